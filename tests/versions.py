"""The seam's tests on the oldest transformers that is promised and on the newest that pip finds.

    python tests/versions.py [--subset] [pytest's arguments]

Each version has a virtual environment of its own under .venv-versions, which shares torch and all else with the one
that this runs in; only what that version cannot go with is installed beside it. The newest is looked up every time.
"""

import os
import re
import subprocess
import sys
import time
import tomllib
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".venv-versions"
#: What CI runs on each, in about a minute.
SUBSET = [
    *(
        f"tests/seam/test_{name}.py"
        for name in ("names", "guard", "own_cache", "attention_name", "generate", "compile")
    ),
    "tests/seam/test_equals_masked_full_cache.py",
    "tests/seam/test_models.py",
]


def oldest() -> str:
    """What pyproject.toml promises, as pip is asked for it."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least = next(found[1] for need in needs if (found := re.fullmatch(r"transformers>=([\d.]+)", need)))
    return f"transformers=={least}.*"


def environment(name: str, wanted: str) -> tuple[Path, str]:
    """A Python with `wanted` (a requirement), everything else shared; returns it and transformers' version."""
    place = HOME / name
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
    own = next(place.glob("lib/python*/site-packages"))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    (own / "share.pth").unlink(missing_ok=True)  # or pip would see the transformers that is shared
    subprocess.run([*pip, "--no-deps", "--upgrade", wanted], check=True)
    (own / "share.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    transformers = _installed(own, "transformers")
    unmet = [str(need) for need in _needs(transformers) if not _met(need, own)]
    if unmet:
        subprocess.run([*pip, *unmet], check=True)
    return python, transformers.version


def _installed(place: Path, name: str) -> Distribution:
    return next(found for found in distributions(path=[str(place)]) if found.name == name)


def _needs(package: Distribution) -> list[Requirement]:
    needs = map(Requirement, package.requires or ())
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _met(need: Requirement, own: Path) -> bool:
    """By what lies in the environment itself, else by what it shares."""
    name = re.sub(r"[-_.]+", "-", need.name).lower()
    for found in distributions(path=[str(own)]):
        if re.sub(r"[-_.]+", "-", found.name).lower() == name:
            return need.specifier.contains(found.version)
    try:
        return need.specifier.contains(version(need.name))
    except PackageNotFoundError:
        return False


def main(arguments: list[str]) -> int:
    subset = "--subset" in arguments
    tests = [a for a in arguments if a != "--subset"] or (SUBSET if subset else ["tests/seam"])
    failed, ran = 0, []
    for name, wanted in (("oldest", oldest()), ("newest", "transformers")):
        python, found = environment(name, wanted)
        print(f"transformers {found} ({name}): {' '.join(tests)}", flush=True)
        started = time.perf_counter()
        code = subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, env=os.environ | _THREADS).returncode
        failed = failed or code
        ran.append(f"{found} {'failed' if code else 'passed'} in {time.perf_counter() - started:.0f} s")
    print(f"transformers: {', '.join(ran)}; {version('transformers')} is what everything else is tested with")
    return failed


_THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
