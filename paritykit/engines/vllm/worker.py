"""The worker extension: runs inside each vLLM worker, hooks the model and writes that rank's part of a capture.

Rows are labelled from the scheduler's state at the start of each forward pass: which requests take part, in which
order, from which position. Warm-up runs carry no request and are not recorded.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from paritykit.captures.feeder import Feeder
from paritykit.captures.manifest import CACHE_PORTS, Part, Segment, point_key
from paritykit.captures.recorder import Recorder, Seen, Selection
from paritykit.captures.writer import PartWriter
from paritykit.engines.vllm.facts import declared_names, describe_device, module_facts
from paritykit.engines.vllm.kv import CacheReader, chunk_of
from paritykit.engines.vllm.loader import LEDGERS
from paritykit.engines.vllm.orders import CASE_KEY, Orders, Outcome
from paritykit.engines.vllm.semantics import VllmReading, has_batch_axis, meaning_of
from paritykit.engines.vllm.shared import forget_names
from paritykit.engines.vllm.watch import CacheWatch
from paritykit.errors import EngineError
from paritykit.provenance.weightmap import RankLedger, WeightMap
from paritykit.registry import load_attribute

HEAD = "lm_head"
NOTHING = object()
"""In place of an attribute that an object had not of its own."""


class ParityWorker:
    """Mixed into vLLM's worker by ``worker_extension_cls``. All arguments and results are bytes (JSON)."""

    model_runner: Any
    rank: int

    def parity_describe(self, names: bytes) -> bytes:
        """Module facts of this rank, with where the declared loading rules send each checkpoint tensor name."""
        forget_names()
        model = self.model_runner.model
        declared = declared_names(model, msgspec.json.decode(names))
        facts = {**module_facts(model), "names": declared, "head": HEAD, "device": describe_device(model)}
        return msgspec.json.encode(facts)

    def parity_warm_up(self) -> None:
        """A pass over nothing, which makes room for what the stage before hands over: without it vLLM's CPU worker
        refuses its first request ("assert self.intermediate_tensors is not None").
        """
        self.model_runner.profile_run()

    def parity_call(self, target: str, arguments: bytes) -> None:
        """Call ``package.module:function(worker, **arguments)``, to change a loaded model under test."""
        load_attribute(target, kind="after_load function")(self, **msgspec.json.decode(arguments))

    def parity_ledger(self) -> bytes:
        """This rank's ledger of weights."""
        ledger = LEDGERS.get(self.model_runner.model)
        if ledger is None:
            ledger = RankLedger(rank=self.rank, found=WeightMap(), error="the loader was not watched")
        return msgspec.json.encode(ledger)

    def parity_poison(self, value: bytes) -> None:
        """Fill every layer's KV cache with a number; the next run watches it."""
        layers = self.model_runner.vllm_config.compilation_config.static_forward_context.values()
        for cache in (getattr(layer, "kv_cache", None) for layer in layers):
            if isinstance(cache, torch.Tensor) and cache.is_floating_point():
                cache.fill_(msgspec.json.decode(value, type=float))
        self._poisoned = True

    def parity_begin(self, orders: bytes) -> None:
        """Attach hooks and start recording."""
        poisoned, self._poisoned = self._poisoned, False
        decoded = msgspec.json.decode(orders, type=Orders)
        self._parity = _Session(self.model_runner, self.rank, decoded, watched=poisoned)

    def parity_end(self) -> bytes:
        """Remove the hooks. Returns the ``Outcome``."""
        session, self._parity = self._parity, None
        return msgspec.json.encode(session.end())

    _parity: Any = None
    _poisoned = False


class _Session:
    """Hooks and state of one run on one rank."""

    def __init__(self, runner: Any, rank: int, orders: Orders, *, watched: bool) -> None:
        self._runner = runner
        self._model: nn.Module = runner.model
        self._orders = orders
        self._part = PartWriter(Path(orders.folder), rank=rank)
        self._segments: list[Segment] = []
        self._chosen: list[list[int]] = [[] for _ in orders.cases]
        self._caches = CacheReader()
        self._watch = CacheWatch(runner, rank=rank, reader=self._caches) if watched else None
        self._undo: list[tuple[Any, str, Any]] = []
        self._selection = Selection(orders.points)
        feed, ids = orders.feed, [c.id for c in orders.cases]
        self._feeder = None if feed is None else Feeder(feed, rank=rank, cases=ids)
        self._recorder = Recorder(
            self._model,
            self._part,
            reading=VllmReading(),
            alias=False,
            keep_error=True,
            selection=self._selection,
            feeder=self._feeder,
        )
        first = self._model.register_forward_pre_hook(self._start)
        self._recorder.__enter__()
        self._handles = [first, self._model.register_forward_hook(self._finish)]
        self._compute_logits = self._model.compute_logits
        self._patch(self._model, "compute_logits", self._sampled_logits)
        self._wrap_unhookable()

    def end(self) -> Outcome:
        """Undo everything and close the files."""
        self._recorder.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        for owner, name, before in reversed(self._undo):
            delattr(owner, name) if before is NOTHING else setattr(owner, name, before)
        error = self._recorder.error
        try:
            part = self._part.finish() if error is None else Part()
        except OSError as failure:
            error, part = failure, Part()
        part.fed = [] if self._feeder is None else self._feeder.fed
        return Outcome(
            part=part,
            chosen=self._chosen,
            watched=None if self._watch is None else self._watch.finish(),
            error="" if error is None else f"{type(error).__name__}: {error}",
        )

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        """Set it on the object itself, where somebody else may have done so before."""
        self._undo.append((owner, name, vars(owner).get(name, NOTHING)))
        setattr(owner, name, value)

    def _wrap_unhookable(self) -> None:
        """Hooks never fire on a class with a ``__call__`` of its own, nor on the head: wrap their functions."""
        for name, module in self._model.named_modules():
            if type(module).__call__ is not nn.Module.__call__:
                whole = partial(self._pass, module.forward)
                part = partial(self._forward, module, name, module.forward)
                self._patch(module, "forward", part if name else whole)
            if type(module).__name__ == "LogitsProcessor" and hasattr(module, "_get_logits"):
                self._patch(module, "_get_logits", partial(self._head, module._get_logits))

    def _pass(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """A whole pass of a model whose own hooks do not fire."""
        if self._recorder.active:
            return forward(*args, **kwargs)
        self._start(self._model, args)
        output = forward(*args, **kwargs)
        self._finish(self._model, args, output)
        return output

    def _forward(self, module: nn.Module, name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        tensor = meaning_of(module, output)
        if tensor is not None and self._recorder.active:
            with self._recorder.guard():
                self._recorder.record(Seen("", tensor), module=name, kind=type(module).__name__)
        return output

    def _head(self, get_logits: Any, *args: Any, **kwargs: Any) -> Any:
        logits = get_logits(*args, **kwargs)
        if logits is not None and self._recorder.active:
            with self._recorder.guard():
                given = self._recorder.record(Seen("", logits), module=HEAD, kind="LogitsProcessor")
                logits = logits if given is None else given
        return logits

    def _start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        from vllm.forward_context import get_forward_context

        del module, args
        self._segments = [] if get_forward_context().attn_metadata is None else self._labels()
        if self._segments:
            rows = sum(s.length for s in self._segments)
            self._recorder.begin(self._segments, partial(_actual_rows, rows, has_batch_axis(self._model)))
            if self._watch is not None:
                with self._recorder.guard():
                    self._watch.before_step()

    def _labels(self) -> list[Segment]:
        """Requests of this step in row order; a request that is no case of ours ends the recording."""
        batch, runner = self._runner.input_batch, self._runner
        starts = runner.query_start_loc.np
        found = []
        for i, request in enumerate(batch.req_ids):
            extra = runner.requests[request].sampling_params.extra_args or {}
            if CASE_KEY not in extra:
                return []
            length = int(starts[i + 1] - starts[i])
            found.append(Segment(int(extra[CASE_KEY]), int(batch.num_computed_tokens_cpu[i]), length))
        return found

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The pass is over: logits for every position (on the last stage), then stop until the next pass."""
        del args
        hidden = meaning_of(module, output)
        if self._recorder.active:
            with self._recorder.guard():
                if hidden is not None:
                    self._record_logits(hidden)
                self._record_caches()
                if self._watch is not None:
                    self._watch.after_step(self._runner.input_batch.req_ids, self._segments)
        self._recorder.end()

    def _record_logits(self, hidden: torch.Tensor) -> None:
        logits = self._compute_logits(hidden[: sum(s.length for s in self._segments)])
        if logits is not None:
            self._recorder.record(Seen("logits", logits), module="", kind=type(self._model).__name__)

    def _record_caches(self) -> None:
        """Keys and values of every request that computes its last position in this pass, read by its block table."""
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        for name, layer in self._caches.layers(context).items():
            module = name.rpartition(".")[0]
            if any(point_key(module, port=p) in self._selection for p in CACHE_PORTS):
                for row, segment in enumerate(self._segments):
                    end = segment.start + segment.length
                    if end == self._orders.cases[segment.case].positions:
                        table = self._blocks_of(name, layer, row)
                        self._record_cache(name, layer, table, segment=Segment(segment.case, 0, end))

    def _blocks_of(self, name: str, layer: Any, row: int) -> torch.Tensor:
        """The blocks of the request in this row: as the layer is told, but not where it is told of each chunk alone."""
        from vllm.forward_context import get_forward_context

        if not chunk_of(layer):
            table: torch.Tensor = get_forward_context().attn_metadata[name].block_table[row]
            return table
        runner = self._runner
        groups = runner.kv_cache_config.kv_cache_groups
        number = next(n for n, group in enumerate(groups) if name in group.layer_names)
        request = runner.requests[runner.input_batch.req_ids[row]]
        return torch.tensor(request.block_ids[number], device=runner.device)

    def _record_cache(self, name: str, layer: Any, table: torch.Tensor, *, segment: Segment) -> None:
        module = name.rpartition(".")[0]
        try:
            start, pair = self._caches.read(layer, table, segment.length)
        except (EngineError, RuntimeError, LookupError, ValueError) as error:
            reason = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            for port in CACHE_PORTS:
                self._part.drop(module, port, f"the cache could not be read: {reason}")
            return
        length = segment.length - start
        self._recorder.begin([Segment(segment.case, start, length)], partial(_actual_rows, length, False))
        for port, tensor in zip(CACHE_PORTS, pair, strict=True):
            self._recorder.record(Seen(port, tensor), module=module, kind=type(layer).__name__)

    def _sampled_logits(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The engine's own logits of sampled rows: note the choice, and force the ids that a case asks for."""
        logits: torch.Tensor | None = self._compute_logits(hidden, *args, **kwargs)
        if logits is None or logits.shape[0] != len(self._segments):
            return logits
        for row, segment in enumerate(self._segments):
            case = self._orders.cases[segment.case]
            number = segment.start + segment.length - case.prompt
            if number < 0:
                continue
            self._chosen[segment.case].append(int(logits[row].argmax()))
            if number < len(case.forced):
                logits[row] = float("-inf")
                logits[row, case.forced[number]] = 0.0
        return logits


def _actual_rows(rows: int, batched: bool, tensor: torch.Tensor, key: str) -> torch.Tensor | None:
    """``tensor`` without padding rows and batch axis; None where its first axis is not the tokens."""
    del key
    if batched and tensor.dim() > 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor[:rows] if tensor.dim() >= 2 and tensor.shape[0] >= rows else None
