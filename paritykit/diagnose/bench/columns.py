"""Features of one side found again among those of the other: rows of a weight that changed their places."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paritykit.captures.manifest import point_key
from paritykit.diagnose.scene import Scene

LARGEST = 1 << 28
"""Pairs of features that are compared at most."""
ROWS = 4
"""Positions that it takes to tell features apart."""
TELLING = 64
"""Positions that are enough for it."""
ALIKE = 8.0
"""A feature is found where it differs by less than this many times what is allowed."""


@dataclass(frozen=True)
class Columns:
    """For each feature of the candidate at the scene's point, which one of ``pool`` it is; -1 for none.

    The pool is the module's own features, then those of its siblings, ``names`` and ``widths`` in that order.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    places: torch.Tensor

    @property
    def found(self) -> bool:
        """Whether every feature was found, and not all of them in their own place."""
        own = torch.arange(len(self.places))
        return bool((self.places >= 0).all() and (self.places != own).any())

    @property
    def strange(self) -> bool:
        """Whether some are a sibling's."""
        return bool((self.places >= self.widths[0]).any())

    def moves_blocks(self, count: int) -> bool:
        """Whether each of ``count`` equal parts moved as a whole: a stretch of the pool, unbroken."""
        if count < 2 or len(self.places) % count:
            return False
        parts = self.places.reshape(count, -1)
        return bool((parts.diff(dim=1) == 1).all())

    def predict(self, scene: Scene, case: str) -> torch.Tensor:
        """The reference's features in the candidate's order."""
        pool = torch.cat([scene.reference(n, case) for n in self.names], dim=1)
        return pool[:, self.places]

    def words(self) -> str:
        """What moved where, in a few words."""
        own = torch.arange(len(self.places))
        moved = (self.places != own).nonzero().flatten()
        first = int(moved[0])
        place, text = int(self.places[first]), f"{len(moved)} of {len(self.places)} features in other places"
        name = self.names[0]
        for name, width in zip(self.names, self.widths, strict=True):  # noqa: B007  (the one it ends at is used)
            if place < width:
                break
            place -= width
        whose = "" if name == self.names[0] else f" of {name.rpartition('.')[2]}"
        return f"{text} (feature {first} is feature {place}{whose})"


def siblings(scene: Scene) -> list[str]:
    """Modules beside the scene's that are of its kind and were fed with the same tensor."""
    parent, own = scene.module.rpartition(".")[0], scene.points.get(point_key(scene.module, port="input"))
    if own is None:
        return []
    found = []
    for key, point in scene.points.items():
        alike = point.port == "input" and point.source and point.source == own.source and point.call == 0
        beside = point.module.rpartition(".")[0] == parent and point.module != scene.module
        if alike and beside and key != own.key and point.module in scene.points and point.kind == own.kind:
            found.append(point.module)
    return found


def in_attention(scene: Scene) -> bool:
    """Whether the module around the scene's caches keys."""
    return point_key(scene.module.rpartition(".")[0], port="key_cache") in scene.points


def columns_of(scene: Scene) -> Columns | None:
    """Where the candidate's features are among the reference's; None where that is too much to look for.

    A first look that had positions enough has found them for all.
    """
    if "columns" not in scene.fits:
        return scene.once("columns", lambda: _columns_of(scene))
    found: Columns = scene.fits["columns"]
    return found


def _columns_of(scene: Scene) -> Columns | None:
    if scene.port or scene.point not in scene.points:
        return None
    names = (scene.point, *siblings(scene))
    widths = tuple(scene.width(n) for n in names)
    if widths[0] * sum(widths) > LARGEST:
        return None
    ours = torch.cat([torch.cat([scene.reference(n, c) for n in names], dim=1) for c in scene.cases]).double()
    theirs = torch.cat([scene.candidate(scene.point, c) for c in scene.cases]).double()
    rows = theirs.isfinite().all(1)
    if int(rows.sum()) < ROWS:
        return None
    ours, theirs = ours[rows][:TELLING], theirs[rows][:TELLING]
    sizes = ours.norm(dim=0)
    limit = ALIKE * scene.allowed.whole * float(sizes.pow(2).mean().sqrt())
    squares = theirs.pow(2).sum(0)[:, None] + sizes.pow(2)[None] - 2 * theirs.T @ ours
    nearest = squares.argmin(1)
    own = torch.arange(widths[0])
    stays = (theirs - ours[:, : widths[0]]).norm(dim=0) <= limit
    nearest = torch.where(stays, own, nearest)
    error = (theirs - ours[:, nearest]).norm(dim=0)
    found = Columns(names, widths, torch.where(error <= limit, nearest, -1))
    if len(ours) == TELLING:
        scene.fits["columns"] = found
    return found
