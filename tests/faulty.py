"""Planted faults under test: models that they fit, engines that stay open, and where a planted run differs first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paritykit.captures.manifest import split_key
from paritykit.captures.reader import Capture, let_go
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.comparison.ensemble import DrawPlan, Ensemble
from paritykit.comparison.twin import read_at_once
from paritykit.config import load_config
from paritykit.engines.hf import HFEngine
from paritykit.engines.nano.engine import NanoEngine
from paritykit.reference import ABOVE
from paritykit.results import Results
from paritykit.runner import compare_captures
from paritykit.testing.faults import Fault, planted
from paritykit.testing.scoreboard.models import LAYERS, VOCABULARY, model_of
from paritykit.testing.scoreboard.models import MODELS as EVERY
from paritykit.testing.scoreboard.models import homes as every_home

__all__ = ["LAYERS", "VOCABULARY", "model_of"]

MODELS = {n: EVERY[n] for n in ("qwen2", "llama", "llama_tied", "mistral", "gemma2", "gemma3", "mixtral")}
"""Together they have everything that a fault may need; the names are for tests to speak of them."""
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}


OTHERWISE = {"embedding-scale-missing": "model.layers.0"}
"""In nano the embedding's factor is outside of it."""


def homes(fault: Fault) -> dict[str, int]:
    """The models that the fault fits, and the layer to plant it in: the second, where that can be."""
    return every_home(fault, MODELS)


@dataclass
class Ground:
    """Open engines in ``dtype``, at most ``room`` of them, and clean captures, each made once.

    ``floor``: the reference is the truth, one precision above, beside a twin and draws of its rounding, as in a run;
    otherwise float32 alone.
    """

    folder: Path
    kind: type[Any] = NanoEngine
    room: int = 1000
    dtype: str = "float32"
    floor: bool = False
    engines: dict[str, Any] = field(default_factory=dict)
    captures: dict[str, Capture] = field(default_factory=dict)
    ensembles: dict[str, Ensemble] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def engine(self, model: Path, **arguments: Any) -> Any:
        key = f"{model}{sorted(arguments.items())}"
        if key not in self.engines:
            while len(self.engines) >= self.room:
                self.engines.pop(next(iter(self.engines))).close()
            self.engines[key] = self.kind(str(model), dtype=self.dtype, provenance=False, **arguments)
            self.engines[key].open()
        return self.engines[key]

    def name_of(self, engine: Any) -> str:
        return next(key for key, found in self.engines.items() if found is engine)

    def run(self, engine: Any, cases: list[Case]) -> Capture:
        return let_go(engine.run(cases, points=Selection(), out=self.folder / f"{next(self.numbers)}"))

    def reference(self, model: Path, cases: list[Case]) -> Capture:
        """What Hugging Face computes, and generates."""
        exact = {"dtype": ABOVE[self.dtype], "weights_dtype": self.dtype} if self.floor else {}
        return self._hf(model, cases, **exact)

    def twin(self, model: Path, cases: list[Case]) -> Capture | None:
        """The same in the engines' dtype, fed what the reference generated; None where no floor is measured."""
        return self._hf(model, [*cases, *read_at_once(cases)], dtype=self.dtype) if self.floor else None

    def ensemble(self, model: Path, truth: Capture, cases: list[Case]) -> Ensemble | None:
        """What draws of the twin's rounding do; None where no floor is measured."""
        key = f"{model}{cases}"
        if self.floor and key not in self.ensembles:
            engine = HFEngine(str(model), dtype=self.dtype)
            engine.open()
            out = self.folder / f"{next(self.numbers)}"
            self.ensembles[key] = engine.draw(cases, truth=truth.path, out=out, plan=DrawPlan())
            engine.close()
        return self.ensembles.get(key)

    def _hf(self, model: Path, cases: list[Case], **arguments: str) -> Capture:
        key = f"hf{model}{arguments}{cases}"
        if key not in self.captures:
            engine = HFEngine(str(model), **arguments)  # type: ignore[arg-type]
            engine.open()
            self.captures[key] = self.run(engine, cases)
            engine.close()
        return self.captures[key]

    def clean(self, engine: Any, cases: list[Case]) -> Capture:
        key = f"{self.name_of(engine)}{cases}"
        if key not in self.captures:
            self.captures[key] = self.run(engine, cases)
        return self.captures[key]

    def close(self) -> None:
        """End what has processes; the rest goes with the test session."""
        for engine in self.engines.values():
            if self.kind is not NanoEngine or engine.llm.settings.ranks > 1:
                engine.close()


@dataclass
class Trial:
    """A fault, the model it is planted in, and its cases, which follow what Hugging Face generates."""

    ground: Ground
    fault: Fault
    name: str
    layer: int

    def __post_init__(self) -> None:
        self.model = model_of(self.name)
        todo = self.fault.when.cases(vocab_size=VOCABULARY)
        self.reference = self.ground.reference(self.model, todo)
        self.cases = [c.force(self.reference.generated(c.id)) for c in todo]

    @property
    def engine(self) -> Any:
        return self.ground.engine(self.model, **self.fault.when.arguments)

    def clean(self) -> Capture:
        return self.ground.clean(self.engine, self.cases)

    def planted(self, *, strength: float = 1.0) -> Capture:
        key = f"{self.fault.name}{self.name}{strength}"
        if key not in self.ground.captures:
            with planted(self.engine, self.fault, layer=self.layer, strength=strength):
                self.ground.captures[key] = self.ground.run(self.engine, self.cases)
        return self.ground.captures[key]

    def compare(self, candidate: Capture) -> Results:
        return self._compared(candidate, explain=False)

    def explained(self, candidate: Capture) -> Results:
        """The same with causes."""
        return self._compared(candidate, explain=True)

    def _compared(self, candidate: Capture, *, explain: bool) -> Results:
        twin, config = self.ground.twin(self.model, self.cases), load_config({}, environ={})
        ensemble = self.ground.ensemble(self.model, self.reference, self.cases)
        return compare_captures(self.reference, candidate, twin=twin, ensemble=ensemble, config=config, explain=explain)


def differences(
    clean: Capture, other: Capture, *, cases: Iterable[str] = (), prefill: bool = False, floor: float = 0.0
) -> dict[str, float]:
    """The points that differ, in computing order, and by how much relative to the largest number of the clean one.

    With ``prefill`` only positions of prompts are looked at, as they were computed: what the cache holds at the end is
    not. Differences up to ``floor`` are none.
    """
    found = dict[str, float]()
    for key, ranks in clean.points.items():
        for rank in () if prefill and key.endswith("_cache") else ranks:
            for name in cases or clean.cases:
                rows = slice(len(clean.cases[name].tokens) if prefill else None)
                error = distance(clean.rows(key, name, rank=rank)[rows], other.rows(key, name, rank=rank)[rows])
                found[key] = max(error, found.get(key, 0.0))
    return {key: error for key, error in found.items() if error > floor}


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Zero for the same bits, infinite for other shapes or numbers that are none."""
    if mine.shape != theirs.shape:
        return float("inf")
    if torch.equal(mine.nan_to_num(), theirs.nan_to_num()) and torch.equal(mine.isnan(), theirs.isnan()):
        return 0.0
    error = float((mine.double() - theirs.double()).abs().max() / mine.double().abs().max())
    return float("inf") if math.isnan(error) else error


def first_blamed(clean: Capture, found: dict[str, float]) -> str:
    """The module that computed the first point that differs: an input is what the module around made."""
    key = next(iter(found), "")
    module, port, _ = split_key(key)
    if port != "input":
        return module or key
    while (module := module.rpartition(".")[0]) not in clean.points:
        assert module, key
    return module


def native(fault: Fault, *, layer: int) -> str:
    """Where nano itself shows a fault first."""
    point = OTHERWISE.get(fault.name) or fault.at(layer=layer)
    head, _, last = point.rpartition(".")
    return f"{head}.{FUSED[last]}" if last in FUSED else point
