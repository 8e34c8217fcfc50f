"""Every type of AutoModelForCausalLM and AutoModelForImageTextToText that can be built tiny: `make test-all`."""

import pytest

from benchmarks import zoo
from benchmarks.models import examine


@pytest.mark.parametrize("kind", zoo.TYPES)
def test_attached_and_full_change_not_a_bit(kind):
    finding = examine(kind)
    assert finding.outcome in ("exact", "refused", "unbuildable"), finding
    assert finding.outcome == "exact" or finding.reason
