"""Packing: the rows as columns with one string table, and their details in chunks that are inflated on demand."""

from __future__ import annotations

import base64
import gzip
import math
from typing import Any, NamedTuple

import msgspec

from paritykit.reports.html.rows import STATUSES, Row
from paritykit.reports.replayed import local, origin
from paritykit.reports.wording import layer, parts
from paritykit.results import Finding

CHUNK = 250
FULL_PROFILES = 15_000


class Packed(NamedTuple):
    """The embedded data: the index, the chunks of details, and how many profiles were left out."""

    columns: str
    chunks: list[str]
    trimmed: int


class Strings:
    """Every text once; columns hold its number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {"": 0}

    def number(self, text: str) -> int:
        """The number of ``text``, the same each time."""
        return self._numbers.setdefault(text, len(self._numbers))

    def texts(self) -> list[str]:
        """All texts, by number."""
        return list(self._numbers)


def pack(rows: list[Row]) -> Packed:
    """``rows`` for embedding. Profiles of passing points are dropped where there are more than 15,000 rows."""
    lean = len(rows) > FULL_PROFILES
    details = [_detail(row, lean=lean) for row in rows]
    chunks = [squeeze(details[start : start + CHUNK]) for start in range(0, len(details), CHUNK)]
    trimmed = sum(1 for row in rows if _trims(row, lean=lean))
    return Packed(squeeze(_index(rows)), chunks, trimmed)


def squeeze(value: Any) -> str:
    """``value`` as JSON, gzip and base64; the same bytes for the same value."""
    packed = gzip.compress(msgspec.json.encode(value), 9, mtime=0)
    # The tenth byte names the operating system in some Python versions.
    return base64.b64encode(packed[:9] + b"\xff" + packed[10:]).decode("ascii")


def _index(rows: list[Row]) -> dict[str, Any]:
    strings = Strings()
    found = [row.finding for row in rows]
    columns: dict[str, Any] = {
        name: [strings.number(getattr(f, name)) for f in found]
        for name in ("check", "case", "point", "metric", "allowed_source", "located")
    }
    columns |= {name: [_digits(getattr(f, name)) for f in found] for name in ("value", "allowed", "noise_floor")}
    columns["local"] = [_digits(f.local.value if f.local else None) for f in found]
    columns["origin"] = [strings.number(f.origin or "") for f in found]
    columns["status"] = [STATUSES.index(row.status) for row in rows]
    columns["order"] = [f.order for f in found]
    columns["layer"] = [layer(f.point) for f in found]
    return {"rows": len(rows), "chunk": CHUNK, "statuses": STATUSES, "columns": columns, "strings": strings.texts()}


def _detail(row: Row, *, lean: bool) -> dict[str, Any]:
    finding = row.finding
    told: dict[str, Any] = {
        "origin": origin(finding),
        "local": local(finding),
        "message": finding.message,
        "mapping": finding.mapping,
        "candidate_point": finding.candidate_point,
        "metrics": {name: _digits(value, 6) for name, value in finding.metrics.items()},
        "causes": [msgspec.to_builtins(cause) for cause in finding.causes],
        "profile": [] if _trims(row, lean=lean) else [_digits(value, 3) for value in finding.profile],
        "trimmed": _trims(row, lean=lean),
        "positions": finding.positions,
        "failing": finding.failing,
        "parts": parts(finding),
        "shape": finding.shape,
        "dtypes": finding.dtypes,
    }
    return {name: value for name, value in told.items() if value}


def _trims(row: Row, *, lean: bool) -> bool:
    return lean and row.status == "pass" and bool(row.finding.profile)


def _digits(value: float | None, digits: int = 5) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def spread(finding: Finding) -> list[float]:
    """The positive numbers a log axis for ``finding`` must hold."""
    numbers = (finding.value, finding.allowed, finding.noise_floor)
    return [n for n in numbers if n is not None and math.isfinite(n) and n > 0]
