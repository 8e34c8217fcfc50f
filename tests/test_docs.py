"""The documentation as a site: every page is in its navigation, every link and anchor leads somewhere."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_site_builds_with_all_its_links(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site/API/index.html").read_text(encoding="utf-8")
    for name in ("compress", "CompressedCache", "LayerView", "from_published"):
        assert f"{name}</span>" in reference
