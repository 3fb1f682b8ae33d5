"""Two captures of one engine, each seen through its own mapping from the reference's names, held against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import torch

from paritykit.captures.manifest import CACHE_PORTS, Manifest, split_key
from paritykit.captures.reader import Capture
from paritykit.checks.base import LOGITS
from paritykit.comparison.align import Stretch, overlaps, rule_rows, stretches
from paritykit.comparison.choices import Choice, choice_at, choice_finding, compare_choices, logits_within
from paritykit.comparison.judge import finding_from, judge, ranges
from paritykit.comparison.metrics import Meter, measure
from paritykit.comparison.routing import Rerouted, Router, Rows, judge_around, trace_flips
from paritykit.comparison.tolerance import Tolerance, is_half
from paritykit.diagnose.locate import Graph, locate
from paritykit.mapping.build import build_mapping
from paritykit.mapping.rules import Rule
from paritykit.results import Finding, Unmatched

Allow = Callable[[tuple[str, str], int], Tolerance]
"""The tolerance for the dtypes of a point, at this place in execution order."""


class View:
    """A capture under the reference's names: fused tensors split, shards joined."""

    def __init__(self, capture: Capture, reference: Manifest) -> None:
        self.capture = capture
        self.rules: dict[str, Rule] = {r.reference: r for r in build_mapping(reference, capture.manifest).rules}

    def stretches(self, key: str, case: str) -> list[Stretch]:
        """The positions of a case that the capture has for a point."""
        return stretches(self.capture.spans(self.capture.point(self.rules[key].candidate), case))

    def rows(self, key: str, case: str, start: int, end: int) -> torch.Tensor:
        """``[tokens, features]`` of these positions."""
        return rule_rows(self.rules[key], self.capture, case, start, end - start)

    def dtype(self, key: str) -> str:
        """The dtype of a point."""
        return self.capture.point(self.rules[key].candidate).dtype


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Two views of one case, and by what they are judged.

    ``cases`` are the case of the base and the one of the varied run that stands for it. ``partial``: the varied run may
    lack positions. ``routers`` are the reference's.
    """

    base: View
    varied: View
    cases: tuple[str, str]
    graph: Graph
    allow: Allow
    check: str
    condition: str
    partial: bool = False
    routers: tuple[Router, ...] = ()

    @cached_property
    def rerouted(self) -> Rerouted:
        """Tokens that the two runs sent to other experts, explained by the measured error."""
        return trace_flips(self.routers, self)

    def rows(self, key: str) -> Rows | None:
        """Both runs' rows of a point, at the positions that both computed; None where one does not show it."""
        if any(key not in view.rules for view, _ in self.sides()):
            return None
        spans = list(overlaps(*(view.stretches(key, case) for view, case in self.sides())))
        if not spans:
            return None
        left, right = (torch.cat([v.rows(key, c, *span) for span in spans]) for v, c in self.sides())
        return Rows([p for span in spans for p in range(*span)], left, right)

    def sound(self, key: str, rows: Rows) -> Sequence[bool]:
        """All of these rows if they are within tolerance together, otherwise none."""
        within = judge(measure(rows.left, rows.right), self.allowed(key))[0] == "pass"
        return [within] * len(rows.positions)

    def same(self, key: str, rows: Rows) -> Sequence[bool]:
        """For each of these rows whether it is as near as a whole point has to be."""
        limit = self.allowed(key).whole
        return [error <= limit for error in measure(rows.left, rows.right).row_rel_l2]

    @property
    def half(self) -> bool:
        """Whether the runs compute in fewer bits than float32."""
        return is_half(self.base.capture.manifest.side.dtype)

    def sides(self) -> Iterator[tuple[View, str]]:
        """Each view with its own case."""
        yield from zip((self.base, self.varied), self.cases, strict=True)

    def allowed(self, key: str) -> Tolerance:
        """The tolerance of a point."""
        return self.allow((self.base.dtype(key), self.varied.dtype(key)), self.graph.order(key))

    def told(self, message: str) -> str:
        """``message`` after the condition."""
        return f"{self.condition}: {message}" if message else self.condition


def compare_views(scene: Scene) -> list[Finding]:
    """One finding for every point that both views have, in execution order, failures located. Case: the base's."""
    found = []
    for key in scene.base.rules:
        finding = _point(scene, key) if key in scene.varied.rules else None
        if finding is not None:
            told = scene.told(finding.message)
            found.append(msgspec.structs.replace(finding, message=told, condition=scene.condition))
    return locate(found, scene.graph)


def _point(scene: Scene, key: str) -> Finding | None:
    """The finding of one point."""
    order = scene.graph.order(key)
    ours, theirs = (view.stretches(key, case) for view, case in scene.sides())
    wanted = sum(end - start for start, end in ours)
    spans = list(overlaps(ours, theirs))
    places = [p for span in spans for p in range(*span)]
    cached = split_key(key)[1] in CACHE_PORTS and bool(places)
    if len(places) < wanted and not (scene.partial or cached):
        message = f"computed {len(places)} of {wanted} positions"
        return Finding(check=scene.check, case=scene.cases[0], point=key, verdict="error", order=order, message=message)
    if not places:
        return None
    return judge_around(
        scene.rerouted, places, order=order, half=scene.half, judged=lambda some: _measured(scene, key, some)
    )


def _measured(scene: Scene, key: str, places: list[int]) -> Finding:
    """The finding of these positions, which both runs have."""
    base, varied, allowed = scene.base, scene.varied, scene.allowed(key)
    meter = Meter(element_tolerance=allowed.whole)
    for first, last in ranges(places):
        meter.update(*(view.rows(key, case, first, last + 1) for view, case in scene.sides()))
    return finding_from(
        meter.result(),
        allowed,
        check=scene.check,
        case=scene.cases[0],
        point=key,
        order=scene.graph.order(key),
        places=places,
        shape=[len(places), math.prod(base.capture.point(base.rules[key].candidate).row)],
        dtypes=(base.dtype(key), varied.dtype(key)),
        candidate_point=varied.rules[key].candidate,
        mapping=varied.rules[key].describe(),
    )


def compare_tokens(scene: Scene) -> Finding | None:
    """Whether both runs chose the same tokens; where they differ, whether the measured logit error explains it."""
    ours, theirs = (view.capture.generated(case) for view, case in scene.sides())
    length = min(len(ours), len(theirs))
    if not length:
        return None

    def weigh(step: int) -> Choice:
        tokens = ours[step], theirs[step]
        if any(LOGITS not in view.rules for view, _ in scene.sides()):
            return Choice(step, *tokens, margin=0.0, error=0.0, sound=False)
        place = len(scene.base.capture.cases[scene.cases[0]].tokens) - 1 + step
        left, right = (view.rows(LOGITS, case, place, place + 1)[0] for view, case in scene.sides())
        return choice_at(step, tokens, (left, right), sound=logits_within((left, right), scene.allowed(LOGITS)))

    flips, text = compare_choices(ours, theirs, weigh, sides=("one run", "the other"), stop=True)
    prompt = len(scene.base.capture.cases[scene.cases[0]].tokens)
    places = [prompt - 1 + choice.step for choice in flips]
    order = scene.graph.order(LOGITS)
    found = choice_finding(
        check=scene.check,
        case=scene.cases[0],
        point="#tokens",
        order=order + 1,
        flips=len(flips),
        total=length,
        message=scene.told(text),
        excuse=scene.rerouted.excuse(places, order=order, half=scene.half),
    )
    return msgspec.structs.replace(found, condition=scene.condition)


def left_out(base: View, varied: View) -> list[Unmatched]:
    """Points that one run shows and the other does not: they could not be compared."""
    keys = [k for k in base.rules if k not in varied.rules]
    return [Unmatched(side="candidate", point=k, reason="the other run does not show it") for k in keys]
