"""Policies: allowed numbers that a project writes down as data, by point, dtype and check. Torch-free.

::

    [[tool.paritykit.policy]]
    point = "model.layers.*.mlp"
    dtype = "bfloat16"
    factor = 3.0
    reason = "the fused kernel keeps its sum in bfloat16"

``factor`` is how many times the noise floor is allowed, ``tolerance`` a ``rel_l2`` in its place. What a policy does not
name, it fits. Of several that fit, the last one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from paritykit.comparison.tolerance import ROUNDING
from paritykit.errors import UnknownNameError, UsageError


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """One entry. ``source`` says where it was written."""

    point: str = "*"
    dtype: str = ""
    check: str = ""
    factor: float | None = None
    tolerance: float | None = None
    reason: str = ""
    source: str = ""

    def fits(self, *, point: str, dtype: str, check: str) -> bool:
        """Whether it is about this point, in this dtype, in this check."""
        return self.dtype in ("", dtype) and self.check in ("", check) and fnmatchcase(point, self.point)

    @property
    def note(self) -> str:
        """Where an allowed number came from, and why."""
        return f"{self.source}: {self.reason}" if self.reason else self.source


FIELDS = tuple(f for f in Policy.__struct_fields__ if f != "source")


def read_policies(entries: Sequence[Any], *, source: str, checks: Iterable[str]) -> list[Policy]:
    """The policies of the setting ``policy``. Raises UsageError, with the entry's number, for one without sense."""
    return [
        _policy(entry, name=f"policy {n} of {Path(source).name or source}", checks=list(checks))
        for n, entry in enumerate(entries, 1)
    ]


def find_policy(policies: Sequence[Policy], *, point: str, dtype: str, check: str) -> Policy | None:
    """The last of ``policies`` that fits; None where none does."""
    return next((p for p in reversed(policies) if p.fits(point=point, dtype=dtype, check=check)), None)


def _policy(entry: Any, *, name: str, checks: list[str]) -> Policy:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{name} must be a table, not {entry!r}")
    unknown = next((key for key in entry if key not in FIELDS), None)
    if unknown is not None:
        raise UnknownNameError(f"key in {name}", str(unknown), FIELDS)
    try:
        found = msgspec.convert(entry, Policy)
    except msgspec.ValidationError as error:
        raise UsageError(f"{name}: {error}") from error
    if found.dtype and found.dtype not in ROUNDING:
        raise UnknownNameError(f"dtype in {name}", found.dtype, ROUNDING)
    if found.check and found.check not in checks:
        raise UnknownNameError(f"check in {name}", found.check, checks)
    if (found.factor is None) == (found.tolerance is None):
        raise UsageError(f"{name} must have a factor (of the noise floor) or a tolerance (a rel_l2), and not both")
    if found.factor is not None and not 0 < found.factor < 1e6:
        raise UsageError(f"{name}: factor must be a number above 0, not {found.factor!r}")
    if found.tolerance is not None and not 0 < found.tolerance < 1:
        raise UsageError(f"{name}: tolerance must be a number between 0 and 1, not {found.tolerance!r}")
    return msgspec.structs.replace(found, source=name)
