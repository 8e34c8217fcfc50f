"""`python -m kvweave.methods.NAME` draws what a method keeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import kvweave
from kvweave.methods.base import method_class

ROOT = Path(__file__).parents[2]


def test_a_methods_file_draws_it(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "kvweave.methods.chelsea", "budget=0.3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "chelsea:budget=0.3" in done.stdout
    with Image.open(tmp_path / "out" / "chelsea.png") as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize("name", kvweave.list_methods())
def test_every_methods_file_draws_the_method_that_it_holds(name):
    module = method_class(name).__module__
    text = (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").read_text()
    assert text.endswith(
        f'if __name__ == "__main__":\n    from kvweave.report.draw import main\n\n    main("{name}")\n'
    )
