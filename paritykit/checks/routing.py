"""Expert flips of a candidate against the reference: ``comparison.routing``, with what the noise floor allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paritykit.captures.reader import Capture
from paritykit.checks.base import Subject
from paritykit.checks.floors import sound_positions
from paritykit.comparison.align import pairs
from paritykit.comparison.routing import Rerouted, Rows, chosen_experts, find_routers, trace_flips
from paritykit.mapping.rules import Rule


def find_flips(subject: Subject, case: str) -> Rerouted:
    """The tokens of a case that the candidate sent to other experts, explained by the noise floor."""
    if case not in subject.flips:
        routers = find_routers(subject.reference.manifest)
        rules = {r.reference: r for r in subject.mapping.rules if r.candidate in subject.candidate.points}
        subject.flips[case] = trace_flips(routers, _Sides(subject, rules, case))
    return subject.flips[case]


def idle_experts(reference: Capture) -> dict[str, tuple[int, int]]:
    """Of each router that chooses by its logits alone: how many experts no token was sent to, of how many."""
    found = {}
    for router in find_routers(reference.manifest):
        rows = [x for c in reference.cases if len(x := reference.rows(router.key, c))] if router.chosen else []
        if rows:
            chosen = torch.stack([chosen_experts(x.flatten(1), router.chosen).any(0) for x in rows]).any(0)
            found[router.key] = int((~chosen).sum()), len(chosen)
    return found


@dataclass(frozen=True)
class _Sides:
    subject: Subject
    rules: dict[str, Rule]
    case: str

    def rows(self, key: str) -> Rows | None:
        if key not in self.rules:
            return None
        found = list(pairs(self.rules[key], self.subject.reference, self.subject.candidate, self.case))
        if not found:
            return None
        places = [p for start, left, _ in found for p in range(start, start + len(left))]
        return Rows(places, torch.cat([left for _, left, _ in found]), torch.cat([right for _, _, right in found]))

    def sound(self, key: str, rows: Rows) -> list[bool]:
        found = sound_positions(self.subject, self.rules[key], self.case)
        return [found[p] for p in rows.positions]

    def same(self, key: str, rows: Rows) -> list[bool]:
        found = sound_positions(self.subject, self.rules[key], self.case, alone=False)
        return [found[p] for p in rows.positions]
