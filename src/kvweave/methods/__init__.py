"""The methods, one file a paper. Importing this package registers them all."""

from kvweave.methods.base import (
    Method,
    get_method,
    list_methods,
    method_from_dict,
    parse_method,
    register,
)
from kvweave.methods.flowmm import FlowMM
from kvweave.methods.full import Full
from kvweave.methods.h2o import H2O
from kvweave.methods.random import Random
from kvweave.methods.snapkv import SnapKV
from kvweave.methods.streaming_llm import StreamingLLM

__all__ = [
    "H2O",
    "FlowMM",
    "Full",
    "Method",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "get_method",
    "list_methods",
    "method_from_dict",
    "parse_method",
    "register",
]
