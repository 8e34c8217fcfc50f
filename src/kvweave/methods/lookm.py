"""LOOK-M: text first, and the rest merged (Wan et al., 2406.18139; SPEC 6)."""

from dataclasses import dataclass, replace

from kvweave.methods.merging import MergingMethod
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import choice, real
from kvweave.methods.registry import register
from kvweave.ops import budget as counts
from kvweave.ops.merge import RULES
from kvweave.ops.select import top_and_recent
from kvweave.plan import Plan
from kvweave.view import LayerView


@register("lookm")
@dataclass(frozen=True)
class LookM(MergingMethod):
    """Keeps recent tokens and heavy hitters, text before images; the rest merges into its nearest kept token.

    `text_prior="exact"` keeps exactly the budget; `"union"`, as the authors' code, keeps all text on top of it.
    """

    keeps_by = "attention from all rows, text first"
    merges_by = "nearest kept token"
    source = "2406.18139"

    text_prior: str = choice("exact", "exact", "union", "off", help="text before images, within or beyond the budget")
    merge_rule: str = choice("pivotal", *RULES, help="weights of the members of a merged entry")
    recent_frac: float = real(0.5, lo=0, hi=1, help="share of the budget that is recent tokens")

    uses_modality = True

    @property
    def needs(self) -> Needs:
        union = self.text_prior == "union"
        return replace(super().needs, rows=ALL_ROWS, statistics=(LayerView.column_mass,), alone=union)

    def plan(self, view: LayerView, budget: int) -> Plan:
        mass = view.column_mass()
        score = mass
        if self.text_prior != "off":  # text above every image token
            score = mass + (~view.visual) * mass.amax(-1, keepdim=True)
        recent = min(counts.floor(self.recent_frac * budget), budget - 1)
        keep = top_and_recent(score, budget, recent)
        if self.text_prior != "union":
            return self.merge_into_nearest(view, keep, mass)
        return self.merge_uneven(view, (~view.visual).scatter(-1, keep, True), mass)
