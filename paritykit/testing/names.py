"""The folder of any model that is made on the spot, by its name."""

from __future__ import annotations

from paritykit.testing.drawn.named import DRAWN, DrawnModel
from paritykit.testing.named import REAL, TINY, TinyModel


def folder_of(model: str) -> str:
    """``model``, or the folder of the model that ``tiny:FAMILY,...`` or ``real:NAME,...`` means, made on the spot."""
    if model.startswith(REAL):
        from paritykit.testing.real import build_named

        return str(build_named(model))
    if model.startswith(DRAWN):
        return str(DrawnModel(model).build())
    return str(TinyModel(model).build()) if model.startswith(TINY) else model
