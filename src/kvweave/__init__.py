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
    from kvweave.methods.d2o import D2O
    from kvweave.methods.flashcache import FlashCache
    from kvweave.methods.flowmm import FlowMM
    from kvweave.methods.full import Full
    from kvweave.methods.h2o import H2O
    from kvweave.methods.kvmerger import KVMerger
    from kvweave.methods.lookm import LookM
    from kvweave.methods.madakv import MadaKV
    from kvweave.methods.meda import Meda
    from kvweave.methods.merging import MergingMethod
    from kvweave.methods.mixkv import MixKV
    from kvweave.methods.peak import Peak
    from kvweave.methods.pyramidkv import PyramidKV
    from kvweave.methods.quantized import Quantized
    from kvweave.methods.random import Random
    from kvweave.methods.registry import get_method, list_methods, method_from_dict, parse_method
    from kvweave.methods.snapkv import SnapKV
    from kvweave.methods.streaming_llm import StreamingLLM
    from kvweave.methods.vlcache import VLCache
    from kvweave.methods.weave import Weave
    from kvweave.plan import Compacted, Merge, Plan
    from kvweave.prompt import Prompt
    from kvweave.seam.cache import CompressedCache
    from kvweave.seam.layer import CompressedLayer
    from kvweave.seam.session import Session, attach, compress, detach
    from kvweave.tensors import compress_tensors
    from kvweave.view import LayerView

__version__ = "0.1.0"
__all__ = [
    "D2O",
    "H2O",
    "AdaKV",
    "CaM",
    "Chelsea",
    "Compacted",
    "CompressedCache",
    "CompressedLayer",
    "FlashCache",
    "FlowMM",
    "Full",
    "KVMerger",
    "LayerView",
    "LookM",
    "MadaKV",
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
    "Session",
    "SnapKV",
    "StreamingLLM",
    "VLCache",
    "Weave",
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
    "D2O": "methods.d2o",
    "FlashCache": "methods.flashcache",
    "FlowMM": "methods.flowmm",
    "Full": "methods.full",
    "H2O": "methods.h2o",
    "KVMerger": "methods.kvmerger",
    "LayerView": "view",
    "LookM": "methods.lookm",
    "MadaKV": "methods.madakv",
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
    "Session": "seam.session",
    "SnapKV": "methods.snapkv",
    "StreamingLLM": "methods.streaming_llm",
    "VLCache": "methods.vlcache",
    "Weave": "methods.weave",
    "attach": "seam.session",
    "compress": "seam.session",
    "compress_tensors": "tensors",
    "detach": "seam.session",
    "get_method": "methods.registry",
    "list_methods": "methods.registry",
    "method_from_dict": "methods.registry",
    "parse_method": "methods.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
