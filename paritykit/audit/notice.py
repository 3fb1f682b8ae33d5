"""What an audit says: notices, and the audit that holds them. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import msgspec

from paritykit.provenance.names import pattern

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[str, ...] = get_args(Severity)


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One fact about a checkpoint, and what it does to each engine.

    ``error``: one of the engines fails, or computes something else than was stored. ``warning``: suspicious, and
    harmless only if it is meant. ``note``: worth knowing. ``place`` is a file name within the folder, a tensor or a
    config key.
    """

    code: str
    severity: Severity
    place: str
    message: str
    hf: str
    vllm: str
    fix: str


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """All notices on one checkpoint, the worst first, and how much was looked at.

    ``tensors`` and ``bytes`` count what the weight files hold; ``deep`` says that the values were read too.
    """

    notices: list[Notice]
    files: list[str]
    tensors: int
    bytes: int
    deep: bool
    seconds: float

    @property
    def errors(self) -> list[Notice]:
        """The notices that are errors."""
        return [n for n in self.notices if n.severity == "error"]

    @property
    def warnings(self) -> list[Notice]:
        """The notices that are warnings."""
        return [n for n in self.notices if n.severity == "warning"]

    @property
    def clean(self) -> bool:
        """Nothing worse than a note."""
        return all(n.severity == "note" for n in self.notices)


def by_pattern(names: Iterable[str]) -> list[list[str]]:
    """Names grouped by what they are with their numbers left out, so that a fault of all layers is one notice.

    >>> by_pattern(["layers.0.w1", "layers.1.w1", "layers.0.w2"])
    [['layers.0.w1', 'layers.1.w1'], ['layers.0.w2']]
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(pattern(name), []).append(name)
    return list(groups.values())


def count(items: list[str], *, what: str = "tensor") -> str:
    """``3 tensors, the first x``: how many there are, in words.

    >>> count(["a", "b"])
    '2 tensors, the first a'
    """
    return f"{what} {items[0]}" if len(items) == 1 else f"{len(items)} {what}s, the first {items[0]}"
