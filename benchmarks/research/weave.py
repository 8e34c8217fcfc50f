"""What weave's parts are worth on the lab's questions: the figures that docs/RESEARCH.md quotes (resumes).

python -m benchmarks.research.weave --only parts --count 60

Every answer token behind the first comes from the compressed cache (`redecode`). Short answers are the lab's five
families, right or wrong; long ones list what is in a picture, by ROUGE-L. Seeds were used for nothing else.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmarks.research.ideas  # noqa: F401  registers them, to be named with their module
from kvweave import lab
from kvweave.evals import Evaluation, lab_tasks, run, summarise
from kvweave.evals.run.store import read_json, write_json, write_text
from kvweave.methods import parse_method
from kvweave.methods.registry import method_class

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LENGTHS = {"short": lab.TASKS, "long": lab.AUXILIARY}

#: Weave with the attention of four decoded tokens, softened, in scores, weights and biases.
SOFT = "weave:defer=4,temperature=2,recent=1,merge_rule=importance,mass_kind=entropy"
SOFT_2 = "weave:defer=2,temperature=3,recent=2,merge_rule=importance,mass_kind=entropy"


@dataclass(frozen=True)
class Question:
    """Methods side by side on the same samples.

    Attributes:
        asks: in words.
        methods: name in the table -> spelling; the first is what the others are compared with.
        count: samples of each family.
    """

    asks: str
    methods: dict[str, str]
    budgets: tuple[float, ...]
    count: int
    seed: int


QUESTIONS = {
    "marks": Question(
        "Does softened attention beat weave's defaults, and merging never cost?",
        {
            "weave": "weave:form=spelled",
            "soft, 4 tokens": SOFT,
            "soft, 4 tokens, nothing merged": f"{SOFT},merge=false",
            "soft, 2 tokens": SOFT_2,
            "soft, 2 tokens, nothing merged": f"{SOFT_2},merge=false",
        },
        (0.2, 0.1, 0.05),
        150,
        7001,
    ),
    "parts": Question(
        "Which part gains what?",
        {
            "soft": SOFT,
            "1 decoded token": f"{SOFT},defer=1",
            "2 decoded tokens": f"{SOFT},defer=2",
            "temperature 1": f"{SOFT},temperature=1",
            "temperature 4": f"{SOFT},temperature=4",
            "not softened, last rows mixed in": f"{SOFT},temperature=none",
            "8 recent": f"{SOFT},recent=8",
            "32 recent": f"{SOFT},recent=32",
            "plain averages, bias log(mass)": f"{SOFT},merge_rule=average",
            "bias log(mass)": f"{SOFT},mass_kind=count",
            "no bias": f"{SOFT},mass_bias=false",
            "quantile 0.1": f"{SOFT},sensitivity_quantile=0.1",
            "quantile 0.8": f"{SOFT},sensitivity_quantile=0.8",
            "every pivot a target": f"{SOFT},sensitivity_quantile=none",
            "rope_aware": f"{SOFT},rope_aware=true",
            "only into the other modality": f"{SOFT},cross_scope=other_only",
        },
        (0.1, 0.05),
        60,
        7002,
    ),
    "ideas": Question(
        "Do other ways to choose, to share out and to match help?",
        {
            "soft": SOFT,
            "chosen by output error": SOFT.replace("weave", "benchmarks.research.ideas.output_error"),
            "targets chosen by covering": SOFT.replace("weave", "benchmarks.research.ideas.covering"),
            "budgets pooled over heads": SOFT.replace("weave", "benchmarks.research.ideas.pooled_heads"),
            "merged within a modality": SOFT.replace("weave", "benchmarks.research.ideas.same_modality"),
        },
        (0.1, 0.05),
        60,
        7003,
    ),
}


def spelled(text: str) -> str:
    """A spelling in which a later option replaces an earlier one, for analysis if a cut is deferred."""
    name, _, rest = text.partition(":")
    options = dict(item.split("=") for item in filter(None, rest.split(",")))
    if int(options.get("defer", method_class(name).defer)):
        options["redecode"] = "true"
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in options.items())


def answer(question: Question, count: int, length: str, out: Path, workers: int) -> dict[str, Any]:
    """Evaluate one question on short or on long answers."""
    methods = tuple(parse_method(spelled(text)) for text in question.methods.values())
    tasks = lab_tasks(LENGTHS[length], count)
    evaluation = Evaluation("lab", tasks, methods, question.budgets, (question.seed,), fidelity=False)
    results = run(evaluation, out, workers=workers, progress=_tell)
    labels = evaluation.labels[1:]
    found = summarise(evaluation, results, baseline=labels[0])
    names = dict(zip(labels, question.methods, strict=True))
    return {
        "samples": count * len(tasks),
        "methods": {name: label for label, name in names.items()},
        "unequal": found["unequal"],
        "rows": [_row(mean, names.get(mean["method"], mean["method"])) for mean in found["means"]],
        "differences": [_row(test, names[test["method"]]) for test in found["tests"]],
        "seconds": round(sum(result["seconds"] for result in results)),
    }


def _row(numbers: dict[str, Any], name: str) -> dict[str, Any]:
    kept = ("budget", "score", "difference", "low", "high", "p")
    return {"method": name, **{key: numbers[key] for key in kept if key in numbers}}


def _tell(result: dict[str, Any], done: int, total: int, read: bool) -> None:
    if sys.stderr.isatty() and not read:
        print(
            f"{done}/{total} {result['cell']['method']} {result['cell']['budget']} {result['cell']['task']}",
            file=sys.stderr,
        )


def markdown(data: dict[str, Any]) -> str:
    """All questions' tables."""
    parts = ["\n".join(f"- {line}" for line in data["about"])]
    for name, found in data["questions"].items():
        parts += [f"**{name}: {found['asks']}** ({found['count']} samples a family, seed {found['seed']})"]
        parts += [table(found)]
        spellings = "\n".join(f"- {label}: `{text}`" for label, text in found["long"]["methods"].items())
        parts += [spellings]
    return "\n\n".join(parts) + "\n"


def table(found: dict[str, Any]) -> str:
    """One question: short and long answers by budget, with 95 % intervals."""
    budgets = found["budgets"]
    columns = [(length, budget) for length in LENGTHS for budget in budgets]
    cells = {
        (row["method"], length, row["budget"]): f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        for length in LENGTHS
        for row in found[length]["rows"]
    }
    head = ["method", *(f"{length}, {100 * budget:g} %" for length, budget in columns)]
    lines = [head, ["---"] + ["--:"] * len(columns)]
    lines += [
        ["full cache", *(cells["full", length, 1.0] for length, _ in columns)],
        *([name, *(cells[name, *column] for column in columns)] for name in found["long"]["methods"]),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"questions, separated by commas, of {', '.join(QUESTIONS)}; default all")
    parser.add_argument("--count", type=int, help="samples a family, fewer or more than usual")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "research", help="folder of unfinished results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of research.json and research.md")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args(arguments)
    asked = given.only.split(",") if given.only else list(QUESTIONS)
    for name in asked:
        if name not in QUESTIONS:
            parser.error(f"only={name!r} is unknown: allowed is one of {', '.join(QUESTIONS)}")
    start, path = time.perf_counter(), given.results / "research.json"
    data = read_json(path) if path.exists() else {"questions": {}}
    for name in asked:
        question = QUESTIONS[name]
        count = given.count or question.count
        found = {
            length: answer(question, count, length, given.out / name / f"{count}-{length}", given.workers)
            for length in LENGTHS
        }
        command = shlex.join(["python", "-m", "benchmarks.research.weave", "--only", name, "--count", str(count)])
        data["questions"][name] = {
            "asks": question.asks, "command": command, "count": count, "seed": question.seed,
            "budgets": list(question.budgets), **found,
        }  # fmt: skip
        data["about"] = [
            "Command: `python -m benchmarks.research.weave`",
            "Every answer token behind the first is decoded from the compressed cache; question seen; 8 images.",
            "Short: five families, exact match, their mean. Long: what is in a picture, ROUGE-L. 95 % intervals.",
        ]
        write_json(path, data)
        write_text(path.with_suffix(".md"), markdown(data))
        print(f"\n{table(data['questions'][name])}\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
