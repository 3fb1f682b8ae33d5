"""Names of drawn models: ``drawn:cohere,seed=7,dtype=bfloat16``, safe in any shell."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paritykit.errors import UsageError
from paritykit.options import read_value

DRAWN = "drawn:"
OPTIONS = ("seed", "dtype")


@dataclass(frozen=True)
class DrawnModel:
    """A drawn model, named and not yet built.

    >>> DrawnModel("drawn:cohere,seed=7").options
    {'seed': 7}

    Raises UsageError for a name that cannot be read; whether there is such a model shows when it is built.
    """

    name: str

    def __post_init__(self) -> None:
        _read(self.name)

    @property
    def model_type(self) -> str:
        """Its ``model_type``."""
        return _read(self.name)[0]

    @property
    def options(self) -> dict[str, Any]:
        """Seed and dtype, where they are given."""
        return _read(self.name)[1]

    def build(self, path: str | os.PathLike[str] | None = None) -> Path:
        """The checkpoint's folder: a new one at ``path``, or one in the cache. Raises as ``drawn_model`` does."""
        from paritykit.testing.drawn.model import drawn_model

        return drawn_model(self.model_type, path, **self.options)

    def __str__(self) -> str:
        return self.name


def _read(name: str) -> tuple[str, dict[str, Any]]:
    if not name.startswith(DRAWN):
        raise UsageError(f"{name!r} is not the name of a drawn model: it does not begin with {DRAWN!r}")
    model_type, *pairs = name.removeprefix(DRAWN).split(",")
    options: dict[str, Any] = {}
    for pair in pairs:
        option, _, text = pair.partition("=")
        if option not in OPTIONS or not text or option in options:
            raise UsageError(f"{name!r}: {pair!r} is not one of {', '.join(f'{o}=VALUE' for o in OPTIONS)}, each once")
        options[option] = read_value(text)
    seed = options.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UsageError(f"{name!r}: seed must be an integer, not {seed!r}")
    return model_type, options
