"""Expert flips of a candidate against the reference: ``comparison.routing``, with what the noise floor allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paritykit.checks.base import Subject
from paritykit.checks.floors import sound_positions
from paritykit.comparison.align import pairs
from paritykit.comparison.routing import Rerouted, Rows, find_routers, trace_flips
from paritykit.mapping.rules import Rule


def find_flips(subject: Subject, case: str) -> Rerouted:
    """The tokens of a case that the candidate sent to other experts, explained by the noise floor."""
    if case not in subject.flips:
        routers = find_routers(subject.reference.manifest)
        rules = {r.reference: r for r in subject.mapping.rules if r.candidate in subject.candidate.points}
        subject.flips[case] = trace_flips(routers, _Sides(subject, rules, case))
    return subject.flips[case]


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
