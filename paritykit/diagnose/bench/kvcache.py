"""What a cache that differs holds: for each wrong position, whose key or value it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paritykit.diagnose.scene import Scene

SAME = 0.1
"""A row is another one where it differs by less than this many times what is allowed at a position, or what is."""
NEAR = 0.7
"""Of a row's size, how far another may be off to be that row, changed, and not what was never written."""


@dataclass(frozen=True)
class Held:
    """What the candidate's cache holds in one case.

    ``wrong`` and ``near`` (still more like the right row than like nothing), bool ``[positions]``; ``case`` and
    ``position`` ``[positions]`` of the reference's row that is found there, -1 where none is: an index into ``names``.
    """

    names: tuple[str, ...]
    own: int
    wrong: torch.Tensor
    near: torch.Tensor
    case: torch.Tensor
    position: torch.Tensor

    @property
    def found(self) -> torch.Tensor:
        """Wrong positions whose content is another one's."""
        return self.wrong & (self.case >= 0)

    @property
    def lost(self) -> torch.Tensor:
        """Wrong positions that hold what no position of any case has, nor anything near the right row."""
        return self.wrong & (self.case < 0) & ~self.near

    @property
    def moved(self) -> torch.Tensor:
        """Positions that hold another position of the same case."""
        return self.found & (self.case == self.own)

    @property
    def foreign(self) -> torch.Tensor:
        """Positions that hold another case's."""
        return self.found & (self.case != self.own)


def held_by(scene: Scene) -> dict[str, Held]:
    """What the cache holds at the scene's point, for every case; empty where the point is no cache."""
    return scene.once("held", lambda: _held(scene))


def _held(scene: Scene) -> dict[str, Held]:
    if scene.port not in ("key_cache", "value_cache"):
        return {}
    names = tuple(scene.reference_capture.cases)
    pool = torch.cat([scene.reference(scene.point, c) for c in names])
    case_of = torch.cat([torch.full((scene.length(c),), n) for n, c in enumerate(names)])
    place_of = torch.cat([torch.arange(scene.length(c)) for c in names])
    found = {}
    for case in scene.cases:
        ours, theirs = scene.reference(scene.point, case), scene.candidate(scene.point, case)
        there = scene.present(scene.point, case)
        usual = float(ours.norm(dim=1).pow(2).mean().sqrt())
        limit = scene.allowed.position * usual
        wrong = there & ~((theirs - ours).norm(dim=1) <= limit)
        rows = theirs.nan_to_num(nan=torch.inf)
        distance = torch.full((len(ours),), torch.inf, dtype=ours.dtype)
        nearest = torch.zeros(len(ours), dtype=torch.long)
        for p in wrong.nonzero().flatten().tolist():
            distance[p], nearest[p] = (pool - rows[p]).norm(dim=1).min(0)
        known = wrong & (distance <= limit)
        held = [torch.where(known, values[nearest], -1) for values in (case_of, place_of)]
        near = (theirs - ours).norm(dim=1) <= NEAR * ours.norm(dim=1)
        found[case] = Held(names, names.index(case), wrong, near, held[0], held[1])
    return found


def content(scene: Scene, held: dict[str, Held], case: str) -> torch.Tensor:
    """The reference's rows that the cache holds; NaN where it holds none of them."""
    mine = held[case]
    rows = scene.reference(scene.point, case).clone()
    for p in mine.found.nonzero().flatten().tolist():
        rows[p] = scene.reference(scene.point, mine.names[int(mine.case[p])])[int(mine.position[p])]
    rows[mine.lost] = torch.nan
    return rows


def block_size(scene: Scene) -> int:
    """Positions in a block of the candidate's cache; 0 where it says none."""
    told = scene.candidate_capture.manifest.side.args.get("block_size", "")
    return int(told) if told.isdigit() else 0


def prefix_caching(scene: Scene) -> bool:
    """Whether the candidate says that it keeps blocks of earlier requests."""
    return scene.candidate_capture.manifest.side.args.get("enable_prefix_caching", "").lower() in ("true", "1")


def shared_prefix(scene: Scene, case: str) -> int:
    """How many tokens a case has in common with the beginning of one before it."""
    best = 0
    mine = scene.tokens(case)
    for other in scene.reference_capture.cases:
        if other == case:
            break
        theirs = scene.tokens(other)
        size = min(len(mine), len(theirs))
        same = (mine[:size] == theirs[:size]).long().cumprod(0)
        best = max(best, int(same.sum()))
    return best


def was_interrupted(scene: Scene, case: str) -> bool:
    """Whether other cases went on in steps between the first and the last that the candidate computed this one in."""
    capture = scene.candidate_capture
    index = [c.id for c in capture.manifest.cases].index(case)
    own = [any(s.case == index and s.start for s in segments) for segments in capture.manifest.steps]
    if sum(own) < 2:
        return False
    first, last = own.index(True), len(own) - 1 - own[::-1].index(True)
    return not all(own[first : last + 1])


def earlier(scene: Scene, case: str, other: str) -> bool:
    """Whether ``other`` was over before ``case`` began."""
    cases = scene.reference_capture.cases
    return cases[other].batch < cases[case].batch
