"""Every rule of the ledger, in one list. Torch-free."""

from __future__ import annotations

from paritykit.ledger.coverage import ties, unread, unwritten, written_apart, written_twice, wrong_source
from paritykit.ledger.numbers import changed, narrowed, wrong_transpose, wrong_values
from paritykit.ledger.order import declared_otherwise, layers_disagree, wrong_index, wrong_order, wrong_rank
from paritykit.ledger.problem import Problem, Rule
from paritykit.ledger.subject import WeightSubject

RULES: tuple[Rule, ...] = (
    wrong_rank,
    unread,
    unwritten,
    wrong_source,
    written_apart,
    ties,
    written_twice,
    declared_otherwise,
    wrong_order,
    wrong_index,
    wrong_transpose,
    changed,
    narrowed,
    wrong_values,
    layers_disagree,
)
"""Every rule, the most telling first: the first problem of a tensor is the one its finding names."""


def find_problems(subject: WeightSubject) -> list[Problem]:
    """All problems. That a layer is unlike the others is left out where something else is told of it."""
    found: list[Problem] = []
    for rule in RULES:
        told = " ".join(f"{p.name} {p.message}" for p in found) if rule is layers_disagree else ""
        found += [p for p in rule(subject) if not told or not any(n in told for n in p.names)]
    return found
