"""Every table and figure that is made: the papers', and our own."""

import difflib

from kvweave.evals.paper import analysis, scores, timing
from kvweave.evals.paper.recipe import Recipe

_BOTH = ("seen", "unseen")
BUDGETS = (0.6, 0.5, 0.35, 0.2, 0.1, 0.05)


def _variants(name: str, *options: str) -> dict[str, str]:
    return {f"{name}:{each}" if each else name: f"{name} {each}".strip() for each in options}


_THETAS = {f"flowmm:theta={theta:g}": f"theta {theta:g}" for theta in (0.1, 0.2, 0.3, 0.4, 0.5)}
_ABLATION = {
    "flowmm": "FlowMM",
    "flowmm:flow=cross": "without information flow",
    "flowmm:sensitivity_quantile=none": "without sensitivity",
    "flowmm:flow=cross,sensitivity_quantile=none": "without both",
}
_ALIGNMENT = {f"flowmm:flow={flow}": flow for flow in ("aligned", "misaligned", "cross", "intra")}
_MERGES = {
    f"lookm:merge_rule={rule},text_prior={prior}": f"{rule}, text prior {'on' if prior == 'exact' else 'off'}"
    for rule in ("pivotal", "average", "weighted")
    for prior in ("exact", "off")
}
_READINGS = (
    _variants(
        "flowmm", "", "theta=0.45", "flow_ratio=balanced,theta=0.45", "proxies=8", "sensitivity_quantile=none",
        "sensitivity_quantile=0.5", "sensitivity_quantile=0.8", "flow=intra", "flow=cross", "flow=misaligned",
        "cross_scope=other_only", "no_target=any", "modality_floor=8", "merge_rule=average", "merge_rule=importance",
        "rope_aware=true", "merge_keys=false", "mass_bias=true",
    )
    | _variants("flashcache", "", "recent=32", "per_head=true")
    | _variants("lookm", "", "text_prior=union", "text_prior=off", "merge_rule=average", "merge_rule=weighted")
    | _variants("meda", "", "causal=true", "recent_frac=0.5")
    | _variants("d2o", "", "var_norm=none", "recent_frac=0.5", "merge_rule=weighted")
    | _variants("kvmerger", "", "variant=threshold", "recent=0", "value_scale=true", "mass_bias=true")
    | _variants("chelsea", "", "mass_bias=true")
    | _variants("cam", "", "mode=expected", "against=largest")
    | _variants("snapkv", "", "window=8", "kernel=1")
    | {"quantized:method=snapkv,bits=4": "snapkv, stored in 4 bits"}
)  # fmt: skip

_ALL = (
    Recipe(
        "flowmm:table1",
        "FlowMM, Table 1: methods by task, 20 % kept",
        "The paper's main result: FlowMM before all other methods on seven tasks of MileBench.",
        scores.by_task,
        budgets=(0.2,),
        protocols=_BOTH,
        printed="table1",
    ),
    Recipe(
        "flowmm:table2",
        "FlowMM, Table 2: decoding time and KV memory by budget",
        "Decoding gets faster and the cache smaller as less is kept.",
        timing.decode_sheet,
        measure=timing.decoding,
        methods={"flowmm": "flowmm"},
        printed="table2",
    ),
    Recipe(
        "flowmm:table3",
        "FlowMM, Table 3: the threshold theta",
        "The paper's scores peak at a theta between 0.2 and 0.3.",
        scores.by_variant,
        methods=_THETAS,
        budgets=(0.2,),
        tasks=("TextNeedleInAHaystack", "ALFRED"),
        printed="table3",
    ),
    Recipe(
        "flowmm:table4",
        "FlowMM, Table 4: what its parts contribute",
        "Without the information flow, without sensitivity, and without both the paper's scores fall.",
        scores.by_variant,
        methods=_ABLATION,
        budgets=(0.2,),
        tasks=("TextNeedleInAHaystack", "Spot-the-Diff", "ALFRED"),
        printed="table4",
    ),
    Recipe(
        "flowmm:fig3",
        "FlowMM, Figure 3: cross-modal flow by layer, and merging that follows it or does the opposite",
        "In the paper flow differs between layers, and merging aligned with it scores above misaligned merging.",
        analysis.flow_sheet,
        measure=analysis.flow,
        methods=_ALIGNMENT,
        budgets=(0.2,),
    ),
    Recipe(
        "flowmm:fig4",
        "FlowMM, Figure 4: score by budget",
        "The paper's methods by share of the cache kept, 5 to 60 %.",
        scores.by_budget,
        budgets=BUDGETS,
        protocols=_BOTH,
        marked=("flowmm", "lookm", "snapkv", "weave"),
    ),
    Recipe(
        "flashcache:latency",
        "FlashCache: what compressing adds to a prefill, by length",
        "FlashCache reads no attention, so the paper finds it cheaper than methods that do.",
        timing.added_sheet,
        measure=timing.added,
    ),
    Recipe(
        "flashcache:budget",
        "FlashCache: score by budget",
        "FlashCache beside the other methods as less is kept.",
        scores.by_budget,
        budgets=BUDGETS,
        protocols=_BOTH,
        marked=("flashcache", "snapkv", "streaming_llm", "random"),
    ),
    Recipe(
        "flashcache:outliers",
        "FlashCache: the outliers that it keeps",
        "Few tokens' keys and values lie far from a low-pass of the sequence; those it keeps.",
        analysis.outlier_sheet,
        measure=analysis.outliers,
    ),
    Recipe(
        "lookm:merges",
        "LOOK-M: three ways to merge, with the text prior and without",
        "The paper finds pivotal merging with the text prior best.",
        scores.by_variant,
        methods=_MERGES,
        budgets=(0.2,),
        protocols=_BOTH,
    ),
    Recipe(
        "lookm:budget",
        "LOOK-M: score by budget",
        "LOOK-M beside the other methods as less is kept.",
        scores.by_budget,
        budgets=BUDGETS,
        protocols=_BOTH,
        marked=("lookm", "meda", "h2o", "streaming_llm"),
    ),
    Recipe(
        "readings",
        "Our readings of the papers, and what the others would give",
        "Where papers leave things open (docs/ERRATA.md): each method as we read it, and read differently.",
        scores.by_variant,
        methods=_READINGS,
        budgets=(0.2,),
    ),
)  # fmt: skip

#: By name.
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def find(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"paper={name!r} is unknown{hint}: allowed is one of {', '.join(RECIPES)}")
    return RECIPES[name]
