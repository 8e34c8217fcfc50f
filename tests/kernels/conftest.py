"""Triton's kernels: on a GPU as they are, elsewhere by its interpreter, where `make test-kernels` runs them."""

import importlib.util
import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined
_interpreted = np.lib.NumpyVersion(np.__version__) < "2.4.0"  # later ones break the interpreter
_runs = importlib.util.find_spec("triton") is not None and (torch.cuda.is_available() or _interpreted)
collect_ignore_glob = [] if _runs else ["test_*.py"]  # `pytest tests/kernels` then finds no test, and fails
