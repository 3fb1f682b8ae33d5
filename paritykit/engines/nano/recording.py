"""Recording on one rank: hooks on the model, rows labelled by the step's chunks, and the KV cache as requests end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from paritykit.captures.feeder import Feeder
from paritykit.captures.manifest import CACHE_PORTS, Part, Segment
from paritykit.captures.recorder import Recorder, Seen, Selection
from paritykit.captures.writer import PartWriter
from paritykit.engines.nano.facts import HEAD, NanoReading, token_rows
from paritykit.engines.nano.model import CausalLM
from paritykit.engines.nano.step import Step


class Recording:
    """From ``Recording(...)`` to ``finish()``. The first failure ends it, not the run: ranks must stay in step."""

    def __init__(
        self, model: CausalLM, folder: Path, *, rank: int, points: list[str] | None, feeder: Feeder | None = None
    ) -> None:
        self._model, self._feeder = model, feeder
        self._part = PartWriter(folder, rank=rank)
        self._selection = Selection(points)
        self._recorder = Recorder(
            model,
            self._part,
            reading=NanoReading(),
            selection=self._selection,
            alias=True,
            keep_error=True,
            feeder=feeder,
        )
        self._recorder.__enter__()
        self._labelled = False

    def begin(self, step: Step) -> None:
        """A step starts; one with requests that are no cases is not recorded."""
        segments = [Segment(c.label, c.start, len(c.tokens)) for c in step.chunks]
        self._labelled = all(s.case >= 0 for s in segments)
        if self._labelled:
            self._recorder.begin(segments, partial(token_rows, len(step.ids)))

    @property
    def wants_logits(self) -> bool:
        """Whether logits of every position are to be computed: the same on all ranks, even where recording failed."""
        return self._labelled and ("#logits" in self._selection or HEAD in self._selection)

    def logits(self, seen: Seen) -> None:
        """The logits of every position."""
        with self._recorder.guard():
            self._recorder.record(seen, module="", kind=type(self._model).__name__)

    def end(self) -> None:
        """The step is over."""
        self._recorder.end()

    def cache(self, label: int, table: list[int], length: int) -> None:
        """Keys and values of a request that ends, read through its block table, ``[tokens, kv_heads, head_dim]``."""
        found = [(n, m) for n, m in self._model.attentions() if any(f"{n}#{p}" in self._selection for p in CACHE_PORTS)]
        if not found or not length or label < 0:
            return
        self._recorder.begin([Segment(label, 0, length)], partial(token_rows, length))
        for name, module in found:
            with self._recorder.guard():
                pair = module.attn.cache.read(table, length, module.o_proj.weight.dtype)
                for port, tensor in zip(CACHE_PORTS, pair, strict=True):
                    self._recorder.record(Seen(port, tensor), module=name, kind=type(module).__name__)
        self._recorder.end()

    def finish(self) -> tuple[Part, str]:
        """Remove the hooks. Returns what was written, and the error that ended it, if any."""
        self._recorder.__exit__(None, None, None)
        error = self._recorder.error
        try:
            part = self._part.finish() if error is None else Part()
        except OSError as failure:
            error, part = failure, Part()
        self._part.abandon()
        part.fed = [] if self._feeder is None else self._feeder.fed
        return part, "" if error is None else f"{type(error).__name__}: {error}"
