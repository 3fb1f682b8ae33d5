"""The arguments of nano, checked. Torch-free."""

from __future__ import annotations

from typing import Any

import msgspec

from paritykit.engines.dtypes import DTYPES, dtype_name
from paritykit.engines.nano.config import NanoConfig
from paritykit.errors import UnknownNameError, UsageError

KV_LAYOUTS = ("paged", "contiguous")
FP8 = "float8_e4m3fn"
LONGEST = 4096
COUNTS = ("block_size", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "pipeline_parallel_size")
DISTRIBUTED_BACKENDS = ("auto", "gloo", "nccl")
ROOM = 4
"""Requests of full length that the blocks hold where ``num_blocks`` is not given."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a model; sent to every rank as it is.

    ``kv`` is ``paged`` or ``contiguous``; ``kv_dtype`` a dtype, ``fp8``, or ``auto`` for the model's;
    ``num_blocks`` and ``max_model_len`` 0 take what fits the model; ``timeout`` is how many seconds a rank waits for
    another. ``tensor_parallel_size`` ranks share every layer, ``pipeline_parallel_size`` stages of so many ranks have
    layers of their own; ``distributed_backend`` is how ranks talk. ``attention_backend`` is ``torch``, ``triton`` or
    ``auto``, see ``choose_attention``. ``before_load`` is ``package.module:function``, called on every rank with the
    empty model, ``rank`` and ``before_load_args``; ``provenance`` traces where the loader puts weights.
    """

    model: str
    dtype: str = "float32"
    device: str = "cpu"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_backend: str = "auto"
    kv: str = "paged"
    kv_dtype: str = "auto"
    block_size: int = 16
    num_blocks: int = 0
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 2048
    max_model_len: int = 0
    enable_prefix_caching: bool = False
    attention_backend: str = "auto"
    timeout: float = 60.0
    before_load: str = ""
    before_load_args: dict[str, Any] = {}
    provenance: bool = False

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def resolve(self, config: NanoConfig) -> Settings:
        """These settings with every open value filled in. Raises UsageError for what cannot be."""
        for name in COUNTS:
            _check_count(name, getattr(self, name), least=1)
        _check_count("num_blocks", self.num_blocks, least=0)
        _check_count("max_model_len", self.max_model_len, least=0)
        if self.kv not in KV_LAYOUTS:
            raise UnknownNameError("KV cache layout", self.kv, KV_LAYOUTS)
        if self.timeout <= 0:
            raise UsageError(f"timeout must be positive, not {self.timeout}")
        if self.distributed_backend not in DISTRIBUTED_BACKENDS:
            raise UnknownNameError("distributed_backend", self.distributed_backend, DISTRIBUTED_BACKENDS)
        config.check_parallel(self.tensor_parallel_size, stages=self.pipeline_parallel_size)
        return self._with_attention()._sized(config)

    def _with_attention(self) -> Settings:
        from paritykit.engines.nano.attention import choose_attention

        name = choose_attention(self.attention_backend, device=self.device, dtype=dtype_name(self.dtype))
        return msgspec.structs.replace(self, attention_backend=name)

    def _sized(self, config: NanoConfig) -> Settings:
        limit = longest(config)
        if self.max_model_len > limit:
            raise UsageError(f"max_model_len {self.max_model_len} is more than the model's {limit} positions")
        length = self.max_model_len or min(limit, LONGEST)
        if self.kv == "contiguous" and self.enable_prefix_caching:
            raise UsageError("enable_prefix_caching needs kv='paged': contiguous requests share nothing")
        paged = self.kv == "paged"
        block_size = self.block_size if paged else length
        rows = min(self.max_num_seqs, ROOM) * -(-length // block_size) if paged else self.max_num_seqs
        return msgspec.structs.replace(
            self,
            dtype=dtype_name(self.dtype),
            kv_dtype=_kv_dtype(self.kv_dtype, self.dtype),
            max_model_len=length,
            block_size=block_size,
            num_blocks=(self.num_blocks if paged else 0) or rows,
        )


def longest(config: NanoConfig) -> int:
    """Most positions of a sequence; dynamic rotary scaling is made to go beyond the model's own."""
    stretch = max((layer.rope.factor for layer in config.layers if layer.rope.kind == "dynamic"), default=1.0)
    return int(config.max_positions * stretch)


def _check_count(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be an integer of at least {least}, not {value!r}")


def _kv_dtype(name: str, dtype: str) -> str:
    if name in ("fp8", "fp8_e4m3", FP8):
        return FP8
    try:
        return dtype_name(dtype if name == "auto" else name)
    except UnknownNameError as error:
        raise UnknownNameError("kv_dtype", name, (*DTYPES, "fp8", "auto")) from error
