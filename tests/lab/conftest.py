"""The packaged model and processor, loaded once as a user would load them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import kvweave.lab


@pytest.fixture(scope="session")
def processor() -> Any:
    return AutoProcessor.from_pretrained(kvweave.lab.weights_path())


@pytest.fixture(scope="session")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(kvweave.lab.weights_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def large_model() -> Any:
    path = kvweave.lab.weights_path("large")
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
