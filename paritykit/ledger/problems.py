"""Every rule of the ledger, in one list. Torch-free."""

from __future__ import annotations

from paritykit.ledger.coverage import ties, unread, unwritten, written_twice, wrong_source
from paritykit.ledger.numbers import changed, narrowed, wrong_transpose, wrong_values
from paritykit.ledger.order import declared_otherwise, layers_disagree, wrong_index, wrong_order, wrong_rank
from paritykit.ledger.problem import Problem, Rule
from paritykit.ledger.subject import WeightSubject

RULES: tuple[Rule, ...] = (
    unread,
    unwritten,
    wrong_rank,
    wrong_source,
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
    """All problems. What is only a consequence of another one of the same tensor is left out."""
    found: list[Problem] = []
    for rule in RULES:
        told = {p.name for p in found}
        fresh = list(rule(subject))
        found += [p for p in fresh if rule is not layers_disagree or p.name not in told]
    return found
