"""What kind of tensors these are: where the fused kernels run, in what precision, and which may be written."""

import functools
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def fused(*tensors: Tensor) -> bool:
    """True if `kernels` takes these: on a GPU, in float32 or a half precision, with Triton installed."""
    halves = torch.float32, torch.bfloat16, torch.float16
    return all(x.is_cuda and x.dtype in halves for x in tensors) and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def exact(function: Callable[P, T]) -> Callable[P, T]:
    """`function` without gradients, and in the precision that it was written in: autocast is off inside it."""

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in _kinds():
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return computed


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Devices that this process may have tensors on."""
    device = torch.accelerator.current_accelerator()
    return ("cpu",) if device is None else ("cpu", device.type)


def writable(x: Tensor) -> Tensor:
    """`x`, or a copy if it was made in inference mode, outside of which it may be read but not written."""
    if torch.compiler.is_compiling():
        return x  # the compiler cannot ask, and compiled steps write to buffers that were made outside
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x
