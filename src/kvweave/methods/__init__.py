"""The methods, one file a paper. Importing this package registers them all."""

from kvweave.methods.adakv import AdaKV
from kvweave.methods.base import (
    MergingMethod,
    Method,
    get_method,
    list_methods,
    method_from_dict,
    parse_method,
    register,
)
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
from kvweave.methods.mixkv import MixKV
from kvweave.methods.pyramidkv import PyramidKV
from kvweave.methods.quantized import Quantized
from kvweave.methods.random import Random
from kvweave.methods.snapkv import SnapKV
from kvweave.methods.streaming_llm import StreamingLLM
from kvweave.methods.vlcache import VLCache

__all__ = [
    "D2O",
    "H2O",
    "AdaKV",
    "CaM",
    "Chelsea",
    "FlashCache",
    "FlowMM",
    "Full",
    "KVMerger",
    "LookM",
    "MadaKV",
    "Meda",
    "MergingMethod",
    "Method",
    "MixKV",
    "PyramidKV",
    "Quantized",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "VLCache",
    "get_method",
    "list_methods",
    "method_from_dict",
    "parse_method",
    "register",
]
