"""What a check is, and what it may ask for. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from paritykit.comparison.tolerance import Tolerance, tolerance_for
from paritykit.diagnose.locate import Graph
from paritykit.ledger.subject import WeightSubject
from paritykit.results import Coverage, Finding, WeightRow

if TYPE_CHECKING:
    from paritykit.audit.notice import Audit
    from paritykit.captures.reader import Capture
    from paritykit.mapping.build import Mapping

LOGITS = "#logits"


class Subject:
    """Two captures, their mapping and the tolerances: all that checks look at.

    ``reference`` and ``candidate`` hold the same tokens (the candidate was fed the reference's). ``free``, asked for
    only by checks that need it, gives the tokens the candidate chose when left alone, by case id.
    """

    def __init__(
        self,
        *,
        reference: Capture,
        candidate: Capture,
        mapping: Mapping,
        tolerance: dict[str, float] | None = None,
        tolerance_source: str = "",
        free: Callable[[], dict[str, list[int]]] | None = None,
    ) -> None:
        self.reference = reference
        self.candidate = candidate
        self.mapping = mapping
        self.tolerance = tolerance or {}
        self.tolerance_source = tolerance_source
        self._free = free

    @cached_property
    def graph(self) -> Graph:
        """The reference's execution order and who fed whom."""
        return Graph(self.reference.manifest)

    @cached_property
    def routed_from(self) -> int | None:
        """Execution order of the reference's first MoE router; None in a dense model."""
        orders = [self.graph.order(p.key) for p in self.reference.manifest.points if "Router" in p.kind]
        return min(orders, default=None)

    @property
    def half_precision(self) -> bool:
        """Whether a side computes in fewer bits than float32."""
        sides = (self.reference.manifest.side, self.candidate.manifest.side)
        return any(s.dtype not in ("float32", "float64") for s in sides)

    def allowed(self, dtypes: tuple[str, str], *, order: int) -> Tolerance:
        """The tolerance of a point with these dtypes, at this place in execution order."""
        return tolerance_for(dtypes, depth=order, overrides=self.tolerance, source=self.tolerance_source)

    @cached_property
    def free_tokens(self) -> dict[str, list[int]] | None:
        """Tokens the candidate chose by itself, by case id; None where it was not run so."""
        return self._free() if self._free else None


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One question. ``run(subject, case_id)`` answers it for a case; ``cover(subject)`` says what it looked at.

    ``detects`` names the faults (see ``paritykit.testing``) that it must find.
    """

    name: str
    question: str
    run: Callable[[Subject, str], list[Finding]]
    cover: Callable[[Subject], Coverage]
    detects: tuple[str, ...] = ()


class ModelSubject:
    """A model as a whole, before it runs: all that model checks look at."""

    def __init__(self, *, weights: Callable[[], WeightSubject], audit: Callable[[], Audit]) -> None:
        self._weights = weights
        self._audit = audit

    @cached_property
    def weights(self) -> WeightSubject:
        """Where the candidate's loader put every weight."""
        return self._weights()

    @cached_property
    def audit(self) -> Audit:
        """What is wrong with the checkpoint's files and config."""
        return self._audit()


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a model check found."""

    coverage: Coverage
    findings: list[Finding]
    weights: list[WeightRow] = []


class ModelCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One question about the model as a whole, in no case.

    ``needs`` is what the candidate must be capable of; the check is skipped, and says so, where it is not.
    """

    name: str
    question: str
    run: Callable[[ModelSubject], Answer]
    needs: str = ""
    detects: tuple[str, ...] = ()


class InvarianceCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One question about an engine against itself: the same cases run in several ways. It may start engines anew.

    ``run`` gets a ``paritykit.invariance.laboratory.Laboratory``; ``looks`` are patterns of the points that show first
    whether there is a difference. ``beside`` is what it also asks of the captures of the reference and the candidate,
    case by case.
    """

    name: str
    question: str
    run: Callable[..., Answer]
    looks: tuple[str, ...] = (LOGITS,)
    beside: Callable[[Subject, str], list[Finding]] | None = None
    detects: tuple[str, ...] = ()
