"""What transformers' models need to run in float64, and the proof that all of them then is float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from paritykit.captures.manifest import Point
from paritykit.engines.causal import carried
from paritykit.engines.dtypes import DTYPES
from paritykit.engines.widen import NarrowOps
from paritykit.errors import EngineError

HINT = "widen=False runs it as it is, with that rounding"


def let_run(model: Any) -> None:
    """Choose those of transformers' ways to compute the same thing that take float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped matrix product has no float64
    for module in model.modules():
        if getattr(module, "reorder_and_upcast_attn", False):
            module.reorder_and_upcast_attn = False  # GPT-2's attention that insists on float32; the other is its equal


def prove_wide(model: Any, *, where: str) -> None:
    """Run two tokens and then one more. Raises EngineError if any operation took or gave less than float64."""
    failure: RuntimeError | None = None
    with torch.no_grad(), NarrowOps() as ops:
        try:
            _generate(model)
        except RuntimeError as error:  # such as that two dtypes do not go together
            failure = error
    if ops.found:
        name, place = next(iter(ops.found.items()))
        more = f" (and {len(ops.found) - 1} other operations)" if len(ops.found) > 1 else ""
        reason = f"{name} at {place}{more} works in fewer bits"
        raise EngineError(f"hf has no float64 for {where}: {reason}; {HINT}") from failure
    if failure is not None:
        raise failure


def _generate(model: Any) -> None:
    cache: dict[str, Any] = {}
    for tokens in (2, 1):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
        cache = carried(model, model(input_ids=ids, use_cache=True, **cache))


@torch.no_grad()
def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round every weight to ``dtype``, stored as it was; those that transformers keeps in float32 stay as they are.

    So a truth has the very weights of an engine in ``dtype``, and what that engine differs by is its arithmetic alone.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and kept.isdisjoint(name.split(".")):
            weight.copy_(weight.to(dtype))


def check_wide(points: Iterable[Point]) -> None:
    """Raises EngineError if a point was recorded in a floating dtype of fewer bits than float64."""
    narrow = [p for p in points if p.dtype in DTYPES and p.dtype != "float64"]
    if narrow:
        raise EngineError(f"hf has no float64 for {narrow[0].key}, which is {narrow[0].dtype}; {HINT}")
