"""docs/ADDING_A_METHOD.md is true: its method runs everywhere, registered from outside the package."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvweave
from kvweave.methods.catalogue import markdown
from kvweave.methods.registry import load_plugin

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "ADDING_A_METHOD.md"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The guide's method, as a file on the Python path."""
    code = re.search(r"```python\n# longest\.py\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    (tmp_path / "longest.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("longest", None)
    kvweave.methods.registry._REGISTRY.pop("longest", None)


def test_it_compresses_tensors(outside):
    importlib.import_module("longest")
    method = kvweave.parse_method("longest.longest:recent=2,budget=6")
    keys = torch.randn(1, 2, 20, 8)
    layer = kvweave.compress_tensors(method, [keys], [keys], [keys], visual=torch.zeros(1, 20, dtype=torch.bool))[0]
    lengths = keys.norm(dim=-1)[..., :18]
    expected = torch.cat([lengths.topk(4).indices.sort().values, torch.tensor([18, 19]).expand(1, 2, 2)], -1)
    assert torch.equal(layer.positions, expected)
    assert "longest" in kvweave.list_methods()
    assert kvweave.method_from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert kvweave.parse_method(method.spelling()) == method


def test_it_runs_on_a_model_and_in_the_command_line(outside):
    environment = os.environ | {"PYTHONPATH": f"{outside}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, "-m", "kvweave", "--plugin", "longest", "run", "--method", "longest:recent=4"]
    done = subprocess.run(
        [*command, "--images", "4", "--json", "--out", str(outside / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "longest" in done.stdout
    json.loads(done.stdout)


def test_a_plugin_that_cannot_be_imported_is_named(outside):
    with pytest.raises(ValueError, match=r"plugin='no_such_module' cannot be imported .*No module named"):
        load_plugin("no_such_module")
    (outside / "exits.py").write_text("raise RuntimeError('not today')")
    with pytest.raises(ValueError, match=r"plugin='exits' cannot be imported \(RuntimeError\): not today"):
        load_plugin("exits")


@pytest.mark.parametrize(
    "spelling", ["this.x", "antigravity.snapkv:budget=0.2", "longest.longest", "..x", ".", "a..b"]
)
def test_a_name_imports_nothing(outside, spelling):
    before = set(sys.modules)
    for read in (kvweave.parse_method, lambda name: kvweave.method_from_dict({"name": name.partition(":")[0]})):
        with pytest.raises(ValueError, match=r"method='.*' is (of a module that is not imported|unknown)"):
            read(spelling)
    assert set(sys.modules) == before


def test_a_module_answers_for_its_own_methods_only():
    with pytest.raises(ValueError, match=r"'os.snapkv' is none of that module's"):
        kvweave.parse_method("os.snapkv")
    assert kvweave.parse_method("kvweave.methods.snapkv.snapkv") == kvweave.SnapKV()


def test_the_table_of_methods_is_what_the_registry_says():
    assert (ROOT / "docs" / "METHODS.md").read_text() == markdown(), "run: make docs"
