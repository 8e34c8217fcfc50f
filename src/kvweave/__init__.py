"""KV-cache compression for multimodal LLMs on Hugging Face Transformers.

    with kvweave.compress(model, kvweave.FlowMM(budget=0.2)) as session:
        out = model.generate(**inputs, max_new_tokens=64)
    session.report

The public names are in `__all__`; each is imported when it is first used, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvweave.methods.adakv import AdaKV
    from kvweave.methods.base import Method
    from kvweave.methods.cam import CaM
    from kvweave.methods.chelsea import Chelsea
    from kvweave.methods.critical import Critical
    from kvweave.methods.d2o import D2O
    from kvweave.methods.defensive import Defensive
    from kvweave.methods.expected_attention import ExpectedAttention
    from kvweave.methods.flashcache import FlashCache
    from kvweave.methods.flowmm import FlowMM
    from kvweave.methods.fold import Fold
    from kvweave.methods.full import Full
    from kvweave.methods.h2o import H2O
    from kvweave.methods.infinipot import InfiniPot
    from kvweave.methods.keydiff import KeyDiff
    from kvweave.methods.knorm import Knorm
    from kvweave.methods.kvmerger import KVMerger
    from kvweave.methods.kvzip import KVzip
    from kvweave.methods.leave_one_out import LeaveOneOut
    from kvweave.methods.leverage import Leverage
    from kvweave.methods.lookm import LookM
    from kvweave.methods.madakv import MadaKV
    from kvweave.methods.match import Match
    from kvweave.methods.meda import Meda
    from kvweave.methods.merging import MergingMethod
    from kvweave.methods.mixkv import MixKV
    from kvweave.methods.peak import Peak
    from kvweave.methods.pyramidkv import PyramidKV
    from kvweave.methods.quantized import Quantized
    from kvweave.methods.random import Random
    from kvweave.methods.registry import get_method, list_methods, method_from_dict, parse_method
    from kvweave.methods.regress import Regress
    from kvweave.methods.residual import Residual
    from kvweave.methods.scored import ScoredMethod
    from kvweave.methods.snapkv import SnapKV
    from kvweave.methods.streaming_llm import StreamingLLM
    from kvweave.methods.tgv import TGV
    from kvweave.methods.tova import Tova
    from kvweave.methods.vlcache import VLCache
    from kvweave.methods.weave import Weave
    from kvweave.methods.weave2 import Weave2
    from kvweave.plan import Compacted, Merge, Plan
    from kvweave.prompt import Prompt
    from kvweave.seam.cache import CompressedCache
    from kvweave.seam.entry import attach, compress, detach
    from kvweave.seam.layer import CompressedLayer
    from kvweave.seam.session import Session
    from kvweave.tensors import compress_tensors
    from kvweave.view import LayerView

__version__ = "0.1.0"
__all__ = [
    "D2O",
    "H2O",
    "TGV",
    "AdaKV",
    "CaM",
    "Chelsea",
    "Compacted",
    "CompressedCache",
    "CompressedLayer",
    "Critical",
    "Defensive",
    "ExpectedAttention",
    "FlashCache",
    "FlowMM",
    "Fold",
    "Full",
    "InfiniPot",
    "KVMerger",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LayerView",
    "LeaveOneOut",
    "Leverage",
    "LookM",
    "MadaKV",
    "Match",
    "Meda",
    "Merge",
    "MergingMethod",
    "Method",
    "MixKV",
    "Peak",
    "Plan",
    "Prompt",
    "PyramidKV",
    "Quantized",
    "Random",
    "Regress",
    "Residual",
    "ScoredMethod",
    "Session",
    "SnapKV",
    "StreamingLLM",
    "Tova",
    "VLCache",
    "Weave",
    "Weave2",
    "attach",
    "compress",
    "compress_tensors",
    "detach",
    "get_method",
    "list_methods",
    "method_from_dict",
    "parse_method",
]

_HOMES = {
    "AdaKV": "methods.adakv",
    "CaM": "methods.cam",
    "Chelsea": "methods.chelsea",
    "Compacted": "plan",
    "CompressedCache": "seam.cache",
    "CompressedLayer": "seam.layer",
    "Critical": "methods.critical",
    "D2O": "methods.d2o",
    "Defensive": "methods.defensive",
    "ExpectedAttention": "methods.expected_attention",
    "FlashCache": "methods.flashcache",
    "FlowMM": "methods.flowmm",
    "Fold": "methods.fold",
    "Full": "methods.full",
    "H2O": "methods.h2o",
    "InfiniPot": "methods.infinipot",
    "KVMerger": "methods.kvmerger",
    "KVzip": "methods.kvzip",
    "KeyDiff": "methods.keydiff",
    "Knorm": "methods.knorm",
    "LayerView": "view",
    "LeaveOneOut": "methods.leave_one_out",
    "Leverage": "methods.leverage",
    "LookM": "methods.lookm",
    "MadaKV": "methods.madakv",
    "Match": "methods.match",
    "Meda": "methods.meda",
    "Merge": "plan",
    "MergingMethod": "methods.merging",
    "Method": "methods.base",
    "MixKV": "methods.mixkv",
    "Peak": "methods.peak",
    "Plan": "plan",
    "Prompt": "prompt",
    "PyramidKV": "methods.pyramidkv",
    "Quantized": "methods.quantized",
    "Random": "methods.random",
    "Regress": "methods.regress",
    "Residual": "methods.residual",
    "ScoredMethod": "methods.scored",
    "Session": "seam.session",
    "SnapKV": "methods.snapkv",
    "StreamingLLM": "methods.streaming_llm",
    "TGV": "methods.tgv",
    "Tova": "methods.tova",
    "VLCache": "methods.vlcache",
    "Weave": "methods.weave",
    "Weave2": "methods.weave2",
    "attach": "seam.entry",
    "compress": "seam.entry",
    "compress_tensors": "tensors",
    "detach": "seam.entry",
    "get_method": "methods.registry",
    "list_methods": "methods.registry",
    "method_from_dict": "methods.registry",
    "parse_method": "methods.registry",
}


#: Packages that are used by their own names: `kvweave.models.load(...)`.
_PARTS = ("lab", "methods", "models")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
