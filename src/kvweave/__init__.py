"""KV-cache compression for multimodal LLMs on Hugging Face Transformers.

with kvweave.compress(model, kvweave.FlowMM(budget=0.2)) as session:
    out = model.generate(**inputs, max_new_tokens=64)
session.report
"""

from kvweave.attach import Session, attach, compress
from kvweave.cache import CompressedCache, CompressedLayer
from kvweave.layer import LayerView
from kvweave.methods import (
    H2O,
    FlowMM,
    Full,
    Method,
    Random,
    SnapKV,
    StreamingLLM,
    get_method,
    list_methods,
    method_from_dict,
    parse_method,
)
from kvweave.plan import Compacted, Merge, Plan
from kvweave.prompt import Prompt
from kvweave.tensors import compress_tensors

__version__ = "0.1.0"
__all__ = [
    "H2O",
    "Compacted",
    "CompressedCache",
    "CompressedLayer",
    "FlowMM",
    "Full",
    "LayerView",
    "Merge",
    "Method",
    "Plan",
    "Prompt",
    "Random",
    "Session",
    "SnapKV",
    "StreamingLLM",
    "attach",
    "compress",
    "compress_tensors",
    "get_method",
    "list_methods",
    "method_from_dict",
    "parse_method",
]
