"""Local errors: what each module makes of the reference's own values, beside what it makes of what it was handed.

The candidate runs its cases again, and each point that is looked at is replaced by the reference's rows as soon as it
was seen. So what is seen of the next point is the work of the code between the two, and of nothing before. One run for
each level: layers first, then what is inside those that are wrong, down to the leaves. The culprits are the smallest
modules that are beyond what is allowed, all of them: none of them sees the others. Which part of a culprit is wrong
(``slices``) the run says. Torch-free; the run is handed in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from paritykit.captures.manifest import CACHE_PORTS, split_key, within
from paritykit.diagnose.locate import Graph
from paritykit.diagnose.tree import Tree
from paritykit.results import Finding, Local, Slice

LEVELS = ("layers", "blocks", "leaves")
WORSE = 1.1
"""A module is worse with the reference's values inside it if its error then is so many times the one without: of the
free run, or of the level before.
"""
Place = tuple[str, str]
"""A case and a point."""


class Look(NamedTuple):
    """What one fed run showed: a judged number for each place, and the points that were replaced in every row."""

    findings: Mapping[Place, Finding]
    replaced: frozenset[str]


Run = Callable[[Sequence[str], Sequence[str]], Look]
"""Runs the candidate: the reference's points to replace, and those to look at."""


@dataclass(frozen=True)
class Replayed:
    """Local errors by place, the culprits (places that nothing before or inside explains, to whom to blame), and which
    part of these is wrong.

    ``doubted`` are points that are wrong and whose replacing made the module around them worse: the candidate may mean
    something else by their names.
    """

    local: dict[Place, Local] = field(default_factory=dict)
    culprits: dict[Place, str] = field(default_factory=dict)
    slices: dict[Place, list[Slice]] = field(default_factory=dict)
    doubted: frozenset[str] = frozenset()


class _Suspicion(NamedTuple):
    level: int
    place: Place
    blamed: str
    opened: bool


class Descent:
    """From the layers to the leaves. ``points`` are those that can be looked at, in execution order.

    ``free`` are the findings of the free run: what failed in it though its input was right is looked into even where
    the module around it passes.
    """

    def __init__(self, *, graph: Graph, tree: Tree, points: Iterable[str], free: Iterable[Finding], run: Run) -> None:
        self._graph, self._tree, self._run = graph, tree, run
        self._by_module: dict[str, list[str]] = defaultdict(list)
        for key in points:
            self._by_module[split_key(key)[0]].append(key)
        self._failing: dict[str, bool] = {}
        """Points that failed in the free run, to whether one did with nothing before it."""
        free = list(free)
        for f in free:
            if f.verdict == "fail":
                self._failing[f.point] = f.origin == "introduced" or self._failing.get(f.point, False)
        self._failed: dict[str, dict[str, bool]] = defaultdict(dict)
        self._local: dict[Place, Local] = {}
        self._slices: dict[Place, list[Slice]] = {}
        self._suspicions: list[_Suspicion] = []
        self._errors = {(f.case, f.point): e for f in free if (e := f.metrics.get("rel_l2")) is not None}
        self._worse: set[tuple[Place, int]] = set()

    def replay(self) -> Replayed:
        """Run level after level, while something is left to look into."""
        modules, replaced, level = self._tree.top, list[str](), 0
        opened: list[str] = []
        while modules:
            shown = [k for m in (*opened, *modules) for k in self._by_module.get(m, ())]
            replaced += [k for k in shown if k not in replaced]
            look = self._run(replaced, shown) if shown else Look({}, frozenset())
            self._note(look, level)
            opened = [m for m in modules if self._tree.inside(m) and self._suspect(m, look)]
            self._judge(look, level, opened)
            modules = [inner for m in opened for inner in self._tree.inside(m)]
            level += 1
        return Replayed(self._local, self._culprits(), self._slices, self._doubted())

    def replay_all(self) -> Replayed:
        """Replace and look at every point at once: what each is, is the work of the code since the one before."""
        every = [k for keys in self._by_module.values() for k in keys]
        look = self._run(every, every)
        self._note(look, len(LEVELS) - 1)
        self._judge(look, len(LEVELS) - 1, [])
        return Replayed(self._local, self._culprits(), self._slices)

    def _note(self, look: Look, level: int) -> None:
        """Keep what was measured: of a point that is seen on several levels the first is its module as a whole."""
        name = LEVELS[min(level, len(LEVELS) - 1)]
        for place, f in look.findings.items():
            self._failed[place[0]][place[1]] = f.verdict == "fail"
            self._local.setdefault(place, local_of(f, level=name))
            if f.verdict == "fail":
                error = f.metrics.get("rel_l2") or 0.0
                before = self._errors.get(place, error)
                if error > WORSE * before:
                    self._worse.add((place, level))
                self._errors[place] = min(error, before)

    def _doubted(self) -> frozenset[str]:
        """The points that failed on the level on which a module around them became worse."""
        return frozenset(
            s.place[1]
            for s in self._suspicions
            for (case, key), level in self._worse
            if (case, level) == (s.place[0], s.level) and self._is_inside(s.place[1], key)
        )

    def _is_inside(self, point: str, outer: str) -> bool:
        """Whether a point lies in the module that another one shows, and is neither its output nor its input."""
        module, port, _ = split_key(outer)
        scope = self._graph.around(module) if port == "input" else module
        inner, own, _ = split_key(point)
        return within(inner, scope) and (inner != scope or own in CACHE_PORTS) and point != outer

    def _suspect(self, module: str, look: Look) -> bool:
        """Whether to look inside: it is beyond its limit, was not seen, or failed inside with nothing before it."""
        inside = {k: new for k, new in self._failing.items() if k.startswith(f"{module}.")}
        seen = {f.verdict for (_, key), f in look.findings.items() if key == module}
        return any(inside.values()) or bool(seen & {"fail", "inconclusive"}) or (not seen and bool(inside))

    def _judge(self, look: Look, level: int, opened: Sequence[str]) -> None:
        for (case, key), f in look.findings.items():
            if f.verdict == "fail" and not self._inherits(case, key, look):
                module, port, _ = split_key(key)
                blamed = module if not port else self._graph.blame(key, compared=self._failed[case])
                self._suspicions.append(_Suspicion(level, (case, key), blamed, port != "input" and module in opened))
                self._slices[case, key] = f.slices

    def _inherits(self, case: str, key: str, look: Look) -> bool:
        """Whether something that it was computed from is wrong and went on as it was."""
        failed = {k: f.verdict == "fail" for (c, k), f in look.findings.items() if c == case}
        origins = self._graph.origins(key, compared=failed)
        if any(failed.get(k, False) and not _cleared(k, key, look.replaced) for k in origins):
            return True
        loose = (k for k, bad in failed.items() if bad and k not in look.replaced and not split_key(k)[1])
        return any(self._beside(k, key) for k in loose)

    def _beside(self, earlier: str, key: str) -> bool:
        """Whether one point comes before another in the same module: it may reach that unseen."""
        scopes = {self._graph.around(split_key(k)[0]) for k in (earlier, key)}
        return len(scopes) == 1 and self._graph.order(earlier) < self._graph.order(key)

    def _culprits(self) -> dict[Place, str]:
        """The suspicions that nothing found further inside explains."""
        found = {}
        for s in self._suspicions:
            inner = (o for o in self._suspicions if o.level > s.level and o.place[0] == s.place[0])
            if not (s.opened and any(within(split_key(o.place[1])[0], s.blamed) for o in inner)):
                found[s.place] = s.blamed
        return found


def local_of(finding: Finding, *, level: str) -> Local:
    """The measured numbers of a finding as a local error."""
    return Local(
        level=level,
        verdict=finding.verdict,
        metric=finding.metric,
        value=finding.value,
        allowed=finding.allowed,
        allowed_source=finding.allowed_source,
        noise_floor=finding.noise_floor,
        needs=finding.needs,
        message=finding.message,
    )


def refine(findings: Iterable[Finding], replayed: Replayed) -> list[Finding]:
    """The findings with their local errors, and by these who introduced a failure and who inherited it.

    A failing point that is right on the reference's own values only passes on what it was handed; so does one whose
    module holds a culprit.
    """
    return [_refined(f, replayed) for f in findings]


def _refined(finding: Finding, replayed: Replayed) -> Finding:
    place = (finding.case, finding.point)
    local, blamed = replayed.local.get(place), replayed.culprits.get(place)
    if local is None:
        return finding
    culprit = blamed is not None
    needs = _both(finding.needs, local.needs) if culprit else finding.needs
    origin = finding.origin if finding.verdict != "fail" else "introduced" if culprit else "inherited"
    return msgspec.structs.replace(
        finding,
        local=msgspec.structs.replace(local, culprit=culprit),
        slices=replayed.slices.get(place, []) if culprit else finding.slices,
        needs=needs,
        origin=origin,
        located=blamed or finding.located,
    )


def _both(needs: Mapping[str, float], local: Mapping[str, float]) -> dict[str, float]:
    """What lets a point pass in the free run and on the reference's own values."""
    return {name: max(value, local[name]) for name, value in needs.items() if name in local}


def expose(finding: Finding) -> Finding:
    """A finding that passes in the free run though its module is wrong by itself: it fails, by its local error."""
    local = finding.local
    if local is None or not local.culprit or finding.verdict != "pass":
        return finding
    text = "wrong on the reference's own values; what it is handed in the free run hides it"
    return msgspec.structs.replace(
        finding,
        verdict="fail",
        origin="introduced",
        metric=local.metric,
        value=local.value,
        allowed=local.allowed,
        allowed_source=local.allowed_source,
        noise_floor=local.noise_floor,
        needs=local.needs,
        message="; ".join(filter(None, (finding.message, text))),
    )


def _cleared(origin: str, key: str, replaced: frozenset[str]) -> bool:
    """Whether what is wrong with ``origin`` cannot have reached ``key``.

    An input is replaced for its own module only: the code around it goes on with what it has.
    """
    module, port, _ = split_key(origin)
    return origin in replaced and (not port or module == split_key(key)[0])
