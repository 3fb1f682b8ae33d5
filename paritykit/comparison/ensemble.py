"""The ensemble: what several draws of the reference's own rounding do at each point, as sums of rows and channels.

Each draw is the reference in the candidate's dtype with its roundings drawn anew. Its tensors are measured against the
truth while it runs and not kept: of each point and case there are, for every draw, a row's squared error and its dot
with the truth, and of channels what the judge goes by. On disk: one JSON index and one safetensors file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save_file

from paritykit.captures.feed import Feed
from paritykit.comparison.noise import LEAST_ROW, Floats, scales_of, share_of
from paritykit.errors import CaptureFormatError

SAME = 1e-4
"""Sums of squares are kept to about six digits: draws that are nearer than this are one draw."""
RECIPE = 4
"""Version of the way roundings are drawn: part of the name under which an ensemble is kept."""
INDEX, TENSORS = "ensemble.json", "ensemble.safetensors"
PARTS = ("rows", "channel", "numbers")


class DrawPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a reference's rounding is drawn anew: so many ``draws``, the same ones for the same ``seed``.

    With ``feed`` modules go on with what that gives; ``cache`` is the dtype in which keys and values are kept, one of 8
    bits, or empty where they are kept as they are.
    """

    draws: int = 8
    """The more, the surer is how far numbers scatter, and as many times the reference's own computation."""
    seed: int = 0
    feed: Feed | None = None
    cache: str = ""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A point of a case, and the number of its tensors in the file."""

    case: str
    point: str
    number: int


class Index(msgspec.Struct, frozen=True):
    """What a folder holds. ``draws`` is how many there are of every point."""

    draws: int
    seed: int
    dtype: str
    entries: list[Entry]
    schema: int = 1


@dataclass(frozen=True)
class PointDraws:
    """One point of one case.

    ``truth`` ``[tokens]`` squares of the truth's rows; ``squares`` and ``dots`` ``[draws, tokens]`` of each draw's
    errors, and their dots with the truth. ``channel`` ``[features]``: root mean square over the draws of each channel's
    relative error. ``numbers`` ``[3, draws]``: by how much a draw's worst channel is beyond what the others do there,
    and its ``channel_scale`` and ``channel_bias`` (see ``Spread``).
    """

    truth: Floats
    squares: Floats
    dots: Floats
    channel: Floats
    numbers: Floats

    @property
    def draws(self) -> int:
        """How many."""
        return len(self.squares)

    def select(self, places: Sequence[int]) -> PointDraws:
        """The same of some positions; channels stay those of all."""
        return PointDraws(self.truth[places], self.squares[:, places], self.dots[:, places], self.channel, self.numbers)

    @property
    def differ(self) -> bool:
        """Whether they do: where nothing before was a product, no rounding was drawn anew."""
        return bool(np.ptp(self.squares, axis=0).max() > SAME * self.squares.max())

    @property
    def whole(self) -> Floats:
        """Each draw's whole relative error, ``[draws]``."""
        found: Floats = np.sqrt(self.squares.sum(1)) / self._size
        return found

    @property
    def scale(self) -> Floats:
        """Each draw's constant factor, signed, ``[draws]``."""
        total = float(self.truth.sum())
        found: Floats = self.dots.sum(1) / total if total else np.zeros(self.draws)
        return found

    @property
    def row_scale(self) -> Floats:
        """The norm of what of each draw's error is a factor of each row's own, ``[draws]``."""
        return np.array([share_of(d, self.truth) for d in self.dots]) / self._size

    @property
    def row(self) -> Floats:
        """Each draw's relative error of each row, ``[draws, tokens]``."""
        found: Floats = np.sqrt(self.squares) / scales_of(self.truth, least=LEAST_ROW)
        return found

    @property
    def _size(self) -> float:
        return float(np.sqrt(self.truth.sum())) or 1.0


class Ensemble:
    """What a folder holds, read as it is asked for."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index
        self._numbers = {(e.case, e.point): e.number for e in index.entries}
        self._file = _open_tensors(path / TENSORS)

    @classmethod
    def open(cls, path: Path) -> Ensemble:
        """The ensemble in a folder. Raises CaptureFormatError where it is damaged, or none."""
        try:
            index = msgspec.json.decode((path / INDEX).read_bytes(), type=Index)
        except (OSError, msgspec.MsgspecError) as error:
            raise CaptureFormatError(f"{path} holds no ensemble: {error}") from error
        return cls(path, index)

    @property
    def draws(self) -> int:
        """How many there are of every point."""
        return self.index.draws

    def at(self, point: str, case: str) -> PointDraws | None:
        """What the draws do at a point of a case; None where it was not measured."""
        number = self._numbers.get((case, point))
        if number is None:
            return None
        rows, channel, numbers = (
            np.asarray(self._file.get_tensor(f"{number}.{part}"), dtype=np.float64) for part in PARTS
        )
        count = (len(rows) - 1) // 2
        return PointDraws(rows[0], rows[1 : 1 + count], rows[1 + count :], channel, numbers)


Draw = Callable[[Feed, list[str]], Ensemble | None]
"""Draws of the reference's rounding on some cases, fed: None where they cannot be had."""


class EnsembleWriter:
    """Collects points and writes them, the index last."""

    def __init__(self) -> None:
        self._tensors: dict[str, Floats] = {}
        self._entries: list[Entry] = []

    def add(self, draws: PointDraws, *, point: str, case: str, also: Sequence[str] = ()) -> None:
        """Add a point; ``also`` are other names of the very same tensor."""
        number = len(self._tensors) // len(PARTS)
        self._entries += [Entry(case, name, number) for name in (point, *also)]
        rows = np.concatenate([draws.truth[None], draws.squares, draws.dots])
        parts = rows, draws.channel.astype(np.float32), draws.numbers
        for name, part in zip(PARTS, parts, strict=True):
            self._tensors[f"{number}.{name}"] = np.ascontiguousarray(part)

    def write(self, folder: Path, *, draws: int, seed: int, dtype: str) -> None:
        """Write into ``folder``, which is there. Raises OSError."""
        save_file(self._tensors, folder / TENSORS)
        index = Index(draws=draws, seed=seed, dtype=dtype, entries=self._entries)
        (folder / INDEX).write_bytes(msgspec.json.encode(index))


def _open_tensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise CaptureFormatError(f"{path} is damaged: {error}") from error
