"""Mistakes in the KV cache: slots, block tables, lengths, prefix caching, and who gets which blocks."""

from __future__ import annotations

from typing import Any

import torch

from paritykit.engines.nano.step import slot_mapping
from paritykit.testing.faults.conditions import (
    BATCH,
    BATCH_DECODE,
    BLOCKS,
    CROWDED,
    DECODE,
    FP8_CACHE,
    LATE_DECODE,
    NEW_BLOCK,
    PARTIAL,
    PREEMPTED,
    PREFIX,
    SAME_BLOCK,
)
from paritykit.testing.faults.host import Host
from paritykit.testing.faults.nano_site import NanoSite, Reading
from paritykit.testing.faults.site import Core, Site, Write
from paritykit.testing.faults.table import fault

ATTENTION = "model.layers.{layer}.self_attn"
CACHE = {"kind": "cache", "point": ATTENTION}
CHECKS = ("modules", "logits", "kv_cache")
HOST = {"kind": "cache", "point": "model.layers.0.self_attn", "stage": "host"}
LOST = 20
"""A position whose key and value are lost."""


def begins(write: Write, block_size: int) -> torch.Tensor:
    """Rows that begin a block, the first one left out, bool ``[tokens]``."""
    return (write.positions % block_size == 0) & (write.positions > 0)


@fault("kv-write-lost", cause="kv-slot", checks=CHECKS, **CACHE)
def lost(site: Site) -> None:
    """One position's key and value are never written, and their slot keeps what it held."""
    site.spoil_cache()
    site.on_slots(lambda write: write.slots.masked_fill(write.positions == LOST, -1))


@fault("kv-slot-off-at-block-start", cause="kv-slot", checks=(*CHECKS, "decode_prefill"), when=BLOCKS, **CACHE)
def block_start(site: Site) -> None:
    """The first position of a block is written one slot further on."""

    site.on_slots(lambda write: torch.where(begins(write, site.block_size), write.slots + 1, write.slots))


@fault(
    "kv-write-lost-at-new-block",
    cause="kv-slot",
    checks=(*CHECKS, "decode_prefill"),
    when=NEW_BLOCK,
    **CACHE,
)
def new_block(site: Site) -> None:
    """A new token that begins a block is not written: its slot is looked up before the block is there."""
    site.spoil_cache()
    site.on_slots(lambda write: write.slots.masked_fill(begins(write, site.block_size) & write.decode, -1))


@fault(
    "kv-offset-not-advanced",
    cause="kv-slot",
    seen=("mlx-lm #1024", "mlx-lm #1673"),
    checks=(*CHECKS, "decode_prefill"),
    when=DECODE,
    **CACHE,
)
def not_advanced(site: Site) -> None:
    """New tokens' keys and values are written over the slot of the token before."""
    site.on_slots(lambda write: write.slots - write.decode.to(write.slots.dtype))


@fault(
    "kv-padding-writes",
    cause="kv-slot",
    seen=("vLLM #37884",),
    checks=(*CHECKS, "decode_prefill"),
    when=LATE_DECODE,
    engines=("nano",),
    **CACHE,
)
def padding(site: NanoSite) -> None:
    """A padding row of the batch writes to a slot that is in use."""
    cache = site.attention.attn.cache

    def write(right_of: Any, key: torch.Tensor, value: torch.Tensor, step: Any) -> None:
        right_of(key, value, step)
        for chunk in step.chunks:
            if chunk.start >= chunk.prompt:
                live = torch.tensor(slot_mapping(chunk.table, chunk.start - 1, chunk.start, cache.block_size))
                cache.keys.put(live, torch.zeros_like(key[:1]))
                cache.values.put(live, torch.zeros_like(value[:1]))

    site.changes.wrap(cache, "write", write)


@fault(
    "kv-padding-writes-in-a-batch",
    cause="kv-slot",
    checks=(*CHECKS, "batching"),
    when=BATCH,
    **CACHE,
)
def padding_in_a_batch(site: Site) -> None:
    """A batch is padded to the size that a graph was captured for, and the padding row writes to the first request."""
    site.on_padding(lambda write: write.slots[write.last[: len(write.last) > 1]])


@fault(
    "kv-block-size-doubled",
    cause="kv-slot",
    seen=("vLLM #31540", "vLLM #47493"),
    checks=CHECKS,
    when=BLOCKS,
    engines=("nano",),
    **CACHE,
)
def block_size_doubled(site: NanoSite) -> None:
    """Slots are computed with another block size than the cache has."""
    cache = site.attention.attn.cache
    count = len(cache.keys.data) // cache.block_size

    def table_of(table: list[int]) -> list[int]:
        return [(table[n // 2] + n % 2) % count for n in range(len(table))]

    site.on_attention(lambda core: core.run(cache=Reading(core.cache, table_of=table_of)))


@fault(
    "kv-table-rows-swapped",
    cause="kv-block-table",
    seen=("vLLM #7018",),
    checks=(*CHECKS, "batching"),
    when=BATCH,
    **CACHE,
)
def rows_swapped(site: Site) -> None:
    """Two requests of a batch are given each other's block table."""

    def wrong(core: Core) -> torch.Tensor:
        order = list(range(core.count))
        return core.run(order=[*order[1:2], *order[:1], *order[2:]])

    site.on_attention(wrong)


@fault(
    "kv-block-ids-wrap",
    cause="kv-block-table",
    seen=("vLLM #47671",),
    checks=CHECKS,
    when=BATCH,
    engines=("nano",),
    **CACHE,
)
def ids_wrap(site: NanoSite) -> None:
    """High block numbers wrap around, as an index that overflows."""
    site.on_attention(lambda core: core.run(cache=Reading(core.cache, table_of=lambda t: [n % 2 for n in t])))


@fault(
    "kv-partial-block-unread",
    cause="kv-block-table",
    checks=(*CHECKS, "decode_prefill"),
    when=PARTIAL,
    engines=("nano",),
    graded=True,
    **CACHE,
)
def partial_unread(site: NanoSite) -> None:
    """Decode reads full blocks only, and not the last one that is not full."""
    size = site.block_size

    def wrong(core: Any) -> torch.Tensor:
        full = core.run(cache=Reading(core.cache, length_of=lambda n: max(n // size * size, 1)))
        found: torch.Tensor = torch.where(core.decode, full, core.right)
        return found

    site.on_attention(wrong)


@fault(
    "kv-lengths-mixed-up",
    cause="kv-block-table",
    seen=("TGI #3324", "vLLM #15200"),
    checks=(*CHECKS, "batching"),
    when=BATCH,
    engines=("nano",),
    graded=True,
    **CACHE,
)
def lengths(site: NanoSite) -> None:
    """Every request of a batch is given the length of the next."""

    def wrong(core: Any) -> torch.Tensor:
        ends = [c.end for c in core.step.chunks]
        following = dict(zip(ends, ends[1:] + ends[:1], strict=True))
        found: torch.Tensor = core.run(cache=Reading(core.cache, length_of=lambda n: min(n, following[n])))
        return found

    site.on_attention(wrong)


@fault(
    "kv-scale-unread",
    cause="scale-factor",
    seen=("vLLM #11688", "vLLM #27227"),
    checks=("kv_cache",),
    when=FP8_CACHE,
    engines=("nano",),
    **CACHE,
)
def scale_unread(site: NanoSite) -> None:
    """The fp8 cache's scales are written and not multiplied with."""
    for slots in (site.attention.attn.cache.keys, site.attention.attn.cache.values):

        def get(right_of: Any, index: Any, dtype: torch.dtype, *, of: Any = slots) -> torch.Tensor:
            found: torch.Tensor = of._bytes[index].view(of.data.dtype).to(dtype)
            return found if of.scales is not None else right_of(index, dtype)

        site.changes.wrap(slots, "get", get)


@fault(
    "batch-rows-mixed-up",
    kind="cache",
    cause="unknown",
    point="#tokens",
    checks=("tokens", "batching"),
    seen=("vLLM #22963", "vLLM #22896"),
    when=BATCH_DECODE,
    engines=("nano",),
)
def rows_mixed_up(site: NanoSite) -> None:
    """The logits of a batch are given to the wrong requests."""
    site.changes.wrap(site.worker, "run", lambda right_of, plan: right_of(plan).roll(1, dims=0))


@fault(
    "prefix-hash-ignores-parent",
    cause="kv-stale",
    seen=("vLLM #12603", "vLLM #36708", "SGLang #16521"),
    checks=("modules", "prefix_cache"),
    when=SAME_BLOCK,
    **{**HOST, "point": "model.layers.1.self_attn"},
)
def ignores_parent(host: Host) -> None:
    """A block is known by its own tokens, whatever came before them."""
    host.forget_parents()


@fault(
    "prefix-hit-too-long",
    cause="kv-stale",
    seen=("vLLM #18957",),
    checks=("modules", "prefix_cache"),
    when=PREFIX,
    **HOST,
)
def hit_too_long(host: Host) -> None:
    """One position more than the cache holds is taken to be in it."""
    host.on_hit(lambda found: found + 1 if found else 0)


@fault(
    "stale-after-preemption",
    cause="kv-stale",
    seen=("nano-vllm #144", "vLLM #28787"),
    checks=("kv_cache", "batching"),
    when=PREEMPTED,
    **HOST,
)
def after_preemption(host: Host) -> None:
    """A request whose blocks were taken goes on where it was, and nothing is computed anew."""
    host.keep_computed()


@fault(
    "block-freed-early",
    cause="kv-block-table",
    seen=("TGI #2489",),
    checks=("kv_cache", "batching"),
    when=CROWDED,
    engines=("nano",),
    **HOST,
)
def freed_early(host: Host) -> None:
    """A request's first block is freed while the request still reads it."""
    blocks = host.llm.blocks

    def reserve(right_of: Any, key: str, start: int, end: int) -> Any:
        made = right_of(key, start, end)
        if made is not None and start == 0:
            blocks._free = {blocks.table(key)[0]: None, **blocks._free}
        return made

    host.changes.wrap(blocks, "reserve", reserve)
