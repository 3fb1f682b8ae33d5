"""The seams of nano: where each kind of fault goes in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from paritykit.engines.nano.attention import Scores, gather_attention
from paritykit.engines.nano.step import Step
from paritykit.testing.faults.site import NotHere, Rotation, Site, Write, Wrong

SPOILT = 3.0
"""What a spoilt cache holds; no number of the caches is undone: a run reads nothing of the one before."""


class NanoSite(Site):
    """A worker of nano."""

    engine = "nano"

    @property
    def model(self) -> Any:
        """This rank's model."""
        return self.worker.model

    @property
    def rank(self) -> int:
        """This rank among those that share a layer."""
        return int(self.worker.group.rank)

    @property
    def ranks(self) -> int:
        """How many ranks share a layer."""
        return int(self.worker.group.size)

    @property
    def sparse(self) -> Any:
        """The layer's mixture of experts."""
        return self.block.mlp

    def norm_facts(self, norm: Any) -> tuple[torch.Tensor, float]:
        """What a norm multiplies with, ``[size]``, and its epsilon."""
        return norm.offset + norm.weight, norm.eps

    def on_norm(self, norm: Any, wrong: Wrong) -> None:
        """``wrong(x)`` instead of a norm of ``x``."""
        self.on_output(norm, lambda _, x: wrong(x))

    def on_rotation(self, wrong: Callable[[Rotation], tuple[torch.Tensor, torch.Tensor]]) -> None:
        """``wrong(rotation)`` gives query and key of this layer."""
        rotary = self.attention.rotary_emb
        own = copy.deepcopy(rotary)

        def forward(query: torch.Tensor, key: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
            def turn(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                rotated: tuple[torch.Tensor, torch.Tensor] = rotary.forward(
                    q, k, replace(step, positions=positions, _made={})
                )
                return rotated

            right = rotary.forward(query, key, step)
            start = per_row(step, [c.start for c in step.chunks])
            found = wrong(
                Rotation(query, key, right, step.positions, start, decode_rows(step), rotary._frequencies, turn)
            )
            return self.blend(right[0], found[0]), self.blend(right[1], found[1])

        self.changes.set(own, "forward", forward)
        self.changes.set(self.attention, "rotary_emb", own)

    def on_attention(self, wrong: Callable[[Any], torch.Tensor]) -> None:
        """``wrong(core)`` instead of the attention core's output, ``[tokens, heads, head_dim]``."""

        def backend(right_of: Any, query: torch.Tensor, cache: Any, step: Step, scores: Scores) -> torch.Tensor:
            core = NanoCore(right_of, query, cache, step, scores)
            return self.blend(core.right, wrong(core))

        self.changes.wrap(self.attention.attn, "backend", backend)

    def on_slots(self, wrong: Callable[[Write], torch.Tensor]) -> None:
        """``wrong(write)`` gives the slots that this layer's keys and values go to."""

        def write(right_of: Any, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
            slots = wrong(write_of(step))
            right_of(key, value, replace(step, slots=slots, written=(slots >= 0).nonzero().flatten()))

        self.changes.wrap(self.attention.attn.cache, "write", write)

    def on_padding(self, live: Callable[[Write], torch.Tensor]) -> None:
        """Zeros are written to the slots ``live(write)``, after the step's own keys and values."""
        cache = self.attention.attn.cache

        def write(right_of: Any, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
            right_of(key, value, step)
            slots = live(write_of(step))
            for rows in (cache.keys, cache.values):
                rows.put(slots, torch.zeros_like(key[: len(slots)]))

        self.changes.wrap(cache, "write", write)

    @property
    def block_size(self) -> int:
        """Positions in a block of the cache."""
        return int(self.attention.attn.cache.block_size)

    def spoil_cache(self) -> None:
        """Let this layer's cache hold what no request wrote."""
        for slots in (self.attention.attn.cache.keys, self.attention.attn.cache.values):
            slots.data.fill_(SPOILT)

    def on_residual(self, number: int, wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """``wrong(residual, update)`` instead of the layer's first (0) or second (1) residual sum."""
        block, calls = self.block, [0]

        def add(right_of: Any, residual: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
            right: torch.Tensor = right_of(residual, update)
            mine = calls[0] % 2 == number
            calls[0] += 1
            return self.blend(right, wrong(residual, update)) if mine else right

        self.changes.wrap(block, "add", add)

    def on_layer(self, wrong: Wrong) -> None:
        """``wrong(right, hidden)`` instead of what the whole layer makes of ``hidden``."""
        self.on_output(self.block, lambda right, hidden, _: wrong(right, hidden))

    def on_activation(self, wrong: Wrong) -> None:
        """``wrong(gate)`` instead of the activated gate of the layer's MLP or experts."""
        mlp = self.block.mlp
        self.on_output(mlp.act_fn if hasattr(mlp, "act_fn") else mlp.experts.act_fn, lambda _, gate: wrong(gate))

    def on_experts(self, wrong: Wrong) -> None:
        """``wrong(run, x, logits)`` instead of the experts' output; ``run(x, logits)`` routes and computes rightly."""
        sparse, held = self.sparse, dict[str, torch.Tensor]()

        def gate(right_of: Any, x: torch.Tensor) -> Any:
            output = right_of(x)
            held["logits"] = output[0]
            return output

        def experts(right_of: Any, x: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
            def run(inputs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                other, whose = sparse.gate.choose(logits)
                output: torch.Tensor = right_of(inputs, other.to(inputs.dtype), whose)
                return output

            return self.blend(right_of(x, shares, chosen), wrong(run, x, held["logits"]))

        self.changes.wrap(sparse.gate, "forward", gate)
        self.changes.wrap(sparse.experts, "forward", experts)

    def on_reduce(self, linear: Any, wrong: Wrong) -> None:
        """``wrong(partial, reduce)`` instead of the sum of every rank's ``partial``."""
        group = linear._group

        def reduce(partial: torch.Tensor) -> torch.Tensor:
            return self.blend(group.all_reduce(partial), wrong(partial, group.all_reduce))

        self.changes.set(linear, "_group", Rerouted(group, reduce))

    def on_hand_over(self, wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """``wrong(hidden, residual)`` instead of what goes to the stage whose first layer this is.

        ``hidden`` is the sum of ``residual`` and what the last layer's MLP added. NotHere on every other stage.
        """
        own = dict(self.model.model.layers.named_children())
        last = own.get(str(self.layer - 1))
        if last is None or str(self.layer) in own:
            raise NotHere
        held: list[torch.Tensor] = []

        def add(right_of: Any, residual: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
            held[:] = [residual]
            total: torch.Tensor = right_of(residual, update)
            return total

        self.changes.wrap(last, "add", add)
        change = HandedOver(self.worker.place, lambda hidden: self.blend(hidden, wrong(hidden, held[0])))
        self.changes.set(self.worker, "place", change)

    def on_embedding_scale(self, wrong: Callable[[float], float]) -> None:
        """Another factor on the embedding."""
        right = self.model.model.scale
        self.changes.set(self.model.model, "scale", right + self.strength * (wrong(right) - right))

    def on_head(self, wrong: Wrong) -> None:
        """``wrong(right, hidden, product)`` instead of the logits; ``product(hidden, weight)`` is a head's."""
        head = self.present(self.model.lm_head)

        def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            local = torch.nn.functional.linear(hidden, weight)
            logits: torch.Tensor = head._group.all_gather(local)[..., : head.shard.vocabulary]
            return logits

        self.on_output(head, lambda right, hidden: wrong(right, hidden, product))

    def on_logits(self, wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """``wrong(raw)`` instead of the finished logits; ``raw`` are those before any softcap."""

        def compute(right_of: Any, hidden: torch.Tensor) -> torch.Tensor:
            return self.blend(right_of(hidden), wrong(self.model.lm_head.forward(hidden)))

        self.present(self.model.lm_head)
        self.changes.wrap(self.model, "compute_logits", compute)


class HandedOver:
    """A rank's place, from which other hidden states are handed on."""

    def __init__(self, place: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._place, self._change = place, change

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """See ``Place.send_hidden``."""
        self._place.send_hidden(self._change(hidden))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)


class Rerouted:
    """A group of ranks whose sum is another."""

    def __init__(self, group: Any, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.rank, self.size = group.rank, group.size
        self.all_reduce, self.all_gather = all_reduce, group.all_gather


@dataclass(frozen=True)
class NanoCore:
    """See ``Core``."""

    right_of: Any
    query: torch.Tensor
    cache: Any
    step: Step
    scores: Scores

    @property
    def right(self) -> torch.Tensor:
        """The right output."""
        return self.run()

    @property
    def decode(self) -> torch.Tensor:
        """Rows that are decode, bool ``[tokens, 1, 1]``."""
        return decode_rows(self.step)[:, None, None]

    @property
    def count(self) -> int:
        """How many requests there are."""
        return len(self.step.chunks)

    def run(self, *, scores: Scores | None = None, order: list[int] | None = None, cache: Any = None) -> torch.Tensor:
        """See ``Core.run``; ``cache`` is read in the place of the layer's."""
        step, chunks = self.step, self.step.chunks
        if order is not None:
            chunks = tuple(
                msgspec.structs.replace(c, table=chunks[n].table) for c, n in zip(chunks, order, strict=True)
            )
            step = replace(step, chunks=chunks, _made={})
        backend = self.right_of if order is None and cache is None else gather_attention
        output: torch.Tensor = backend(self.query, cache or self.cache, step, scores or self.scores)
        return output

    def requests(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        """See ``Core.requests``."""
        for chunk, rows in zip(self.step.chunks, self.step.rows, strict=True):
            keys, values = self.cache.read(chunk.table, chunk.end, self.query.dtype)
            yield rows, self.query[rows], keys, values, chunk.start


@dataclass(frozen=True)
class Reading:
    """A cache that is read otherwise: ``length_of(length)`` positions, of blocks ``table_of(table)``."""

    cache: Any
    length_of: Callable[[int], int] = lambda length: length
    table_of: Callable[[list[int]], list[int]] = lambda table: table

    def read(self, table: list[int], length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``LayerCache.read``."""
        found: tuple[torch.Tensor, torch.Tensor] = self.cache.read(self.table_of(table), self.length_of(length), dtype)
        return found


def per_row(step: Step, values: list[Any]) -> torch.Tensor:
    """One value for each chunk, repeated for its rows, ``[tokens]``."""
    lengths = torch.tensor([len(c.tokens) for c in step.chunks], device=step.ids.device)
    return torch.tensor(values, device=step.ids.device).repeat_interleave(lengths)


def write_of(step: Step) -> Write:
    """What a step writes."""
    last = torch.tensor([rows.stop - 1 for rows in step.rows], device=step.ids.device)
    return Write(step.slots.clone(), step.positions, decode_rows(step), last)


def decode_rows(step: Step) -> torch.Tensor:
    """Rows beyond their request's prompt, bool ``[tokens]``."""
    return step.positions >= per_row(step, [c.prompt for c in step.chunks])
