"""What a check is, and what it may ask for. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from paritykit.captures.manifest import CACHE_PORTS, split_key
from paritykit.comparison.drawn import each_chance
from paritykit.comparison.policy import Policy, find_policy
from paritykit.comparison.tolerance import Tolerance, coarser, flat, is_half, tolerance_for
from paritykit.diagnose.locate import Graph
from paritykit.ledger.subject import WeightSubject
from paritykit.results import Coverage, Finding, WeightRow

if TYPE_CHECKING:
    from paritykit.audit.notice import Audit
    from paritykit.captures.reader import Capture
    from paritykit.comparison.ensemble import Ensemble
    from paritykit.comparison.routing import Rerouted
    from paritykit.errors import EngineError
    from paritykit.mapping.build import Mapping
    from paritykit.mapping.rules import Rule

LOGITS = "#logits"


class Subject:
    """Two captures, their mapping and the tolerances: all that checks look at.

    ``reference`` and ``candidate`` hold the same tokens (the candidate was fed the reference's). ``free``, asked for
    only by checks that need it, gives the tokens the candidate chose when left alone, by case id.

    ``twin`` is the reference again, in the candidate's dtype: with it, ``reference`` is the truth that both are held
    against, and ``ensemble`` is what draws of the twin's rounding do. ``no_floor`` says why there is none.
    ``policies`` are the project's own allowed numbers. ``replayed``: modules are replayed where a point fails.
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
        twin: Capture | None = None,
        no_floor: str = "",
        policies: list[Policy] | None = None,
        ensemble: Ensemble | None = None,
        replayed: bool = False,
    ) -> None:
        self._looks = 2 if replayed else 1
        self.reference = reference
        self.candidate = candidate
        self.mapping = mapping
        self.tolerance = tolerance or {}
        self.tolerance_source = tolerance_source
        self._free = free
        self._policies = policies or []
        self.twin, self._no_floor = _fitting(twin, candidate, no_floor)
        self.ensemble = ensemble if self.twin is not None else None
        self.local = False
        """Whether the ensemble was fed as the candidate was."""
        self.twin_errors: dict[str, float] = {}
        self.flips: dict[str, Rerouted] = {}

    def again(
        self, candidate: Capture, *, flips: dict[str, Rerouted] | None = None, ensemble: Ensemble | None = None
    ) -> Subject:
        """The same beside another capture of the candidate, not left alone; ``flips`` if they are known.

        ``ensemble`` was run as this capture was; None: as the first.
        """
        found = Subject(
            reference=self.reference,
            candidate=candidate,
            mapping=self.mapping,
            tolerance=self.tolerance,
            tolerance_source=self.tolerance_source,
            twin=self.twin,
            no_floor=self._no_floor,
            policies=self._policies,
            ensemble=ensemble or self.ensemble,
            replayed=self._looks == 2,
        )
        found.local = ensemble is not None
        found.flips, found.twin_errors = flips or {}, self.twin_errors
        return found

    def luck(self, point: str) -> float:
        """The chance of a false alarm that each number of a point may take, so that a run keeps ``RUN_CHANCE``.

        What the model gives and keeps is held to it alone; a point on the way is looked at twice where it is replayed.
        """
        gives = split_key(point)[1] in CACHE_PORTS or point == LOGITS
        return each_chance(len(self.mapping.rules) * len(self.reference.cases), looks=1 if gives else self._looks)

    @cached_property
    def graph(self) -> Graph:
        """The reference's execution order and who fed whom."""
        return Graph(self.reference.manifest)

    def dtypes(self, rule: Rule) -> tuple[str, str]:
        """The dtypes of a rule's point, the reference's first."""
        return self.reference.point(rule.reference).dtype, self.candidate.point(rule.candidate).dtype

    @property
    def half_precision(self) -> bool:
        """Whether a side computes in fewer bits than float32."""
        sides = (self.reference.manifest.side, self.candidate.manifest.side)
        return any(is_half(s.dtype) for s in sides)

    def allowed(self, dtypes: tuple[str, str], *, order: int, policy: Policy | None = None) -> Tolerance:
        """The tolerance of a point with these dtypes, at this place in execution order, where no floor judges it."""
        if policy is not None and policy.tolerance is not None:
            return flat(policy.tolerance, policy.note)
        return tolerance_for(
            dtypes,
            depth=order,
            overrides=self.tolerance,
            source=self.tolerance_source,
            reason=self._no_floor,
        )

    def policy(self, point: str, dtypes: tuple[str, str], *, check: str) -> Policy | None:
        """What the project says of a point, if anything."""
        return find_policy(self._policies, point=point, dtype=coarser(dtypes), check=check)

    def floor_judges(self, dtypes: tuple[str, str], policy: Policy | None) -> bool:
        """Whether a point is judged by its noise floor: where there is a twin, and no number was given in its place."""
        given = policy.tolerance is not None if policy is not None else coarser(dtypes) in self.tolerance
        return self.twin is not None and not given

    @cached_property
    def free_tokens(self) -> dict[str, list[int]] | None:
        """Tokens the candidate chose by itself, by case id; None where it was not run so."""
        return self._free() if self._free else None


def _fitting(twin: Capture | None, candidate: Capture, reason: str) -> tuple[Capture | None, str]:
    """The twin if it is in the candidate's dtype; otherwise none, and why."""
    if twin is None:
        return None, reason
    ours, theirs = twin.manifest.side.dtype, candidate.manifest.side.dtype
    if ours == theirs:
        return twin, ""
    return None, f"the reference's twin ran in {ours}, the candidate in {theirs}"


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


class ReferenceSubject:
    """The reference alone: its truth, its twin, and other ways to run it in the twin's dtype.

    ``variants`` gives each of these with its name, or with the error that ended it; asked for only beside a twin.
    """

    def __init__(
        self,
        *,
        truth: Capture,
        twin: Capture | None,
        variants: Callable[[], Iterator[tuple[str, Capture | EngineError]]],
        no_floor: str = "",
    ) -> None:
        self.truth = truth
        self.twin = twin
        self.variants = variants
        self.no_floor = no_floor


class ReferenceCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One question about the reference alone. It runs the reference in other ways."""

    name: str
    question: str
    run: Callable[[ReferenceSubject], Answer]
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
