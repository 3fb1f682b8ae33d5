"""The audit of a checkpoint and its config: what would go wrong in either engine, found without running a model."""

from paritykit.audit.notice import Audit, Notice
from paritykit.audit.run import audit

__all__ = ["Audit", "Notice", "audit"]
