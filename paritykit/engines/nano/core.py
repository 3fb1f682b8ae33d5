"""The engine core: requests in, steps, tokens out. Tests and the adapter drive it step by step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import torch

from paritykit.captures.feed import Feed
from paritykit.engines.checkpoint import Checkpoint
from paritykit.engines.nano.blocks import BlockManager
from paritykit.engines.nano.config import NanoConfig
from paritykit.engines.nano.group import choose_backend
from paritykit.engines.nano.request import Request
from paritykit.engines.nano.sampling import GREEDY, Sampling, choose, log_probabilities
from paritykit.engines.nano.scheduler import Scheduler
from paritykit.engines.nano.settings import Settings
from paritykit.engines.nano.team import Team
from paritykit.errors import UnknownNameError, UsageError


@dataclass(frozen=True)
class Output:
    """What a step gave a request: the token chosen (None where it only ended), the logits ``[vocabulary]`` behind it.

    ``logprobs`` are there if they were asked for, by token id.
    """

    id: str
    token: int | None
    finished: bool
    logits: torch.Tensor | None = field(default=None, repr=False)
    logprobs: dict[int, float] = field(default_factory=dict)


class NanoLLM:
    """A model and its requests. ``arguments`` are the fields of ``Settings``; use as a context manager or close it.

    Raises UnknownNameError or UsageError for a bad argument, EngineError if the model does not load.
    """

    def __init__(self, model: str | os.PathLike[str], **arguments: Any) -> None:
        for name in arguments:
            if name not in Settings.__struct_fields__:
                raise UnknownNameError("nano argument", name, [n for n in Settings.__struct_fields__ if n != "model"])
        checkpoint = Checkpoint.find(str(model))
        self.config = NanoConfig.of(checkpoint)
        if arguments.get("dtype") == "auto":
            arguments["dtype"] = checkpoint.dtype
        self.settings = Settings(model=str(checkpoint.path), **arguments).resolve(self.config)
        backend = choose_backend(
            self.settings.distributed_backend,
            device=self.settings.device,
            ranks=self.settings.ranks,
            gpus=torch.cuda.device_count(),
        )
        self.settings = msgspec.structs.replace(self.settings, distributed_backend=backend)
        self.blocks = BlockManager(
            self.settings.num_blocks, self.settings.block_size, prefix_caching=self.settings.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=self.settings.max_num_seqs,
            max_num_batched_tokens=self.settings.max_num_batched_tokens,
        )
        self.team = Team(self.settings)
        self._numbers = count()

    def __enter__(self) -> NanoLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the other ranks."""
        self.team.close()

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self.scheduler.waiting) + len(self.scheduler.running)

    def add_request(
        self,
        tokens: Sequence[int],
        *,
        id: str = "",  # noqa: A002  (what it is)
        max_tokens: int = 16,
        sampling: Sampling = GREEDY,
        forced: Iterable[int] = (),
        stop: Iterable[int] = (),
        label: int = -1,
    ) -> str:
        """Queue a prompt; returns the request's id.

        ``forced`` ids are fed in place of the model's first choices; a chosen id in ``stop`` ends the request;
        ``label`` is the number of the case that it is recorded as.
        Raises UsageError for a prompt that is empty, too long, or outside the vocabulary, or fits no pool.
        """
        request = Request(
            id=id or f"request-{next(self._numbers)}",
            prompt=tuple(tokens),
            max_tokens=max_tokens,
            sampling=sampling,
            forced=tuple(forced),
            stop=frozenset(stop),
            label=label,
            salt=len(tokens) if any(layer.rope.grows(len(tokens)) for layer in self.config.layers) else 0,
        )
        self._check(request)
        self.scheduler.add(request)
        return request.id

    def step(self) -> list[Output]:
        """Compute one step. What it gave, request by request; empty if there is nothing to do."""
        scheduled, plan = self.scheduler.plan()
        if not scheduled:
            return []
        rows = iter(self.team.run(plan))
        outputs = []
        for request, chunk in scheduled:
            request.computed = chunk.end
            self.blocks.seal(request.id, request.tokens, request.computed)
            output = self._sampled(request, next(rows)) if chunk.sample else Output(request.id, None, request.finished)
            if request.finished:
                self._finish(request)
            if chunk.sample or output.finished:
                outputs.append(output)
        return outputs

    def abort(self, id: str) -> None:  # noqa: A002
        """Forget a request and free its blocks. UnknownNameError if there is none of that id."""
        self.scheduler.remove(self._find(id))

    def preempt(self, id: str) -> None:  # noqa: A002
        """Take a running request's blocks away, as if they had run out; one that waits is left as it is."""
        request = self._find(id)
        if request in self.scheduler.running:
            self.scheduler.preempt(request)

    def fork(self, id: str, *, sampling: Sampling | None = None, forced: Iterable[int] = ()) -> str:  # noqa: A002
        """A second request that goes on where this one is, sharing its blocks. Returns its id.

        ``forced`` ids are fed in place of its next choices.
        """
        parent = self._find(id)
        child = Request(
            id=f"{parent.id}-fork-{next(self._numbers)}",
            prompt=parent.prompt,
            max_tokens=parent.max_tokens,
            sampling=sampling or parent.sampling,
            forced=(*parent.tokens[len(parent.prompt) :], *forced),
            stop=parent.stop,
            salt=parent.salt,
            tokens=list(parent.tokens),
            chosen=list(parent.chosen),
        )
        self.scheduler.fork(parent, child)
        return child.id

    def generate(self, prompts: Iterable[Sequence[int]], **options: Any) -> list[list[int]]:
        """The tokens chosen after each prompt; ``options`` as for ``add_request``."""
        ids = [self.add_request(p, **options) for p in prompts]
        chosen: dict[str, list[int]] = {i: [] for i in ids}
        while self.unfinished:
            for output in self.step():
                if output.id in chosen and output.token is not None:
                    chosen[output.id].append(output.token)
        return [chosen[i] for i in ids]

    def begin_recording(
        self, folder: Path, points: list[str] | None, *, feed: Feed | None = None, cases: Sequence[str] = ()
    ) -> None:
        """Record what is computed from now on, on every rank; requests need a ``label``.

        With ``feed`` modules are fed as it says, the labels being numbers of ``cases``.
        """
        self.team.call("begin", str(folder), points, msgspec.json.encode(feed) if feed else b"", list(cases))

    def end_recording(self, kind: Any) -> list[Any]:
        """What every rank wrote, read as ``kind``: a part of a capture, and the error that ended it, if any."""
        return self.team.call("end", kind=kind)

    def refill(self) -> None:
        """In caches that are watched, fill again what no request holds and no later one may find."""
        free = set(self.blocks.free) - self.blocks.cached
        self.team.call("refill", [n for n in range(self.settings.num_blocks) if n not in free])

    def _sampled(self, request: Request, logits: torch.Tensor) -> Output:
        sampling = request.sampling
        token = choose(logits, sampling, number=len(request.chosen))
        logprobs = log_probabilities(logits, token, best=sampling.logprobs) if sampling.logprobs else {}
        request.accept(token)
        return Output(request.id, token, request.finished, logits, logprobs)

    def _finish(self, request: Request) -> None:
        if request.label >= 0:
            self.team.call("record_cache", request.label, self.blocks.table(request.id), request.computed)
        self.scheduler.remove(request)

    def _find(self, id_: str) -> Request:
        found = self.scheduler.find(id_)
        if found is None:
            known = [r.id for r in (*self.scheduler.running, *self.scheduler.waiting)]
            raise UnknownNameError("unfinished request", id_, known)
        return found

    def _check(self, request: Request) -> None:
        length, limit = len(request.prompt) + max(request.max_tokens, 0), self.settings.max_model_len
        if self.scheduler.find(request.id) is not None:
            raise UsageError(f"request id {request.id!r} is in use")
        if not request.prompt or request.max_tokens < 0 or len(request.forced) > request.max_tokens:
            raise UsageError(f"request {request.id!r} needs a prompt, and at least as many max_tokens as forced ids")
        bad = next((t for t in (*request.prompt, *request.forced) if not 0 <= t < self.config.vocab_size), None)
        if bad is not None:
            raise UsageError(
                f"request {request.id!r}: token id {bad} is outside the vocabulary (0 to {self.config.vocab_size - 1})"
            )
        if length > limit:
            raise UsageError(
                f"request {request.id!r}: {len(request.prompt)} prompt tokens and {request.max_tokens} new ones "
                f"are more than max_model_len {limit}"
            )
        needed = self.blocks.blocks_for(request.positions)
        if needed > self.settings.num_blocks:
            raise UsageError(
                f"request {request.id!r} needs {needed} blocks of {self.settings.block_size} positions, "
                f"and the pool has {self.settings.num_blocks}: raise num_blocks"
            )


def describe_settings(settings: Settings) -> dict[str, str]:
    """The settings as a report shows them."""
    hidden = {"model", "dtype", "device", "tensor_parallel_size", "pipeline_parallel_size"}
    return {k: str(v) for k, v in msgspec.structs.asdict(settings).items() if k not in hidden and v not in ("", {})}
