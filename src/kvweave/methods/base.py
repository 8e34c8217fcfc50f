"""What every method is: a frozen dataclass of options that plans one layer at a time."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvweave.methods.needs import Needs
from kvweave.methods.options import Option, flag, integer, real
from kvweave.ops.budget import Budget, check_budget, entries, kl_target, warn_of_one
from kvweave.ops.quantize import Quantization
from kvweave.plan import Plan
from kvweave.view import LayerView

#: Options that every method takes beside its budget.
COMMON = ("defer", "defer_weight")
#: Those that are for analysis alone; none changes what a method keeps.
ANALYSIS = ("redecode",)
#: Members that `Method.needs` has taken the place of.
_NOW_NEEDS = (
    *("query_rows", "probed_rows", "turns_keys", "plans_rows_alone", "decoded_reductions", "decoded_temperature"),
    *("keeps_rows", "projects_values", "replays"),
)


@dataclass(frozen=True)
class Method:
    """Base of all methods; subclasses are frozen dataclasses registered under a name.

    Attributes:
        budget: entries that stay in each layer: a share of the prompt in (0, 1], tokens as an int, or bytes of
            keys and values over all layers and the whole batch, such as "256MiB"; or what it may cost, such as
            "auto:kl=0.05": on a model, the smallest whose estimated mean KL from the full cache's own next tokens, in
            nats, stays under 0.05.
        defer: cut only when that many tokens have been decoded (SPEC 13.1). Methods that score by attention count
            theirs, others simply cut later. A reply that is shorter is never cut. The idea is that of Lookahead
            Q-Cache (2505.20334) and SpecKV (2506.08373).
        defer_weight: of those tokens' attention against that of the prompt's rows.
        redecode: for analysis: the tokens are drafted, taken back after the cut and decoded again, so that every
            token behind the first comes from the compressed cache.
    """

    budget: Budget = 0.2
    _: dataclasses.KW_ONLY
    defer: int = integer(0, minimum=0, help="tokens decoded from the whole prompt before it is cut, which count too")
    defer_weight: float | None = real(
        None,
        lo=0,
        hi=1,
        open_hi=True,
        optional=True,
        help="their weight against the prompt's rows; None: k / (k + 4)",
    )
    redecode: bool = flag(False, help="analysis: take those tokens back after the cut and decode them again")

    name: ClassVar[str] = ""
    #: For the table of methods: what it keeps by, merges by, allocates by, and where it was published.
    keeps_by: ClassVar[str] = ""
    merges_by: ClassVar[str] = "-"
    allocates_by: ClassVar[str] = "-"
    source: ClassVar[str] = ""
    #: What deciding costs, by layer and head, where rows x length x dim does not say it.
    cost: ClassVar[str] = ""
    #: Its options are those of many methods, and documented once.
    shares_options: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in _NOW_NEEDS:
            if name in vars(cls):
                raise TypeError(
                    f"{cls.__name__}.{name} is read no more: allowed is needs = Needs(...), see Method.needs"
                )

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget(self.budget))
        warn_of_one(self.budget)
        for field, option in self.options():
            value = getattr(self, field)
            if not option.check(value):
                raise ValueError(option.refusal(field, value, self.name))
        if kl_target(self.budget) is not None and (self.redecode or self.kl_factor is None):
            why = "redecode=True" if self.redecode else f"method={self.name}, which has no estimate of what it costs"
            raise ValueError(
                f"budget={self.budget!r} is not allowed with {why}: allowed is a number, or weave as it comes"
            )
        if self.redecode and not self.defer:
            raise ValueError("redecode=True is not allowed with defer=0: nothing is drafted; allowed is defer >= 1")

    @classmethod
    def build(cls, **options: Any) -> "Method":
        """The method with options as a dictionary or the command line gives them."""
        return cls(**options)

    @classmethod
    def takes(cls, values: dict[str, Any]) -> dict[str, Option]:
        """The options that may be given beside `values`, the budget not among them."""
        return dict(cls.options())

    @classmethod
    def options(cls) -> list[tuple[str, Option]]:
        """Names and descriptions of the method's options, its own first, then those that all methods take."""
        pairs = [(f.name, f.metadata["option"]) for f in dataclasses.fields(cls) if "option" in f.metadata]
        every = COMMON + ANALYSIS
        shared = [option for option in pairs if not cls.has_own(option[0]) and option[0] not in every]
        common = [option for option in pairs if option[0] in every]
        return [*(option for option in pairs if option not in [*shared, *common]), *shared, *common]

    @classmethod
    def has_own(cls, option: str) -> bool:
        """Not an option that every method takes, or one with a default of its own."""
        shared = [base for base in cls.__mro__[1:] if base.__dict__.get("shares_options") and hasattr(base, option)]
        return not shared or getattr(cls, option) != getattr(shared[0], option)

    def on_model(self, profile: Callable[[], str | None]) -> "Method":
        """The method as it works on a model: itself, or what its options leave to the model.

        Args:
            profile: gives the name of the profile that is shipped for this model, None if there is none.
        """
        return self

    @property
    def when_probed(self) -> "Method":
        """The method as it works where probes were answered, or the prompt was read again: itself, or another."""
        return self

    @property
    def kl_factor(self) -> float | None:
        """By how much the KL over the next tokens may exceed that over those which the cut waited for; None: unknown.

        With it the budget may be found by what it costs (`kvweave.seam.foresight`).
        """
        return None

    def searching(self) -> "Method":
        """The method as it works while its budget is not found: it waits for tokens, and holds their attention."""
        if kl_target(self.budget) is None:
            return self
        return dataclasses.replace(self, budget=0.5)

    @property
    def without_model(self) -> "Method":
        """The method as `compress_tensors` runs it: what its options leave to a model, without one."""
        return self

    def weight_of(self, rows: Tensor) -> Tensor:
        """Weight of the attention of that many decoded tokens against the prompt's own rows' (SPEC 13.1)."""
        return rows / (rows + 4) if self.defer_weight is None else torch.full_like(rows, self.defer_weight)

    @property
    def needs(self) -> Needs:
        """What it needs beside keys and values: a class attribute, or a property where options decide."""
        return Needs()

    @property
    def needs_heads(self) -> str:
        """Why heads cannot be held to one set of tokens, as those of MLA must be; empty: they can."""
        return f"method={self.name} decides for each head by itself"

    @property
    def layer_adaptive(self) -> bool:
        """Layer budgets depend on all layers' statistics: nothing is cut before the prefill ends."""
        return False

    @property
    def uses_modality(self) -> bool:
        """The plan depends on which tokens are visual."""
        return False

    @property
    def biases_logits(self) -> bool:
        """Decoding adds a bias to the logits."""
        return False

    @property
    def storage(self) -> Quantization | None:
        """How what is kept is stored; None: in the dtype of the cache."""
        return None

    @property
    def profiles(self) -> tuple[str, ...]:
        """Files with shares by head that it goes by; they belong to one model each."""
        return ()

    @property
    def pools(self) -> bool:
        """Layer-adaptive methods: counts by head depend on scores of all layers, those of decoded tokens included."""
        return False

    def prepare(self, view: LayerView, budget: int) -> None:
        """Compute all statistics that `plan` will need, so that queries can be released.

        Args:
            budget: mean entries of a layer; less than `view.length`.
        """
        self.needs.compute(view)

    def plan(self, view: LayerView, budget: int) -> Plan:
        """Decide for rows of one layer; `budget` < `view.length` entries stay in each KV head."""
        raise TypeError(f"{type(self).__name__} does not define plan(view, budget)")

    def plan_heads(self, view: LayerView, counts: tuple[int, ...]) -> Plan:
        """As `plan`, where `allocate` or `layer_budgets` gave a count for each KV head."""
        raise TypeError(f"{type(self).__name__} does not define plan_heads(view, counts)")

    def layer_budgets(self, budget: int, length: int, layers: int) -> list[Any]:
        """Entries of each layer where `budget` is their mean, known before any layer is seen; an int or one a KV
        head."""
        return [budget] * layers

    @property
    def coarse_cut(self) -> "Method | None":
        """What decides straight after a layer's attention what is held until the cut, where that waits for tokens;
        None: the whole prompt is."""
        return None

    @property
    def coarse_refusal(self) -> str:
        """Why the whole prompt is held where `coarse_cut` says otherwise; empty: it is not."""
        return ""

    def coarse_budgets(self, budget: int, length: int, layers: int) -> list[Any] | None:
        """Entries of each layer, or one a KV head, to which `coarse_cut` cuts; None: the whole prompt is held.

        Args:
            budget: entries of a layer that stay in the end, their mean.
        """
        return None

    def keeps_all(self, length: int) -> bool:
        """Nothing of a prompt of that many tokens is given up, whatever it holds; a budget in bytes may not tell."""
        if self.layer_adaptive or isinstance(self.budget, str):
            return False
        budget = entries(self.budget, length, 0)
        return all(share >= length for share in self.layer_budgets(budget, length, 1))

    def layer_weight(self, view: LayerView) -> Tensor:
        """Layer-adaptive methods: the statistic, [batch], that `allocate` goes by."""
        raise TypeError(f"{type(self).__name__} does not define layer_weight(view)")

    def observe(self, view: LayerView) -> Any:
        """Layer-adaptive methods: compute all that `plan` will need, so that queries can be released.

        Returns:
            What `allocate` is given of the layer: its weight, a tensor of one number, or anything if the method
            `pools`.
        """
        self.needs.compute(view)
        return self.layer_weight(view)

    def allocate(self, weights: list[Any], budget: int, length: int) -> list[Any]:
        """Layer-adaptive methods: entries of each layer from what was observed of all; an int each, or one a KV head.

        They sum to layers x budget, or to layers x KV heads x budget.
        """
        raise TypeError(f"{type(self).__name__} does not define allocate(weights, budget, length)")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `method_from_dict` reads it back."""
        options = dataclasses.asdict(self)
        common = {name: options.pop(name) for name in COMMON + ANALYSIS}
        return {"name": self.address(), **options, **common}

    def spelling(self) -> str:
        """The command line's spelling, with the options that differ from their defaults."""
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name == "budget" or getattr(self, f.name) != f.default
        }
        return f"{self.address()}:" + ",".join(f"{key}={value}" for key, value in changed.items())

    @classmethod
    def address(cls) -> str:
        """The name by which any process finds the method: with its module if it is not one of kvweave's own."""
        outside = not cls.__module__.startswith(f"{__package__}.")
        return f"{cls.__module__}.{cls.name}" if outside else cls.name
