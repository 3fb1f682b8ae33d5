"""Running one module alone, on given inputs: is it wrong itself, or was it fed something wrong?"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from paritykit.engines.nano.model import Decoder
from paritykit.engines.nano.step import Chunk, Plan, Step
from paritykit.engines.reading import first_tensor
from paritykit.errors import EngineError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from paritykit.engines.nano.worker import Worker


def replay_module(worker: Worker, name: str, inputs: Path) -> torch.Tensor:
    """What module ``name`` gives for the tensors in ``inputs``, in order of their names, ``[tokens, ...]`` each.

    The tokens are taken as one request from position 0 on; attention gets an empty cache of its own. Raises
    UnknownNameError for an unknown module, UsageError for one that these tensors do not fit.
    """
    modules = dict(worker.model.named_modules(remove_duplicate=False))
    if name not in modules or not name:
        raise UnknownNameError("module of nano", name, modules)
    if isinstance(modules[name], Decoder) and worker.place.stage.count > 1:
        raise UsageError(f"{name!r} is spread over the stages of the pipeline: replay its layers, or use one stage")
    given = [t.to(worker.device) for _, t in sorted(load_file(inputs).items())]
    if not given:
        raise UsageError(f"{inputs} holds no tensors to replay {name!r} with")
    module, tokens = modules[name], given[0].shape[0]
    if tokens > worker.settings.max_model_len:
        raise UsageError(f"{tokens} tokens to replay are more than max_model_len {worker.settings.max_model_len}")
    held = [(a.attn, a.attn.cache) for _, a in worker.model.attentions()]
    blocks = -(-tokens // worker.settings.block_size)
    step = _whole_request(given[0], list(range(blocks)), worker.settings.block_size)
    try:
        for attention, _ in held:
            attention.cache = worker.make_cache(blocks)
        extra = {"step": step} if "step" in signature(module.forward).parameters else {}
        found = first_tensor(module(*given, **extra))
    except (RuntimeError, TypeError, IndexError) as error:
        shapes = [list(t.shape) for t in given]
        raise UsageError(f"{name!r} does not take tensors of {shapes} on rank {worker.place.rank}: {error}") from error
    finally:
        for attention, cache in held:
            attention.cache = cache
    if found is None:
        raise EngineError(f"{name!r} gives no floating-point tensor")
    return found


def _whole_request(first: torch.Tensor, table: list[int], block_size: int) -> Step:
    ids = first.tolist() if first.dim() == 1 else [0] * first.shape[0]
    chunk = Chunk(tokens=ids, start=0, table=table, prompt=len(ids), sample=False)
    return Step.make(Plan([chunk]), block_size=block_size, device=first.device)
