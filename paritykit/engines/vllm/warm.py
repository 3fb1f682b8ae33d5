"""Ranks on a CPU begin as forks of a process that has imported vLLM: importing it is most of what their start takes.

vLLM starts them as new interpreters, which also take seconds to end. The process that is forked has one thread and has
computed nothing. ``VLLM_WORKER_MULTIPROC_METHOD`` in the environment, or more than one thread for a rank (whose
binding to cores is read once, at import), leaves vLLM's own way in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from multiprocessing import context, get_context
from typing import Any

from paritykit.engines.vllm.shared import forget_names

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
IMPORTED = ["paritykit.engines.vllm.worker", "vllm.v1.worker.cpu_worker", "vllm.model_executor.model_loader"]
CHOSEN = os.environ.get(METHOD)
"""What the user asked for: vLLM sets it itself, later."""


class WarmContext(context.SpawnContext):
    """Starts processes by forking one that has imported ``IMPORTED``; as new interpreters where they have threads."""

    def Process(self, **given: Any) -> Any:  # type: ignore[override]  # noqa: N802  (the name is multiprocessing's)
        """Takes what ``multiprocessing.Process`` takes, by keyword."""
        if os.environ.get("OMP_NUM_THREADS") != "1":
            return super().Process(**given)
        target, kwargs = given.pop("target"), given.pop("kwargs")
        return get_context("forkserver").Process(target=begin, args=(dict(os.environ), target, kwargs), **given)


def begin(environment: dict[str, str], target: Callable[..., None], kwargs: dict[str, Any]) -> None:
    """Run ``target`` in a forked process as if it had been started with this environment."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    cores = {int(core) for core in environment.get("GOMP_CPU_AFFINITY", "").split() if core.isdigit()}
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        target(**kwargs)
    finally:  # a fork ends at once, and vLLM's own destructors are not called
        forget_names()


def warm_ranks() -> None:
    """From here on vLLM's executor in this process forks its ranks."""
    if CHOSEN is not None:
        return
    import vllm.v1.executor.multiproc_executor as executor

    get_context("forkserver").set_forkserver_preload(IMPORTED)
    executor.get_mp_context = WarmContext
