"""A quantised cache around any method: what it keeps is stored in 8, 4 or 2 bits (KIVI, Liu et al., 2402.02750)."""

from dataclasses import dataclass
from typing import ClassVar

from kvweave.methods.base import Method
from kvweave.methods.full import Full
from kvweave.methods.options import integer, one_of, wrapped
from kvweave.methods.registry import register
from kvweave.methods.wrapping import Wrapper
from kvweave.ops.quantize import BITS, Quantization


@register("quantized", wrapper=True)
@dataclass(frozen=True)
class Quantized(Wrapper):
    """Lets another method decide, and stores what it keeps in few bits.

    Keys are quantised by channel within groups of tokens, values by token within groups of channels; the youngest
    slots stay in full precision, and are packed in whole groups as decoding goes on. The budget is the inner
    method's: it counts entries as if they were not quantised; so are `defer`, `defer_weight` and `redecode`.

    Spelled `quantized:method=flowmm,bits=4,budget=0.2,theta=0.3`: options that are not its own are the method's.
    """

    method: Method = wrapped(Full, help="what decides")
    bits: int = one_of(4, *BITS, help="of a stored number")
    group: int = integer(32, minimum=1, help="tokens that share a channel's scale, channels that share a token's")
    residual: int = integer(32, minimum=0, help="youngest slots that stay in full precision, at least")

    default_method: ClassVar[str] = "full"

    @classmethod
    def accepts(cls, method: Method) -> bool:
        return isinstance(method, Method) and not isinstance(method, Quantized)

    @classmethod
    def allowed(cls) -> str:
        return "a method that is not quantized"

    @property
    def storage(self) -> Quantization:
        return Quantization(self.bits, self.group, self.residual)
