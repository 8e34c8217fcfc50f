"""Every type of language model that can be built tiny, with eyes or ears or without: `make test-all`."""

import pytest

from benchmarks import zoo
from benchmarks.models import examine


@pytest.mark.parametrize("kind", zoo.TYPES)
def test_untouched_to_the_bit_and_cut_as_the_masked_full_cache(kind):
    finding = examine(kind)
    assert finding.outcome in ("exact", "refused", "unbuildable"), finding
    assert finding.outcome == "exact" or finding.reason
    for cut in finding.decoded.values():
        assert cut.word in ("equal", "nothing", "refused", "failed"), finding
        assert cut.word == "equal" or cut.reason or cut.kinds, finding
