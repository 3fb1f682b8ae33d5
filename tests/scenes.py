"""Scenes of captures that are made up, for tests of causes."""

from __future__ import annotations

from pathlib import Path

import torch

from paritykit.captures.manifest import Segment
from paritykit.case import Case
from paritykit.comparison.tolerance import Tolerance
from paritykit.diagnose.scene import Scene
from paritykit.mapping.rules import Rule
from tests.made import write_capture

ALLOWED = Tolerance(1e-5, 8e-5, "test")
TOKENS = 12


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Points = dict[str, torch.Tensor]


def scene_of(
    folder: Path, point: str, ours: Points, theirs: Points, *, rows: int = TOKENS, floor: float = 0.0
) -> Scene:
    """A scene of one case whose captures hold these tensors; ``rows`` below ``TOKENS`` are its last positions.

    Beside a noise ``floor`` twice that is allowed.
    """
    cases = [Case(id="a", tokens=tuple(range(TOKENS)))]

    def steps(points: Points) -> list[tuple[list[Segment], Points]]:
        late = {k: t for k, t in points.items() if len(t) < TOKENS}
        made = [([Segment(0, 0, TOKENS)], {k: t for k, t in points.items() if k not in late})]
        return made + ([([Segment(0, TOKENS - rows, rows)], late)] if late else [])

    rules = {k: Rule(reference=k, candidate=k) for k in theirs}
    return Scene(
        reference=write_capture(folder / "ours", steps(ours), cases=cases),
        candidate=write_capture(folder / "theirs", steps(theirs), cases=cases),
        rules=rules,
        point=point,
        located=point,
        cases=["a"],
        allowed=Tolerance(2 * floor, 6 * floor, "test") if floor else ALLOWED,
        floor=floor,
    )
