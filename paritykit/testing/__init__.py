"""What ParityKit's own tests use and yours may too: tiny seeded models, and trained ones. Loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paritykit.testing.drawn.model import drawn_model
    from paritykit.testing.drawn.named import DrawnModel
    from paritykit.testing.families import TINY_FAMILIES, nano_families, tiny_config
    from paritykit.testing.named import TinyModel
    from paritykit.testing.real import REAL_MODELS, real_model
    from paritykit.testing.tiny import tiny_model
    from paritykit.testing.transplants import TRANSPLANTS

__all__ = [
    "REAL_MODELS",
    "TINY_FAMILIES",
    "TRANSPLANTS",
    "DrawnModel",
    "TinyModel",
    "drawn_model",
    "nano_families",
    "real_model",
    "tiny_config",
    "tiny_model",
]

_HOMES = {
    "DrawnModel": "paritykit.testing.drawn.named",
    "REAL_MODELS": "paritykit.testing.real",
    "TINY_FAMILIES": "paritykit.testing.families",
    "TRANSPLANTS": "paritykit.testing.transplants",
    "TinyModel": "paritykit.testing.named",
    "drawn_model": "paritykit.testing.drawn.model",
    "nano_families": "paritykit.testing.families",
    "real_model": "paritykit.testing.real",
    "tiny_config": "paritykit.testing.families",
    "tiny_model": "paritykit.testing.tiny",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
