"""One server for the tests that need no other."""

from collections.abc import Iterator
from typing import Any

import pytest
from serving import METHODS, Running, start

from kvweave import models
from kvweave.serve.limits import Limits, Offers


@pytest.fixture(scope="session")
def lab_model() -> tuple[Any, Any]:
    """A model and its processor that no server uses."""
    return models.load("lab")


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    """The server that most tests ask."""
    limits = Limits(rows=8, queue=64, memory=64 << 20, new_tokens=64, choices=4)
    found = start(limits=limits, offers=Offers(METHODS))
    yield found
    found.stop()
