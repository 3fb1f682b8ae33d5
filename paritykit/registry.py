"""One small registry for everything that can be added from outside: engines, checks, metrics, report formats.

A value may be registered as ``"package.module:attribute"``: it is imported on first use, so that listing names stays
free of heavy imports. Other packages add entries through an entry point group, ``paritykit.<kind>s``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from typing import Any, Generic, TypeVar, cast

from paritykit.errors import UnknownNameError, UsageError

T = TypeVar("T")


def load_attribute(target: str, *, kind: str = "object") -> Any:
    """Return the attribute named by ``"package.module:attribute"``.

    Raises UsageError if the form is wrong, the module does not import or has no such attribute.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise UsageError(f"{kind} {target!r} is not of the form 'package.module:attribute'")
    try:
        value: Any = import_module(module_name)
    except ImportError as error:
        raise UsageError(f"{kind} {target!r}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise UsageError(f"{kind} {target!r}: module {module_name!r} has no attribute {part!r}")
        value = getattr(value, part)
    return value


def call_function(target: str, arguments: Mapping[str, Any], *, progress: Any = None) -> Any:
    """What the function that ``"package.module:attribute"`` names gives; one that takes ``progress`` gets it.

    Raises UsageError as ``load_attribute`` does.
    """
    function = load_attribute(target, kind="function")
    told = {"progress": progress} if "progress" in signature(function).parameters else {}
    return function(**arguments, **told)


class Registry(Generic[T]):
    """Names to values of one kind, in order of registration.

    >>> r: Registry[int] = Registry("number")
    >>> r.register("one", 1)
    >>> r.get("one")
    1
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.group = f"paritykit.{kind}s"
        self._values: dict[str, T | str | EntryPoint] = {}
        self._scanned = False

    def register(self, name: str, value: T | str) -> None:
        """Add ``value`` (or the dotted path it is imported from) under ``name``; a second value is refused."""
        there = self._values.get(name, value)
        if there is not value and not (isinstance(value, str) and there == value):
            raise UsageError(f"{self.kind} {name!r} is registered twice")
        self._values[name] = value

    def names(self) -> list[str]:
        """All names, without importing any value."""
        self._scan()
        return list(self._values)

    def get(self, name: str) -> T:
        """The value under ``name``; UnknownNameError with the nearest names otherwise."""
        self._scan()
        if name not in self._values:
            raise UnknownNameError(self.kind, name, self._values)
        value = self._values[name]
        if isinstance(value, EntryPoint):
            value = cast("T", load_attribute(f"{value.module}:{value.attr}", kind=f"{self.kind} {name!r}, entry point"))
        elif isinstance(value, str):
            value = cast("T", load_attribute(value, kind=self.kind))
        self._values[name] = value
        return value

    def items(self) -> Iterator[tuple[str, T]]:
        """Every name with its value, imported as needed."""
        for name in self.names():
            yield name, self.get(name)

    def _scan(self) -> None:
        if not self._scanned:
            self._scanned = True
            for point in entry_points(group=self.group):
                self._values.setdefault(point.name, point)
