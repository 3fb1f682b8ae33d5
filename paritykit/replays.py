"""Replaying the candidate: it runs again with the reference's values put in, and what it makes of them is judged."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.checks.base import Subject
from paritykit.checks.measured import measure_point
from paritykit.comparison.ensemble import Draw, Ensemble
from paritykit.comparison.readings import kind_of
from paritykit.comparison.routing import find_routers
from paritykit.diagnose.replay import Descent, Look, Place, Replayed, expose, refine
from paritykit.diagnose.slices import find_slices
from paritykit.diagnose.tree import Tree
from paritykit.engines.base import Progress
from paritykit.errors import ParityError
from paritykit.mapping.feeding import can_feed, make_feed
from paritykit.mapping.rules import Rule
from paritykit.meanings import measured_anew, read_alone
from paritykit.results import Finding, Local

CHECKS = ("modules", "logits")
"""Whose findings are about points that can be replayed."""
POSITIONS = 64
"""A local error says no more on many rows than on some, and draws cost eight passes: two of the smoke cases fit."""
UNMAPPED = ("shape", "mapping")
"""Failures that no number was measured for."""


class Replays:
    """Local errors for the findings of a subject, from further runs of ``engine``, which is open; each case once.

    ``draw`` runs draws of the reference's rounding, fed as the engine is: what these do is the local noise floor.
    """

    def __init__(
        self, subject: Subject, engine: Any, *, draw: Draw | None = None, progress: Progress | None = None
    ) -> None:
        self._subject, self._engine, self._draw, self._progress = subject, engine, draw, progress
        self._rules = {r.reference: r for r in subject.mapping.rules}
        self._known: dict[str, Replayed] = {}
        self._everywhere: dict[tuple[str, ...], Replayed] = {}

    @property
    def done(self) -> frozenset[str]:
        """The cases that were replayed to the end."""
        return frozenset(case for case, found in self._known.items() if found.local)

    def explain(self, findings: list[Finding]) -> list[Finding]:
        """``findings`` with local errors where a case failed; as they are where the engine cannot replay.

        A replay that fails costs none of them: the first failure says why it has no local error.
        """
        if "replay" not in self._engine.capabilities:
            return findings
        mine = [f for f in findings if f.check in CHECKS]
        failing = [f for f in mine if f.verdict == "fail" and f.metric not in UNMAPPED]
        cases = [c for c in dict.fromkeys(f.case for f in failing) if c not in self._known]
        try:
            if cases:
                replayed = self._descent(cases, mine).replay()
                anew = self._read_anew(replayed.doubted, cases) if replayed.doubted else []
                if anew:
                    findings = measured_anew(self._subject, findings, anew)
                    replayed = self._descent(cases, [f for f in findings if f.check in CHECKS]).replay()
                self._known |= dict.fromkeys(cases, replayed)
        except ParityError as error:
            self._known |= dict.fromkeys(cases, Replayed())
            return [_unmeasured(f, str(error)) if f is failing[0] else f for f in findings]
        return [
            refine([f], self._known[f.case])[0] if f.check in CHECKS and f.case in self._known else f for f in findings
        ]

    def explain_all(self, findings: list[Finding], *, cases: Sequence[str]) -> list[Finding]:
        """``findings`` with the local error of every point of these cases, from one run, if the engine can replay.

        They run without the others that were in a batch with them. What is wrong on the reference's own values fails,
        though what it was handed in the free run hides it. Raises EngineError if the engine did not run.
        """
        if "replay" not in self._engine.capabilities:
            return findings
        key = tuple(cases)
        if key not in self._everywhere:
            todo = [self._subject.candidate.cases[c] for c in cases]
            self._everywhere[key] = self._descent(cases, [], todo=todo).replay_all()
        return [expose(f) for f in refine(findings, self._everywhere[key])]

    def _read_anew(self, doubted: Collection[str], cases: Sequence[str]) -> list[str]:
        """Those for which a reading fits what the candidate makes of them where all others are the reference's.

        They are held against the noise floor of the free run: another point that is read with them rounds by itself.
        The mapping has what was found.
        """
        kinds = set(map(kind_of, doubted))
        others = [k for k in self._rules if kind_of(k) not in kinds]
        with self._fed(others, None, with_neighbours(self._subject.candidate, cases)) as capture:
            found = read_alone(self._subject.again(capture), kinds, cases)
        self._rules = {r.reference: r for r in self._subject.mapping.rules}
        return found

    def _descent(self, cases: Sequence[str], free: Iterable[Finding], *, todo: list[Case] | None = None) -> Descent:
        """Of these cases, which run with their neighbours, or as ``todo`` has them."""
        graph = self._subject.graph
        todo = todo or with_neighbours(self._subject.candidate, cases)
        return Descent(
            graph=graph,
            tree=Tree(self._subject.reference.manifest),
            points=sorted(self._rules, key=graph.order),
            free=[f for f in free if f.case in cases],
            run=lambda replaced, shown: self._look(replaced, shown, todo, cases),
        )

    def _look(self, replaced: Sequence[str], shown: Sequence[str], todo: list[Case], cases: Sequence[str]) -> Look:
        routers = [r.key for r in find_routers(self._subject.reference.manifest) if r.key in self._rules]
        points = [p for k in (*shown, *routers) for p in self._rules[k].points]
        with self._fed(replaced, points, todo) as capture:
            done = set(capture.manifest.facts["fed"])
            whole = [k for k in replaced if can_feed(self._rules[k]) and self._rules[k].candidate in done]
            found = self._measured(capture, shown, cases, replaced=whole)
        return Look(found, frozenset(whole))

    @contextmanager
    def _fed(self, replaced: Sequence[str], points: list[str] | None, todo: list[Case]) -> Iterator[Capture]:
        """A capture of ``points`` (None: all) where those of the reference's that can be are put in; then removed."""
        subject = self._subject
        feed = make_feed(
            (self._rules[k] for k in replaced),
            reference=subject.reference.manifest,
            folder=subject.reference.path,
            candidate=subject.candidate.manifest,
        )
        if self._progress:
            self._progress("replaying", 0, 0)
        with tempfile.TemporaryDirectory(prefix="paritykit-replay-") as folder:
            out, selection = Path(folder) / "capture", Selection(points)
            yield self._engine.run(todo, points=selection, out=out, progress=self._progress, feed=feed)

    def _drawn(self, replaced: Sequence[str], cases: Sequence[str]) -> Ensemble | None:
        """What the draws do where these points of the reference's are its true values."""
        if self._draw is None:
            return None
        manifest = self._subject.reference.manifest
        own = [Rule(reference=k, candidate=k) for k in replaced]
        feed = make_feed(own, reference=manifest, folder=self._subject.reference.path, candidate=manifest)
        return self._draw(feed, list(cases))

    def _measured(
        self, capture: Capture, shown: Sequence[str], cases: Sequence[str], *, replaced: Sequence[str]
    ) -> dict[Place, Finding]:
        subject = self._subject
        again = subject.again(capture, ensemble=self._drawn(replaced, cases))
        plain = subject.again(capture)  # a reading rounds by itself, and no draw does so where its point was fed
        orders = sorted(subject.graph.order(k) for k in replaced)
        found = {}
        for key in (k for k in shown if self._rules[k].candidate in capture.points):
            order = subject.graph.order(key)
            depth = order - max((o for o in orders if o < order), default=0)
            for case in cases:
                rule = self._rules[key]
                found[case, key] = self._sliced(
                    measure_point(plain if rule.made else again, rule, case, check="replay", depth=depth), capture
                )
        return found

    def _sliced(self, finding: Finding, capture: Capture) -> Finding:
        """``finding`` with the part of its point that is wrong, if it is a part."""
        if finding.verdict != "fail":
            return finding
        rule, reference = self._rules[finding.point], self._subject.reference
        found = find_slices(finding, rule, reference=reference, candidate=capture)
        return msgspec.structs.replace(finding, slices=found)


def cases_to_replay(findings: Iterable[Finding], subject: Subject, *, asked: bool | None) -> list[str]:
    """The cases in which every module is to be replayed: all or none, as it was asked for.

    Or else, where all passes and draws can tell, the shortest, of ``POSITIONS`` together and at least one: what the
    noise of a free run hides is wrong on the reference's own values.
    """
    cases = sorted(subject.reference.cases.values(), key=lambda c: c.positions)
    if asked is not None:
        return [c.id for c in cases] if asked else []
    known = list(findings)
    looked = subject.ensemble is not None and any(f.check == "modules" for f in known)
    if not looked or any(f.verdict == "fail" for f in known):
        return []
    ends = accumulate(c.positions for c in cases)
    return [c.id for n, (c, end) in enumerate(zip(cases, ends, strict=True)) if not n or end <= POSITIONS]


def with_neighbours(capture: Capture, cases: Iterable[str]) -> list[Case]:
    """The cases as they were run, with all that were in a batch with one of them."""
    batches = {capture.cases[c].batch for c in cases}
    return [c for c in capture.cases.values() if c.batch in batches]


def _unmeasured(finding: Finding, reason: str) -> Finding:
    return msgspec.structs.replace(finding, local=Local(verdict="error", message=reason))
