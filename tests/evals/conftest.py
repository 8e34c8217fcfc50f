"""The packaged model and processor, loaded once."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvweave import lab


@pytest.fixture(scope="session")
def processor() -> Any:
    return AutoProcessor.from_pretrained(lab.weights_path())


@pytest.fixture(scope="session")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(lab.weights_path(), dtype=torch.float32).eval()
