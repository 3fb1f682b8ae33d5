"""Checks: each asks one question. Importing this package imports no check."""

from __future__ import annotations

from paritykit.checks.base import Check, InvarianceCheck, ModelCheck, ReferenceCheck
from paritykit.registry import Registry

CHECKS: Registry[Check | ModelCheck | InvarianceCheck | ReferenceCheck] = Registry("check")
CHECKS.register("checkpoint", "paritykit.checks.checkpoint:CHECK")
CHECKS.register("weights", "paritykit.checks.weights:CHECK")
CHECKS.register("modules", "paritykit.checks.modules:CHECK")
CHECKS.register("logits", "paritykit.checks.logits:CHECK")
CHECKS.register("tokens", "paritykit.checks.tokens:CHECK")
BASIC = tuple(CHECKS.names())
"""What a run asks unless told otherwise: it takes one start of each engine."""

CHECKS.register("reference", "paritykit.checks.reference:CHECK")

INVARIANCES = (
    "tensor_parallel",
    "pipeline_parallel",
    "kv_cache",
    "batching",
    "chunking",
    "prefix_cache",
    "decode_prefill",
    "repeat",
    "observer",
)
for _name in INVARIANCES:
    CHECKS.register(_name, f"paritykit.invariance.checks:{_name.upper()}")
