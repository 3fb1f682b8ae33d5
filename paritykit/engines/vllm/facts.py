"""What a vLLM worker says of its modules, for mapping: fused parts, other meanings, declared rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size

from paritykit.engines.reading import other_paths
from paritykit.engines.vllm.kv import chunk_of, is_readable, stored_dtype, window_of
from paritykit.engines.vllm.semantics import PARTIAL, is_partial, other_meaning

Part = dict[str, int]


def module_facts(model: nn.Module) -> dict[str, Any]:
    """Everything mapping needs, JSON-ready.

    ``fused``: module path to its parts in order, each with ``total`` and ``local`` columns and ``replicas`` (how many
    ranks hold the same part). ``same``: paths to the first path of the same module. ``compiled``: paths of modules that
    run as compiled graphs, inside which hooks do not fire. ``meanings``: module path to the reason it must not be
    compared by name. ``packed``: ``packed_modules_mapping`` as declared. ``attention``: names of the attention
    backends. ``cache``: the dtype of the numbers in the KV cache. ``windows``: module path of each attention whose
    cache forgets what lies behind its sliding window, to the window's length. ``chunks``: the same of those that see
    chunks.
    """
    named = list(model.named_modules(remove_duplicate=False))
    fused = {n: parts for n, m in named if (parts := fused_parts(m))}
    meanings = {n: reason for n, m in named if (reason := other_meaning(m))}
    for name in [n for n, m in named if is_partial(m)]:
        meanings |= dict.fromkeys(filter(None, (name, name.rpartition(".")[0])), PARTIAL)
    packed = {k: list(v) for k, v in (getattr(model, "packed_modules_mapping", None) or {}).items()}
    return {
        "modules": [n for n, _ in named],
        "same": other_paths(model),
        "compiled": [n for n, m in named if getattr(m, "do_not_compile", True) is False],
        "fused": fused,
        "meanings": meanings,
        "packed": packed,
        "attention": attention_backends(model),
        "cache": next(
            (str(d).removeprefix("torch.") for _, m in named if is_readable(m) and (d := stored_dtype(m))), ""
        ),
        "windows": {n.rpartition(".")[0]: w for n, m in named if is_readable(m) and (w := window_of(m))},
        "chunks": {n.rpartition(".")[0]: c for n, m in named if is_readable(m) and (c := chunk_of(m))},
    }


def fused_parts(module: Any) -> list[Part]:
    """The parts of a fused linear on this rank; empty for any other module."""
    names = {c.__name__ for c in type(module).__mro__}
    size = getattr(module, "tp_size", 1)
    if "QKVParallelLinear" in names:
        q, k, v = (int(s) // size for s in module.output_sizes)
        replicas = int(module.num_kv_head_replicas)
        return [
            {"total": q * size, "local": q, "replicas": 1},
            {"total": k * size // replicas, "local": k, "replicas": replicas},
            {"total": v * size // replicas, "local": v, "replicas": replicas},
        ]
    if "MergedColumnParallelLinear" in names:
        replicas = max(1, get_tensor_model_parallel_world_size() // size)
        return [{"total": int(s), "local": int(s) // size, "replicas": replicas} for s in module.output_sizes]
    return []


def attention_backends(model: nn.Module) -> list[str]:
    """Names of the attention backends in use, sorted."""
    found = set()
    for module in model.modules():
        backend = getattr(module, "attn_backend", None)
        if backend is not None and hasattr(backend, "get_name"):
            found.add(str(backend.get_name()))
    return sorted(found)


def declared_names(model: nn.Module, names: list[str]) -> dict[str, tuple[str, str] | None]:
    """Checkpoint tensor name to (vLLM parameter name, shard id) by the model's own ``hf_to_vllm_mapper``.

    The shard id is ``q``, ``0`` ... or empty; None where the mapper drops the tensor.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {n: (n, "") for n in names}
    return {n: _mapped(mapper, n) for n in names}


def _mapped(mapper: Any, name: str) -> tuple[str, str] | None:
    if hasattr(mapper, "_map_name_with_shard"):
        found = mapper._map_name_with_shard(name)
        return None if found is None else (found[0], "" if found[1] is None else str(found[1]))
    renamed = mapper.map_name(name) if hasattr(mapper, "map_name") else mapper._map_name(name)
    return None if renamed is None else (renamed, "")


def describe_device(model: nn.Module) -> str:
    """The device of the first parameter, ``cpu`` for none."""
    return next((str(p.device) for p in model.parameters()), str(torch.device("cpu")))
