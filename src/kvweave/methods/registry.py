"""Methods by name: listed, spelled on a command line, read back from what was saved."""

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from kvweave.methods.base import Method
from kvweave.ops.budget import Budget, check_budget

_REGISTRY: dict[str, type[Method]] = {}
_WRAPPERS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str, *, wrapper: bool = False) -> Any:
    """Class decorator: make a method known under `name`; a wrapper of other methods is not listed among them."""

    def decorate(cls: M) -> M:
        cls.name = name
        (_WRAPPERS if wrapper else _REGISTRY)[name] = cls
        return cls

    return decorate


@functools.cache
def _read_own() -> None:
    """Import every file beside this one, so that the library's own methods are registered."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{package}.{module.name}")


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    _read_own()
    return sorted(_REGISTRY)


def method_class(name: str) -> type[Method]:
    """The class registered under `name`; a ValueError names the nearest one.

    A method of another package is named with its module, which is then imported: `my_package.my_module.my_method`.
    """
    _read_own()
    module, _, short = name.rpartition(".")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"method={name!r} cannot be imported: {error}") from None
    known = _REGISTRY | _WRAPPERS
    if short not in known:
        raise ValueError(f"method={name!r} is unknown{_nearest(short, known)}: allowed is one of {_names(known)}")
    return known[short]


def get_method(name: str, **options: Any) -> Method:
    """A method by its name, with options; an unknown option's error names the nearest one."""
    cls = method_class(name)
    known = ["budget", *cls.takes(options)]
    for option, value in options.items():
        if option not in known:
            raise ValueError(
                f"{option}={value!r} is no option of {name}{_nearest(option, known)}: "
                f"allowed is one of {_names(known)}"
            )
    return cls.build(**options)


def method_from_dict(data: dict[str, Any]) -> Method:
    """The method that `Method.to_dict` wrote."""
    options = dict(data)
    if "name" not in options:
        raise ValueError(f"name is missing from the method {data!r}: allowed is one of {_names(_REGISTRY)}")
    return get_method(options.pop("name"), **options)


def parse_method(text: str, **defaults: Any) -> Method:
    """A method from the command line's spelling, such as "flowmm:budget=0.2,theta=0.3".

    Args:
        defaults: options that hold where `text` does not say otherwise.
    """
    name, _, rest = text.strip().partition(":")
    words = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{item!r} in method {text!r} is not an option: allowed is name=value")
        words[key] = value
    takes = method_class(name).takes(words)
    options = dict(defaults)
    for key, value in words.items():
        if key == "budget":
            options[key] = parse_budget(value)
        elif key in takes:
            try:
                options[key] = takes[key].parse(value)
            except ValueError:
                raise ValueError(
                    f"{key}={value!r} is not allowed for {name}: allowed is {takes[key].allowed}"
                ) from None
        else:
            options[key] = value  # get_method says what is wrong with it
    return get_method(name, **options)


def parse_budget(text: str) -> Budget:
    """A budget as typed: "0.2" is a share, "512" tokens, "256MiB" bytes."""
    try:
        return check_budget(int(text))
    except ValueError as error:
        if "budget=" in str(error):
            raise
    try:
        share = float(text)
    except ValueError:
        return check_budget(text)
    return check_budget(share)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else ""


def _names(known: Iterable[str]) -> str:
    return ", ".join(sorted(known))
