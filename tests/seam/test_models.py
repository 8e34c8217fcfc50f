"""Types of models that ask for the name of their attention, or keep something else beside their keys, change by not a
bit; `make test-all` runs all types. docs/MODELS.md names each of them."""

import re
from pathlib import Path

import pytest
import transformers

from benchmarks import zoo
from benchmarks.models import NOTES, Finding, examine, page

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
OTHERS = ("deepseek_v3", "gemma3", "gpt_oss", "llama", "llama4", "qwen2_5_vl", "qwen3_5")
HERE = [kind for kind in (*ASK_BY_NAME, *OTHERS) if kind in zoo.TYPES]
if transformers.__version__ >= "5.24":
    HERE = [kind for kind in HERE if kind not in NOTES]


@pytest.mark.parametrize("kind", HERE)
def test_attached_and_full_change_not_a_bit(kind):
    finding = examine(kind)
    assert finding.outcome == "exact", finding


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
    text = page(
        [Finding("llama4", "exact", layers="1 of 2", kinds=["chunked attention"]), Finding("x", "refused", "a|b")]
    )
    assert "| llama4 | exact | 1 of 2 | chunked attention; transformers 5.24.0 itself cannot run it" in text
    assert "| x | refused |  | a/b |" in text
    assert "1 run tiny" in text
