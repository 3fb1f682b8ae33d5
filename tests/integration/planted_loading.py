"""Mistakes planted in how vLLM loads: ``before_load="tests.integration.planted_loading:bias_dropped"``.

Each changes what stands between the checkpoint's files and the model's parameters, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Pair = tuple[str, torch.Tensor]


def between(model: Any, change: Callable[[str, torch.Tensor], Iterable[Pair]]) -> None:
    """Put ``change`` between the files and ``model.load_weights``."""
    load = model.load_weights

    def changed(weights: Iterable[Pair]) -> Any:
        return load(new for name, tensor in weights for new in change(name, tensor))

    model.load_weights = changed


def afterwards(model: Any, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Let ``change`` work on the parameters after every load."""
    load = model.load_weights

    def changed(weights: Iterable[Pair]) -> Any:
        loaded = load(weights)
        with torch.no_grad():
            change(dict(model.named_parameters(remove_duplicate=False)))
        return loaded

    model.load_weights = changed


def renamed(model: Any, **names: str) -> None:
    """Two tensors of layer 2 under each other's name."""
    ((one, other),) = names.items()

    def swap(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
        if ".layers.2." in name and (one in name or other in name):
            name = name.replace(one, other) if one in name else name.replace(other, one)
        yield name, tensor

    between(model, swap)


def on(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Callable[[str, torch.Tensor], Iterable[Pair]]:
    def only(found: str, tensor: torch.Tensor) -> Iterator[Pair]:
        new = change(tensor) if found == name else tensor
        if new is not None:
            yield found, new

    return only


def nothing(model: Any, *, rank: int) -> None:
    between(model, lambda name, tensor: [(name, tensor)])


def k_proj_dropped(model: Any, *, rank: int) -> None:
    between(model, on("model.layers.2.self_attn.k_proj.weight", lambda _: None))


def bias_dropped(model: Any, *, rank: int) -> None:
    between(model, on("model.layers.2.self_attn.v_proj.bias", lambda _: None))


def q_k_swapped(model: Any, *, rank: int) -> None:
    renamed(model, q_proj="k_proj")


def gate_up_swapped(model: Any, *, rank: int) -> None:
    renamed(model, gate_proj="up_proj")


def k_rows_permuted(model: Any, *, rank: int) -> None:
    """As a rotary permutation would: even rows first, then odd ones."""
    name = "model.layers.2.self_attn.k_proj.weight"
    between(model, on(name, lambda w: torch.cat([w[0::2], w[1::2]])))


def norm_offset(model: Any, *, rank: int) -> None:
    between(model, on("model.layers.2.input_layernorm.weight", lambda w: w + 1))


def embedding_scaled(model: Any, *, rank: int) -> None:
    between(model, on("model.embed_tokens.weight", lambda w: w * 11.5))


def square_transposed(model: Any, *, rank: int) -> None:
    between(model, on("model.layers.2.self_attn.o_proj.weight", lambda w: w.T.contiguous()))


def experts_swapped(model: Any, *, rank: int) -> None:
    def swap(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
        if ".layers.2." in name and name.endswith(".w1.weight"):
            places = {"experts.1.": "experts.3.", "experts.3.": "experts.1."}
            name = next((name.replace(a, b) for a, b in places.items() if a in name), name)
        yield name, tensor

    between(model, swap)


def rank_zero_everywhere(model: Any, *, rank: int) -> None:
    """Rank 1 cuts rank 0's shard of one projection."""
    projection = model.model.layers[2].mlp.down_proj
    projection.tp_rank = 0
    for parameter in projection.parameters():
        parameter.tp_rank = 0


def head_from_embedding(model: Any, *, rank: int) -> None:
    def overwrite(parameters: dict[str, torch.Tensor]) -> None:
        parameters["lm_head.weight"].copy_(parameters["model.embed_tokens.weight"])

    afterwards(model, overwrite)


def one_element(model: Any, *, rank: int) -> None:
    def corrupt(parameters: dict[str, torch.Tensor]) -> None:
        parameters["model.layers.2.mlp.down_proj.weight"][3, 5] += 0.25

    afterwards(model, corrupt)


def one_real_element(model: Any, *, rank: int) -> None:
    """One number that is wrong only among real weights, some of which are negative: no address shows it."""

    def corrupt(parameters: dict[str, torch.Tensor]) -> None:
        weight = parameters["model.layers.2.mlp.down_proj.weight"]
        if (weight < 0).any():
            weight[3, 5] *= 1.5

    afterwards(model, corrupt)
