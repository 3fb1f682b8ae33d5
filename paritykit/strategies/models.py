"""Random tiny models of a family: what an engine must get right whatever the config says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

from paritykit.errors import UnknownNameError
from paritykit.strategies.aspects import ASPECTS
from paritykit.strategies.fields import Limits, defaults, merged
from paritykit.testing.families import TINY_FAMILIES
from paritykit.testing.named import TinyModel

HEAD_DIMS = (32, 64, 80, 96, 112, 128)
"""Those of vLLM's attention on a CPU, as far as a tiny model can have them; it has 160, 192, 224, 256 and 512 too."""
ROPES = ("default", "linear", "llama3", "yarn", "dynamic")


def models(
    family: str | Sequence[str] = TINY_FAMILIES,
    *,
    head_dims: Sequence[int] = HEAD_DIMS,
    ropes: Sequence[str] = ROPES,
    ranks: int = 1,
    keep: Iterable[str] = (),
) -> st.SearchStrategy[TinyModel]:
    """Tiny models of a family, or of several: sizes, windows, rotary embeddings, experts, biases and switches drawn.

    ``head_dims`` and ``ropes`` are those that the engine knows; ``ranks`` can share every model; ``keep`` names
    aspects (keys of ``ASPECTS``) that stay as the family has them. Shrinks to the first family's defaults, or to what
    is nearest where these are not allowed. Nothing is built: that is ``model.build()``. Raises UnknownNameError,
    and UsageError where no heads are allowed.

    >>> from hypothesis import find
    >>> str(find(models("qwen2"), lambda model: model.config["vocab_size"] < 499))
    'tiny:qwen2,vocab_size=65'
    """
    kept = set(keep)
    for name, known in [*((n, ASPECTS) for n in kept), *((r, ROPES) for r in ropes)]:
        if name not in known:
            raise UnknownNameError("aspect of a model" if known is ASPECTS else "kind of rotary embedding", name, known)
    limits = Limits(head_dims=tuple(head_dims), ropes=tuple(ropes), ranks=ranks)
    families = (family,) if isinstance(family, str) else tuple(family)
    return st.one_of([_models_of(name, limits, kept) for name in families])


def _models_of(family: str, limits: Limits, kept: set[str]) -> st.SearchStrategy[TinyModel]:
    own = defaults(family)
    drawn = merged(*(aspect(own, limits) for name, aspect in ASPECTS.items() if name not in kept))
    usual = _flat(own)

    def named(fields: dict[str, Any]) -> TinyModel:
        return TinyModel.of(family, {n: v for n, v in fields.items() if n not in usual or usual[n] != v})

    return drawn.map(named)


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``fields`` with the entries of tables under dotted names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
