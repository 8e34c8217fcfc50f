"""Methods by name: listed, spelled on a command line, read back from what was saved."""

import difflib
import functools
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from kvweave.methods.base import Method
from kvweave.methods.options import finite
from kvweave.ops.brief import brief
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


def list_wrappers() -> list[str]:
    """Names of the library's own methods that stand around another one, sorted."""
    _read_own()
    package = __name__.rpartition(".")[0]
    return sorted(name for name, cls in _WRAPPERS.items() if cls.__module__.startswith(f"{package}."))


def load_plugin(module: str) -> None:
    """Import a module that registers methods, so that they are found by name: code of the user's choice runs.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the module does
        raise ValueError(f"plugin={brief(module)} cannot be imported ({type(error).__name__}): {error}") from error


def method_class(name: str) -> type[Method]:
    """The class registered under `name`; a ValueError names the nearest one.

    A method of another package may be named with its module, `my_package.my_module.my_method`. Names come from
    command lines and from files: none of them imports anything, so the module has to be imported already.
    """
    _read_own()
    registry = _REGISTRY | _WRAPPERS
    module, _, short = name.rpartition(".") if isinstance(name, str) else ("", "", name)
    if module and module not in sys.modules:
        raise ValueError(
            f"method={brief(name)} is of a module that is not imported: allowed is one of kvweave.list_methods(), or "
            "a method whose module was imported before, as --plugin MODULE does"
        )
    if not isinstance(short, str) or short not in registry:
        raise ValueError(
            f"method={brief(name)} is unknown{_nearest(short, registry)}: allowed is one of {_names(registry)}"
        )
    cls = registry[short]
    if module and getattr(sys.modules[module], cls.__name__, None) is not cls:
        raise ValueError(
            f"method={brief(name)} is none of that module's: {short!r} is {cls.__module__}.{short}; allowed is "
            f"one of {_names(registry)}"
        )
    return cls


def get_method(name: str, **options: Any) -> Method:
    """A method by its name, with options; an unknown option's error names the nearest one."""
    return _built(name, options)


def _built(name: Any, options: dict[Any, Any]) -> Method:
    cls = method_class(name)
    allowed = ["budget", *cls.takes(options)]
    for option, value in options.items():
        if option not in allowed:
            raise ValueError(
                f"{option}={brief(value)} is no option of {name}{_nearest(option, allowed)}: "
                f"allowed is one of {_names(allowed)}"
            )
    return cls.build(**options)


def method_from_dict(data: dict[str, Any]) -> Method:
    """The method that `Method.to_dict` wrote."""
    if not isinstance(data, dict) or "name" not in data:
        raise ValueError(f"name is missing from the method {brief(data)}: allowed is one of {_names(_REGISTRY)}")
    options = dict(data)
    return _built(options.pop("name"), options)


def parse_method(text: str, **defaults: Any) -> Method:
    """A method from the command line's spelling, such as "flowmm:budget=0.2,theta=0.3".

    Args:
        defaults: options that hold where `text` does not say otherwise.
    """
    name, _, rest = text.strip().partition(":")
    words = {}
    for item in filter(None, (part.strip() for part in _parts(rest))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"{brief(item)} in method {brief(text)} is not an option: allowed is name=value")
        if key in words:
            raise ValueError(f"{key} comes twice in method {brief(text)}: allowed is once")
        words[key] = value
    takes = method_class(name).takes(words)
    options = dict(defaults)
    for key, value in words.items():
        if key == "method" and value.startswith("[") and value.endswith("]"):
            options[key] = parse_method(value[1:-1])
        elif key == "budget":
            options[key] = parse_budget(value)
        elif key in takes:
            try:
                options[key] = takes[key].parse(value)
            except ValueError:
                raise ValueError(takes[key].refusal(key, value, name)) from None
        else:
            options[key] = value  # what builds the method says what is wrong with it
    return _built(name, options)


def chosen_method(method: Any, budget: Budget | None) -> Method:
    """A method as `compress` takes it: itself, its spelling, or a budget alone, which means `weave`."""
    if method is None and budget is not None:
        return get_method("weave", budget=budget)
    if budget is not None:
        raise ValueError(f"budget={budget!r} is not allowed beside method={method!r}: allowed is one of them")
    if isinstance(method, str):
        return parse_method(method)
    if not isinstance(method, Method):
        raise TypeError(
            f"method={method!r} is not a kvweave method: allowed is one of kvweave.get_method(...), a spelling such "
            'as "flowmm:budget=0.2", or a budget alone'
        )
    return method


def _parts(text: str) -> list[str]:
    """`text` at its commas, those within brackets left alone."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse_budget(text: str) -> Budget:
    """A budget as typed: "0.2" is a share, "512" tokens, "256MiB" bytes."""
    digits = re.fullmatch(r"\s*[+-]?[0-9]{1,40}\s*", text)
    try:
        number = int(text) if digits else finite(text)
    except ValueError:
        return check_budget(text)
    return check_budget(number)


def _nearest(name: Any, names: Iterable[str]) -> str:
    if not isinstance(name, str):
        return ""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f", did you mean {close[0]!r}?" if close else ""


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
