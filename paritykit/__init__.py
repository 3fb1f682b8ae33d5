"""ParityKit: layer-by-layer parity of Hugging Face models and the engines that re-implement them.

Everything public is imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paritykit.api import ParityRun, capture, compare, run, weights
    from paritykit.captures.reader import Capture
    from paritykit.case import Case, CaseSet, cases
    from paritykit.engines import engine
    from paritykit.errors import EngineError, ParityError, ParityFailure, UsageError
    from paritykit.pytest_session import Parity

__version__ = "0.1.0"

__all__ = [
    "Capture",
    "Case",
    "CaseSet",
    "EngineError",
    "Parity",
    "ParityError",
    "ParityFailure",
    "ParityRun",
    "UsageError",
    "capture",
    "cases",
    "compare",
    "engine",
    "run",
    "weights",
]

_HOME = {
    "Capture": "paritykit.captures.reader",
    "Case": "paritykit.case",
    "CaseSet": "paritykit.case",
    "EngineError": "paritykit.errors",
    "Parity": "paritykit.pytest_session",
    "ParityError": "paritykit.errors",
    "ParityFailure": "paritykit.errors",
    "ParityRun": "paritykit.api",
    "UsageError": "paritykit.errors",
    "capture": "paritykit.api",
    "cases": "paritykit.case",
    "compare": "paritykit.api",
    "run": "paritykit.api",
    "weights": "paritykit.api",
    "engine": "paritykit.engines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'paritykit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
