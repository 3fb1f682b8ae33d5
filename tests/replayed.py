"""Replaying planted faults, for tests: the findings of a run with local errors, and whom they name."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from paritykit.captures.reader import Capture
from paritykit.case import Case
from paritykit.checks.base import Subject
from paritykit.diagnose.locate import find_culprits
from paritykit.mapping.build import build_mapping
from paritykit.replays import Replays
from paritykit.results import Finding
from paritykit.runner import run_checks
from paritykit.testing.faults import Fault, find, planted
from tests.faulty import Ground

BESIDE = {
    "gate-up-swapped": ("mlp.up_proj",),
    "gate-up-interleaved": ("mlp.up_proj",),
    "bias-never-written": ("self_attn.k_proj", "self_attn.v_proj"),
}
"""Modules of the layer that are wrong by the same mistake."""
Planted = tuple[str, int]
"""A fault by name, and its layer."""


def places(fault: Fault | str, layer: int) -> set[str]:
    """The modules that a fault makes wrong."""
    found = find(fault) if isinstance(fault, str) else fault
    return {found.at(layer=layer), *(f"model.layers.{layer}.{m}" for m in BESIDE.get(found.name, ()))}


def explained(
    ground: Ground,
    engine: Any,
    reference: Capture,
    cases: list[Case],
    faults: Iterable[Planted] = (),
    *,
    twin: Capture | None = None,
    strength: float = 1.0,
) -> list[Finding]:
    """What the checks find in a run with these faults, after a replay."""
    with ExitStack() as stack:
        for name, layer in faults:
            stack.enter_context(planted(engine, name, layer=layer, strength=strength))
        candidate = ground.run(engine, cases)
        mapping = build_mapping(reference.manifest, candidate.manifest)
        subject = Subject(reference=reference, candidate=candidate, mapping=mapping, twin=twin)
        _, findings = run_checks(subject, ["modules", "logits"])
        return Replays(subject, engine).explain(findings)


def named(findings: Iterable[Finding]) -> set[str]:
    """The culprits."""
    return {c.point for c in find_culprits(findings)}
