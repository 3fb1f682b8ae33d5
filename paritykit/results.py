"""The records of a run, and their JSONL form: the one truth that every report is made from.

One record a line, ``"type"`` first: ``run``, ``case``, ``coverage``, ``finding``, ``weight``, and last
``summary``. Torch-free, so that a report is rebuilt on any laptop.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar, get_args

import msgspec

from paritykit.errors import UsageError

SCHEMA_VERSION = 1

Verdict = Literal["pass", "fail", "skip", "error", "inconclusive"]
Origin = Literal["introduced", "inherited"]
Kind = Literal["", "accumulated", "named_alike"]
"""Why a point that differs is no failure: rounding that added up, or one name for two things."""
VERDICTS: tuple[str, ...] = get_args(Verdict)


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One side of a comparison: an engine as it really ran."""

    engine: str
    model: str
    dtype: str
    device: str = "cpu"
    digest: str = ""
    attention_backend: str = ""
    parallel: dict[str, int] = {}
    versions: dict[str, str] = {}
    args: dict[str, str] = {}

    def __post_init__(self) -> None:
        """Take strings of a class of their own, such as ``torch.__version__``, as the strings that they are."""
        for name in ("versions", "args"):
            given: dict[str, str] = getattr(self, name)
            plain = {str(k): str(v) if isinstance(v, str) else v for k, v in given.items()}
            msgspec.structs.force_setattr(self, name, plain)
        for name in ("engine", "model", "dtype", "device", "digest", "attention_backend"):
            value = getattr(self, name)
            msgspec.structs.force_setattr(self, name, str(value) if isinstance(value, str) else value)


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """First record: what was compared, with what, by which command.

    ``starts`` counts how often an engine was started, by side, or by the arguments that it was given in place of its
    own.
    """

    schema: int = SCHEMA_VERSION
    paritykit: str
    reference: Side
    candidate: Side
    checks: list[str]
    command: str = ""
    starts: dict[str, int] = {}
    created: str = ""
    environment: dict[str, str] = {}


class CaseInfo(msgspec.Struct, frozen=True, kw_only=True, tag="case"):
    """One input, and the tokens each side produced after it (greedy, free-running)."""

    id: str
    tokens: list[int]
    new_tokens: int = 0
    batch: int = 0
    reference_tokens: list[int] = []
    candidate_tokens: list[int] = []


class Unmatched(msgspec.Struct, frozen=True, kw_only=True):
    """A point of one side that nothing was compared with; no ``reason`` means that nobody knows why."""

    side: Literal["reference", "candidate"]
    point: str
    reason: str = ""


class Coverage(msgspec.Struct, frozen=True, kw_only=True, tag="coverage"):
    """What a check compared and what it left out. ``points`` counts those of the reference."""

    check: str
    points: int
    compared: int
    skipped: list[Unmatched] = []
    unmatched: list[Unmatched] = []


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """A named explanation with its evidence."""

    code: str
    name: str
    confidence: float
    evidence: str


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a point that is wrong, where the rest is right: ``which`` (inclusive ranges) of ``of`` along ``axis``.

    ``axis``: ``ranks``, ``heads``, ``elements of each head``, ``features`` or ``experts``.
    """

    axis: str
    which: list[tuple[int, int]]
    of: int

    def describe(self) -> str:
        """The part in words.

        >>> Slice(axis="heads", which=[(0, 0), (2, 3)], of=4).describe()
        'heads 0, 2-3 of 4'
        """
        shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in self.which)
        one = len(self.which) == 1 and self.which[0][0] == self.which[0][1]
        first, _, rest = self.axis.partition(" ")
        return f"{first.removesuffix('s') if one else first} {shown} of {self.of}{f' {rest}' if rest else ''}"


class Local(msgspec.Struct, frozen=True, kw_only=True):
    """A point's error where its module ran on the reference's own values, judged like any other.

    ``level`` is how deep the reference's values went: into ``layers``, ``blocks`` or ``leaves``. ``culprit``: beyond
    what is allowed, and nothing before or inside it explains that. Verdict ``error``, with ``message``: not measured.
    ``noise_floor`` and ``needs`` are those of a finding.
    """

    verdict: Verdict
    level: str = ""
    metric: str = ""
    value: float | None = None
    allowed: float | None = None
    allowed_source: str = ""
    noise_floor: float | None = None
    needs: dict[str, float] = {}
    culprit: bool = False
    message: str = ""


class Finding(msgspec.Struct, frozen=True, kw_only=True, tag="finding"):
    """One judged fact: one point (or one question) of one case.

    ``metric``/``value``/``allowed`` are the judged number; ``metrics`` holds all the others. ``order`` is the place in
    the reference's execution order; ``located`` the module to blame where it differs from the point that shows it.
    ``profile`` is the relative error per position, pooled to at most 64 numbers, ``floor_profile`` the same of the
    reference's twin, ``positions`` the first and last position and ``failing`` the position ranges (inclusive) that are
    beyond tolerance. ``needs`` is the smallest ``factor`` (of the noise floor) or ``tolerance`` that would pass, as a
    policy says it. ``condition`` says how the engine ran, where a check holds it against itself, and ``workload`` names
    all cases that ran, where these are not those of the run. ``local`` is its error on the reference's own values,
    where the modules were replayed. ``slices`` say which part of it is wrong, where that was looked for and is a part.
    ``kind`` says why a point that differs in the free run is no failure: *accumulated* rounding (verdict ``pass``,
    every module is right on the reference's own values), or *named_alike*, something else under the same name (nothing
    that is computed from it differs). ``reading`` is how the candidate's point is read to be the reference's.
    """

    check: str
    case: str
    point: str
    verdict: Verdict
    kind: Kind = ""
    reading: str = ""
    metric: str = ""
    value: float | None = None
    allowed: float | None = None
    allowed_source: str = ""
    noise_floor: float | None = None
    origin: Origin | None = None
    causes: list[Cause] = []
    order: int = 0
    located: str = ""
    message: str = ""
    condition: str = ""
    workload: list[str] = []
    candidate_point: str = ""
    mapping: str = ""
    metrics: dict[str, float | None] = {}
    positions: tuple[int, int] | None = None
    failing: list[tuple[int, int]] = []
    profile: list[float | None] = []
    floor_profile: list[float | None] = []
    needs: dict[str, float] = {}
    shape: list[int] = []
    dtypes: tuple[str, str] | None = None
    local: Local | None = None
    slices: list[Slice] = []

    @property
    def means_another(self) -> bool:
        """Whether the candidate means something else by its name: it is named alike, or read in another way."""
        return self.kind == "named_alike" or bool(self.reading)


class WeightRow(msgspec.Struct, frozen=True, kw_only=True, tag="weight"):
    """One box of a checkpoint tensor and where it landed: check ``weights``, as a table for people.

    ``source`` and ``target`` are index texts (``[0:64, :]``); ``parameter`` is empty where the tensor landed nowhere,
    ``tensor`` where nothing filled the parameter. ``status``: ``pass``, ``skip``, or what is wrong.
    """

    tensor: str = ""
    parameter: str = ""
    rank: int = 0
    source: str = ""
    target: str = ""
    change: str = ""
    elements: int = 0
    dtype: str = ""
    status: str = "pass"
    message: str = ""


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """Where the difference starts: ``point`` is the module to look at, ``seen_at`` the point that shows it."""

    check: str
    case: str
    point: str
    origin: Origin | None = None
    seen_at: str = ""


class Summary(msgspec.Struct, frozen=True, kw_only=True, tag="summary"):
    """Last record: the verdict and its counts. A file without it is an unfinished run.

    ``culprits`` are all modules that are wrong by themselves, in execution order, where modules were replayed.
    ``notes`` say what the verdict does not speak of: what was asked for and never ran, what failed beside it.
    """

    verdict: Verdict
    compared: int
    failed: int
    skipped: int
    unmatched: int
    errors: int = 0
    inconclusive: int = 0
    first_divergence: Divergence | None = None
    culprits: list[Divergence] = []
    causes: list[Cause] = []
    checks: dict[str, Verdict] = {}
    message: str = ""
    seconds: float | None = None
    notes: list[str] = []

    @property
    def exit_code(self) -> int:
        """0 parity, 1 divergence, 3 could not run, 4 inconclusive, 5 nothing was compared."""
        if self.verdict == "pass" and self.compared:
            return 0
        if self.verdict == "fail":
            return 1
        if self.verdict == "error":
            return 3
        return 5 if self.compared == 0 else 4


Record = Run | CaseInfo | Coverage | Finding | WeightRow | Summary


class Results(msgspec.Struct, kw_only=True):
    """All records of one run, sorted by kind: what reports consume."""

    run: Run
    cases: list[CaseInfo] = []
    coverage: list[Coverage] = []
    findings: list[Finding] = []
    weights: list[WeightRow] = []
    summary: Summary

    def records(self) -> Iterator[Record]:
        """Every record in file order."""
        yield self.run
        yield from self.cases
        yield from self.coverage
        yield from self.findings
        yield from self.weights
        yield self.summary


R = TypeVar("R")
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """One JSON line without its newline; non-finite numbers become null."""
    return _encoder.encode(record)


def write_jsonl(results: Results, path: str | os.PathLike[str]) -> None:
    """Write every record of ``results``, one a line; the file appears whole or not at all."""
    write_whole(path, b"\n".join(encode_record(r) for r in results.records()) + b"\n")


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` beside ``path`` and rename it into place, making missing parent folders."""
    target = Path(path)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def read_jsonl(path: str | os.PathLike[str]) -> Results:
    """Read a finished run. Raises UsageError for a missing, damaged, unfinished or newer file."""
    source = Path(path)
    try:
        lines = source.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror or error}") from error
    _check_schema(source, lines)
    return _sort(source, [_decode(source, n, line) for n, line in enumerate(lines, 1) if line.strip()])


class _Head(msgspec.Struct):
    type: str = ""
    schema: int = SCHEMA_VERSION


def _check_schema(source: Path, lines: list[bytes]) -> None:
    """Refuse another schema before its records are read: they may be of kinds that are unknown here."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError):
        head = msgspec.json.decode(next(filter(None, lines), b""), type=_Head)
        if head.type == "run" and head.schema != SCHEMA_VERSION:
            raise UsageError(f"{source}: schema {head.schema}, but this ParityKit reads schema {SCHEMA_VERSION}")


def _decode(source: Path, number: int, line: bytes) -> Record:
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}, line {number}: not a ParityKit record: {error}") from error


def _sort(source: Path, records: list[Record]) -> Results:
    runs = [r for r in records if isinstance(r, Run)]
    summaries = [r for r in records if isinstance(r, Summary)]
    if len(runs) != 1:
        raise UsageError(f"{source}: expected one 'run' record, found {len(runs)}")
    if len(summaries) != 1 or not isinstance(records[-1], Summary):
        raise UsageError(f"{source}: no 'summary' record at its end: the run did not finish")
    return Results(
        run=runs[0],
        cases=_of(records, CaseInfo),
        coverage=_of(records, Coverage),
        findings=_of(records, Finding),
        weights=_of(records, WeightRow),
        summary=summaries[0],
    )


def _of(records: Iterable[Record], kind: type[R]) -> list[R]:
    return [r for r in records if isinstance(r, kind)]
