"""Reading captures lazily, by memory map: nothing is loaded before it is asked for, and rows are found by label."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from paritykit.captures.manifest import MANIFEST, Manifest, Piece, Point, decode_manifest
from paritykit.captures.mapped import MappedFile
from paritykit.captures.stream import digest_tensor
from paritykit.case import Case
from paritykit.errors import CaptureFormatError, UnknownNameError


class Span(NamedTuple):
    """``length`` consecutive positions of a case, from ``position``: rows ``row`` and on of ``piece``."""

    position: int
    length: int
    piece: Piece
    row: int


class Capture:
    """A capture on disk. Open one with ``Capture.open(folder)``.

    Opening checks the manifest's digest and every file's size; each tensor's digest is checked when it is first read.
    """

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self.path = path
        self.manifest = manifest
        self._verify = verify
        self._verified: set[tuple[int, str]] = set()
        self._handles: dict[int, MappedFile] = {}
        self._spans: dict[tuple[str, int, str], list[Span]] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Capture:
        """Open the capture in folder ``path``. Raises CaptureFormatError with the reason it is refused."""
        folder = Path(path)
        if not folder.is_dir():
            raise CaptureFormatError(f"{folder}: no such folder")
        if not (folder / MANIFEST).is_file():
            raise CaptureFormatError(f"{folder} is not a complete capture: it has no {MANIFEST}")
        manifest = decode_manifest((folder / MANIFEST).read_bytes(), where=str(folder))
        for file in manifest.files:
            found = (folder / file.name).stat().st_size if (folder / file.name).is_file() else None
            if found != file.bytes:
                state = "missing" if found is None else f"{found} bytes long instead of {file.bytes}"
                raise CaptureFormatError(f"{folder}: {file.name} is {state}")
        return cls(folder, manifest, verify=verify)

    @cached_property
    def cases(self) -> dict[str, Case]:
        """The cases by id, in order."""
        return {c.id: c for c in self.manifest.cases}

    @cached_property
    def points(self) -> dict[str, dict[int, Point]]:
        """Points by key, then by rank, in the order the engine finished them."""
        found: dict[str, dict[int, Point]] = {}
        for point in self.manifest.points:
            found.setdefault(point.key, {})[point.rank] = point
        return found

    @property
    def ranks(self) -> int:
        """How many ranks recorded."""
        return 1 + max((p.rank for p in self.manifest.points), default=0)

    def point(self, key: str, *, rank: int | None = None) -> Point:
        """The point ``key`` of ``rank``, or of the lowest that has it; UnknownNameError with the nearest names."""
        if key not in self.points:
            raise UnknownNameError("point", key, self.points)
        if rank is None:
            return self.points[key][min(self.points[key])]
        if rank not in self.points[key]:
            raise UnknownNameError(f"rank of {key}", str(rank), map(str, self.points[key]))
        return self.points[key][rank]

    def spans(self, point: Point, case: str) -> list[Span]:
        """Where the rows of ``case`` are, by position. A position computed twice counts with its last computation."""
        known = self._spans.get((point.key, point.rank, case))
        if known is not None:
            return known
        found: list[Span] = []
        for piece in point.pieces:
            for position, length, row in self._by_step[piece.step].get(case, ()):
                new = Span(position, length, piece, row)
                found = [rest for old in found for rest in _outside(old, new)] if found else found
                found.append(new)
        self._spans[point.key, point.rank, case] = sorted(found)
        return self._spans[point.key, point.rank, case]

    def read(self, piece: Piece) -> torch.Tensor:
        """The tensor of ``piece``, ``[tokens, ...]``, mapped from its file. Raises CaptureFormatError if damaged."""
        name = self.manifest.files[piece.file].name
        try:
            tensor = self._handle(piece).tensor(piece.name)
        except (SafetensorError, OSError) as error:
            raise CaptureFormatError(f"{self.path}: {name} cannot be read: {error}") from error
        if self._verify and (piece.file, piece.name) not in self._verified:
            if digest_tensor(tensor) != piece.digest:
                raise CaptureFormatError(f"{self.path}: {piece.name} in {name} was altered (its digest does not match)")
            self._verified.add((piece.file, piece.name))
        return tensor

    def part(self, piece: Piece, row: int, length: int) -> torch.Tensor:
        """``length`` rows of ``piece`` from ``row``, ``[tokens, ...]``; only these are read, no digest is checked."""
        try:
            return self._handle(piece).tensor(piece.name)[row : row + length]
        except (SafetensorError, OSError) as error:
            name = self.manifest.files[piece.file].name
            raise CaptureFormatError(f"{self.path}: {name} cannot be read: {error}") from error

    def rows(self, key: str, case: str, *, rank: int | None = None) -> torch.Tensor:
        """All rows of one point and case in order of position, ``[tokens, ...]``: a copy, for looking at.

        Without ``rank``, those of the lowest that has the point.
        """
        point = self.point(key, rank=rank)
        spans = self.spans(point, case)
        return torch.cat([self.read(s.piece)[s.row : s.row + s.length] for s in spans]) if spans else torch.empty(0)

    def verify(self) -> None:
        """Read every tensor and check its digest. Raises CaptureFormatError at the first that fails."""
        for point in self.manifest.points:
            for piece in point.pieces:
                self.read(piece)

    def generated(self, case: str) -> list[int]:
        """Tokens this engine produced after ``case``."""
        return self.manifest.generated.get(case, [])

    def continuation(self, case: str) -> list[int]:
        """The tokens after the prompt of ``case`` as they were fed: the forced ones, then this engine's own choices."""
        forced = self.cases[case].forced
        return [*forced, *self.generated(case)[len(forced) :]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def _handle(self, piece: Piece) -> MappedFile:
        """The file of ``piece``, mapped. Raises SafetensorError or OSError."""
        if piece.file not in self._handles:
            self._handles[piece.file] = MappedFile(self.path / self.manifest.files[piece.file].name)
        return self._handles[piece.file]

    @cached_property
    def _by_step(self) -> list[dict[str, list[tuple[int, int, int]]]]:
        ids = [c.id for c in self.manifest.cases]
        table = []
        for segments in self.manifest.steps:
            row = 0
            found: dict[str, list[tuple[int, int, int]]] = {}
            for segment in segments:
                found.setdefault(ids[segment.case], []).append((segment.start, segment.length, row))
                row += segment.length
            table.append(found)
        return table


def let_go(capture: Capture, folder: Path | None = None) -> Capture:
    """``capture``, whose temporary ``folder``, its own if None, is removed when it is garbage-collected."""
    weakref.finalize(capture, shutil.rmtree, folder or capture.path, ignore_errors=True)
    return capture


def _outside(old: Span, new: Span) -> list[Span]:
    """The parts of ``old`` that ``new`` does not cover."""
    old_end, new_end = old.position + old.length, new.position + new.length
    if new.position >= old_end or new_end <= old.position:
        return [old]
    rest = []
    if old.position < new.position:
        rest.append(Span(old.position, new.position - old.position, old.piece, old.row))
    if old_end > new_end:
        rest.append(Span(new_end, old_end - new_end, old.piece, old.row + new_end - old.position))
    return rest
