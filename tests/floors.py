"""Truth, twin and candidate of a family's model in this process, each made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paritykit as pk
from paritykit.captures.reader import Capture
from paritykit.config import load_config
from paritykit.engines.hf import HFEngine
from paritykit.results import Results
from paritykit.runner import compare_captures
from paritykit.testing import tiny_model
from paritykit.testing.faults import planted
from paritykit.testing.real import SHORT, SHORTENED
from paritykit.testing.scoreboard.ground import Ground, Sides, fed
from tests.real import trained

NANO = ("qwen2", "llama", "mistral", "qwen3", "gemma2", "gemma3")
"""Dense families that nano runs."""


TRAINED = tuple(f"smollm2_{family}" for family in SHORTENED)
"""Trained weights in the families that can have them."""


def model_of(family: str) -> Path:
    """The folder of a family's tiny model, or of one with trained weights."""
    if family not in TRAINED:
        return tiny_model(family)
    changes = {} if family == TRAINED[0] else {"family": family.removeprefix("smollm2_")}
    return trained("smollm2", num_hidden_layers=SHORT, **changes)


class Floors:
    def __init__(self, folder: Path) -> None:
        self.ground = Ground(folder, kept=100)

    def sides(self, family: str, dtype: str, *, names: tuple[str, ...] = ("smoke",)) -> Sides:
        todo = pk.cases(*names).resolve(vocab_size=499, max_positions=512)
        return self.ground.sides(model_of(family), dtype=dtype, cases=todo)

    def truth(self, family: str, dtype: str, *, names: tuple[str, ...] = ("smoke",)) -> Capture:
        return self.sides(family, dtype, names=names).truth

    def twin(self, family: str, dtype: str, *, names: tuple[str, ...] = ("smoke",)) -> Capture:
        return self.sides(family, dtype, names=names).twin

    def another_twin(self, family: str, dtype: str, **arguments: Any) -> Capture:
        engine = HFEngine(str(model_of(family)), dtype=dtype, **arguments)
        engine.open()
        return self.ground.run(engine, self.sides(family, dtype).cases)

    def nano(self, family: str, truth: Capture, *, dtype: str, fault: str = "", **planting: Any) -> Capture:
        engine = self.ground.engine("nano", model_of(family), dtype=dtype, provenance=False)
        if not fault:
            return self.ground.run(engine, fed(truth))
        with planted(engine, fault, **planting):
            return self.ground.run(engine, fed(truth))

    def compare(
        self,
        family: str,
        candidate: Capture,
        *,
        dtype: str,
        names: tuple[str, ...] = ("smoke",),
        checks: tuple[str, ...] = ("modules", "logits", "tokens"),
        **settings: Any,
    ) -> Results:
        sides, config = self.sides(family, dtype, names=names), load_config(settings, environ={})
        return compare_captures(
            sides.truth, candidate, twin=sides.twin, ensemble=sides.ensemble, checks=checks, config=config
        )
