"""Types of models that ask for the name of their attention, or keep something else beside their keys, change by not a
bit, and decode from a cut cache as from the masked full one; `make test-all` runs all types. docs/MODELS.md names
each of them."""

import re
from pathlib import Path

import pytest
import torch
import transformers

import kvweave
from benchmarks import cuts, zoo
from benchmarks.cuts import Outcome
from benchmarks.models import NOTES, Finding, examine, page
from benchmarks.oracle import Cut, masked

ASK_BY_NAME = (
    "axk2",
    "deepseek_v32",
    "dots3_note_text",
    "gemma4",
    "gemma4_unified",
    "glm_moe_dsa",
    "gpt2",
    "hy_v4",
    "minimax_m3_vl",
    "mistral_large4",
)
OTHERS = ("deepseek_v3", "doge", "gemma3", "gpt_oss", "llama", "llama4", "qwen2_5_vl", "qwen3_5")
#: What two types that decode otherwise come to: by evicting, by merging, visual tokens.
EXPECTED = {
    "gemma3": ("equal", "equal", "yes"),
    "gpt_oss": ("equal", "equal", ""),
    "qwen2_5_vl": ("equal", "equal", "yes"),
    "deepseek_v3": ("equal", "refused", ""),
    "doge": ("nothing", "nothing", ""),
    "hy_v4": ("nothing", "nothing", ""),
}
HERE = [kind for kind in (*ASK_BY_NAME, *OTHERS) if kind in zoo.TYPES]
if transformers.__version__ >= "5.24":
    HERE = [kind for kind in HERE if kind not in NOTES]


@pytest.mark.parametrize("kind", HERE)
def test_attached_and_full_change_not_a_bit_and_cuts_equal_the_masked_full_cache(kind):
    finding = examine(kind)
    assert finding.outcome == "exact", finding
    evicting, merging = finding.decoded["evicting"], finding.decoded["merging"]
    assert {evicting.word, merging.word} <= {"equal", "nothing", "refused"}, finding
    assert evicting.visual in ("yes", "none named", ""), finding
    if kind in EXPECTED:
        assert (evicting.word, merging.word, evicting.visual) == EXPECTED[kind], finding


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_the_oracle_notices_a_token_too_many_and_another_content(kind):
    made = zoo.tiny(kind, "sdpa")
    inputs = cuts.prompts(pictures=False)
    with kvweave.compress(made.model, cuts.METHODS["evicting"]) as session:
        mine = cuts.decoded(made.model, inputs)
    for spoil in ("nothing", "a token", "contents"):
        cut = Cut.of(session.cache, cuts.LENGTH, merged=kind == "llama")
        if spoil == "a token":
            hidden = (cut.bias[0][0, 0] == -torch.inf).nonzero()[0]
            cut.bias[0][0, 0, hidden] = 0
        elif spoil == "contents" and cut.contents:
            cut.contents[1][1][0, :, 20:] += 1
        with masked(made.model, cut):
            error = cuts.distance(mine, cuts.decoded(made.model, inputs))
        spoilt = spoil != "nothing" and (spoil == "a token" or bool(cut.contents))
        assert (error > cuts.TOLERANCE) == spoilt, (spoil, error)


def test_types_that_ask_by_name_are_there():
    assert len(HERE) > 10


def test_what_cannot_be_chosen_is_refused_by_name():
    finding = examine("bloom")
    assert finding.outcome == "refused"
    assert "BloomForCausalLM does not let its attention be chosen" in finding.reason


def test_the_page_names_every_type_of_the_version_that_it_was_written_with():
    text = (Path(__file__).parents[2] / "docs" / "MODELS.md").read_text()
    rows = dict(re.findall(r"^\| (\S+) \| (\w+) \|", text, re.MULTILINE))
    rows.pop("type")
    assert set(rows.values()) <= {"exact", "refused", "unbuildable"}
    if f"transformers {transformers.__version__}." in text:
        assert sorted(rows) == zoo.TYPES


def test_a_page():
    cut = {
        "evicting": Outcome("equal", layers="1 of 2", kinds=["chunked attention"], visual="yes"),
        "merging": Outcome("refused", "it merges; allowed is another"),
    }
    text = page([Finding("llama4", "exact", decoded=cut), Finding("x", "refused", "a|b")])
    row = (
        "| llama4 | exact | 1 of 2 | equal | refused | yes | chunked attention; it merges; transformers 5.24.0 itself"
    )
    assert row in text
    assert "| x | refused | | | | | a/b |" in text
    assert "1 run exactly as without kvweave" in text
    assert "Equal (1 types)" in text
