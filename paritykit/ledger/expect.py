"""What weights should look like: the checkpoint's files, the reference, what the engine declares. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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
    ledgers: Iterable[RankLedger],
    reference: ReferenceLayout | None = None,
    dtype: str = "",
    allowed: list[Allowed] | None = None,
) -> Expected:
    """Expectations for a checkpoint of ``tensors`` (name to shape and dtype) in an engine that runs in ``dtype``.

    ``ledgers`` are those of all ranks: each declares rules for its stage of the pipeline.
    """
    declared: dict[str, tuple[str, int | None]] = {}
    fused: dict[str, list[Part]] = {}
    for ledger in ledgers:
        places = {n: (p[0], part_number(p[1])) for n, p in ledger.names.items() if p is not None and p[0]}
        declared = places | declared
        fused |= {m: [Part(**p) for p in parts] for m, parts in ledger.fused.items()}
    return Expected(
        tensors=dict(tensors), reference=reference, declared=declared, fused=fused, dtype=dtype, allowed=allowed or []
    )
