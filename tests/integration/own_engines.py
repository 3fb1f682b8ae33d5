"""Engines of a user's own, named on the command line: ``--candidate tests.integration.own_engines:faulty``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.captures.writer import CaptureFolder
from paritykit.case import Case
from paritykit.engines.base import Progress
from paritykit.engines.module import ModuleEngine
from paritykit.results import Side

MARK = "PARITYKIT_TEST_MARK"
"""Environment variable: the file a stuck engine makes when it is where it was to get."""


def faulty(model: str, *, dtype: str = "float32", layer: int = 2) -> ModuleEngine:
    """The model itself, run as a module of the user's own, without the value bias of one layer."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    network.model.layers[layer].self_attn.v_proj.bias.data.zero_()
    return ModuleEngine(network, name="mine", dtype=dtype, head="lm_head")


def defective(model: str, **arguments: Any) -> ModuleEngine:
    """Its code has a defect."""
    raise ZeroDivisionError("a defect of the factory")


class Stuck:
    """Stops in ``open`` or in ``run``, with a capture half written: to ``sleep``, or to ``die`` after some last words.

    Like vLLM it has forked by then, and the forked process holds an end of every pipe.
    """

    capabilities = frozenset({"logits"})

    def __init__(self, model: str, *, stage: str, end: str = "sleep", dtype: str = "float32") -> None:
        self._model, self._stage, self._end, self._dtype = model, stage, end, dtype

    def open(self) -> None:
        if self._stage == "open":
            self._stop()

    def run(self, cases: list[Case], *, points: Selection, out: Path, progress: Progress | None = None) -> Capture:
        with CaptureFolder(out) as folder:
            (folder.path / "rank0-00000.safetensors").write_bytes(bytes(1 << 16))
            if progress:
                progress("stuck", 0, 1)
            self._stop()
        raise AssertionError("it stopped before")

    def describe(self) -> Side:
        return Side(engine="stuck", model=self._model, dtype=self._dtype)

    def close(self) -> None:
        pass

    def _stop(self) -> None:
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
        Path(os.environ[MARK]).touch()
        if self._end == "die":
            print("no more memory for layer 3", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


def stuck_opening(model: str, **arguments: Any) -> Stuck:
    return Stuck(model, stage="open", **arguments)


def stuck_running(model: str, **arguments: Any) -> Stuck:
    return Stuck(model, stage="run", **arguments)


def dying(model: str, **arguments: Any) -> Stuck:
    return Stuck(model, stage="run", end="die", **arguments)
