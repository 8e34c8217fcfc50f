"""Weave: the queries that count, and two ways to keep what they look at (SPEC 13.3, 17.7).

FlowMM's proxies and sensitivity (2511.05534) taken further by known ideas: queries of decoded tokens (Lookahead
Q-Cache, 2505.20334; SpecKV, 2506.08373), probes (KVzip, 2505.23416), a merged entry's mass on its logit, and budgets
that belong to a model's heads (KVzip; HeadKV, 2410.19258; DuoAttention, 2410.10819).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvweave.methods.allocation import Quota
from kvweave.methods.base import Method
from kvweave.methods.kvzip import surprise_option
from kvweave.methods.merging import MergingMethod
from kvweave.methods.needs import ALL_ROWS, Needs
from kvweave.methods.options import choice, flag, integer, real
from kvweave.methods.peak import peak_score
from kvweave.methods.registry import register
from kvweave.methods.scored import ScoredMethod, Scores, Selection, forced_tokens
from kvweave.ops.match import nearest_of_few
from kvweave.ops.merge import RULES
from kvweave.ops.select import complement, first, last, lowest, lowest_of, top
from kvweave.plan import Plan
from kvweave.view import LayerView

_FREE = {"budget", "redecode", "form", "coarse"}  # options that leave the form open
#: Other defaults, by the name of a form.
FORMS: dict[str, dict[str, Any]] = {
    "lent": {
        "merge": False,
        "mass_bias": False,
        "rows_by": "max",
        "heads_by": "max",
        "ahead": 64,  # a reply that quotes goes on where its eighth token looks
        "fade": 0.9,
        "recent": 1,  # of few entries those are dear that every head keeps by force: who wants a token scores it
        "sinks": 1,
        "defer": 8,
        "temperature": 1.0,  # what the prompt's own rows look at counts only where none is decoded
        "replay": True,
        "allocation": "global",
        "reach": 64,  # heads that look farther back want the entries
    }
}
FORMS["even"] = FORMS["lent"] | {"allocation": "head"}
#: Where a profile is shipped for the model: it was fitted to what these very scores lose, and says it all.
BY_PROFILE: dict[str, Any] = {"allocation": "profile", "mix": 0.0}
#: Of a prompt that was read again: every token of it has been looked at itself, by the heads that want it.
READ_AGAIN: dict[str, Any] = {"ahead": 0, "fade": 1.0, "sinks": 0, "recent": 0, "reach": 0}
#: Last rows of the prompt that tell how far heads look back.
FAR_ROWS = 256


@register("weave")
@dataclass(frozen=True)
class Weave(MergingMethod, ScoredMethod):
    """Keeps what the first decoded tokens attend to, on a model; or merges the rest into the least important of it.

    On a model, `weave` with nothing but a budget is `form=lent`: the prompt stays whole while eight tokens are
    decoded. The largest attention that any of them pays, from any head, is lent to the 64 tokens behind what it looks
    at, a tenth less to each next one: a name is looked up, and its value follows. The first token and the last stay
    in every head, and the first lends nothing. Entries go to the heads that look far back: those of all layers
    compete by what the prompt's own last rows pay to what lies 64 tokens before them or farther. Where a profile is
    shipped for the model, or given (`weave:profile=FILE`, made by `kvweave calibrate --fit`), each head has what it
    says, which was fitted to what cuts cost. Nothing is merged.
    Where the prompt is frozen, or asked about, before any reply (`CompressedCache.question`), or probes are named, it
    is read again instead, and the largest attention paid meanwhile counts, as `kvzip` has it: nothing is lent then.
    The report says what it came to (`works_as`). `form=even` is the same with equally many entries in each head, for
    engines that hold equal counts and add no biases; `form=lent,recent=16` changes what is spelled.

    Without a model (`kvweave.compress_tensors`), and wherever another option is spelled, it is SPEC 13.3, with the
    defaults below; `form=spelled` is that on a model, all defaults. `Weave(0.2).defer` and the others tell what it
    does on one. The prompt stays whole for `defer` tokens, whose attention is counted beside that of the prompt's
    last rows; with probes, the attention of their answers and the largest of the prompt's own is counted instead.
    Important pivots are never blurred; the others take up everything else, and weigh in decoding as many tokens as
    they stand for.
    """

    keeps_by = "attention from the first decoded tokens and the last rows"
    merges_by = "nearest of the least important pivots, mass kept"
    source = "ours, on 2511.05534 and 2505.20334"
    attention_like = True

    form: str = choice(
        "auto",
        "auto",
        "spelled",
        *FORMS,
        help="auto: as lent on a model, where nothing but a budget is spelled, else as spelled; lent, even: other "
        "defaults for what is not spelled",
    )
    defer: int = integer(2, minimum=0, help="tokens decoded from the whole prompt before it is cut, which count too")
    proxies: int = integer(32, minimum=1, help="last rows of the prompt whose attention counts")
    recent: int = integer(32, minimum=0, help="last tokens that stay unmerged, at most half of the budget")
    sinks: int = integer(0, minimum=0, help="first tokens that stay unmerged, at most half of what recent ones leave")
    sensitivity_quantile: float | None = real(
        0.35, lo=0, hi=1, optional=True, help="share of the pivots, least important first, that may absorb others"
    )
    cross_scope: str = choice("any", "any", "other_only", help="modalities that a token may merge into")
    merge_rule: str = choice("average", *RULES, help="weights of the members of a merged entry")
    mass_bias: bool = flag(True, help="decode adds log(mass) to a merged entry's logit")
    merge: bool = flag(True, help="merge what is not kept; false: evict it, to see what merging is worth")
    temperature: float | None = real(
        None,
        lo=1,
        hi=math.inf,
        open_hi=True,
        optional=True,
        help="softens the decoded tokens' attention, which then counts alone; None: mixed with the last rows'",
    )

    reach: int = integer(
        0,
        minimum=0,
        help="layer, global: heads compete by the most that the prompt's last 256 rows pay to what lies so many "
        "tokens back, or a quarter of the prompt; 0: by the scores",
    )
    replay: bool = flag(False, help="read the prompt again where it is cut before a reply has begun, without probes")
    surprise: float = surprise_option()
    _explicit: ClassVar[frozenset[str]] = frozenset()  # options that were spelled

    def __new__(cls, *args: Any, **options: Any) -> "Weave":
        method = super().__new__(cls)
        object.__setattr__(method, "_explicit", frozenset(options))  # `lent` and `even` change what was not
        return method

    def __post_init__(self) -> None:
        self._settle_form()
        super().__post_init__()
        if self.cross_scope == "other_only" and self.allocation != "head":
            raise ValueError(
                f"cross_scope='other_only' is not allowed with allocation={self.allocation!r}: allowed is 'any'"
            )
        if self.temperature is not None and not self.defer:
            raise ValueError(
                f"temperature={self.temperature} is not allowed with defer=0: no token is decoded before the cut; "
                "allowed is defer >= 1"
            )

    def _settle_form(self) -> None:
        """Options take what their form says; from then on it is "auto", left to a model, or "spelled"."""
        explicit, form, lent = self._explicit, self.form, FORMS["lent"]
        by_own = self.profile is not None and "allocation" not in explicit
        if by_own and (form == "lent" or (form == "auto" and explicit <= _FREE | {"profile"})):
            form, lent = "lent", lent | BY_PROFILE
        is_open = form == "auto" and ("form" in explicit or explicit <= _FREE) and (self._is({}) or self._is(lent))
        if is_open:
            values = {name: value for name, value in lent.items() if name not in explicit & _FREE}
        elif form == "auto" and explicit >= {"form", *lent}:  # one that was left to a model, with a change
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            values = {name: defaults[name] for name, value in lent.items() if getattr(self, name) == value}
        else:
            others = lent if form == "lent" else FORMS.get(form, {})
            late = () if self.defer else ("temperature", "replay")
            values = {name: value for name, value in others.items() if name not in explicit and name not in late}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "form", "auto" if is_open else "spelled")

    def _is(self, form: dict[str, Any]) -> bool:
        """All options but those that leave the form open are as it has them, or else the defaults."""
        own = (field for field in dataclasses.fields(self) if field.name not in _FREE)
        return all(getattr(self, field.name) == form.get(field.name, field.default) for field in own)

    @property
    def without_model(self) -> "Weave":
        if self.form != "auto":
            return self
        return Weave(self.budget, form="spelled", redecode=self.redecode, coarse=self.coarse)

    def on_model(self, profile: Callable[[], str | None]) -> Method:
        if self.form != "auto":
            return super().on_model(profile)
        mark = profile()
        shares: dict[str, Any] = {} if mark is None else BY_PROFILE | {"profile": mark}
        return replace(self, form="spelled", **shares)

    @property
    def coarse_cut(self) -> Method | None:
        evicting = replace(self, form="spelled", merge=False, temperature=None)
        return super(Weave, evicting).coarse_cut

    @property
    def when_probed(self) -> "Weave":
        if not self.replay:
            return self
        pooled = self.allocation in ("global", "profile")  # a profile is of what decoded tokens look at
        again: dict[str, Any] = READ_AGAIN | ({"allocation": "global", "profile": None} if pooled else {})
        return replace(self, **again)

    def spelling(self) -> str:
        """By the form that leaves the fewest options to be said."""
        if self.form == "auto":
            return super(Weave, self.without_model).spelling().replace(",form=spelled", "")
        text = super().spelling()
        spelled = [text if self._is({}) else text.replace(",form=spelled", "")]
        for name, defaults in FORMS.items():
            form = Weave(self.budget, form=name, defer=self.defer)
            names = (field.name for field in dataclasses.fields(self) if field.name not in ("budget", "form"))
            changed = {n: getattr(self, n) for n in names if getattr(self, n) != getattr(form, n)}
            if self.defer != defaults["defer"]:
                changed["defer"] = self.defer
            if Weave(self.budget, form=name, **changed) == self:
                options = {"budget": self.budget, "form": name} | changed
                spelled.append(f"{self.address()}:" + ",".join(f"{key}={value}" for key, value in options.items()))
        return min(spelled, key=len)

    @property
    def kl_factor(self) -> float | None:
        """Ten, where nothing merges, as was measured on the lab model (docs/RESEARCH.md)."""
        return 10.0 if self.form == "auto" or (self.defer and not self.merge) else None

    @property
    def needs_heads(self) -> str:
        return super().needs_heads if self.merge else super(MergingMethod, self).needs_heads

    @property
    def needs(self) -> Needs:
        return replace(
            super().needs,
            rows=max(self.proxies, FAR_ROWS) if self._looks_far else self.proxies,
            statistics=(self.far,) if self._looks_far else (),
            probed_rows=ALL_ROWS,
            probed_decoded=(("mean", self.heads_by),),
            temperature=self.temperature or 1.0,
            by_slot=True,
            replay=self.replay and not self.defer,
            unasked=self.replay and not self.coarse,  # what went by then cannot be looked at again
            images=self.replay,
            surprise=self.surprise,
        )

    @property
    def uses_modality(self) -> bool:
        return self.cross_scope != "any"

    def prepare(self, view: LayerView, budget: int) -> None:
        if self.temperature is None or view.probed or self.coarse:
            super().prepare(view, budget)
        else:
            self.needs.compute(view)
            view.hold_rows(self.proxies)  # what they look at is asked for only where nothing is decoded

    def plan(self, view: LayerView, budget: int) -> Plan:
        if self.allocation != "head" or view.empty is not None:
            return self.uneven_plan(view, self.selection(view, budget))
        quota = self.quota(budget, budget)
        score = self.ranking(view, quota).value  # [batch, kv_heads, length]
        pivots, parts = top(score[..., quota.sinks : view.length - quota.recent], quota.free), []
        if quota.sinks:
            pivots, parts = pivots + quota.sinks, [first(score, quota.sinks)]
        keep = torch.cat([*parts, pivots, last(score, quota.recent)], -1)
        if not self.merge:
            return Plan(keep)
        source = complement(keep, view.length)
        eligible = lowest(score.gather(-1, pivots), self.sensitivity_quantile)
        target, cosine = self.match(view, pivots, eligible, source)
        if quota.sinks:  # by what stays, of which the first tokens come first
            target = target.where(target < 0, target + quota.sinks)
        plan = self.merged(view, keep, source, target, cosine, score)
        return replace(plan, log=_log(plan, eligible, view))

    def plan_heads(self, view: LayerView, counts: tuple[int, ...]) -> Plan:
        return self.uneven_plan(view, self.selection(view, counts))

    def uneven_plan(self, view: LayerView, selection: Selection) -> Plan:
        """The plan where heads keep different counts."""
        if not self.merge:
            return self.evicting(view, selection)
        score, kept = selection.scores.value, selection.kept
        pivots = kept & ~selection.forced
        eligible = lowest_of(score, pivots, self.sensitivity_quantile)
        plan = self.merge_uneven(view, kept, score, eligible)
        return replace(plan, log=_log(plan, pivots & eligible, view))

    def score(self, view: LayerView, quota: Quota | None = None) -> Tensor:
        """What a token is worth: [batch, kv_heads, length]. First tokens that stay by force lend nothing to others:
        what attention they get is not for what they say."""
        score = self.attention(view)
        sinks = 0 if quota is None else quota.sinks
        if not sinks or not self.lends:
            return score
        if view.empty is None:
            return F.pad(score[..., sinks:], (sinks, 0))
        forced, _ = forced_tokens(view, Quota(sinks, sinks))
        return score.masked_fill(forced, 0)

    @property
    def _looks_far(self) -> bool:
        return self.reach > 0 and (self.pools or self.allocation == "layer")

    def far(self, view: LayerView) -> Tensor:
        """Attention that reaches far back: [batch, kv_heads, length]."""
        return view.far_attention(FAR_ROWS, self.reach)

    def rivals(self, view: LayerView, quota: Quota, scores: Scores | None = None) -> Scores:
        if not self._looks_far or view.probed:
            return super().rivals(view, quota, scores)
        if view.queries is not None:  # they may be gone when it is planned, by the scores
            self.prepare(view, view.mean_budget)
        far = Scores(self.far(view))
        return far if view.stored is None else far.shared("max")

    def attention(self, view: LayerView) -> Tensor:
        """Attention that tokens received, as the options reduce it: [batch, kv_heads, length]."""
        decoded = view.decoded_attention(self.rows_by, self.heads_by)
        if view.probed:
            return decoded if self.replay and decoded is not None else peak_score(view, "max", self.heads_by)
        if self.temperature is not None and decoded is not None:
            return decoded
        return view.window_attention(self.proxies, rows_by=self.rows_by, heads_by=self.heads_by)

    def match(self, view: LayerView, pivots: Tensor, eligible: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest eligible pivot of each source, index into `pivots` or -1, and its cosine."""
        allowed = eligible[:, :, None]  # [batch, kv_heads, labels, pivots]
        labels = torch.zeros_like(source)
        if self.cross_scope == "other_only":
            label = torch.tensor([False, True], device=pivots.device)[:, None]  # a source is text or visual
            allowed = allowed & (view.visual.gather(-1, pivots)[:, :, None] != label)
            labels = view.visual.gather(-1, source).long()
        most = int(eligible.sum(-1).max())
        return nearest_of_few(view.keys, source, pivots, allowed, labels, most)


def _log(plan: Plan, eligible: Tensor, view: LayerView) -> dict[str, Tensor]:
    """For the report, [batch] each: the heaviest entry, the share of tokens merged, protected pivots a head."""
    assert plan.merge is not None
    ours = (plan.merge.target >= 0).sum(-1), (~eligible).sum(-1), plan.merge.mass.amax(-1)
    merged, protected, heaviest = view.over_heads(torch.stack([x.double() for x in ours], -1)).unbind(-1)
    return {
        "heaviest_mass": heaviest.amax(1),
        "merged_share": merged.mean(1) / view.length,
        "protected_pivots": protected.mean(1),
    }
