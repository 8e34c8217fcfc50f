"""`kvweave methods NAME --draw` draws what a method keeps."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from kvweave.cli import app, main


def test_a_method_is_drawn(tmp_path):
    done = CliRunner().invoke(app, ["methods", "chelsea:budget=0.3", "--draw", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "chelsea:budget=0.3" in "".join(done.output.split())
    with Image.open(tmp_path / "chelsea.png") as picture:
        assert min(picture.size) > 400


def test_a_picture_needs_a_method(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["methods", "--draw", "--out", str(tmp_path)])
    assert "kvweave methods NAME --draw" in capsys.readouterr().err
