"""The forms of attention: where a module's queries, keys and values are before rotation, and its keys after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from paritykit.captures.manifest import point_key
from paritykit.diagnose.scene import Scene

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values, ``[positions, heads, head_dim]``."""
FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj")


@dataclass(frozen=True)
class Form:
    """``heads`` of a case before rotation; in each the elements that rotation may turn come first.

    ``turned`` is the point that shows rotated keys, ``unturned`` gives those of a case before it, ``[positions, heads,
    dims]``. ``head_dim`` is that of queries and keys, ``places`` is where these two begin.

    ``order`` is where in memory, from a head's place on, lie the elements that rotation may turn; as they come if None.
    """

    heads: Callable[[str], Heads]
    turned: str
    unturned: Callable[[str], torch.Tensor]
    head_dim: int
    places: tuple[Place, Place]
    order: torch.Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where in a point's row the first head's elements begin that rotation turns, and how far apart heads are.

    ``shared``: there is one such part for all heads.
    """

    key: str
    start: int
    step: int
    shared: bool = False

    def starts(self, heads: int) -> list[int]:
        """Where each head's begin."""
        return [self.start + (0 if self.shared else n * self.step) for n in range(heads)]


@dataclass(frozen=True)
class Source:
    """Where heads are found: a point, and which of its columns."""

    key: str
    start: int
    stop: int

    def rows(self, scene: Scene, case: str, head_dim: int) -> torch.Tensor:
        """``[positions, heads, head_dim]``."""
        found = scene.reference(self.key, case)[:, self.start : self.stop]
        return found.reshape(found.shape[0], -1, head_dim)


def forms_of(scene: Scene, module: str, context: str) -> Iterator[Form]:
    """The forms that a module may have, whose result is fed to the output projection at ``context``."""
    sources, cached = _separate(scene, module, context), point_key(module, port="key_cache")
    if sources is not None:
        size = scene.points[cached].row[-1]

        def heads(case: str) -> Heads:
            query, key, value = (s.rows(scene, case, size) for s in sources)
            return query, key, value

        places = (Place(sources[0].key, sources[0].start, size), Place(sources[1].key, sources[1].start, size))
        yield Form(heads, cached, lambda case: heads(case)[1], size, places)
    yield from _latent(scene, module)


def _separate(scene: Scene, module: str, context: str) -> tuple[Source, Source, Source] | None:
    """Queries, keys and values of three projections, or of a fused one; None where no known module holds them."""
    row = scene.points[point_key(module, port="key_cache")].row
    width, size = row[0] * row[-1], scene.width(context)
    for name in FUSED:
        key = f"{module}.{name}"
        if scene.width(key) == size + 2 * width:
            edges = (0, size, size + width, size + 2 * width)
            query, keys, values = (Source(key, a, b) for a, b in pairwise(edges))
            return query, keys, values
    found = []
    for names, wide in ((("q_norm", "q_proj"), size), (("k_norm", "k_proj"), width), (("v_norm", "v_proj"), width)):
        key = next((f"{module}.{n}" for n in names if scene.width(f"{module}.{n}") == wide), "")
        if not key:
            return None
        found.append(Source(key, 0, wide))
    return found[0], found[1], found[2]


def _latent(scene: Scene, module: str) -> Iterator[Form]:
    """Multi-head latent attention (arXiv 2405.04434): keys and values are made of one latent row for each position.

    Each key is that of its head beside a rotated part that all heads share. The cache holds latent and shared part.
    """
    query = next((k for n in ("q_b_proj", "q_proj") if (k := f"{module}.{n}") in scene.points), "")
    entry, latent = f"{module}.kv_a_proj_with_mqa", f"{module}.kv_a_layernorm"
    weight, cached = scene.parameter(f"{module}.kv_b_proj.weight"), point_key(module, port="value_cache")
    count, turned = scene.config.get("num_attention_heads"), scene.width(cached)
    if not query or weight is None or not isinstance(count, int) or latent not in scene.points:
        return
    size = scene.width(query) // count
    if turned != scene.width(entry) - scene.width(latent) or not 0 < turned < size:
        return

    def shared(order: torch.Tensor, case: str) -> torch.Tensor:
        return scene.reference(entry, case)[:, None, -turned:][..., order]

    def heads(order: torch.Tensor, case: str) -> Heads:
        plain, part = scene.reference(query, case).reshape(-1, count, size), shared(order, case)
        made = (scene.reference(latent, case) @ weight.T).reshape(len(plain), count, -1)
        key = torch.cat((part.expand(-1, count, -1), made[..., : size - turned]), dim=-1)
        return (
            torch.cat((plain[..., -turned:][..., order], plain[..., :-turned]), dim=-1),
            key,
            made[..., size - turned :],
        )

    places = (Place(query, size - turned, size), Place(entry, scene.width(latent), turned, shared=True))
    plain = torch.arange(turned)
    for order in (plain, torch.cat((plain[::2], plain[1::2]))):  # some models lay pairs out as halves while they turn
        yield Form(partial(heads, order), cached, partial(shared, order), size, places, order)
