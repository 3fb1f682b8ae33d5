"""The search: every edit of the module to blame, held against the candidate, plainest first, within a time.

An edit is chosen by every second position and judged by the others. It is a cause where, of the difference there, less
than a tenth of the energy is left, and no other edit that gives other numbers leaves about as little.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paritykit.diagnose.edits.calls import call_edits
from paritykit.diagnose.edits.edit import Edit
from paritykit.diagnose.edits.parts import child_edits, parameter_edits, setting_edits
from paritykit.diagnose.edits.rerun import Rerun
from paritykit.diagnose.edits.sites import Watching
from paritykit.diagnose.trial import Bar, Trial, Tried

EXPLAINED = 0.9
"""Of the energy of a difference, what an edit must explain at least."""
SAME = 1e-4
"""Share of the difference by which two edits give the same numbers."""
FINAL = 6
"""Edits that are held against all positions: the best of the first look."""
LOOKED = 4 * FINAL
"""Edits whose rows are kept in a first look: some of them give the same numbers."""
REPRODUCED = 1e-3
"""Times the difference that there is: how near the module's own rows a run of it as it is must come."""


@dataclass(frozen=True)
class Explained:
    """An edit that was held against the candidate: ``left`` of the difference on positions it was not chosen by."""

    edit: Edit
    tried: Tried
    left: float
    rows: torch.Tensor

    @property
    def fits(self) -> bool:
        """Whether it is a cause."""
        return self.tried.fits and self.left**2 <= 1 - EXPLAINED


class Search:
    """Edits of one module, held against ``bar``: both sides' rows of all of ``cases``, one after the other."""

    def __init__(self, rerun: Rerun, bar: Bar, cases: Sequence[str], *, budget: float) -> None:
        self._rerun, self._bar, self._cases = rerun, bar, cases
        self._ends = time.monotonic() + budget
        self.tried = 0
        places = torch.arange(len(bar.judged))
        self._halves = bar.judged & (places % 2 == 0), bar.judged & (places % 2 == 1)

    def reproduces(self) -> bool:
        """Whether the module as it is gives the reference's rows."""
        apart = (self._rows(None) - self._bar.reference)[self._bar.judged].norm()
        return bool(apart <= REPRODUCED * self._bar.difference.norm())

    def best(self, edits: Iterator[Edit]) -> list[Explained]:
        """The edits that leave the least, best first; those that give the same numbers as a plainer one left out."""
        looked: list[tuple[float, Edit, torch.Tensor]] = []
        for edit in edits:
            if time.monotonic() > self._ends:
                break
            rows = self._attempt(edit)
            self.tried += 1
            if rows is not None:
                looked.append((self._left(rows, self._halves[0]), edit, rows))
                looked.sort(key=lambda x: (round(x[0], 6), -x[1].prior))
                del looked[LOOKED:]
        found: list[Explained] = []
        for _, edit, rows in looked:
            if len(found) < FINAL and not any(self._alike(rows, other.rows) for other in found):
                found.append(self._explained(edit, rows))
        return sorted(found, key=lambda e: -e.tried.weight)

    def _explained(self, edit: Edit, rows: torch.Tensor) -> Explained:
        lengths = [self._rerun.length(c) for c in self._cases]
        parts = dict(zip(self._cases, torch.split(rows, lengths), strict=True))
        tried = self._bar.hold(Trial(edit.label, lambda case: parts[case], prior=edit.prior))
        return Explained(edit, tried, self._left(rows, self._halves[1]), rows)

    def _attempt(self, edit: Edit) -> torch.Tensor | None:
        try:
            rows = self._rows(edit)
        except Exception:  # an edited module may fail with any error, and is no explanation then
            return None
        return rows if rows.shape == self._bar.reference.shape and bool(rows.isfinite().all()) else None

    def _rows(self, edit: Edit | None) -> torch.Tensor:
        rows = [self._rerun.rows(case, edit.enter() if edit else None) for case in self._cases]
        return torch.cat(rows).to(self._bar.reference.dtype)

    def _left(self, rows: torch.Tensor, which: torch.Tensor) -> float:
        whole = (self._bar.candidate - self._bar.reference)[which].norm()
        return float((self._bar.candidate - rows)[which].norm() / whole) if whole else 1.0

    def _alike(self, one: torch.Tensor, two: torch.Tensor) -> bool:
        judged = self._bar.judged
        return bool((one - two)[judged].norm() <= SAME * self._bar.difference.norm())


def edits_of(rerun: Rerun, module: nn.Module, case: str) -> Iterator[Edit]:
    """All edits of a module, the plainest kinds first; its calls are those that it makes on a case."""
    with Watching() as watching:
        rerun.rows(case)
    yield from child_edits(module)
    yield from call_edits(watching.calls, tokens=rerun.length(case))
    yield from parameter_edits(module)
    yield from setting_edits(module)
