"""Mistakes to plant on purpose: what engines got wrong in public, as a table of data and small planting functions.

::

    from paritykit.testing import faults

    with faults.planted(engine, "rope-theta", layer=2):            # an open nano or vLLM engine
        ...
    pk.engine("nano", model, **faults.find("bias-not-loaded").arguments(layer=2))
    faults.find("config-rope-theta").damage(model, "damaged")      # a copy of the checkpoint
    faults.for_model(config, engine="vllm")                        # those that fit a model

A fault says what must find it (``checks``), where it first shows (``at(layer=...)``), under which conditions
(``when``) and how it is to be explained (``cause``). ``docs/faults.md`` lists all of them.
"""

from paritykit.testing.faults import (
    attention,
    cache,
    checkpoint,
    head,
    loading,
    mlp,
    moe,
    norm,
    null,
    parallel,
    residual,
    rotary,
)
from paritykit.testing.faults.conditions import Line, When
from paritykit.testing.faults.needs import Need
from paritykit.testing.faults.planting import planted
from paritykit.testing.faults.table import FAULTS, Fault, fault, find, for_model

__all__ = ["FAULTS", "Fault", "Line", "Need", "When", "fault", "find", "for_model", "planted"]

CLASSES = (rotary, norm, attention, mlp, residual, head, moe, parallel, cache, loading, checkpoint, null)
"""The files of the table, in its order."""
