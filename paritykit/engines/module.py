"""An engine of the user's own: any ``nn.Module`` and a function that runs it.

::

    pk.engine("module", model=my_module, forward=my_forward, load=my_loader)
    pk.engine("module", model=my_module, forward=my_forward, load_weights=my_load_weights, checkpoint="./my-model")

``load_weights(model, weights)`` gets an iterator over (checkpoint name, tensor), ``load_folder(model, folder)`` a
checkpoint's folder; with either, and ``checkpoint``, the loader is traced: rules follow, and check ``weights``.

``forward(model, input_ids, positions)`` gets ``[1, tokens]`` integer tensors of one case and returns its logits,
``[tokens, vocab]`` or ``[1, tokens, vocab]`` (or None, where only modules are compared). Tokens after the prompt are
computed in the same pass; an engine with a KV cache of its own is better served by an ``Engine``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from paritykit.captures.feed import Feed
from paritykit.captures.feeder import make_feeder
from paritykit.captures.layout import DenseLayout
from paritykit.captures.manifest import Manifest, Segment
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Recorder, Seen, Selection
from paritykit.captures.writer import CaptureFolder, PartWriter
from paritykit.case import Case
from paritykit.engines.base import Progress
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.reading import FirstTensor, other_paths
from paritykit.engines.weights import checkpoint_weights, through_folder
from paritykit.errors import EngineError, UsageError
from paritykit.provenance.watch import watch_load
from paritykit.provenance.weightmap import RankLedger
from paritykit.results import Side

Forward = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor | None]
Load = Callable[[nn.Module], None]
LoadWeights = Callable[[nn.Module, Iterable[tuple[str, torch.Tensor]]], object]
LoadFolder = Callable[[nn.Module, Path], object]


class ModuleEngine:
    """``engine("module", model=..., forward=..., load=...)``; ``name`` is what reports call it.

    ``load(model)`` is called on opening. Raises UsageError if ``model`` is no module, for two ways to load, or for a
    loader without a checkpoint.
    """

    capabilities = frozenset({"logits", "replay", "teacher_forcing"})

    def __init__(
        self,
        model: nn.Module,
        *,
        forward: Forward | None = None,
        load: Load | None = None,
        load_weights: LoadWeights | None = None,
        load_folder: LoadFolder | None = None,
        checkpoint: str | Path = "",
        name: str = "module",
        dtype: str = "auto",
        head: str = "",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"engine 'module' needs an nn.Module as model, not {type(model).__name__}")
        self._model = model
        self._forward: Forward = forward or _plain_forward
        self._load = load
        self._loader = self._traceable(load, load_weights, load_folder, checkpoint)
        self._ledger: RankLedger | None = None
        if self._loader is not None:
            self.capabilities = self.capabilities | {"ledger"}
        self._name = name
        self._dtype = dtype
        self._head = head

    def open(self) -> None:
        """Put the module into evaluation mode, cast and load it."""
        if self._dtype != "auto":
            from paritykit.engines.dtypes import parse_dtype

            self._model.to(parse_dtype(self._dtype))
        self._model.eval()
        if self._load:
            self._load(self._model)
        if self._loader is not None and self._checkpoint is not None:
            weights = partial(checkpoint_weights, self._checkpoint)
            with torch.no_grad():
                self._ledger = watch_load(self._model, weights=weights, load=self._loader)

    def ledger(self) -> list[RankLedger]:
        """Where every weight landed. Raises EngineError for a module without a traceable loader, or before ``open``."""
        if self._ledger is None:
            raise EngineError(f"engine {self._name!r} was given no load_weights or load_folder to trace")
        return [self._ledger]

    def run(
        self,
        cases: list[Case],
        *,
        points: Selection,
        out: Path,
        progress: Progress | None = None,
        feed: Feed | None = None,
    ) -> Capture:
        """See ``Engine.run``: one pass over prompt and forced tokens for each case."""
        generated: dict[str, list[int]] = {}
        feeder = make_feeder(feed, cases)
        with CaptureFolder(out) as folder, PartWriter(folder.path) as part, torch.no_grad():
            layout, reading = DenseLayout(), FirstTensor()
            with Recorder(self._model, part, reading=reading, selection=points, alias=True, feeder=feeder) as recorder:
                for index, case in enumerate(cases):
                    if progress:
                        progress(self._name, index, len(cases))
                    generated[case.id] = self._one(case, index, recorder, layout)
            facts = self._facts() | ({"fed": feeder.fed} if feeder else {})
            manifest = Manifest(side=self.describe(), cases=cases, generated=generated, facts=facts)
            return Capture.open(folder.commit(manifest, [part.finish()]), verify=False)

    def describe(self) -> Side:
        """Dtype and device of the module's first parameter."""
        first = next(self._model.parameters(), torch.zeros(0))
        return Side(
            engine=self._name,
            model=type(self._model).__name__,
            device=str(first.device),
            dtype=str(first.dtype).removeprefix("torch."),
            versions={"torch": str(torch.__version__)},
        )

    def close(self) -> None:
        """Nothing to free: the module is the caller's."""

    def _facts(self) -> dict[str, Any]:
        landings = self._ledger.found.landings if self._ledger else []
        twice = other_paths(self._model)
        return {"head": self._head, "landings": msgspec.to_builtins(landings), "same": twice}

    def _traceable(
        self, load: Load | None, weights: LoadWeights | None, folder: LoadFolder | None, checkpoint: str | Path
    ) -> Callable[[Iterable[tuple[str, torch.Tensor]]], object] | None:
        self._checkpoint = Checkpoint.find(str(checkpoint)) if str(checkpoint) else None
        if sum(x is not None for x in (load, weights, folder)) > 1:
            raise UsageError("engine 'module' takes one of load, load_weights and load_folder")
        if (weights or folder) and self._checkpoint is None:
            raise UsageError("engine 'module' needs a checkpoint=FOLDER to call load_weights or load_folder with")
        if weights is not None:
            return partial(weights, self._model)
        if folder is not None and self._checkpoint is not None:
            return through_folder(self._checkpoint, partial(folder, self._model))
        return None

    def _one(self, case: Case, index: int, recorder: Recorder, layout: DenseLayout) -> list[int]:
        tokens = [*case.tokens, *case.forced][: case.positions]
        free = len(tokens)
        while len(tokens) < case.positions:
            tokens.append(int(self._choosing(tokens, case)[-1].argmax()))
        layout.set(1, len(tokens))
        recorder.begin([Segment(index, 0, len(tokens))], layout.rows)
        logits = self._logits(tokens)
        if logits is not None:
            recorder.record(Seen("logits", logits[None]), module="", kind=type(self._model).__name__)
        recorder.end()
        if not case.new_tokens or logits is None:
            return []
        own: list[int] = logits[len(case.tokens) - 1 :].argmax(-1).tolist()
        forced = free - len(case.tokens)
        return [*own[:forced], *tokens[free:], own[-1]]

    def _choosing(self, tokens: list[int], case: Case) -> torch.Tensor:
        logits = self._logits(tokens)
        if logits is None:
            raise EngineError(
                f"forward of engine {self._name!r} returned no logits to choose the new tokens of {case.id!r} by"
            )
        return logits

    def _logits(self, tokens: list[int]) -> torch.Tensor | None:
        device = next(self._model.parameters(), torch.zeros(0)).device
        ids = torch.tensor([tokens], device=device)
        logits = self._forward(self._model, ids, torch.arange(len(tokens), device=device)[None])
        if logits is None:
            return None
        if not isinstance(logits, torch.Tensor):
            raise EngineError(f"forward of engine {self._name!r} must return its logits, not {type(logits).__name__}")
        if logits.dim() < 2 or logits.shape[:-1].numel() != len(tokens):
            raise EngineError(
                f"forward of engine {self._name!r} returned {list(logits.shape)} for {len(tokens)} tokens"
            )
        return logits.reshape(len(tokens), -1)


def _plain_forward(model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> Any:
    del positions
    output = model(input_ids)
    return getattr(output, "logits", output)
