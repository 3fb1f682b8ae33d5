"""What weights should look like: the checkpoint's files, the reference, what the engine declares. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from paritykit.errors import UsageError
from paritykit.ledger.subject import Allowed, Expected, ReferenceLayout
from paritykit.mapping.declared import part_number
from paritykit.mapping.rules import Part
from paritykit.provenance.weightmap import RankLedger


def read_allowed(listed: object, *, source: str) -> list[Allowed]:
    """Allowed problems from a setting. Raises UsageError for what is none, or a name that is no pattern."""
    try:
        found = msgspec.convert(listed, list[Allowed])
        for rule in found:
            re.compile(rule.name)
    except (msgspec.ValidationError, re.error) as error:
        raise UsageError(f"allow ({source}): {error}; each needs problem, name (a pattern) and reason") from error
    return found


def expect(
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    ledger: RankLedger,
    reference: ReferenceLayout | None = None,
    dtype: str = "",
    allowed: list[Allowed] | None = None,
) -> Expected:
    """Expectations for a checkpoint of ``tensors`` (name to shape and dtype) in an engine that runs in ``dtype``.

    ``ledger`` is that of any rank: declared rules are the same on all.
    """
    declared = {
        name: (place[0], part_number(place[1]))
        for name, place in ledger.names.items()
        if place is not None and place[0]
    }
    fused = {m: [Part(**p) for p in parts] for m, parts in ledger.fused.items()}
    return Expected(
        tensors=dict(tensors), reference=reference, declared=declared, fused=fused, dtype=dtype, allowed=allowed or []
    )
