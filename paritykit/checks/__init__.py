"""Checks: each asks one question of two captures. Importing this package imports no check."""

from __future__ import annotations

from paritykit.checks.base import Check, ModelCheck
from paritykit.registry import Registry

CHECKS: Registry[Check | ModelCheck] = Registry("check")
CHECKS.register("checkpoint", "paritykit.checks.checkpoint:CHECK")
CHECKS.register("weights", "paritykit.checks.weights:CHECK")
CHECKS.register("modules", "paritykit.checks.modules:CHECK")
CHECKS.register("logits", "paritykit.checks.logits:CHECK")
CHECKS.register("tokens", "paritykit.checks.tokens:CHECK")
