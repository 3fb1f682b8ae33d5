"""From outcomes to counts: what was found, placed and explained, and what was reported where nothing is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from paritykit.testing.drawn.named import DRAWN
from paritykit.testing.scoreboard.outcome import Outcome

LOUD = 10.0
"""So many times the noise floor, and everything above it, has to be found."""
CONFIDENCE = 1.96
"""Standard deviations: intervals hold the true rate 95 times of 100."""
Level = Literal["loud", "quiet", "ten", "twice", "alike"]
LEVELS: dict[Level, str] = {
    "loud": "as it is, ten times the floor or more",
    "ten": "cut to ten times the floor",
    "twice": "cut to twice the floor",
    "quiet": "as it is, less than ten times the floor",
    "alike": "without effect on what is computed from it",
}
UNFOUND = {"twice": "faint", "alike": "alike"}
"""The note of a fault that was not found, where none had to be."""
REQUIRED: tuple[Level, ...] = ("loud", "ten")


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """``tried`` faults, ``found`` by a check that they name; of those with a place ``placed``, of them named ``exact``
    or ``near``; of those found with their cause ``first`` or among ``three``. ``judges``: how many each simpler judge
    failed, of the ``judged`` that ran.
    """

    tried: int = 0
    found: int = 0
    placed: int = 0
    exact: int = 0
    near: int = 0
    first: int = 0
    three: int = 0
    judged: int = 0
    judges: dict[str, int] = {}

    def __add__(self, other: Counts) -> Counts:
        names = {**self.judges, **other.judges}
        numbers = {n: getattr(self, n) + getattr(other, n) for n in self.__struct_fields__ if n != "judges"}
        return Counts(**numbers, judges={n: self.judges.get(n, 0) + other.judges.get(n, 0) for n in names})


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one class of faults at one level, in one engine and dtype."""

    group: str
    level: Level
    engine: str
    dtype: str
    counts: Counts


class Pairs(msgspec.Struct, frozen=True, kw_only=True):
    """Pairs without a fault: ``failed`` are false alarms. ``judges`` as in ``Counts``."""

    kind: Literal["clean", "null"]
    engine: str
    dtype: str
    ranks: int
    tried: int = 0
    failed: int = 0
    inconclusive: int = 0
    judged: int = 0
    judges: dict[str, int] = {}


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """An outcome that is told by name; ``what`` is a key of ``paritykit.testing.scoreboard.names.SECTIONS``."""

    what: str
    name: str
    engine: str
    model: str
    dtype: str
    level: str
    ratio: float | None = None
    wanted: str = ""
    said: str = ""


class Board(msgspec.Struct, frozen=True, kw_only=True):
    """All that the page is made of."""

    versions: dict[str, str] = {}
    planned: int = 0
    outcomes: int = 0
    seconds: float = 0.0
    faults: list[str] = []
    models: dict[str, list[str]] = {}
    cells: list[Cell] = []
    pairs: list[Pairs] = []
    notes: list[Note] = []


def interval(part: int, whole: int) -> tuple[float, float]:
    """Wilson's interval for a rate of ``part`` of ``whole`` (Wilson 1927): the whole range where there is nothing.

    >>> [round(v, 3) for v in interval(8, 10)]
    [0.49, 0.943]
    """
    if not whole:
        return 0.0, 1.0
    z, rate = CONFIDENCE, part / whole
    middle = rate + z * z / (2 * whole)
    half = z * math.sqrt(rate * (1 - rate) / whole + z * z / (4 * whole * whole))
    scale = 1 + z * z / whole
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def make_board(outcomes: Iterable[Outcome], *, planned: int = 0, versions: dict[str, str] | None = None) -> Board:
    """The counts of these outcomes, and those that are told by name."""
    known = sorted(outcomes, key=lambda o: o.trial.id)
    faults = [o for o in known if o.trial.kind == "fault"]
    models: dict[str, set[str]] = {}
    for outcome in known:
        models.setdefault(outcome.trial.engine, set()).add(outcome.trial.model)
    return Board(
        versions=versions or {},
        planned=planned,
        outcomes=len(known),
        seconds=round(sum(o.seconds for o in known), 1),
        faults=sorted({o.trial.fault for o in faults}),
        models={engine: sorted(names) for engine, names in sorted(models.items())},
        cells=count_cells(faults),
        pairs=count_pairs(o for o in known if o.trial.kind != "fault"),
        notes=[note for o in known for note in notes_of(o)],
    )


def level_of(outcome: Outcome) -> Level | None:
    """What a fault's outcome counts for; None where its fault does not reach the level, or it could not run."""
    if outcome.quiet or outcome.error:
        return None
    level = outcome.trial.level
    if outcome.alike and not outcome.failed:
        return "alike"
    if level == "ten":
        return "ten"
    if level == "twice":
        return "twice"
    return "quiet" if outcome.ratio is not None and outcome.ratio < LOUD else "loud"


def count(outcome: Outcome) -> Counts:
    """One fault's counts."""
    found = bool(outcome.found_by)
    return Counts(
        tried=1,
        found=found,
        placed=found and outcome.exact is not None,
        exact=bool(found and outcome.exact),
        near=bool(found and outcome.near),
        first=found and outcome.causes[:1] == [outcome.cause],
        three=found and outcome.cause in outcome.causes[:3],
        judged=bool(outcome.judges),
        judges={name: int(failed) for name, failed in outcome.judges.items()},
    )


def count_cells(faults: Iterable[Outcome]) -> list[Cell]:
    """Faults by class, level, engine and dtype."""
    found: dict[tuple[str, Level, str, str], Counts] = {}
    for outcome in faults:
        level = level_of(outcome)
        if level is not None:
            key = (outcome.group, level, outcome.trial.engine, outcome.trial.dtype)
            found[key] = found.get(key, Counts()) + count(outcome)
    return [Cell(group=g, level=n, engine=e, dtype=d, counts=c) for (g, n, e, d), c in found.items()]


def count_pairs(outcomes: Iterable[Outcome]) -> list[Pairs]:
    """Pairs without a fault by kind, engine, dtype and ranks."""
    found: dict[tuple[str, str, str, int], Pairs] = {}
    for o in outcomes:
        if o.error or _differs(o):
            continue
        trial, ranks = o.trial, int(o.trial.arguments.get("tensor_parallel_size", 1))
        key = (trial.kind, trial.engine, trial.dtype, ranks)
        kind: Literal["clean", "null"] = "null" if trial.kind == "null" else "clean"
        old = found.get(key) or Pairs(kind=kind, engine=trial.engine, dtype=trial.dtype, ranks=ranks)
        found[key] = msgspec.structs.replace(
            old,
            tried=old.tried + 1,
            failed=old.failed + (o.verdict == "fail"),
            inconclusive=old.inconclusive + (o.verdict == "inconclusive"),
            judged=old.judged + bool(o.judges),
            judges={n: old.judges.get(n, 0) + o.judges.get(n, 0) for n in {**old.judges, **o.judges}},
        )
    return list(found.values())


def _differs(outcome: Outcome) -> bool:
    """Whether the engine computes something else for a drawn architecture: where the logits differ nobody is alarmed
    for nothing.
    """
    return outcome.trial.model.startswith(DRAWN) and outcome.verdict == "fail" and "logits" in outcome.failed


def notes_of(outcome: Outcome) -> list[Note]:
    """What is to be told of an outcome by name."""
    trial = outcome.trial

    def note(what: str, *, wanted: str = "", said: str = "") -> Note:
        return Note(
            what=what,
            name=trial.fault or trial.when,
            engine=trial.engine,
            model=trial.model,
            dtype=trial.dtype,
            level=trial.level,
            ratio=outcome.ratio,
            wanted=wanted,
            said=said,
        )

    if outcome.error:
        return [note("refused" if trial.model.startswith(DRAWN) else "broken", said=outcome.error)]
    if _differs(outcome):
        return [note("differs", said=outcome.named)]
    if trial.kind != "fault":
        said = f"{outcome.named}: {', '.join(outcome.failed)}".strip(": ")
        return [note("alarm", said=said)] if outcome.verdict == "fail" else []
    if outcome.quiet:
        return [note("unmeasured")] if outcome.full is None else []
    level = level_of(outcome)
    found = [note("quiet", said="found" if outcome.found_by else "not found")] if level == "quiet" else []
    if not outcome.found_by:
        said = ", ".join(outcome.failed) or outcome.verdict
        return found or [note(UNFOUND.get(level or "", "missed"), said=said)]
    if outcome.exact is False:
        found.append(note("misplaced", wanted=outcome.wanted, said=outcome.named + (", near" if outcome.near else "")))
    if outcome.causes[:1] != [outcome.cause]:
        found.append(note("misexplained", wanted=outcome.cause, said=", ".join(outcome.causes) or "nothing"))
    return found


def total(
    cells: Iterable[Cell],
    *levels: Level,
    group: str = "",
    engine: str = "",
    dtype: str = "",
) -> Counts:
    """The counts of all cells at one of these levels, of one class, engine and dtype where these are given."""
    asked = {"group": group, "engine": engine, "dtype": dtype}
    fitting = (c for c in cells if c.level in levels and all(not v or getattr(c, n) == v for n, v in asked.items()))
    return sum((c.counts for c in fitting), Counts())
