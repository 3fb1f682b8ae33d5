"""What ParityKit's own tests use and yours may too: tiny seeded models. Loads no torch when imported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paritykit.testing.families import TINY_FAMILIES, nano_families, tiny_config
    from paritykit.testing.named import TinyModel
    from paritykit.testing.tiny import tiny_model

__all__ = ["TINY_FAMILIES", "TinyModel", "nano_families", "tiny_config", "tiny_model"]

_HOMES = {
    "TINY_FAMILIES": "paritykit.testing.families",
    "TinyModel": "paritykit.testing.named",
    "nano_families": "paritykit.testing.families",
    "tiny_config": "paritykit.testing.families",
    "tiny_model": "paritykit.testing.tiny",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
