"""From a checkpoint to parameters: which tensor goes where, and reading the files by memory map, each opened once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from paritykit.engines.nano.embedding import VocabShard
from paritykit.engines.nano.moe import DOWN, GATE, UP, FusedExperts
from paritykit.engines.nano.parameter import LoadedParameter, Shard
from paritykit.errors import EngineError
from paritykit.provenance.watch import watch_load
from paritykit.provenance.weightmap import RankLedger

if TYPE_CHECKING:
    from paritykit.engines.nano.model import CausalLM

INDEX = "model.safetensors.index.json"
SHOWN = 5


class Target(NamedTuple):
    """A parameter, and the part of it that a checkpoint tensor is."""

    parameter: str
    shard: Shard = None


def checkpoint_targets(model: CausalLM) -> dict[str, Target]:
    """Every tensor that a checkpoint has for this rank's stage of the model, by name, and where it goes."""
    found: dict[str, Target] = {}
    for name, _ in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        parent, _, last = path.rpartition(".")
        module = model.get_submodule(path)
        if last in model.packed_modules_mapping:
            for shard, part in model.packed_modules_mapping[last].items():
                found[f"{parent}.{part}.{leaf}"] = Target(name, shard)
        elif isinstance(module, FusedExperts):
            found |= _expert_targets(model, module, path, name)
        else:
            found[_block_name(model, name)] = Target(name)
    return found


def load_weights(model: CausalLM, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """See ``CausalLM.load_weights``."""
    targets, parameters = checkpoint_targets(model), dict(model.named_parameters())
    loaded = set()
    for name, tensor in weights:
        if name not in targets:
            if model.elsewhere(name) or _harmless(model, name):
                continue
            raise EngineError(f"the checkpoint has a tensor {name!r}, and {model.config.architecture.name} has none")
        parameter, shard = targets[name]
        target = parameters[parameter]
        assert isinstance(target, LoadedParameter)
        try:
            target.weight_loader(target, tensor, shard)
        except EngineError as error:
            raise EngineError(f"checkpoint tensor {name!r} {error}") from error
        loaded.add(parameter)
    return loaded


def load_checkpoint(model: CausalLM, folder: Path, *, rank: int = 0, provenance: bool = False) -> RankLedger | None:
    """Load every weight of this rank's stage from ``folder``; with ``provenance``, say where each of them went.

    Raises EngineError where one is missing, unknown, misshapen or unreadable.
    """
    files = {name: file for name, file in complete_files(model, folder).items() if not model.elsewhere(name)}
    if not provenance:
        model.load_weights(read_tensors(folder, files))
        return None
    weights = partial(read_tensors, folder, files)
    return watch_load(model, weights=weights, load=model.load_weights, rank=rank, padding=padding_rows(model))


def padding_rows(model: CausalLM) -> dict[str, tuple[int, str]]:
    """Parameters with padding rows on this rank: their first such row, and why."""
    found = {}
    for name, module in model.named_modules():
        shard = getattr(module, "shard", None)
        if isinstance(shard, VocabShard) and shard.real < shard.local:
            why = f"the vocabulary of {shard.vocabulary} is padded to {shard.padded}"
            found[f"{name}.weight"] = (shard.real, why)
    return found


def complete_files(model: CausalLM, folder: Path) -> dict[str, str]:
    """Tensor name to file name in ``folder``. Raises EngineError where a tensor of the model is missing."""
    files = checkpoint_files(folder)
    missing = sorted(set(checkpoint_targets(model)) - set(files))
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise EngineError(f"{folder} lacks the tensor(s) {', '.join(missing[:SHOWN])}{more}")
    return files


def checkpoint_files(folder: Path) -> dict[str, str]:
    """Tensor name to file name, by the index or, where there is none, by the files themselves. Raises EngineError."""
    index = folder / INDEX
    try:
        if index.is_file():
            listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return listed
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise EngineError(f"{folder} has no .safetensors files, and nano reads no others")
        found: dict[str, str] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path.name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EngineError(f"cannot read the weights in {folder}: {error}") from error
    return found


def read_tensors(folder: Path, files: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and memory-mapped tensor, file after file. Raises EngineError."""
    for name in sorted(set(files.values())):
        try:
            with safe_open(folder / name, framework="pt") as file:
                for tensor in (n for n, where in files.items() if where == name):
                    yield tensor, file.get_tensor(tensor)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"cannot read {folder / name}: {error}") from error


def _expert_targets(model: CausalLM, module: FusedExperts, path: str, name: str) -> dict[str, Target]:
    assert model.config.experts is not None
    names = model.config.experts.names
    parts = {DOWN: names.down} if name.endswith("w2_weight") else {GATE: names.gate, UP: names.up}
    block = _block_name(model, path)
    return {
        f"{block}.{expert}.{part}.weight": Target(name, (expert, shard))
        for expert in range(module.count)
        for shard, part in parts.items()
    }


def _block_name(model: CausalLM, name: str) -> str:
    """The checkpoint's name of what is inside a sparse block; any other name stays."""
    head, mlp, rest = name.partition(".mlp.")
    sparse = mlp and rest.startswith(("gate.", "experts"))
    return f"{head}.{model.config.experts.names.block}.{rest}" if sparse and model.config.experts else name


def _harmless(model: CausalLM, name: str) -> bool:
    """Tensors that checkpoints have and models do not need: a tied head, frequencies kept by old versions."""
    return name.endswith("rotary_emb.inv_freq") or (model.config.tied and name == "lm_head.weight")
