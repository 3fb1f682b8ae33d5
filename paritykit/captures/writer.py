"""Writing captures: a part for each recording process, and the folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

import msgspec
import torch

from paritykit.captures.manifest import (
    MANIFEST,
    Dropped,
    Manifest,
    Part,
    Piece,
    Point,
    Segment,
    encode_manifest,
    merge_parts,
    point_key,
)
from paritykit.captures.stream import DTYPE_CODES, TensorStream, digest_tensor
from paritykit.errors import EngineError, UsageError


class PartWriter:
    """Records one process's tensors into ``folder``. Memory: one tensor at a time and a fixed buffer.

    As a context manager it closes its files whatever happens.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self._stream = TensorStream(folder, prefix=f"rank{rank}")
        self._rank = rank
        self._points: dict[str, Point] = {}
        self._part = Part()
        self._dropped: dict[str, tuple[str, str]] = {}

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.abandon()

    def step(self, segments: list[Segment]) -> int:
        """Begin a forward pass whose rows are labelled by ``segments``; returns its number."""
        self._part.steps.append(segments)
        return len(self._part.steps) - 1

    def record(self, tensor: torch.Tensor, *, module: str, port: str, call: int, kind: str, axes: str) -> None:
        """Write ``tensor``, ``[tokens, ...]`` of the current step, as a piece of its point. Raises OSError.

        What is seen twice under one name in one step (by a hook and by a wrapped function) counts once.
        """
        dtype, row = str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:])
        if tensor.dtype not in DTYPE_CODES:
            self.drop(module, port, f"tensors of {dtype} cannot be stored")
            return
        new = Point(
            module=module, port=port, call=call, rank=self._rank, kind=kind, dtype=dtype, row=row, axes=axes, pieces=[]
        )
        point = self._point(new)
        if point is not None and not self._now(point):
            step = len(self._part.steps) - 1
            name = f"{point.key}|{step}"
            file, digest = self._stream.append(name, tensor)
            point.pieces.append(Piece(file, name, step, digest))

    def holds(self, source: str, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` has the bytes that this step recorded as ``source``; True where that was left out."""
        origin = self._points.get(source)
        found = self._now(origin) if origin is not None else []
        return not found or found[0].digest == digest_tensor(tensor)

    def alias(self, source: str, *, module: str, port: str, call: int, kind: str) -> None:
        """Say that this point is the very tensor last recorded as ``source``; nothing is written twice."""
        origin = self._points.get(source)
        found = self._now(origin) if origin is not None else []
        if origin is None or not found:
            self.drop(module, port, f"it is the same tensor as {source}, which was left out")
            return
        new = msgspec.structs.replace(origin, module=module, port=port, call=call, kind=kind, source=source, pieces=[])
        point = self._point(new)
        if point is not None and not self._now(point):
            point.pieces.extend(found)

    def _point(self, new: Point) -> Point | None:
        """The point of this name, ``new`` itself at first; None, and dropped, where its rows are of another kind."""
        point = self._points.setdefault(new.key, new)
        if (point.dtype, point.row) == (new.dtype, new.row):
            return point
        change = f"{point.dtype} {point.row} to {new.dtype} {new.row}"
        self.drop(new.module, new.port, f"its rows changed from {change} between steps")
        return None

    def _now(self, point: Point) -> list[Piece]:
        """The piece that the current step added to ``point``, if it did."""
        last = point.pieces[-1:]
        return last if last and last[0].step == len(self._part.steps) - 1 else []

    def drop(self, module: str, port: str, reason: str) -> None:
        """Leave a point out, all its calls, with the reason; what it had is forgotten."""
        self._dropped.setdefault(point_key(module, port=port), (module + "#" + port, reason))

    def finish(self) -> Part:
        """Close the files. Returns what was written, to be merged by ``CaptureFolder.commit``."""
        self._stream.close()
        gone = {name for name, _ in self._dropped.values()}
        self._part.files = self._stream.files
        self._part.points = [p for p in self._points.values() if f"{p.module}#{p.port}" not in gone]
        self._part.dropped = [Dropped(key, reason) for key, (_, reason) in self._dropped.items()]
        return self._part

    def abandon(self) -> None:
        """Close the files as they are."""
        self._stream.abandon()


class CaptureFolder:
    """A capture in the making: a hidden folder beside ``target``, renamed to it by ``commit``, removed otherwise."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.parent / f".{target.name}.{os.getpid()}.partial"

    def __enter__(self) -> CaptureFolder:
        if self.target.exists():
            raise UsageError(f"{self.target} exists already; remove it or choose another folder")
        try:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self.target.parent}: {error.strerror or error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise EngineError(
                f"capture to {self.target} failed, nothing was kept: {error.strerror or error}"
            ) from error

    def commit(self, manifest: Manifest, parts: list[Part]) -> Path:
        """Merge ``parts`` into ``manifest``, write it last, and rename the folder to its target."""
        whole = merge_parts(parts)
        manifest = msgspec.structs.replace(
            manifest, steps=whole.steps, points=whole.points, files=whole.files, dropped=whole.dropped
        )
        with (self.path / MANIFEST).open("wb") as file:
            file.write(encode_manifest(manifest))
            file.flush()
            os.fsync(file.fileno())
        self.path.rename(self.target)
        return self.target
