"""The seams of real vLLM: where each kind of fault goes in. Imports vLLM only where a worker of it is there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from paritykit.engines.nano.attention import Scores
from paritykit.testing.faults.nano_site import SPOILT
from paritykit.testing.faults.site import NotHere, Rotation, Site, Write, Wrong


class VllmSite(Site):
    """A worker of vLLM, with a model of the Llama lineage."""

    engine = "vllm"

    @property
    def model(self) -> Any:
        """This rank's model."""
        return self.worker.model_runner.model

    @property
    def rank(self) -> int:
        """This rank among those that share a layer."""
        from vllm.distributed import get_tensor_model_parallel_rank

        return int(get_tensor_model_parallel_rank())

    @property
    def ranks(self) -> int:
        """How many ranks share a layer."""
        from vllm.distributed import get_tensor_model_parallel_world_size

        return int(get_tensor_model_parallel_world_size())

    @property
    def sparse(self) -> Any:
        """The layer's mixture of experts."""
        return self.block.mlp if hasattr(self.block, "mlp") else self.block.block_sparse_moe

    def norm_facts(self, norm: Any) -> tuple[torch.Tensor, float]:
        """What a norm multiplies with, ``[size]``, and its epsilon."""
        offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
        return norm.weight + offset, norm.variance_epsilon

    def on_norm(self, norm: Any, wrong: Wrong) -> None:
        """``wrong(x)`` instead of a norm of ``x``; the residual sum that vLLM fuses with it stays right."""

        def forward(right_of: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            total = x.clone() if residual is None else x + residual
            output = right_of(x, residual) if residual is not None else right_of(x)
            right = output[0] if isinstance(output, tuple) else output
            mixed = self.blend(right, wrong(total))
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        self.changes.wrap(norm, "forward", forward)

    def on_rotation(self, wrong: Callable[[Rotation], tuple[torch.Tensor, torch.Tensor]]) -> None:
        """``wrong(rotation)`` gives query and key of this layer; vLLM rotates in place, so copies are handed out."""
        rotary = self.attention.rotary_emb
        own = copy.deepcopy(rotary)
        frequencies = table_frequencies(rotary.cos_sin_cache)

        def turn(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            turned = rotary.forward(positions, q.flatten(1).clone(), k.flatten(1).clone())
            return turned[0].view_as(q), turned[1].view_as(k)

        def forward(positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
            before = heads_of(query, rotary.head_size), heads_of(key, rotary.head_size)
            right = turn(*before, positions)
            spans = self.spans()
            if spans is None:
                return rotary.forward(positions, query, key)
            start, decode = pad(spans.start, len(positions)), pad(spans.decode, len(positions))
            found = wrong(Rotation(*before, right, positions, start, decode, frequencies, turn))
            return self.blend(right[0], found[0]).flatten(1), self.blend(right[1], found[1]).flatten(1)

        self.changes.set(own, "forward", forward)
        self.changes.set(self.attention, "rotary_emb", own)

    def spans(self) -> Spans | None:
        """The requests of the step under way, as this layer's attention sees them; None in a warm-up."""
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        return None if metadata is None else Spans(metadata[self.attention.attn.layer_name])

    def on_attention(self, wrong: Callable[[Any], torch.Tensor]) -> None:
        """``wrong(core)`` instead of the attention core's output, ``[tokens, heads, head_dim]``."""
        impl = self.attention.attn.impl

        def forward(right_of: Any, *args: Any, output: torch.Tensor, **rest: Any) -> torch.Tensor:
            right_of(*args, output=output, **rest)
            metadata = args[5]
            if metadata is not None:
                core = VllmCore(impl, right_of, args, output.clone(), rest)
                count = metadata.num_actual_tokens
                output[:count] = self.blend(core.right[:count], wrong(core)[:count])
            return output

        self.changes.wrap(impl, "forward", forward)

    def on_slots(self, wrong: Callable[[Write], torch.Tensor]) -> None:
        """``wrong(write)`` gives the slots that this layer's keys and values go to."""

        def update(right_of: Any, *args: Any) -> None:
            *rest, slots = args
            write = self.write_of(args)
            if write is not None:
                slots = torch.cat((wrong(write), slots[len(write.slots) :]))
            right_of(*rest, slots)

        self.changes.wrap(self.attention.attn.impl, "do_kv_cache_update", update)

    def on_padding(self, live: Callable[[Write], torch.Tensor]) -> None:
        """Zeros are written to the slots ``live(write)``, after the step's own keys and values."""

        def update(right_of: Any, *args: Any) -> None:
            right_of(*args)
            write, (layer, key, value, cache, _) = self.write_of(args), args
            if write is not None:
                slots = live(write)
                right_of(layer, *(torch.zeros_like(t[: len(slots)]) for t in (key, value)), cache, slots)

        self.changes.wrap(self.attention.attn.impl, "do_kv_cache_update", update)

    def write_of(self, args: tuple[Any, ...]) -> Write | None:
        """What a call of the backend's cache update writes; None in a warm-up, or where a cache reader tries it out."""
        layer, _, _, cache, slots = args
        spans = self.spans()
        if spans is None or cache.data_ptr() != layer.kv_cache.data_ptr():
            return None
        last = torch.tensor(spans.ends[1 : len(spans.counts) + 1]) - 1
        return Write(slots[: len(spans.positions)].clone(), spans.positions, spans.decode, last)

    @property
    def block_size(self) -> int:
        """Positions in a block of the cache."""
        return int(self.worker.vllm_config.cache_config.block_size)

    def spoil_cache(self) -> None:
        """Let this layer's cache hold what no request wrote."""
        self.attention.attn.kv_cache.fill_(SPOILT)

    def on_residual(self, number: int, wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """``wrong(residual, update)`` instead of the layer's first (0) or second (1) residual sum.

        The first is fused with the norm that follows it, and changed in a hook that runs before any that records.
        """
        if number == 1:

            def layer(right_of: Any, *args: Any, **kwargs: Any) -> Any:
                update, residual = right_of(*args, **kwargs)
                total = self.blend(residual + update, wrong(residual, update))
                return total - residual, residual

            self.changes.wrap(self.block, "forward", layer)
            return

        def sum_first(_: Any, args: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            update, residual = args
            total = self.blend(residual + update, wrong(residual, update))
            return total, torch.zeros_like(total)

        block = self.block
        fused = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
        self.changes.later(fused.register_forward_pre_hook(sum_first).remove)

    def on_layer(self, wrong: Wrong) -> None:
        """``wrong(right, hidden)`` instead of what the whole layer makes of ``hidden``."""

        def layer(
            right_of: Any, positions: Any, hidden: torch.Tensor, residual: torch.Tensor | None, **rest: Any
        ) -> Any:
            before = hidden.clone() if residual is None else hidden + residual
            update, stream = right_of(positions, hidden, residual, **rest)
            total = self.blend(update + stream, wrong(update + stream, before))
            return torch.zeros_like(total), total

        self.changes.wrap(self.block, "forward", layer)

    def on_activation(self, wrong: Wrong) -> None:
        """``wrong(gate)`` instead of the activated gate of the layer's MLP."""

        def product(_: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            made: torch.Tensor = wrong(gate) * up
            return made

        mlp = self.block.mlp
        self.changes.set(mlp, "act_fn", copy.deepcopy(mlp.act_fn))  # layers of some families share one
        self.on_output(mlp.act_fn, product)

    def on_experts(self, wrong: Wrong) -> None:
        """``wrong(run, x, logits)`` instead of the experts' output; ``run(x, logits)`` routes and computes rightly."""

        def experts(right_of: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, **rest: Any) -> Any:
            def run(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
                output: torch.Tensor = right_of(hidden_states=x.clone(), router_logits=logits.clone(), **rest)
                return output

            right = run(hidden_states, router_logits).clone()
            return self.blend(right, wrong(run, hidden_states, router_logits))

        self.changes.wrap(self.sparse.experts, "forward", experts)

    def on_reduce(self, linear: Any, wrong: Wrong) -> None:
        """``wrong(partial, reduce)`` instead of the sum of every rank's ``partial``."""
        from vllm.distributed import tensor_model_parallel_all_reduce

        def reduce(x: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = tensor_model_parallel_all_reduce(x.clone())
            return total

        def forward(right_of: Any, *args: Any) -> Any:
            output = right_of(*args)
            partial = output[0] if isinstance(output, tuple) else output
            mixed = self.blend(reduce(partial), wrong(partial, reduce)) if self.ranks > 1 else partial
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        self.changes.set(linear, "reduce_results", False)
        self.changes.wrap(linear, "forward", forward)

    def on_hand_over(self, wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """``wrong(hidden, residual)`` instead of what goes to the stage whose first layer this is.

        ``hidden`` is the sum of ``residual`` and what the last layer's MLP added. NotHere on every other stage.
        """
        inner = self.model.model
        if inner.end_layer != self.layer:
            raise NotHere

        def forward(right_of: Any, *args: Any, **kwargs: Any) -> Any:
            handed = right_of(*args, **kwargs)
            update, residual = handed["hidden_states"], handed["residual"]
            total = self.blend(residual + update, wrong(residual + update, residual))
            handed["hidden_states"], handed["residual"] = torch.zeros_like(total), total
            return handed

        self.changes.wrap(inner, "forward", forward)

    def on_embedding_scale(self, wrong: Callable[[float], float]) -> None:
        """Another factor on the embedding."""
        factor = self.changes.keep(self.model.model.normalizer)
        right = float(factor)
        factor.fill_(right + self.strength * (wrong(right) - right))

    def on_head(self, wrong: Wrong) -> None:
        """``wrong(right, hidden, product)`` instead of this rank's logits; ``product(hidden, weight)`` is a head's."""
        processor = self.model.logits_processor

        def apply(right_of: Any, head: Any, hidden: torch.Tensor, bias: Any) -> torch.Tensor:
            right = right_of(head, hidden, bias)
            return self.blend(right, wrong(right.clone(), hidden, torch.nn.functional.linear))

        self.changes.wrap(processor, "_apply_head", apply)

    def on_logits(self, wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """``wrong(raw)`` instead of the finished logits; ``raw`` are those before any softcap."""
        processor = self.model.logits_processor

        def forward(right_of: Any, *args: Any, **kwargs: Any) -> Any:
            right, (head, hidden) = right_of(*args, **kwargs), args[:2]
            return right if right is None else self.blend(right, wrong(processor._get_logits(hidden, head, None)))

        self.changes.wrap(processor, "forward", forward)


class Spans:
    """The requests of a step, row by row, from vLLM's attention metadata."""

    def __init__(self, metadata: Any) -> None:
        self.metadata = metadata
        self.ends = metadata.query_start_loc.tolist()
        self.lengths = metadata.seq_lens.tolist()
        self.counts = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        counts = torch.tensor(self.counts)
        first = torch.tensor([n - c for n, c in zip(self.lengths, self.counts, strict=False)])
        self.start = first.repeat_interleave(counts)
        within = torch.cat([torch.arange(c) for c in self.counts]) if self.counts else torch.empty(0, dtype=torch.int64)
        self.positions = self.start + within
        self.decode = (counts == 1).repeat_interleave(counts) & (self.start > 0)


class VllmCore:
    """See ``Core``. Keys and values can be had of requests that are whole in this step: the cache is packed."""

    def __init__(self, impl: Any, right_of: Any, args: tuple[Any, ...], right: torch.Tensor, rest: Any) -> None:
        self._impl, self._right_of, self._args, self._rest = impl, right_of, args, rest
        self.right = right
        self._spans = Spans(args[5])
        window, cap = impl.sliding_window, impl.logits_soft_cap
        self.scores = Scores(impl.scale, None if window in (-1, None) else window, cap or None)

    @property
    def decode(self) -> torch.Tensor:
        """Rows that are decode, bool ``[tokens, 1, 1]``."""
        return pad(self._spans.decode, len(self.right))[:, None, None]

    @property
    def count(self) -> int:
        """How many requests there are."""
        return len(self._spans.counts)

    def run(self, *, scores: Scores | None = None, order: list[int] | None = None) -> torch.Tensor:
        """See ``Core.run``."""
        wanted, impl, args = scores or self.scores, self._impl, list(self._args)
        if order is not None:
            args[5] = dataclasses.replace(args[5], block_table=args[5].block_table[order].contiguous())
        names = ("scale", "sliding_window", "logits_soft_cap")
        held = [getattr(impl, n) for n in names]
        output = torch.zeros_like(self.right)
        try:
            impl.scale, impl.logits_soft_cap = wanted.scale, wanted.cap or 0
            impl.sliding_window = -1 if wanted.window is None else wanted.window
            self._right_of(*args, output=output, **self._rest)
        finally:
            for name, value in zip(names, held, strict=True):
                setattr(impl, name, value)
        return output

    def requests(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        """See ``Core.requests``."""
        query, key, value = self._args[1:4]
        for first, count, length in zip(self._spans.ends, self._spans.counts, self._spans.lengths, strict=False):
            if count == length:
                rows = slice(first, first + count)
                yield rows, query[rows], key[rows], value[rows], 0


def heads_of(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A copy of ``x``, ``[tokens, heads * head_dim]``, as ``[tokens, heads, head_dim]``."""
    return x.clone().view(len(x), -1, head_dim)


def pad(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``rows`` with zeros up to ``count``: padding rows of a batch belong to no request."""
    return torch.cat((rows, rows.new_zeros(count - len(rows))))


def table_frequencies(table: torch.Tensor) -> torch.Tensor:
    """The frequencies that a table ``[positions, dim]`` of cos and sin was made with, from its second row."""
    cos, sin = table[1].float().chunk(2)
    return torch.atan2(sin, cos)
