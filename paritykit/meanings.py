"""What is computed decides: points that disagree without a consequence, read anew or named alike.

Each point of check ``modules`` that fails is looked at over all cases. Where what is computed from it agrees, a reading
of the candidate's numbers is looked for that makes it the reference's point; the mapping then has that reading, and the
point is judged by it. Where none fits, the point is *named alike*, if its error would have been seen in what follows: a
small fault that a residual stream dilutes stays a failure. Nothing is done in a run in which no module fails.

Where a real fault beside such a point makes what is computed from it wrong too, a replay tells them apart: putting the
reference's value in the place of a point that means something else makes the module around it worse.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import msgspec

from paritykit.checks.base import LOGITS, Subject
from paritykit.checks.measured import measure_point
from paritykit.comparison.align import pairs
from paritykit.comparison.readings import Fit, Search, best_readings, kind_of, read_alike
from paritykit.diagnose.consequence import Flow, failed_anywhere, is_sink
from paritykit.diagnose.locate import locate
from paritykit.diagnose.tree import Tree
from paritykit.mapping.rules import GUESSES, Rule
from paritykit.results import Finding, Unmatched

CHECK = "modules"
MEASURED = ("pass", "fail")
LOUD = 10.0
"""An error counts as one that would have been seen where it is so many times what is seen of it: what computes with a
point may pass on a part of its error only. Planted faults lost at most a factor of 1.75 from a failing point to one
computed from it: 1,298 pairs, 17 faults in nano, float32."""
LEAST = 2.0**-24
"""What is seen of an error is taken for no less than one rounding to float32."""
TRIED = 3
"""Readings that are judged on all rows, the best on few rows first."""


def settle(subject: Subject, findings: list[Finding]) -> list[Finding]:
    """``findings`` of one or more cases with points read anew, named alike or left out where nothing follows from them.

    The subject's mapping then has the readings, and no rule for what was left out.
    """
    if not any(f.check == CHECK and f.verdict == "fail" for f in findings):
        return findings
    return _located(subject, _Meanings(subject, findings).settled())


def read_alone(local: Subject, kinds: Collection[str], cases: Sequence[str]) -> list[str]:
    """Points of these kinds for which a reading was found, which the mapping now has.

    In ``local`` the candidate was fed the reference's values everywhere but there. So nothing that fails was handed
    anything wrong, and a reading must make every point of its kind the reference's.
    """
    rules = [r for r in local.mapping.rules if kind_of(r.reference) in kinds]
    found = [measure_point(local, rule, case, check=CHECK) for rule in rules for case in cases]
    failing = {f.point for f in found if f.verdict == "fail"} - local.mapping.stated
    meanings = _Meanings(local, found)
    for keys in meanings.kinds(failing):
        meanings.read(keys)
    return [r.reference for r in local.mapping.rules if r.reading and r.reference in failing]


def measured_anew(subject: Subject, findings: list[Finding], points: Collection[str]) -> list[Finding]:
    """``findings`` with those of ``points`` made again, by the rules that the mapping has now, and settled so."""
    rules = {r.reference: r for r in subject.mapping.rules}
    found = [
        msgspec.structs.replace(
            measure_point(subject, rules[f.point], f.case, check=CHECK), reading=rules[f.point].reading
        )
        if f.point in points and _is_point(f)
        else f
        for f in findings
    ]
    return settle(subject, found)


def _located(subject: Subject, findings: list[Finding]) -> list[Finding]:
    """Those of points marked introduced or inherited, in order of execution; then the others."""
    cases = dict.fromkeys(f.case for f in findings)
    modules = [
        located
        for case in cases
        for located in locate((f for f in findings if f.case == case and _is_point(f)), subject.graph)
    ]
    return modules + [f for f in findings if not _is_point(f)]


def _is_point(finding: Finding) -> bool:
    return finding.check == CHECK and finding.metric != "mapping"


class _Meanings:
    def __init__(self, subject: Subject, findings: list[Finding]) -> None:
        self._subject = subject
        self._findings = {(f.check, f.case, f.point): f for f in findings}
        self._rules = {r.reference: r for r in subject.mapping.rules}
        self._misfits = {m.reference: m for m in subject.mapping.misfits}
        self._cases = list(dict.fromkeys(f.case for f in findings if f.check == CHECK))
        self._tree = Tree(subject.reference.manifest)

    def settled(self) -> list[Finding]:
        for keys in self.kinds(self._silent_now(cached=True)[1]):
            self.read(keys)
        flow, silent = self._silent_now()
        for key in sorted(silent, key=self._subject.graph.order):
            if (
                key not in self._misfits
                and self._everywhere(key)
                and self._loudness(key, flow.shown(key, silent)) > LOUD
            ):
                self._name(key)
        self._drop_misfits(flow, silent)
        self._note_mappings()
        return list(self._findings.values())

    def _note_mappings(self) -> None:
        """What is said of a mapping fails nothing where the point and the logits do not: check `weights` judges it."""
        failed = self._failed()
        for place, f in list(self._findings.items()):
            if f.metric == "mapping" and not failed.get(f.located, False) and not failed.get(LOGITS, False):
                self._findings[place] = msgspec.structs.replace(f, verdict="skip", origin=None)

    def _failed(self) -> dict[str, bool]:
        """Every point that was measured, to whether it failed in a case."""
        seen = [f for f in self._findings.values() if f.check in (CHECK, LOGITS[1:]) and f.verdict in MEASURED]
        return failed_anywhere((f.point, f.verdict == "fail") for f in seen if f.metric != "mapping")

    def _silent_now(self, *, cached: bool = False) -> tuple[Flow, set[str]]:
        """Who is computed from whom, and the failing points that nothing after them shows, what is cached included."""
        failed = self._failed()
        flow = Flow(self._subject.graph, self._tree, compared=failed)
        failing = {k for k, bad in failed.items() if bad} - self._subject.mapping.stated
        while True:
            silent = flow.alike(failing) if cached else flow.silent(failing)
            heard = {k for k in silent if any(self._hands_on(k, c, silent, failed) for c in flow.around(k))}
            if not heard:
                return flow, silent
            failing -= heard

    def _hands_on(self, key: str, later: str, silent: set[str], failed: dict[str, bool]) -> bool:
        """Whether a later point of the same width has the error of ``key`` in its own, as a residual stream would."""
        if not failed[later] or later in silent or key in self._misfits or later in self._misfits:
            return False
        rule, after = self._rules.get(key), self._rules.get(later)
        if rule is None or after is None:
            return False
        return any(_inherited(self._subject, rule, after, case) for case in self._cases)

    def kinds(self, silent: Iterable[str]) -> list[list[str]]:
        """The silent points, those of one kind together, in order of execution."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for key in sorted(silent, key=self._subject.graph.order):
            kinds[kind_of(key)].append(key)
        return list(kinds.values())

    def read(self, keys: list[str]) -> None:
        """Take the reading that fits at all of ``keys``, which are of one kind; nothing where there is none.

        It is looked for at the last: what lies before it lies before the first only where there is something.
        """
        known, guessed = self._subject.candidate.points, self._rule(keys[-1]).source in GUESSES
        fits = self._search(keys[-1])
        if is_sink(keys[-1]):
            fits = [f for f in fits if f.reading.how == "order"]
        for fit in best_readings(fits, elsewhere=guessed)[:TRIED]:
            rules = {k: read_alike(fit, self._rule(k), known=known) or self._otherwise(fit, k) for k in keys}
            fitting = {k: rule for k, rule in rules.items() if rule is not None}
            if len(fitting) == len(keys) and self._take(fitting, fit):
                return

    def _otherwise(self, fit: Fit, key: str) -> Rule | None:
        """The rule where the layer before, with the other point of a reading, is missing: read with one in no layer."""
        found = (f for f in self._search(key) if f.reading.how == fit.reading.how and f.reading.on is None)
        return next((f.rule for f in found), None)

    def _rule(self, key: str) -> Rule:
        misfit = self._misfits.get(key)
        return Rule(reference=key, candidate=misfit.candidate) if misfit is not None else self._rules[key]

    def _search(self, key: str) -> list[Fit]:
        subject = self._subject
        case = max(self._cases, key=lambda c: subject.reference.cases[c].positions)
        return Search(
            self._rule(key),
            reference=subject.reference,
            candidate=subject.candidate,
            case=case,
            matches=key not in self._misfits,
        ).fits()

    def _take(self, rules: dict[str, Rule], fit: Fit) -> bool:
        """Judge the points by a reading; keep it where they all pass, for every point of the kind."""
        judged = [
            measure_point(self._subject, rule, case, check=CHECK) for rule in rules.values() for case in self._cases
        ]
        if any(f.verdict in ("fail", "error") for f in judged):
            return False
        kind = kind_of(next(iter(rules)))
        for key, rule in self._rules.items():
            if key in rules or kind_of(key) != kind:
                continue
            other = read_alike(fit, rule, known=self._subject.candidate.points)
            judged_so = [c for c in self._cases if self._verdict(c, key) in MEASURED]
            again = [measure_point(self._subject, other, case, check=CHECK) for case in judged_so] if other else []
            plain = self._failed().get(key, False)
            if not plain and any(f.verdict == "fail" for f in again):
                return False
            if other is not None and plain:
                rules[key], judged = other, judged + again
        for key, rule in rules.items():
            self._adopt(key, rule)
        for f in judged:
            self._findings[CHECK, f.case, f.point] = msgspec.structs.replace(f, reading=rules[f.point].reading)
        return True

    def _verdict(self, case: str, key: str) -> str:
        found = self._findings.get((CHECK, case, key))
        return found.verdict if found is not None else ""

    def _adopt(self, key: str, rule: Rule) -> None:
        mapping = self._subject.mapping
        self._misfits.pop(key, None)
        mapping.misfits = [m for m in mapping.misfits if m.reference != key]
        self._rules[key] = rule
        order = self._subject.graph.order
        mapping.rules = sorted(self._rules.values(), key=lambda r: order(r.reference))

    def _everywhere(self, key: str) -> bool:
        """Whether the point differs in every case, at half of its positions at least: what a name means is no matter of
        the input, where a mistake may be.
        """
        found = [f for c in self._cases if (f := self._findings.get((CHECK, c, key))) is not None]
        return all(2 * sum(b - a + 1 for a, b in f.failing) >= f.shape[0] for f in found if f.verdict in MEASURED)

    def _loudness(self, key: str, shown: set[str]) -> float:
        """How many times what is seen of the point's error it is, where it is seen least, in each case that fails."""
        failing = [f for f in (self._findings.get((CHECK, c, key)) for c in self._cases) if f and f.verdict == "fail"]
        return min((max((self._seen(f, other) for other in shown), default=0.0) for f in failing), default=0.0)

    def _seen(self, finding: Finding, other: str) -> float:
        """The error that could be expected at a later point, of whatever operation, over what is there."""
        check = LOGITS[1:] if other == LOGITS else CHECK
        seen = self._findings.get((check, finding.case, other))
        error, left = finding.metrics.get("rel_l2"), seen.metrics.get("rel_l2") if seen else None
        if error is None or left is None or not math.isfinite(error) or finding.metrics.get("nonfinite_mismatch"):
            return 0.0
        ours, theirs = (_size(self._subject, k, finding.case) for k in (finding.point, other))
        expected = error * min(1.0, ours / theirs) if theirs else 0.0
        return expected / max(left, LEAST)

    def _name(self, key: str) -> None:
        """The point means something else; one whose place was only a guess is compared with nothing."""
        rule = self._rules[key]
        if rule.source in GUESSES:
            place = f"{rule.candidate}, a guess from {rule.source}"
            self._leave_out(key, f"{place}, differs, and nothing that is computed from it does: it is another point")
            return
        self._forget(key)
        self._subject.mapping.alike[key] = f"{rule.describe()}: differs, and nothing computed from it does"
        for case in self._cases:
            old = self._findings.get((CHECK, case, key))
            if old is not None:
                text = (
                    "named alike, means something else: what is computed from it agrees, and no reading of it was found"
                )
                self._findings[CHECK, case, key] = msgspec.structs.replace(
                    old, verdict="skip", kind="named_alike", message=text, origin=None, failing=[], needs={}
                )

    def _leave_out(self, key: str, reason: str) -> None:
        """Compare the point with nothing, and say why."""
        self._forget(key)
        self._subject.mapping.skipped.append(Unmatched(side="reference", point=key, reason=reason))
        self._findings = {place: f for place, f in self._findings.items() if place[0] != CHECK or place[2] != key}

    def _forget(self, key: str) -> None:
        """Take the point's rule away: nothing goes on with the reference's value in its place either."""
        mapping = self._subject.mapping
        self._rules.pop(key, None)
        self._misfits.pop(key, None)
        mapping.rules = [r for r in mapping.rules if r.reference != key]
        mapping.misfits = [m for m in mapping.misfits if m.reference != key]

    def _drop_misfits(self, flow: Flow, silent: Collection[str]) -> None:
        """A rule that does not fit is no rule, unless what is computed from its point fails: in every layer."""
        failed, stated = self._failed(), self._subject.mapping.stated

        def heard(key: str) -> bool:
            return any(failed.get(k, False) and k not in self._misfits for k in flow.after(key))

        dropped = {kind_of(key) for key in self._misfits if key in silent or not heard(key)}
        for key, misfit in list(self._misfits.items()):
            if kind_of(key) in dropped and key not in stated:
                self._leave_out(key, misfit.message)


def _size(subject: Subject, key: str, case: str) -> float:
    """The norm of the reference's point in a case."""
    capture = subject.reference
    spans = capture.spans(capture.point(key), case)
    parts = (capture.read(s.piece)[s.row : s.row + s.length].double().norm() for s in spans)
    return math.sqrt(sum(float(p) ** 2 for p in parts))


def _inherited(subject: Subject, rule: Rule, later: Rule, case: str) -> bool:
    """Whether the error at ``later`` holds that at ``rule``, both of one width: at least half of it."""
    sides = (subject.reference, subject.candidate, case)
    if math.prod(subject.reference.point(rule.reference).row) != math.prod(
        subject.reference.point(later.reference).row
    ):
        return False
    together = alone = 0.0
    for (p, a, b), (q, c, d) in zip(pairs(rule, *sides), pairs(later, *sides), strict=False):
        if p != q or a.shape != c.shape:
            return True
        ours, theirs = (b.double() - a.double()), (d.double() - c.double())
        together, alone = together + float((ours * theirs).sum()), alone + float((ours * ours).sum())
    return abs(together) >= 0.5 * alone
