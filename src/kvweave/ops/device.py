"""Where the fused kernels run."""

import functools
import importlib.util

import torch
from torch import Tensor


def fused(*tensors: Tensor) -> bool:
    """True if `kernels` takes these: on a GPU, in float32 or a half precision, with Triton installed."""
    halves = torch.float32, torch.bfloat16, torch.float16
    return all(x.is_cuda and x.dtype in halves for x in tensors) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
