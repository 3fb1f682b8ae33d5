"""Truth, twin and candidate of tiny models in this process, each made once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paritykit as pk
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.config import load_config
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.results import Results
from paritykit.runner import compare_captures
from paritykit.testing import tiny_model
from paritykit.testing.faults import planted

ABOVE = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}
NANO = ("qwen2", "llama", "mistral", "qwen3", "gemma2", "gemma3")
"""Dense families that nano runs."""


@dataclass
class Floors:
    folder: Path
    captures: dict[str, Capture] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def truth(self, family: str, dtype: str, *, names: tuple[str, ...] = ("smoke",)) -> Capture:
        todo = pk.cases(*names).resolve(vocab_size=499, max_positions=512)
        return self._hf(family, todo, dtype=ABOVE[dtype], weights_dtype=dtype)

    def twin(self, family: str, dtype: str, *, names: tuple[str, ...] = ("smoke",), **arguments: Any) -> Capture:
        return self._hf(family, fed(self.truth(family, dtype, names=names)), dtype=dtype, **arguments)

    def nano(self, family: str, truth: Capture, *, dtype: str, fault: str = "", **planting: Any) -> Capture:
        engine = NanoEngine(str(tiny_model(family)), dtype=dtype, provenance=False)
        engine.open()
        if not fault:
            return self._run(engine, fed(truth))
        with planted(engine, fault, **planting):
            return self._run(engine, fed(truth))

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
        truth, twin = self.truth(family, dtype, names=names), self.twin(family, dtype, names=names)
        return compare_captures(truth, candidate, twin=twin, checks=checks, config=load_config(settings, environ={}))

    def _hf(self, family: str, todo: list[Case], **arguments: Any) -> Capture:
        key = f"{family}{arguments}{[c.id for c in todo]}"
        if key not in self.captures:
            engine = HFEngine(str(tiny_model(family)), **arguments)
            engine.open()
            self.captures[key] = self._run(engine, todo)
            engine.close()
        return self.captures[key]

    def _run(self, engine: Any, todo: list[Case]) -> Capture:
        found: Capture = engine.run(todo, points=Selection(), out=self.folder / f"{next(self.numbers)}")
        return found


def fed(capture: Capture) -> list[Case]:
    return [c.force(capture.continuation(c.id)) for c in capture.cases.values()]
