"""A measured noise floor as data: kept in ``references/`` with what it was made from, and reviewed when it moves."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import msgspec

import paritykit
from paritykit.captures.manifest import leading_points
from paritykit.captures.reader import Capture
from paritykit.comparison.twin import twin_error
from paritykit.errors import UsageError
from paritykit.results import Side, write_whole

SCHEMA = 1
MOVED = 1.5
"""About as far as the errors of two correct engines were from each other: see ``comparison.floor``."""


class FloorFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The twin's ``rel_l2`` against the truth, for each point and case, and where it comes from.

    ``cases`` are digests of the tokens that were run, by case id.
    """

    schema: int = SCHEMA
    paritykit: str = paritykit.__version__
    created: str = ""
    truth: Side
    twin: Side
    cases: dict[str, str]
    floors: dict[str, dict[str, float]]


class Move(msgspec.Struct, frozen=True):
    """A floor that is not what it was; None where the point or case was or is not there."""

    point: str
    case: str
    before: float | None
    now: float | None

    def describe(self) -> str:
        """The move in one line."""
        before, now = ("-" if v is None else f"{v:.2e}" for v in (self.before, self.now))
        return f"{self.point} / {self.case}: {before} -> {now}"


def floor_of(truth: Capture, twin: Capture) -> FloorFile:
    """The noise floor of every point that both captures have."""
    floors: dict[str, dict[str, float]] = {}
    for key in leading_points(truth.manifest.points):
        found = {case: error for case in truth.cases if (error := twin_error(truth, twin, key, case)) is not None}
        if found:
            floors[key] = found
    return FloorFile(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        truth=_without_place(truth),
        twin=_without_place(twin),
        cases={c: _digest(twin, c) for c in truth.cases},
        floors=floors,
    )


def write_floor(floor: FloorFile, path: str | os.PathLike[str]) -> None:
    """Write it as JSON, one line for each point and case, so that a move reads well in a review. Raises UsageError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(floor), indent=1) + b"\n")


def read_floor(path: str | os.PathLike[str]) -> FloorFile:
    """Read one. Raises UsageError for a missing, damaged or newer file."""
    try:
        found = msgspec.json.decode(Path(path).read_bytes(), type=FloorFile)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise UsageError(f"{path} is not a noise floor: {error}") from error
    if found.schema != SCHEMA:
        raise UsageError(f"{path}: schema {found.schema}, but this ParityKit reads schema {SCHEMA}")
    return found


def moves(before: FloorFile, now: FloorFile) -> list[Move]:
    """Where the floor is more than ``MOVED`` times what it was, or less than that share of it, in computing order.

    Raises UsageError where both are of other weights, dtypes or tokens: nothing can be said of them.
    """
    for name, ours, theirs in (
        ("weights", before.truth.digest, now.truth.digest),
        ("dtypes", (before.truth.dtype, before.twin.dtype), (now.truth.dtype, now.twin.dtype)),
        ("cases", before.cases, now.cases),
    ):
        if ours != theirs:
            raise UsageError(f"the kept floor is of other {name}: {ours} then, {theirs} now; measure it anew with -o")
    keys = dict.fromkeys((p, c) for f in (now, before) for p, cases in f.floors.items() for c in cases)
    pairs = [(p, c, before.floors.get(p, {}).get(c), now.floors.get(p, {}).get(c)) for p, c in keys]
    return [Move(p, c, old, new) for p, c, old, new in pairs if _moved(old, new)]


def _moved(before: float | None, now: float | None) -> bool:
    if before is None or now is None:
        return before is not now
    return not min(before, now) * MOVED >= max(before, now)


def _digest(capture: Capture, case: str) -> str:
    tokens = [*capture.cases[case].tokens, *capture.continuation(case)]
    return hashlib.sha256(msgspec.json.encode(tokens)).hexdigest()[:16]


def _without_place(capture: Capture) -> Side:
    """Who computed it, without where the model lay."""
    side = capture.manifest.side
    return msgspec.structs.replace(side, model=Path(side.model).name)
