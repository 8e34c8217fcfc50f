"""KV-cache compression for multimodal LLMs on Hugging Face Transformers.

with kvweave.compress(model, kvweave.FlowMM(budget=0.2)) as session:
    out = model.generate(**inputs, max_new_tokens=64)
session.report
"""

from kvweave.attach import Session, attach, compress
from kvweave.cache import CompressedCache, CompressedLayer
from kvweave.layer import LayerView
from kvweave.methods import (
    D2O,
    H2O,
    AdaKV,
    CaM,
    Chelsea,
    FlashCache,
    FlowMM,
    Full,
    KVMerger,
    LookM,
    MadaKV,
    Meda,
    MergingMethod,
    Method,
    MixKV,
    PyramidKV,
    Quantized,
    Random,
    SnapKV,
    StreamingLLM,
    VLCache,
    get_method,
    list_methods,
    method_from_dict,
    parse_method,
    register,
)
from kvweave.plan import Compacted, Merge, Plan
from kvweave.prompt import Prompt
from kvweave.tensors import compress_tensors

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
    "Plan",
    "Prompt",
    "PyramidKV",
    "Quantized",
    "Random",
    "Session",
    "SnapKV",
    "StreamingLLM",
    "VLCache",
    "attach",
    "compress",
    "compress_tensors",
    "get_method",
    "list_methods",
    "method_from_dict",
    "parse_method",
    "register",
]
