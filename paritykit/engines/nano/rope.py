"""What ``config.json`` says of rotary embedding, in its old and its new spelling. Torch-free.

Old: ``rope_theta``, ``rope_scaling`` and, for Gemma 3, ``rope_local_base_freq``. New (transformers 5):
``rope_parameters``, for Gemma 3 one for each layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paritykit.errors import UnknownNameError, UsageError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
NEEDS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding of one kind of layer.

    ``dim`` of the head's elements are rotated; ``interleaved`` pairs neighbours instead of halves; ``original`` is the
    length that the model was first trained for. ``attention_factor`` multiplies cos and sin.
    """

    dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    interleaved: bool = False

    def grows(self, length: int) -> bool:
        """Whether a sequence of ``length`` is rotated otherwise than a short one."""
        return self.kind == "dynamic" and length > self.original


def read_ropes(config: Mapping[str, Any], *, head_dim: int, theta: float, local_theta: float | None) -> dict[str, Rope]:
    """The rope of each layer type, by ``full_attention`` and ``sliding_attention``.

    ``theta`` and ``local_theta`` hold where the config names none; without ``local_theta`` all layers share one rope.
    Raises UsageError for a kind that is not known or lacks a number.
    """
    new = config.get("rope_parameters") or {}
    if "full_attention" in new or "sliding_attention" in new:
        return {
            "full_attention": _read(new.get("full_attention") or {}, config, head_dim, theta),
            "sliding_attention": _read(new.get("sliding_attention") or {}, config, head_dim, local_theta or theta),
        }
    base = float(config.get("rope_theta") or theta)
    full = _read(new or config.get("rope_scaling") or {}, config, head_dim, base)
    if local_theta is None:
        return {"full_attention": full, "sliding_attention": full}
    local = float(config.get("rope_local_base_freq") or local_theta)
    return {"full_attention": full, "sliding_attention": _read({}, config, head_dim, local)}


def _read(given: Mapping[str, Any], config: Mapping[str, Any], head_dim: int, theta: float) -> Rope:
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind not in KINDS:
        raise UnknownNameError("kind of rotary scaling", kind, KINDS)
    missing = [n for n in NEEDS.get(kind, ()) if not isinstance(given.get(n), int | float)]
    if missing:
        raise UsageError(f"rotary scaling {kind!r} needs {', '.join(missing)} in config.json")
    partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    limit = config.get("max_position_embeddings")
    first_trained = config.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = limit if kind == "dynamic" else first_trained or limit
    factor = float(given.get("factor") or 1.0)
    return Rope(
        dim=int(head_dim * partial),
        theta=float(given.get("rope_theta") or theta),
        kind=kind,
        factor=factor,
        original=int(original or 0),
        low=float(given.get("low_freq_factor") or 1.0),
        high=float(given.get("high_freq_factor") or 4.0),
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=bool(given.get("truncate", True)),
        attention_factor=_attention_factor(given, factor) if kind == "yarn" else 1.0,
        interleaved=bool(config.get("rope_interleaved") or config.get("rope_interleave")),
    )


def _attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """YaRN's factor on cos and sin: as given, or ``0.1 ln(factor) + 1``, or the ratio of two such."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    fixed, one, all_ = (given.get(n) for n in ("attention_factor", "mscale", "mscale_all_dim"))
    if fixed is not None:
        return float(fixed)
    return grown(one) / grown(all_) if one and all_ else grown(1.0)
