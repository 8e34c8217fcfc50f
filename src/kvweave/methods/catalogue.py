"""docs/METHODS.md, written from the registry: `python -m kvweave.methods.catalogue > docs/METHODS.md`."""

import dataclasses
import inspect

from kvweave.methods.base import ANALYSIS, COMMON, Method
from kvweave.methods.merging import MergingMethod
from kvweave.methods.needs import ALL_ROWS
from kvweave.methods.options import Option
from kvweave.methods.registry import list_methods, list_wrappers, method_class
from kvweave.methods.scored import ScoredMethod
from kvweave.methods.wrapping import Wrapper

_HEAD = """# Methods

Written from the registry by `make docs`; do not edit. What a method is and where it departs from its paper is in the
docstring of its file under `src/kvweave/methods/`; open points of the papers are in [ERRATA.md](ERRATA.md).

Every method keeps exactly its budget in each layer, or on average over layers where it allocates. Rows are the last
tokens whose queries it reads. Cost is that of deciding, for each layer and head, with a prompt of L tokens, P rows,
head dimension D and budget B; it is streamed, without an L x L tensor, and merging adds (L - B) x targets x D.
A method that allocates over layers by what it has seen cuts when the prefill ends, so its peak memory is the full
cache; the others cut each layer straight after its attention.
"""

_COMMON = """All take `budget`: a share in (0, 1], tokens as an int, or bytes such as `"256MiB"`; and the options
below. With `defer=k` the prompt stays whole while k tokens are decoded, and a method that scores by attention counts
theirs as well; one that does not (such as flashcache, keydiff or random) simply cuts later. Layer budgets go by
the prompt alone. A reply shorter than k is never cut. Peak memory is the full cache until the cut, or what `coarse`
says."""

_ANALYSIS = """For analysis alone, of every method, is the option below. The tables of results use it where a method
defers: without it the first tokens of an answer come from the full cache."""

_SCORED = """Methods that keep some tokens by force and the best of the others by one score also take the options
below: {}.
Neighbours, maxima and heads' budgets change what is kept, never how much: the entries of all layers and heads add up
to the budget. What reads no attention has no rows or heads to reduce. With `allocation=global` nothing is cut before
the prefill ends; so it is with a profile, unless `mix=0`. Heads of different counts are stored apart."""

_LATENTS = """Models whose heads share one latent a token (MLA: DeepSeek V2 and V3, Kimi K2.5, Mistral 4) are
compressed in those latents: one set of tokens for all heads of a layer, by the mean of the scores of the keys and
values that heads expand from them (`heads_by=max`: the largest). These can: {}.
The others merge entries, turn keys, or give heads tokens or counts of their own; they are refused by name."""

_AROUND = """# Around a method

Not listed among the methods: `fold:method=snapkv,window=8,budget=0.2` lets snapkv decide and goes on from there.
Options that are not the wrapper's own are the method's. One wrapper in another:
`regress:method=[fold:method=h2o],rows=16`, or dictionaries. `budget` and `defer` are shared. Biases (`fold`,
`residual`) need sdpa or eager attention."""


def markdown() -> str:
    """The table of methods, and each one's options."""
    lines = [
        _HEAD,
        "| name | keeps by | merges by | allocates by | reads | cost | cuts | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in list_methods():
        method = method_class(name)()
        cells = [f"[`{name}`](#{name})", method.keeps_by, method.merges_by, method.allocates_by]
        when = "after the prefill" if method.layer_adaptive else "layer by layer"
        lines.append("| " + " | ".join([*cells, reads(method), cost(method), when, source(method)]) + " |")
    for text, names in ((_COMMON, COMMON), (_ANALYSIS, ANALYSIS)):
        lines += ["", text, "", *_table(Method, [option for option in Method.options() if option[0] in names])]
    scored = [name for name in list_methods() if issubclass(method_class(name), ScoredMethod)]
    shared = [option for option in ScoredMethod.options() if option[0] not in COMMON + ANALYSIS]
    lines += ["", _SCORED.format(", ".join(f"`{name}`" for name in scored)), "", *_table(ScoredMethod, shared)]
    sharing = [name for name in list_methods() if not method_class(name)().on_model(lambda: None).needs_heads]
    lines += ["", _LATENTS.format(", ".join(f"`{name}`" for name in sharing))]
    for name in list_methods():
        lines += ["", f"## {name}", "", *_section(method_class(name))]
    lines += ["", _AROUND, ""]
    for name in (name for name in list_wrappers() if issubclass(method_class(name), Wrapper)):
        lines += ["", f"## {name}", "", *_section(method_class(name))]
    return "\n".join(lines) + "\n"


def reads(method: Method) -> str:
    """Whose queries it needs, in words."""
    rows = method.needs.rows
    if rows == ALL_ROWS:
        return "all rows"
    if rows:
        return f"{rows} rows" if rows > 1 else "the last row"
    return "keys and values" if method.cost else "nothing"


def cost(method: Method) -> str:
    """Of deciding, by layer and head."""
    rows = method.needs.rows
    if rows and not method.cost:
        return "L² D" if rows == ALL_ROWS else "P L D"
    return method.cost or "L"


def source(method: Method) -> str:
    """A link to the paper where there is a number."""
    number, _, rest = method.source.partition(",")
    if number.replace(".", "").isdigit():
        return f"[{number}](https://arxiv.org/abs/{number}){',' + rest if rest else ''}"
    return method.source


def _section(cls: type[Method]) -> list[str]:
    text = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    options = [option for option in cls.options() if cls.has_own(option[0])]
    shared = {name for name, _ in MergingMethod.options()} if issubclass(cls, MergingMethod) else set()
    lines = ["\n\n".join(text)]
    return [*lines, "", *_table(cls, sorted(options, key=lambda item: item[0] in shared))] if options else lines


def _table(cls: type[Method], options: list[tuple[str, Option]]) -> list[str]:
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    lines = ["| option | default | allowed | what it does |", "|---|---|---|---|"]
    for name, option in options:
        default = defaults[name]
        if default is dataclasses.MISSING:
            default = getattr(cls, "default_method", "")
        lines.append(f"| `{name}` | {default} | {option.allowed} | {option.help} |")
    return lines


if __name__ == "__main__":
    print(markdown(), end="")
