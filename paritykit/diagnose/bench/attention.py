"""An attention module of the reference, from queries, keys and values to what its output projection is fed.

Nothing of the model is run: queries, keys and values are recorded points, the rotation is measured, and scale, cap and
window are those of the config with which the recorded output comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch

from paritykit.diagnose.bench.calibrate import reproduces
from paritykit.diagnose.bench.form import Form, Heads, forms_of
from paritykit.diagnose.bench.linear import linear_of
from paritykit.diagnose.bench.rotation import Rotation, bases_in, measure, powers
from paritykit.diagnose.scene import Scene

Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What is seen, of query positions ``[n, 1]`` and key positions ``[1, m]``."""
SCALES = ("attention_multiplier", "attn_scale", "attention_scale", "softmax_scale")
NO_MAGNITUDE = 1e-5
"""How far from 1 a magnitude that was measured is none."""
CAPS = ("attn_logit_softcapping", "attention_logit_softcapping", "attn_logit_softcap")


@dataclass(frozen=True)
class Core:
    """How scores are made: ``scale``, a cap of them, the window, and whether the future is hidden."""

    scale: float
    cap: float | None = None
    window: int | None = None
    causal: bool = True

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The mask: True where a query sees a key."""
        seen = key <= query if self.causal else (key <= query) | (key > query)
        return seen if self.window is None else seen & (key > query - self.window)


@dataclass(frozen=True)
class Attention:
    """The module ``module``; ``context`` is the point where its result is fed to the output projection."""

    scene: Scene
    module: str
    context: str
    form: Form
    rotation: Rotation
    core: Core
    notes: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def head_dim(self) -> int:
        """Elements of a query or key."""
        return self.form.head_dim

    def plain(self, case: str) -> Heads:
        """Queries, keys and values before rotation."""
        return self.scene.once((self.module, "plain", case), lambda: self.form.heads(case))

    def turned(self, case: str, rotation: Rotation | None = None, positions: torch.Tensor | None = None) -> Heads:
        """Queries, keys and values after rotation, another one or at other positions where these are given."""
        if rotation is None and positions is None:
            return self.scene.once((self.module, "turned", case), lambda: self._turned(case, self.rotation, None))
        return self._turned(case, rotation or self.rotation, positions)

    def _turned(self, case: str, rotation: Rotation, positions: torch.Tensor | None) -> Heads:
        query, key, value = self.plain(case)
        place = torch.arange(len(query)) if positions is None else positions
        return rotation.turn(query, place), rotation.turn(key, place), value

    def output(self, heads: Heads, core: Core | None = None, mask: Mask | None = None) -> torch.Tensor:
        """``[positions, heads * head_dim]``; ``mask`` is seen instead of the core's own."""
        chosen = core or self.core
        return attend(*heads, core=chosen, mask=mask or chosen.sees)

    def predict(self, case: str, context: torch.Tensor) -> torch.Tensor:
        """What the scene's point would be if the output projection were fed with ``context``.

        Raises KeyError for a point that is made of more than that.
        """
        scene = self.scene
        right: torch.Tensor = self.once("right", case, lambda: self.output(self.turned(case)))
        fed = scene.reference(self.context, case) + (context - right)
        if scene.point == self.context:
            return fed
        module = self.context.partition("#")[0]
        if scene.point == module or scene.points[scene.point].source == module:
            linear = linear_of(scene, module)
            if linear is not None:
                return linear.with_input(case, fed)
        raise KeyError(f"{scene.point} is not made of {self.context} alone")

    def changed(self, case: str, **changes: Any) -> torch.Tensor:
        """The scene's point with another scale, cap or window."""
        return self.predict(case, self.output(self.turned(case), replace(self.core, **changes)))

    def masked(self, case: str, mask: Mask) -> torch.Tensor:
        """The scene's point with another mask."""
        return self.predict(case, self.output(self.turned(case), mask=mask))

    def once(self, *name_and_make: Any) -> Any:
        """What the last argument gives, made once for the others."""
        *name, make = name_and_make
        return self.scene.once((self.module, *name), make)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, core: Core, mask: Mask, first: int = 0
) -> torch.Tensor:
    """Softmax attention, ``[queries, heads * head_dim]``; a query that sees nothing, or what is NaN, gives NaN.

    ``first`` is the position of the first query.
    """
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, dim=1).transpose(0, 1) for t in (key, value))
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * core.scale
    if core.cap is not None:
        scores = torch.tanh(scores / core.cap) * core.cap
    place = torch.arange(first, first + query.shape[0])[:, None], torch.arange(key.shape[0])[None]
    seen, known = mask(*place), key.isfinite().flatten(1).all(1) & value.isfinite().flatten(1).all(1)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    context = (weights @ values.nan_to_num()).transpose(0, 1).reshape(query.shape[0], -1)
    return context.masked_fill((seen & ~known).any(1, keepdim=True), torch.nan)


def attention_of(scene: Scene) -> Attention | None:
    """The attention module around the scene's point, whose numbers it gives; None where there is none."""
    return scene.once("attention", lambda: _attention_of(scene))


def attention_module(scene: Scene) -> str:
    """The module that caches keys and holds the scene's point or is to blame for it; empty where there is none."""
    caching = [p.module for p in scene.points.values() if p.port == "key_cache"]
    around = (scene.module, scene.module.rpartition(".")[0], scene.located)
    return next((m for name in around for m in caching if m == name), "")


def _attention_of(scene: Scene) -> Attention | None:
    module = attention_module(scene)
    context = find_context(scene, module)
    if not module or not context:
        return None
    for form in forms_of(scene, module, context):
        rotation = find_rotation(scene, form)
        if rotation is None:
            continue
        found = Attention(scene, module, context, form, rotation, Core(form.head_dim**-0.5))
        for core in _cores(scene, form.head_dim):
            made = replace(found, core=core)
            if reproduces(scene, context, lambda case, made=made: made.output(made.turned(case))):  # type: ignore[misc]
                return made
    return None


def find_context(scene: Scene, module: str) -> str:
    """The point that the output projection is fed with: the last inner input of the module that no other made."""
    inner = [k for k, p in scene.points.items() if p.module.startswith(f"{module}.") and p.port == "input"]
    return next((k for k in reversed(inner) if not scene.points[k].source), "")


def find_rotation(scene: Scene, form: Form) -> Rotation | None:
    """What turns the reference's keys into those it caches; None where that is no rotation by position."""
    key = form.turned

    def turned(rotation: Rotation, case: str) -> torch.Tensor:
        rows = form.unturned(case)
        return rotation.turn(rows, torch.arange(len(rows))).flatten(1)

    before = torch.cat([form.unturned(c) for c in scene.cases])
    after = torch.cat([scene.reference(key, c) for c in scene.cases]).reshape(before.shape)
    positions = torch.cat([torch.arange(scene.length(c)) for c in scene.cases])
    for dims in rotary_dims(scene, before.shape[-1]):
        for interleaved in (False, True) if dims else (False,):
            made = Rotation(0, torch.zeros(0))
            if dims:
                made = measure(before, after, positions, dims=dims, interleaved=interleaved)
                made = _exact(scene, made)
                made = replace(made, magnitude=1.0) if abs(made.magnitude - 1) < NO_MAGNITUDE else made
            if reproduces(scene, key, lambda case, made=made: turned(made, case)):  # type: ignore[misc]
                return made
    return None


def rotary_dims(scene: Scene, head_dim: int) -> list[int]:
    """How many elements of a head may be rotated: all, what the config says, usual shares, none."""
    config, found = scene.config, [head_dim]
    for name in ("rotary_dim", "qk_rope_head_dim"):
        found += [config[name]] if isinstance(config.get(name), int) else []
    shares = [config.get("partial_rotary_factor"), config.get("rotary_pct"), 0.5, 0.25, 0.75]
    found += [int(head_dim * s) for s in shares if isinstance(s, float)]
    return [d for d in dict.fromkeys(found) if 0 < d <= head_dim and d % 2 == 0] + [0]


def _exact(scene: Scene, measured: Rotation) -> Rotation:
    """The frequencies of one of the config's bases, where those that were measured are them."""
    for theta in bases_in(scene.config):
        plain = powers(theta, measured.dims, dtype=scene.dtype)
        if torch.allclose(plain.double(), measured.frequencies, rtol=1e-4, atol=1e-7):
            return replace(measured, frequencies=plain)
    return measured


def _cores(scene: Scene, head_dim: int) -> Iterator[Core]:
    """Settings that the reference may have, the config's own first."""
    config = scene.config
    scales = [float(config[n]) for n in SCALES if isinstance(config.get(n), int | float)]
    scalar = config.get("query_pre_attn_scalar")
    scales += [float(scalar) ** -0.5] if isinstance(scalar, int | float) and scalar > 0 else []
    caps = [float(config[n]) for n in CAPS if isinstance(config.get(n), int | float)]
    windows = config_windows(scene)
    for cap, window, scale in product([*caps, None], [*windows, None], [*scales, head_dim**-0.5, 1.0]):
        yield Core(scale, cap, window)
    for scale in [*scales, head_dim**-0.5]:
        yield Core(scale, causal=False)


def config_windows(scene: Scene) -> list[int]:
    """The lengths of windows that the config names."""
    found = (scene.config.get(n) for n in ("sliding_window", "attention_window", "attention_chunk_size"))
    return [w for w in found if isinstance(w, int) and w > 0]
