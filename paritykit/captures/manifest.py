"""The manifest of a capture: everything but the numbers. Torch-free.

A capture is a folder with ``manifest.json`` and safetensors files. Rows of a tensor are tokens; a *step* (one forward
pass) labels its rows once, by runs of (case, first position, length), and every tensor recorded in it refers to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from paritykit.case import Case
from paritykit.errors import CaptureFormatError
from paritykit.results import Side

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CACHE_PORTS = ("key_cache", "value_cache")
"""Ports of an attention module: its KV cache, ``[tokens, kv_heads, head_dim]``, keys after rotary."""


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """``length`` rows of one case (an index into the cases), at consecutive positions from ``start``."""

    case: int
    start: int
    length: int


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """The rows one step added to a point: tensor ``name`` in file ``file``, labelled by step ``step``."""

    file: int
    name: str
    step: int
    digest: str


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One captured tensor of one rank.

    ``axes`` labels the whole shape, ``tokens`` first; ``row`` is the shape of one row. ``port`` is empty for the
    module's output. ``call`` counts repeated calls of one module in one step. ``source`` is the key of the point whose
    very tensor this is (a module fed with another's output, a container returning its child's): same pieces.
    """

    module: str
    port: str = ""
    call: int = 0
    rank: int = 0
    kind: str = ""
    dtype: str
    row: list[int]
    axes: str = "tokens, features"
    source: str = ""
    pieces: list[Piece] = []

    @property
    def key(self) -> str:
        """The point's name: ``model.layers.3.mlp``, ``model.norm#input``, ``model.shared@1``."""
        return point_key(self.module, port=self.port, call=self.call)

    @property
    def inner(self) -> bool:
        """Whether it is something on the way inside the module: neither its input nor what it gives."""
        return self.port in CACHE_PORTS


class Dropped(msgspec.Struct, frozen=True):
    """A module output that could not be recorded, and why."""

    point: str
    reason: str


class DataFile(msgspec.Struct, frozen=True):
    """One safetensors file: its name in the folder and its size in bytes."""

    name: str
    bytes: int


class Part(msgspec.Struct, kw_only=True):
    """What one recording process (a rank) wrote: merged into a manifest by whoever started it.

    ``fed`` are the points that were replaced, see ``captures/feed.py``.
    """

    steps: list[list[Segment]] = []
    points: list[Point] = []
    files: list[DataFile] = []
    dropped: list[Dropped] = []
    fed: list[str] = []


class Manifest(msgspec.Struct, kw_only=True):
    """All of a capture but its tensors. ``facts`` is what the engine says of its modules, for mapping.

    ``generated`` holds the tokens produced after each case, by case id.
    """

    schema: int = SCHEMA_VERSION
    side: Side
    cases: list[Case]
    generated: dict[str, list[int]] = {}
    steps: list[list[Segment]] = []
    points: list[Point] = []
    files: list[DataFile] = []
    dropped: list[Dropped] = []
    facts: dict[str, Any] = {}
    digest: str = ""


def point_key(module: str, *, port: str = "", call: int = 0) -> str:
    """The name of a point: module path, ``@call`` from the second call on, ``#port`` unless it is the output.

    >>> point_key("model.norm", port="input")
    'model.norm#input'
    """
    return module + (f"@{call}" if call else "") + (f"#{port}" if port else "")


def split_key(key: str) -> tuple[str, str, int]:
    """Inverse of ``point_key``: (module, port, call)."""
    path, _, port = key.partition("#")
    module, _, call = path.partition("@")
    return module, port, int(call or 0)


def within(module: str, scope: str) -> bool:
    """Whether ``module`` is ``scope`` or lies under it; everything lies under the empty path."""
    return not scope or module == scope or module.startswith(f"{scope}.")


def leading_points(points: Iterable[Point]) -> dict[str, Point]:
    """The points by key, each as the lowest rank that has it recorded it, in order of execution.

    Ranks of one stage record the same points, and a later stage of a pipeline has the later ones.
    """
    found: dict[str, Point] = {}
    for point in sorted(points, key=lambda p: p.rank):
        found.setdefault(point.key, point)
    return found


def module_ranks(points: Iterable[Point]) -> dict[str, list[int]]:
    """Module path to the ranks that recorded it, in order: those that share it."""
    found: dict[str, set[int]] = {}
    for point in points:
        found.setdefault(point.module, set()).add(point.rank)
    return {module: sorted(ranks) for module, ranks in found.items()}


def merge_parts(parts: list[Part]) -> Part:
    """One part of many: steps and files renumbered, points kept per rank."""
    merged = Part()
    for part in parts:
        steps, files = len(merged.steps), len(merged.files)
        merged.steps += part.steps
        merged.files += part.files
        merged.dropped += [d for d in part.dropped if d not in merged.dropped]
        merged.points += [_shifted(p, steps=steps, files=files) for p in part.points]
    return merged


def _shifted(point: Point, *, steps: int, files: int) -> Point:
    moved = [Piece(p.file + files, p.name, p.step + steps, p.digest) for p in point.pieces]
    return msgspec.structs.replace(point, pieces=moved)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON, its ``digest`` field set to the sha256 of all the rest."""
    body = msgspec.json.encode(msgspec.structs.replace(manifest, digest=""), order="deterministic")
    signed = msgspec.structs.replace(manifest, digest=hashlib.sha256(body).hexdigest())
    return msgspec.json.encode(signed, order="deterministic")


class _SchemaOnly(msgspec.Struct):
    schema: int


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """The manifest in ``data``. Raises CaptureFormatError if it is damaged, altered, or of another schema."""
    try:
        schema = msgspec.json.decode(data, type=_SchemaOnly).schema
        if schema != SCHEMA_VERSION:
            raise CaptureFormatError(f"{where}: capture schema {schema}; this ParityKit reads schema {SCHEMA_VERSION}")
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CaptureFormatError(f"{where}: not a capture manifest: {error}") from error
    if encode_manifest(manifest) != data:
        raise CaptureFormatError(f"{where}: the manifest was altered after it was written (its digest does not match)")
    return manifest
