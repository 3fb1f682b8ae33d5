"""The checks of invariance, one for each property."""

from __future__ import annotations

from functools import partial
from typing import Any

from paritykit.captures.manifest import CACHE_PORTS
from paritykit.checks.base import LOGITS, InvarianceCheck
from paritykit.checks.modules import cached
from paritykit.invariance.judge import judge_property


def _check(name: str, question: str, **more: Any) -> InvarianceCheck:
    return InvarianceCheck(name=name, question=question, run=partial(judge_property, name=name), **more)


TENSOR_PARALLEL = _check(
    "tensor_parallel",
    "does the engine give the same on several ranks as on one?",
    detects=("tp-shard", "tp-reduce", "tp-bias", "vocab-shard"),
)
PIPELINE_PARALLEL = _check(
    "pipeline_parallel",
    "does the engine give the same in several stages as in one?",
    detects=("residual", "weight-shared-wrongly"),
)
KV_CACHE = _check(
    "kv_cache",
    "does the KV cache hold what the reference's holds, however it is laid out and whatever it held before?",
    detects=("kv-slot", "kv-block-table", "kv-stale"),
    looks=(LOGITS, *(f"*#{port}" for port in CACHE_PORTS)),
    beside=partial(cached, check="kv_cache"),
)
BATCHING = _check(
    "batching",
    "does a case give the same alone and beside others, in any order?",
    detects=("kv-slot", "mask", "position-shift"),
)
CHUNKING = _check(
    "chunking",
    "does a prompt give the same in one prefill and in chunks?",
    detects=("position-shift", "mask", "kv-slot"),
)
PREFIX_CACHE = _check(
    "prefix_cache",
    "does a prompt give the same cold and after others that begin as it does?",
    detects=("kv-stale", "position-shift"),
)
DECODE_PREFILL = _check(
    "decode_prefill",
    "does decoding token by token give the same as one prefill?",
    detects=("position-shift", "sliding-window", "softcap", "kv-slot"),
)
REPEAT = _check(
    "repeat",
    "does the same case give the same each time, whatever came between?",
    detects=("kv-stale", "position-shift"),
)
OBSERVER = _check(
    "observer",
    "does the engine give the same whether it is recorded or not?",
    detects=("unknown",),
)
