"""Inputs of the kernels, and what their results are held against."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)  # whose products the interpreter does not know


def normal(*shape, dtype=torch.float32, seed=0):
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype).to(DEVICE)


def on_cpu(*tensors):
    """The reference's inputs: wide, on the CPU."""
    return [x.cpu().double() if x.is_floating_point() else x.cpu() for x in tensors]


def close(actual, expected, tolerance):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.cpu().double(), expected.double(), rtol=tolerance, atol=tolerance * scale)
