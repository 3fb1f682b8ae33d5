"""nano as an engine of ParityKit: runs cases, records every module on every rank."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

import paritykit
from paritykit.captures.feed import Feed, fully_fed
from paritykit.captures.feeder import check_feed
from paritykit.captures.manifest import Manifest, Part
from paritykit.captures.reader import Capture
from paritykit.captures.recorder import Selection
from paritykit.captures.writer import CaptureFolder
from paritykit.case import Case
from paritykit.engines.base import Progress, batches
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.core import NanoLLM, describe_settings
from paritykit.engines.stages import merge_facts
from paritykit.engines.strays import Watched, cache_facts
from paritykit.errors import EngineError
from paritykit.provenance.weightmap import RankLedger
from paritykit.registry import load_attribute
from paritykit.results import Side


class NanoEngine:
    """``engine("nano", MODEL, kv="paged", block_size=16, tensor_parallel_size=2, ...)``.

    Arguments are the fields of ``paritykit.engines.nano.settings.Settings``. With prefix caching a case's cached
    positions are computed all the same, from the cached keys and values, so that nothing is missing from the capture.
    ``provenance`` traces the loader. ``after_load`` is ``package.module:function``, called on every rank's
    worker with ``after_load_args``, to change the loaded model; ``after_open`` the same for the engine itself.
    """

    capabilities = frozenset(
        {
            "cache_digest",
            "chunked_prefill",
            "decode",
            "ledger",
            "logits",
            "pipeline_parallel",
            "poison",
            "prefix_caching",
            "replay",
            "teacher_forcing",
            "tensor_parallel",
        }
    )
    variations = {
        "kv_cache": [{"block_size": 3}, {"kv": "contiguous"}, {"block_size": 1}, {"block_size": 16}],
        "tensor_parallel": [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}],
        "pipeline_parallel": [{"pipeline_parallel_size": 2}],
    }

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        after_load: str = "",
        after_load_args: dict[str, Any] | None = None,
        after_open: str = "",
        after_open_args: dict[str, Any] | None = None,
        provenance: bool = True,
        **arguments: Any,
    ) -> None:
        self.checkpoint = Checkpoint.find(model)
        self._arguments = {"dtype": dtype, "provenance": provenance, **arguments}
        self._after_load = (after_load, after_load_args or {})
        self._after_open = (after_open, after_open_args or {})
        self._llm: NanoLLM | None = None
        self._ledgers: list[RankLedger] = []
        self._poisoned = False

    def open(self) -> None:
        """Load the model on every rank."""
        self._llm = NanoLLM(self.checkpoint.path, **self._arguments)
        for (target, arguments), host in ((self._after_load, False), (self._after_open, True)):
            if target:
                self.call(target, arguments, host=host)
        if self._arguments["provenance"]:
            self._ledgers = self._llm.team.call("ledger", kind=RankLedger)

    def run(
        self,
        cases: list[Case],
        *,
        points: Selection,
        out: Path,
        progress: Progress | None = None,
        feed: Feed | None = None,
    ) -> Capture:
        """See ``Engine.run``; cases of a batch are scheduled together, as the engine's settings allow."""
        if feed is not None:
            check_feed(feed, cases)
        with CaptureFolder(out) as folder:
            self.llm.blocks.forget()
            patterns = None if points.patterns is None else list(points.patterns)
            self.llm.begin_recording(folder.path, patterns, feed=feed, cases=[c.id for c in cases])
            try:
                generated = self._generate(cases, progress)
            except BaseException:
                self._forget()
                raise
            ended = self.llm.end_recording(tuple[Part, str])
            for rank, (_, error) in enumerate(ended):
                if error:
                    raise EngineError(f"recording on rank {rank} of nano failed: {error}")
            landings = msgspec.to_builtins([x for r in self._ledgers for x in r.found.landings])
            facts = {**merge_facts(self._facts()), "landings": landings, **cache_facts(self._watched())}
            if feed is not None:
                facts["fed"] = fully_fed(feed, [part for part, _ in ended])
            manifest = Manifest(side=self.describe(), cases=cases, generated=generated, facts=facts)
            return Capture.open(folder.commit(manifest, [part for part, _ in ended]), verify=False)

    def describe(self) -> Side:
        """The engine as it really runs."""
        settings = self.llm.settings
        return Side(
            engine="nano",
            model=str(self.checkpoint.path),
            dtype=settings.dtype,
            device=settings.device,
            digest=self.checkpoint.digest,
            attention_backend=settings.attention_backend,
            parallel={
                "tensor_parallel_size": settings.tensor_parallel_size,
                "pipeline_parallel_size": settings.pipeline_parallel_size,
            },
            versions={"paritykit": paritykit.__version__, "torch": str(torch.__version__)},
            args=describe_settings(settings),
        )

    def ledger(self) -> list[RankLedger]:
        """Where every weight landed on each rank, and whether its numbers arrived. Raises EngineError if not traced."""
        if not self._ledgers:
            raise EngineError("nano's loader was not traced: the engine is not open, or provenance is off")
        return self._ledgers

    def close(self) -> None:
        """End the ranks and drop the model."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None
            gc.collect()

    def call(self, target: str, arguments: Mapping[str, Any], *, host: bool = False) -> None:
        """Call ``package.module:function(worker, **arguments)`` on every rank, with ``host`` on this engine, once."""
        if host:
            load_attribute(target, kind="after_open function")(self, **arguments)
        else:
            self.llm.team.call("call", target, dict(arguments))

    def poison_cache(self, value: float) -> None:
        """Fill every slot of the KV cache with ``value``, on every rank; nothing is left in the prefix cache.

        The next run watches the cache, and fills what requests give up again.
        """
        self.llm.blocks.forget()
        self.llm.team.call("poison", value)
        self._poisoned = True

    def load_weights(self, folder: str) -> None:
        """Load other weights of the same names and shapes, on every rank. Raises EngineError."""
        self.llm.team.call("load", folder)

    def parameters(self) -> list[dict[str, torch.Tensor]]:
        """Every rank's parameters by name, as that rank holds them."""
        with tempfile.TemporaryDirectory(prefix="paritykit-") as folder:
            self.llm.team.call("save_parameters", folder)
            return [load_file(f"{folder}/rank{n}.safetensors") for n in range(self.llm.settings.ranks)]

    @property
    def llm(self) -> NanoLLM:
        """The open core. Raises EngineError before ``open``."""
        if self._llm is None:
            raise EngineError("engine 'nano' is not open")
        return self._llm

    def _facts(self) -> list[dict[str, Any]]:
        """What every rank says of its modules."""
        found: list[dict[str, Any]] = self.llm.team.call("facts", kind=dict[str, Any])
        return found

    def _watched(self) -> list[Watched | None]:
        """What every rank saw of its cache, if it was filled before the run."""
        poisoned, self._poisoned = self._poisoned, False
        return self.llm.team.call("watched", kind=Watched | None) if poisoned else []

    def _generate(self, cases: list[Case], progress: Progress | None) -> dict[str, list[int]]:
        index = {c.id: n for n, c in enumerate(cases)}
        chosen: dict[str, list[int]] = {c.id: [] for c in cases}
        groups = batches(cases)
        for number, group in enumerate(groups):
            if progress:
                progress("nano", number, len(groups))
            for case in group:
                self.llm.add_request(
                    case.tokens, id=case.id, max_tokens=case.new_tokens, forced=case.forced, label=index[case.id]
                )
            while self.llm.unfinished:
                for output in self.llm.step():
                    if output.token is not None:
                        chosen[output.id].append(output.token)
                if self._poisoned:
                    self.llm.refill()
        return chosen

    def _forget(self) -> None:
        """After a failed run: no hooks, no requests, so that the next run starts clean; dead ranks stay dead."""
        for request in (*self.llm.scheduler.running, *self.llm.scheduler.waiting):
            self.llm.scheduler.remove(request)
        with contextlib.suppress(EngineError):
            self.llm.team.call("end")
            self._watched()
