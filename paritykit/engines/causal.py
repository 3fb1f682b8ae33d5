"""Which checkpoints transformers runs as a language model that continues text, and a load that invents no weight."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

from paritykit.engines.checkpoint import Checkpoint
from paritykit.errors import EngineError, UsageError

SUPPORTED = "ParityKit runs models that continue text: those that AutoModelForCausalLM loads"
SHOWN = 3


def check_causal(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> None:
    """Raise UsageError, in one line, for a checkpoint of a class that transformers knows as another kind of model.

    The class is what ``architectures`` or ``auto_map`` names; one that transformers does not know is taken for what its
    ``model_type`` is.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    remote = checkpoint.config.get("auto_map") or {}
    if trust_remote_code and "AutoModelForCausalLM" in remote:
        return
    causal = {name for names in KNOWN.values() for name in ([names] if isinstance(names, str) else names)}
    named = [str(a) for a in checkpoint.config.get("architectures") or [] if isinstance(a, str)]
    kind = str(checkpoint.config.get("model_type", ""))
    other = [a for a in named if a not in causal and hasattr(transformers, a)]
    if other:
        raise UsageError(f"{checkpoint.path} is a {other[0]}, which continues no text alone: {SUPPORTED}")
    if kind in CONFIG_MAPPING_NAMES and kind not in KNOWN and not causal.intersection(named):
        if remote:
            hint = "; its own code runs with trust_remote_code=true, if that has one"
        else:
            hint = f" (transformers {transformers.__version__})"
        raise UsageError(
            f"{checkpoint.path} is a {named[0] if named else kind} of model_type {kind!r}: {SUPPORTED}{hint}"
        )


def check_complete(missing: Iterable[str], *, kind: str, where: str) -> None:
    """Raise EngineError where weights were made up because the checkpoint has none."""
    names = sorted(missing)
    if names:
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        raise EngineError(f"{where} lacks weights that {kind} needs and would be given at random: {shown}")


def carried(model: Any, output: Any) -> dict[str, Any]:
    """What the next step takes of a step's output: the fields that ``forward`` has an argument for.

    So a cache is handed on whatever it is called: ``past_key_values``, ``cache_params``, ...
    """
    taken = signature(model.forward).parameters
    return {name: value for name, value in output.items() if name in taken and value is not None}
