"""Planting a fault in a loaded model and taking it back, on every worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paritykit.errors import UsageError
from paritykit.testing.faults.changes import Changes
from paritykit.testing.faults.host import host_of
from paritykit.testing.faults.loading import Stream
from paritykit.testing.faults.nano_site import NanoSite
from paritykit.testing.faults.site import NotHere, Site
from paritykit.testing.faults.table import PLANT, PLANT_HOST, Fault, find
from paritykit.testing.faults.vllm_site import VllmSite

UNPLANT = "paritykit.testing.faults.planting:unplant"
HELD = "planted_faults"


@contextmanager
def planted(engine: Any, fault: Fault | str, *, layer: int = 1, strength: float = 1.0) -> Iterator[None]:
    """Inside the block the open ``engine`` has the fault; after it, it is what it was, bit for bit.

    Blocks may be nested. Raises UsageError for a fault of loading or of files, a layer it does not fit, or an engine
    that it is not written for.
    """
    found = find(fault) if isinstance(fault, str) else fault
    if found.stage in ("loading", "checkpoint"):
        way = "arguments()" if found.stage == "loading" else "damage()"
        raise UsageError(f"fault {found.name!r} is there before a model is loaded: use {way} and open an engine")
    if not hasattr(engine, "call"):
        raise UsageError(f"faults are planted in engines nano and vllm, not in {type(engine).__name__}")
    host = found.stage == "host"
    engine.call(PLANT_HOST if host else PLANT, found.order(layer=layer, strength=strength), host=host)
    try:
        yield
    finally:
        engine.call(UNPLANT, {}, host=host)


def plant(worker: Any, *, fault: str, layer: int, strength: float = 1.0) -> None:
    """Plant a live fault in a worker of nano or vLLM: for ``after_load``, or ``Engine.call``."""
    found, changes = find(fault), Changes()
    site: Site = VllmSite(worker, changes, layer=layer, strength=strength)
    if not hasattr(worker, "model_runner"):
        site = NanoSite(worker, changes, layer=layer, strength=strength)
    check(found, site.engine, layer=layer, config=config_of(site.model))
    carry_out(found, site, worker, changes)


def plant_host(engine: Any, *, fault: str, layer: int = 0, strength: float = 1.0) -> None:
    """Plant a fault in the process that schedules, once: for ``after_open``, or ``Engine.call(..., host=True)``."""
    del layer, strength
    found, changes = find(fault), Changes()
    host = host_of(engine, changes)
    check(found, host.engine)
    carry_out(found, host, engine, changes)


def plant_loading(model: Any, *, rank: int, fault: str, layer: int, strength: float = 1.0) -> None:
    """Plant a fault between the checkpoint's files and a model that is still empty: for ``before_load``."""
    del strength
    found = find(fault)
    engine = "nano" if type(model).__module__.startswith("paritykit.") else "vllm"
    check(found, engine, layer=layer, config=config_of(model))
    stream = Stream(model, rank=rank, layer=layer, engine=engine)
    if stream.ranks >= found.when.ranks:  # alone, a rank gets no wrong share
        found.plant(stream)


def unplant(holder: Any) -> None:
    """Take back what was planted last. Raises UsageError where nothing is."""
    held = getattr(holder, HELD, [])
    if not held:
        raise UsageError("no fault is planted here")
    held.pop().undo()


def carry_out(fault: Fault, site: Any, holder: Any, changes: Changes) -> None:
    """Plant, and remember what to take back; nothing is left half planted."""
    try:
        fault.plant(site)
    except NotHere:
        changes.undo()
    except BaseException:
        changes.undo()
        raise
    if not hasattr(holder, HELD):
        setattr(holder, HELD, [])
    getattr(holder, HELD).append(changes)


def check(fault: Fault, engine: str, *, layer: int = 0, config: Any = None) -> None:
    """Raise UsageError where a fault cannot be planted."""
    if engine not in fault.engines:
        raise UsageError(f"fault {fault.name!r} can be planted in {' and '.join(fault.engines)}, not in {engine}")
    if config is None:
        return
    layers = fault.layers(config)
    if layer not in layers:
        needs = ", ".join(n.words for n in fault.needs) or "a model of the Llama lineage"
        where = f"; here that is layer {', '.join(map(str, layers))}" if layers else ", which this model has not"
        raise UsageError(f"fault {fault.name!r} in layer {layer} needs {needs}{where}")


def config_of(model: Any) -> Any:
    """The config that a loaded model was built from: nano's own, or what a ``config.json`` holds."""
    return model.config.to_dict() if hasattr(model.config, "to_dict") else model.config
