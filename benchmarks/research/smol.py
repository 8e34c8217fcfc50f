"""Which spelling to use on a real language model: smol-text is asked about texts of some hundred tokens.

    python -m benchmarks.research.smol --count 6

Every prompt is read once for all methods; of a reply all tokens but the first come from the compressed cache
(`redecode`). Results are written sample by sample to `--out`, and what is there is not asked again. Needs
`kvweave lab fetch smol`.
"""

import argparse
import json
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvweave import models
from kvweave.evals.answer.answering import answer, prefill, prepare
from kvweave.evals.scores.metrics import METRICS
from kvweave.evals.tables.intervals import Comparison, compare, estimate
from kvweave.evals.tasks.tasks import Example
from kvweave.evals.tasks.text import TextTask, text_tasks
from kvweave.methods import Method, parse_method
from kvweave.methods.full import Full

LENT = "weave:merge=false,rows_by=max,heads_by=max,ahead=8,recent=8"
TOKENS = {"needle": 24, "reversed": 24, "records": 24, "several": 48, "copy": 48}  # of an answer, at most
TASKS = tuple(TOKENS)
BUDGETS = (0.2, 0.1, 0.05)
KNOWN = 0.7  # score of the full cache where a task counts
#: weave as it comes, without a profile, with equal counts, four decoded tokens, none, and as it came before.
FORMS = (
    "weave",
    "weave:form=lent",
    "weave:form=even",
    "weave:form=lent,defer=4",
    "weave:form=lent,defer=0",
    "weave:form=spelled",
)


@dataclass(frozen=True)
class Question:
    """Methods side by side on the same samples.

    Attributes:
        methods: spellings without budgets; the full cache is asked besides.
        protocol: seen: the question is in the prompt that is cut; unseen: it comes after.
    """

    asks: str
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    protocol: str = "seen"


def _variants(profile: str) -> tuple[str, ...]:
    """Every combination of whom scores are lent to, how budgets are shared out, and whether the cut waits."""
    ways = ("head", "global", f"profile,profile={profile},mix=0.5")
    return tuple(
        f"{LENT},behind={behind},defer={defer},allocation={way}"
        for way in ways
        for defer in (0, 4)
        for behind in (0, 8)
    )


def questions(profile: str) -> dict[str, Question]:
    """What is asked, by name."""
    unseen = ("snapkv", "weave", "weave:form=spelled", "kvzip")
    return {
        "published": Question("What do methods of papers keep?", ("snapkv", "h2o", "flowmm"), BUDGETS),
        "variants": Question(
            "Whom to lend scores to, how to share out budgets, whether to wait?", _variants(profile), (0.1,)
        ),
        "seen": Question("What is kept where the question is in the prompt?", FORMS, BUDGETS),
        "replayed": Question("What does replay keep, the question in the prompt?", ("kvzip",), BUDGETS),
        "unseen": Question("What is kept where the question comes after?", unseen, (0.2, 0.1), "unseen"),
    }


def sets(count: int, rows: int, seed: int, tokens: int) -> Iterator[tuple[list[TextTask], list[Example]]]:
    """`count` samples of each task, so many in a batch, tasks with answers of like length together."""
    tasks = text_tasks(TASKS, count, tokens)
    for most in sorted(set(TOKENS.values())):
        alike = [task for task in tasks if TOKENS[task.name] == most]
        turns = zip(*([(task, one) for one in task.examples(seed)] for task in alike), strict=True)
        pairs = [pair for turn in turns for pair in turn]
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            yield [task for task, _ in part], [one for _, one in part]


def ask(question: Question, model: Any, processor: Any, given: argparse.Namespace) -> None:
    """Append what is not in the file yet."""
    known = {tuple(row["key"]) for row in rows_of(given.out)}
    asked = [("full", 1.0), *((text, budget) for text in question.methods for budget in question.budgets)]
    for tasks, examples in sets(given.count, given.rows, given.seed, given.tokens):
        left = [
            pair for pair in asked
            if any((question.protocol, *pair, example.id) not in known for example in examples)
        ]  # fmt: skip
        if not left:
            continue
        batch, most = prepare(processor, examples, question.protocol), TOKENS[tasks[0].name]
        shared = prefill(model, batch, most)
        for text, budget in left:
            method: Method = Full() if text == "full" else replace(parse_method(text), budget=budget)
            said = answer(model, processor, method, batch, most, shared)
            with given.out.open("a", encoding="utf-8") as file:
                for task, example, one in zip(tasks, examples, said, strict=True):
                    score = METRICS[task.metrics[0]](one.text, example.answer, example.choices)
                    row = {
                        "key": [question.protocol, text, budget, example.id],
                        "task": task.name,
                        "score": score,
                        "text": one.text,
                    }
                    file.write(json.dumps(row) + "\n")
            spent = resource.getrusage(resource.RUSAGE_SELF)
            print(f"{spent.ru_utime + spent.ru_stime:.0f} s {text} {budget} {examples[0].id}", file=sys.stderr)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was written so far, each sample once: several processes may write to one file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return list({tuple(row["key"]): row for row in map(json.loads, lines)}.values())


Scores = dict[str, dict[str, float]]  # by task and sample


def scores_of(rows: Sequence[dict[str, Any]], protocol: str) -> dict[tuple[str, float], Scores]:
    """By method and budget."""
    found: dict[tuple[str, float], Scores] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        asked, text, budget, sample = row["key"]
        if asked == protocol:
            found[text, budget][row["task"]][sample] = row["score"]
    return found


def table(question: Question, rows: Sequence[dict[str, Any]]) -> str:
    """By method and budget: the mean over tasks and what it is above snapkv's, with 95 % intervals; the share of the
    full cache's score that is kept, at most 1 a task, over tasks where that has `KNOWN`; each task's."""
    found = scores_of(rows, question.protocol)
    lines = [
        ["method", "budget", "n", "mean", "minus snapkv", "of full", *TASKS],
        ["---", *["--:"] * (5 + len(TASKS))],
    ]
    full = {task: sum(found["full", 1.0][task].values()) / len(found["full", 1.0][task]) for task in TASKS}
    asked = [("full", 1.0), *((text, budget) for budget in question.budgets for text in question.methods)]
    for text, budget in (pair for pair in asked if pair in found):
        by_task = {task: list(found[text, budget][task].values()) for task in TASKS if found[text, budget][task]}
        whole = estimate(list(by_task.values()))
        assert whole is not None
        base = found.get(("snapkv", budget), {})
        against = compare(found[text, budget], base) if set(by_task) <= set(base) and text != "snapkv" else None
        lines.append(
            [
                f"`{text}`",
                f"{100 * budget:g} %",
                str(sum(map(len, by_task.values()))),
                f"{whole.mean:.2f} [{whole.low:.2f}, {whole.high:.2f}]",
                _signed(against),
                f"{_kept(by_task, full):.2f}",
                *(f"{sum(by_task[task]) / len(by_task[task]):.2f}" if task in by_task else "-" for task in TASKS),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def effects(rows: Sequence[dict[str, Any]], profile: str) -> str:
    """What one option is worth at 10 %, the mean over all combinations of the others, sample by sample."""
    found = scores_of(rows, "seen")
    asked = {
        "`behind=8` against 0": ("behind=8", "behind=0"),
        "`defer=4` against 0": ("defer=4", "defer=0"),
        "`allocation=global` against head": ("allocation=global", "allocation=head"),
        "`allocation=profile` against head": ("allocation=profile", "allocation=head"),
        "`allocation=profile` against global": ("allocation=profile", "allocation=global"),
    }
    lines = [["option", "difference"], ["---", "--:"]]
    for name, sides in asked.items():
        one, other = (_mean([found[text, 0.1] for text in _variants(profile) if side in text]) for side in sides)
        lines.append([name, _signed(compare(one, other))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(methods: Sequence[Scores]) -> Scores:
    """Means over methods of each sample that all of them answered."""
    return {
        task: {
            sample: sum(scores[task][sample] for scores in methods) / len(methods)
            for sample in first
            if all(sample in scores.get(task, {}) for scores in methods)
        }
        for task, first in methods[0].items()
    }


def _kept(by_task: dict[str, list[float]], full: dict[str, float]) -> float:
    """The share of the full cache's score, the mean over tasks that it can do."""
    shares = [
        min(1.0, sum(by_task[task]) / len(by_task[task]) / full[task]) for task in by_task if full[task] >= KNOWN
    ]
    return sum(shares) / len(shares)


def _signed(found: Comparison | None) -> str:
    return "" if found is None else f"{found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(questions("")), help="questions, separated by commas")
    parser.add_argument("--count", type=int, default=6, help="samples a task")
    parser.add_argument("--rows", type=int, default=9, help="prompts in a batch")
    parser.add_argument("--tokens", type=int, default=450, help="of a text, about")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--profile", default="smol-text", help="a shipped profile, or a file")
    parser.add_argument("--out", type=Path, default=Path("out/research/smol.jsonl"))
    parser.add_argument("--tables", action="store_true", help="of what is there; nothing is asked")
    given = parser.parse_args(arguments)
    all_questions = questions(given.profile)
    for name in (names := given.only.split(",")):
        if name not in all_questions:
            parser.error(f"only={name!r} is unknown: allowed is one of {', '.join(all_questions)}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if not given.tables:
        torch.set_num_threads(1)
        model, processor = models.load("smol-text", dtype=given.dtype)
        for name in names:
            ask(all_questions[name], model, processor, given)
    for name in names:
        print(f"\n**{name}: {all_questions[name].asks}**\n\n{table(all_questions[name], rows_of(given.out))}")
        if name == "variants":
            print(f"\n{effects(rows_of(given.out), given.profile)}")


if __name__ == "__main__":
    main()
