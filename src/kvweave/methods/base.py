"""What every method is: a frozen dataclass of options that plans one layer at a time."""

import dataclasses
import difflib
import functools
import importlib
import math
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kvweave.layer import LayerView
from kvweave.methods.options import Option, choice, flag, integer, real
from kvweave.ops.budget import Budget, check_budget
from kvweave.ops.match import nearest
from kvweave.ops.merge import RULES, merge_weights, segment_sum, tangent_bias
from kvweave.ops.quantize import Quantization
from kvweave.ops.select import chosen, complement
from kvweave.plan import Merge, Plan

_REGISTRY: dict[str, type["Method"]] = {}
_WRAPPERS: dict[str, type["Method"]] = {}
M = TypeVar("M", bound=type["Method"])

#: `Method.query_rows` of a method that needs the queries of all rows.
ALL_ROWS = -1
#: Options that every method takes beside its budget.
COMMON = ("defer", "defer_weight", "redecode")


@dataclass(frozen=True)
class Method:
    """Base of all methods; subclasses are frozen dataclasses registered under a name.

    Attributes:
        budget: entries that stay in each layer: a share of the prompt in (0, 1], tokens as an int, or bytes of
            keys and values over all layers and the whole batch, such as "256MiB".
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
    #: Layer budgets depend on all layers' statistics: nothing is cut before the prefill ends.
    layer_adaptive: ClassVar[bool] = False
    #: The plan depends on which tokens are visual.
    uses_modality: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for field, option in self.options():
            value = getattr(self, field)
            if not option.check(value):
                raise ValueError(f"{field}={value!r} is not allowed for {self.name}: allowed is {option.allowed}")
        if self.redecode and not self.defer:
            raise ValueError("redecode=True is not allowed with defer=0: nothing is drafted; allowed is defer >= 1")

    @classmethod
    def build(cls, **options: Any) -> "Method":
        """The method with options as a dictionary or the command line gives them."""
        return cls(**options)

    @classmethod
    def takes(cls, given: dict[str, Any]) -> dict[str, Option]:
        """The options that may be given beside `given`, the budget not among them."""
        return dict(cls.options())

    @classmethod
    def options(cls) -> list[tuple[str, Option]]:
        """Names and descriptions of the method's options, its own first, then those that all methods take."""
        found = [(f.name, f.metadata["option"]) for f in dataclasses.fields(cls) if "option" in f.metadata]
        return sorted(found, key=lambda option: option[0] in COMMON)

    @classmethod
    def has_own(cls, option: str) -> bool:
        """Not an option that every method takes, or one with a default of its own."""
        return option not in COMMON or getattr(cls, option) != getattr(Method, option)

    def weight_of(self, rows: Tensor) -> Tensor:
        """Weight of the attention of that many decoded tokens against the prompt's own rows' (SPEC 13.1)."""
        return rows / (rows + 4) if self.defer_weight is None else torch.full_like(rows, self.defer_weight)

    @property
    def decoded_temperature(self) -> float:
        """Decoded tokens' logits are divided by it before they become attention that counts."""
        return 1.0

    @property
    def plans_rows_alone(self) -> bool:
        """Counts depend on what a row holds, not only on its length: rows of a batch are planned one at a time."""
        return self.layer_adaptive

    @property
    def turns_keys(self) -> bool:
        """The plan needs the rotary tables."""
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
    def query_rows(self) -> int:
        """Queries of how many of the last rows the method needs; 0: none; `ALL_ROWS`: all."""
        return 0

    @property
    def probed_rows(self) -> int:
        """The same where probes are answered before the cut."""
        return self.query_rows

    def plan(self, view: LayerView, budget: int) -> Plan:
        """Decide for rows of one layer; `budget` < `view.length` entries stay in each KV head."""
        raise TypeError(f"{type(self).__name__} does not define plan(view, budget)")

    def layer_budgets(self, budget: int, length: int, layers: int) -> list[int]:
        """Entries of each layer where `budget` is their mean; known before any layer is seen."""
        return [budget] * layers

    def layer_weight(self, view: LayerView) -> Tensor:
        """Layer-adaptive methods: the statistic, [batch], that `allocate` goes by."""
        raise TypeError(f"{type(self).__name__} does not define layer_weight(view)")

    def observe(self, view: LayerView) -> Tensor:
        """Layer-adaptive methods: compute all that `plan` will need, so that queries can be released."""
        return self.layer_weight(view)

    def allocate(self, weights: list[float], budget: int, length: int) -> list[int]:
        """Layer-adaptive methods: entries of each layer from all layers' weights; they sum to layers x budget."""
        raise TypeError(f"{type(self).__name__} does not define allocate(weights, budget, length)")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `method_from_dict` reads it back."""
        options = dataclasses.asdict(self)
        common = {name: options.pop(name) for name in COMMON}
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


@dataclass(frozen=True)
class MergingMethod(Method):
    """Base of methods that merge dropped tokens into kept ones (SPEC 2.2 and 4)."""

    merge_rule: str = choice("similarity", *RULES, help="weights of the members of a merged entry")
    merge_keys: bool = flag(True, help="merge keys as well as values")
    mass_bias: bool = flag(False, help="decode adds log(mass) to a merged entry's logit")
    mass_kind: str = choice(
        "count", "count", "attention", "entropy", help="mass: tokens, attention received, or tokens that weigh in"
    )
    rope_aware: bool = flag(False, help="turn keys to the target's phase before they are averaged")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mass_kind == "attention" and (self.merge_rule != "importance" or self.merge_keys):
            raise ValueError(
                "mass_kind='attention' is not allowed here: it goes with merge_rule='importance' and merge_keys=False"
            )
        if self.mass_kind == "entropy" and (self.merge_rule == "weighted" or not self.merge_keys):
            raise ValueError(
                "mass_kind='entropy' is not allowed here: it goes with merge_keys=True and merge_rule not 'weighted'"
            )

    @property
    def turns_keys(self) -> bool:
        return self.rope_aware

    @property
    def biases_logits(self) -> bool:
        return self.mass_bias

    def merged(
        self,
        view: LayerView,
        keep: Tensor,
        source: Tensor,
        target: Tensor,
        cosine: Tensor,
        importance: Tensor | None = None,
    ) -> Plan:
        """The plan that merges every source into its target by this method's options.

        Args:
            keep: int64 [batch, kv_heads, kept]; source: int64 [batch, kv_heads, sources].
            target: index into `keep`, -1: evicted; cosine: of each source with its target.
            importance: [batch, kv_heads, length], for merge_rule="importance".
        """
        source_mass, kept_mass = view.mass.gather(-1, source), view.mass.gather(-1, keep)
        given = [None, None] if importance is None else [importance.gather(-1, at) for at in (source, keep)]
        weights = merge_weights(self.merge_rule, target, cosine, source_mass, kept_mass, *given)
        return self.weighted(view, keep, source, target, *weights)

    def merge_into_nearest(self, view: LayerView, keep: Tensor, importance: Tensor | None = None) -> Plan:
        """The plan that merges every dropped token into its nearest kept one.

        Args:
            keep: int64 [batch, kv_heads, kept]; importance: as in `merged`.
        """
        source = complement(keep, view.length)
        target, cosine = nearest(view.keys, source, keep)
        return self.merged(view, keep, source, target, cosine, importance)

    def merge_uneven(self, view: LayerView, kept: Tensor, importance: Tensor | None = None) -> Plan:
        """As `merge_into_nearest`, where heads may keep different counts.

        Args:
            kept: bool [batch, kv_heads, length].
        """
        keep, source = parted(view, kept)
        at, goal = source.clamp(min=0), keep.clamp(min=0)
        everyone = torch.zeros_like(at)
        target, cosine = nearest(view.keys, at, goal, (keep >= 0)[:, :, None], everyone)
        plan = self.merged(view, goal, at, target.masked_fill(source < 0, -1), cosine, importance)
        return replace(plan, keep=keep, uneven=True)

    def weighted(
        self, view: LayerView, keep: Tensor, source: Tensor, target: Tensor, weight: Tensor, own: Tensor
    ) -> Plan:
        """The plan that merges every source into its target with given weights."""
        source_mass, kept_mass = view.mass.gather(-1, source), view.mass.gather(-1, keep)
        mass = kept_mass + segment_sum(source_mass, target, keep.shape[-1])
        merge = Merge(source, target, weight, own, mass, keys=self.merge_keys, rope_aware=self.rope_aware)
        bias = None
        if self.mass_bias and self.mass_kind == "count":
            bias = mass.log()
        elif self.mass_bias and self.mass_kind == "entropy":
            bias = tangent_bias(view.bias, keep, source, target, weight, own).to(mass.dtype)
        elif self.mass_bias:  # own = I_c / (I_c + sum of I_e): the bias is minus its logarithm
            before = torch.zeros_like(mass) if view.bias is None else view.bias.gather(-1, keep)
            bias = (before - own.log()).clamp(0, math.log(view.length)).to(mass.dtype)
        return Plan(keep, merge, bias)


def parted(view: LayerView, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Slots that stay and slots that go, heads with fewer with -1 in front; empty slots do neither.

    Args:
        kept: bool [batch, kv_heads, length].
    """
    held = torch.ones_like(kept) if view.empty is None else ~view.empty
    return chosen(kept & held), chosen(~kept & held)


def register(name: str, *, wrapper: bool = False) -> Any:
    """Class decorator: make a method known under `name`; a wrapper of other methods is not listed among them."""

    def decorate(cls: M) -> M:
        cls.name = name
        (_WRAPPERS if wrapper else _REGISTRY)[name] = cls
        return cls

    return decorate


@functools.cache
def _read_own() -> None:
    """Import every file beside this one, so that the library's own methods are registered."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{package}.{module.name}")


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    _read_own()
    return sorted(_REGISTRY)


def method_class(name: str) -> type[Method]:
    """The class registered under `name`; a ValueError names the nearest one.

    A method of another package is named with its module, which is then imported: `my_package.my_module.my_method`.
    """
    _read_own()
    module, _, short = name.rpartition(".")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"method={name!r} cannot be imported: {error}") from None
    known = _REGISTRY | _WRAPPERS
    if short not in known:
        raise ValueError(f"method={name!r} is unknown{_nearest(short, known)}: allowed is one of {_names(known)}")
    return known[short]


def get_method(name: str, **options: Any) -> Method:
    """A method by its name, with options; an unknown option's error names the nearest one."""
    cls = method_class(name)
    known = ["budget", *cls.takes(options)]
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"{option}={value!r} is no option of {name}{_nearest(option, known)}: "
                f"allowed is one of {_names(known)}"
            )
    return cls.build(**options)


def method_from_dict(data: dict[str, Any]) -> Method:
    """The method that `Method.to_dict` wrote."""
    options = dict(data)
    if "name" not in options:
        raise ValueError(f"name is missing from the method {data!r}: allowed is one of {_names(_REGISTRY)}")
    return get_method(options.pop("name"), **options)


def parse_method(text: str, **defaults: Any) -> Method:
    """A method from the command line's spelling, such as "flowmm:budget=0.2,theta=0.3".

    Args:
        defaults: options that hold where `text` does not say otherwise.
    """
    name, _, rest = text.strip().partition(":")
    words = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{item!r} in method {text!r} is not an option: allowed is name=value")
        words[key] = value
    takes = method_class(name).takes(words)
    options = dict(defaults)
    for key, value in words.items():
        if key == "budget":
            options[key] = parse_budget(value)
        elif key in takes:
            try:
                options[key] = takes[key].parse(value)
            except ValueError:
                raise ValueError(
                    f"{key}={value!r} is not allowed for {name}: allowed is {takes[key].allowed}"
                ) from None
        else:
            options[key] = value  # get_method says what is wrong with it
    return get_method(name, **options)


def parse_budget(text: str) -> Budget:
    """A budget as typed: "0.2" is a share, "512" tokens, "256MiB" bytes."""
    try:
        return check_budget(int(text))
    except ValueError as error:
        if "budget=" in str(error):
            raise
    try:
        share = float(text)
    except ValueError:
        return check_budget(text)
    return check_budget(share)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else ""


def _names(known: Iterable[str]) -> str:
    return ", ".join(sorted(known))
