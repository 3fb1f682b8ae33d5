"""Rotary embedding: pairs, base, dimensions, scaling, and the positions it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from paritykit.diagnose.bench.attention import Attention, Core, attention_of, config_windows, rotary_dims
from paritykit.diagnose.bench.rotation import Rotation, as_pairs, base_of, bases_in, measure, powers
from paritykit.diagnose.causes.attention import chunk_starts, first_wrong
from paritykit.diagnose.scene import Scene
from paritykit.diagnose.trial import EXPLAINED, Trial

USUAL_BASES = (10000.0, 500000.0, 1000000.0, 100000.0, 8000000.0, 150000.0)
NEAR_INTEGER = 1e-3
SYMPTOM = 0.05
"""Prior of a rotary base that comes with another window: the layer is then taken for one of another kind."""
NO_MAGNITUDE = 1e-7
"""Of cos and sin, how far from the reference's a magnitude is none."""


def rotated(scene: Scene) -> Attention | None:
    """The attention around the scene's point, where that is keys or what attention makes of them."""
    found = attention_of(scene)
    cached = scene.port in ("key_cache", "value_cache")
    return None if found is None or (cached and scene.point != found.form.turned) else found


def predict(attention: Attention, case: str, rotation: Rotation, positions: torch.Tensor | None = None) -> torch.Tensor:
    """The scene's point with keys and queries rotated so."""
    query, key, value = attention.turned(case, rotation, positions)
    if attention.scene.port == "key_cache":
        _, right, _ = attention.turned(case)
        return attention.scene.reference(attention.scene.point, case) + (key - right).flatten(1)
    return attention.predict(case, attention.output((query, key, value)))


def with_rotation(
    attention: Attention, label: str, rotation: Rotation, *, free: int = 0, prior: float = 1.0
) -> Iterator[Trial]:
    """Queries and keys rotated otherwise; where keys are right in the cache, one of both alone."""
    yield Trial(label, lambda case: predict(attention, case, rotation), free=free, prior=prior)
    if attention.scene.port != "key_cache":
        yield Trial(f"{label} of queries only,", partial(_one_side, attention, rotation, 0), free=free)
        yield Trial(f"{label} of keys only,", partial(_one_side, attention, rotation, 1), free=free)


def _one_side(attention: Attention, rotation: Rotation, side: int, case: str) -> torch.Tensor:
    heads = list(attention.turned(case))
    heads[side] = attention.turned(case, rotation)[side]
    return attention.predict(case, attention.output((heads[0], heads[1], heads[2])))


def candidates(scene: Scene, attention: Attention) -> Rotation | None:
    """The candidate's rotation, measured from its own cache; None where it does not show it."""
    return scene.once("candidate's rotation", lambda: _measured(scene, attention))


def _measured(scene: Scene, attention: Attention) -> Rotation | None:
    key, own = attention.form.turned, attention.rotation
    if key not in scene.rules or not own.dims:
        return None
    before = torch.cat([attention.form.unturned(c) for c in scene.cases])
    after = torch.cat([scene.candidate(key, c) for c in scene.cases]).reshape(before.shape)
    positions = torch.cat([torch.arange(scene.length(c)) for c in scene.cases])
    rows = after.isfinite().all(-1).all(-1)
    return measure(before[rows], after[rows], positions[rows], dims=own.dims, interleaved=own.interleaved)


def pairing(scene: Scene) -> Iterator[Trial]:
    """Neighbours for halves, and the reverse."""
    attention = rotated(scene)
    if attention is not None and attention.rotation.dims:
        own = attention.rotation
        label = "with neighbouring elements" if not own.interleaved else "with the halves of each head"
        yield from with_rotation(attention, f"{label} rotated as pairs", replace(own, interleaved=not own.interleaved))


def theta(scene: Scene) -> Iterator[Trial]:
    """Bases of the config, usual ones, and the one that the candidate's own keys show."""
    attention = rotated(scene)
    if attention is None or not attention.rotation.dims:
        return
    own = attention.rotation
    base = base_of(own.frequencies, own.dims)
    if base is None:
        return
    known = bases_in(scene.config)
    nearest = min(known, key=lambda b: abs(b - base), default=base)
    other = layer_kinds(scene, attention)
    tried = [*known, *USUAL_BASES, nearest * 2, nearest / 2, nearest * 10, nearest / 10]
    for value in dict.fromkeys(tried):
        if abs(value - base) > 1e-3 * base:
            label = f"with a rotary base of {value:g} instead of {nearest:g}"
            prior = SYMPTOM if value in other else 1.0
            yield from with_rotation(attention, label, replace(own, frequencies=powers(value, own.dims)), prior=prior)
    measured = candidates(scene, attention)
    fitted = None if measured is None else base_of(measured.frequencies, own.dims)
    if fitted is not None and abs(fitted - base) > 1e-3 * base:
        label = f"with a rotary base of {fitted:.6g} instead of {nearest:g}"
        yield from with_rotation(attention, label, replace(own, frequencies=powers(fitted, own.dims)), free=1)


def layer_kind(scene: Scene) -> Iterator[Trial]:
    """A layer that is taken for one of another kind, with that one's rotary base and window: keys show the base."""
    attention = rotated(scene)
    if attention is None:
        return
    own = attention.rotation
    for base, window in layer_kinds(scene, attention).items():
        text = f"without the sliding window of {attention.core.window}" if window is None else f"a window of {window}"
        label = f"with a layer of another kind, {text} and with a rotary base of {base:g},"
        rotation = replace(own, frequencies=powers(base, own.dims))
        yield Trial(label, partial(predict, attention, rotation=rotation))


def layer_kinds(scene: Scene, attention: Attention) -> dict[float, int | None]:
    """Bases of the config beside which the candidate's attention has another window than the reference's, and which.

    Keys alone tell a base and no window; what attention made of them tells both.
    """
    return scene.once("layer kinds", lambda: _layer_kinds(scene, attention))


def _layer_kinds(scene: Scene, attention: Attention) -> dict[float, int | None]:
    own, core = attention.rotation, attention.core
    windows = [w for w in (*config_windows(scene), None) if w != core.window]
    if scene.port != "key_cache" or not own.dims or not windows or attention.context not in scene.rules:
        return {}
    found: dict[float, int | None] = {}
    for base in bases_in(scene.config):
        rotation = replace(own, frequencies=powers(base, own.dims))
        left = {w: _left(attention, rotation, replace(core, window=w)) for w in (core.window, *windows)}
        best = min(left, key=left.__getitem__)
        if left[best] < EXPLAINED * left[core.window]:
            found[base] = best
    return found


def _left(attention: Attention, rotation: Rotation, core: Core) -> float:
    """How far what attention makes of keys and queries that are turned so is from the candidate's."""
    scene, wrong = attention.scene, 0.0
    for case in scene.cases:
        made = attention.output(attention.turned(case, rotation), core)
        error = scene.candidate(attention.context, case) - made
        wrong += float(error.nan_to_num().double().pow(2).sum())
    return math.sqrt(wrong)


def partial_dims(scene: Scene) -> Iterator[Trial]:
    """Fewer or more elements of a head rotated, with frequencies of their own or the first ones; none at all."""
    attention = rotated(scene)
    if attention is None:
        return
    own = attention.rotation
    if own.dims:
        yield from with_rotation(attention, "without rotary embedding", Rotation(0, torch.zeros(0)))
    for dims in rotary_dims(scene, attention.head_dim):
        if not dims or dims == own.dims:
            continue
        for frequencies in _frequencies_for(scene, own, dims):
            label = f"with {dims} of {attention.head_dim} elements of each head rotated instead of {own.dims}"
            yield from with_rotation(attention, label, replace(own, dims=dims, frequencies=frequencies))


def _frequencies_for(scene: Scene, own: Rotation, dims: int) -> Iterator[torch.Tensor]:
    base = base_of(own.frequencies, own.dims) if own.dims else None
    for value in dict.fromkeys([*([base] if base else []), *bases_in(scene.config)]):
        yield powers(value, dims)
    if dims < own.dims:
        yield own.frequencies[: dims // 2]
        if own.dims % dims == 0:
            yield own.frequencies[:: own.dims // dims]


def scaling(scene: Scene) -> Iterator[Trial]:
    """The candidate's own frequencies, or their size, where they are no powers of another base."""
    attention = rotated(scene)
    if attention is None or not attention.rotation.dims:
        return
    own, measured = attention.rotation, candidates(scene, attention)
    for value in bases_in(scene.config) if base_of(own.frequencies, own.dims) is None else ():
        plain = powers(value, own.dims)
        if not torch.allclose(plain.double(), own.frequencies.double(), rtol=1e-3):
            label = f"with the plain frequencies of base {value:g}, unscaled,"
            yield from with_rotation(attention, label, replace(own, frequencies=plain))
            label = f"with the frequencies of base {value:g} scaled twice"
            twice = own.frequencies**2 / plain.to(own.frequencies)
            yield from with_rotation(attention, label, replace(own, frequencies=twice))
    if measured is None:
        return
    factors = measured.frequencies / own.frequencies.double().clamp_min(1e-30)
    factor = float(factors.median())
    if abs(factor - 1) > 1e-7 and factor > 0:
        label = f"with rotary frequencies {factor:.6g} times the reference's"
        yield from with_rotation(attention, label, replace(own, frequencies=own.frequencies * factor), free=1)
    if abs(measured.magnitude - own.magnitude) > NO_MAGNITUDE:
        label = f"with cos and sin multiplied by {measured.magnitude / own.magnitude:.8g}"
        yield from with_rotation(attention, label, replace(own, magnitude=measured.magnitude), free=1)
    yield from with_rotation(
        attention,
        "with the frequencies measured from the candidate's keys",
        replace(measured, magnitude=own.magnitude),
        free=2,
    )


def positions(scene: Scene) -> Iterator[Trial]:
    """For every token the position whose rotation gives the candidate's key; known mistakes where it shows none."""
    attention = rotated(scene)
    if attention is None or not attention.rotation.dims:
        return
    own = attention.rotation
    if attention.form.turned in scene.rules:
        found = {c: found_positions(scene, attention, c) for c in scene.cases}
        label = f"with {shift_words(scene, found)}"
        yield Trial(label, lambda case: predict(attention, case, own, found[case]), free=1)
    sides = ((None, ""),) if scene.port == "key_cache" else ((None, ""), (0, " of queries only,"))
    for text, change, fitted in _usual_shifts(scene):
        for side, whose in sides:
            yield Trial(f"{text}{whose}", partial(_shifted, scene, attention, change, side), free=fitted)


def found_positions(scene: Scene, attention: Attention, case: str) -> torch.Tensor:
    """The position that each key of the candidate's cache was rotated for; its own where that is not known."""
    own, place = attention.rotation, torch.arange(scene.length(case))
    before = attention.form.unturned(case)
    after = scene.candidate(attention.form.turned, case).reshape(before.shape)
    z = as_pairs(before.double(), own.dims, interleaved=own.interleaved)
    turned = as_pairs(after.double().nan_to_num(), own.dims, interleaved=own.interleaved)
    sums = (turned * z.conj()).sum(1)
    tried = torch.arange(-8, max(scene.length(case) + 64, 128))
    angles = tried.double()[:, None] * own.frequencies.double()
    likeness = (sums @ torch.polar(torch.ones_like(angles), -angles).T).real
    best = tried[likeness.argmax(1)]
    same = likeness.max(1).values - likeness[place, place + 8] <= NEAR_INTEGER * sums.abs().sum(1)
    return torch.where(same, place, best)


def shift_words(scene: Scene, found: dict[str, torch.Tensor]) -> str:
    """What became of the positions, from what is seen of them."""
    case = next((c for c, p in found.items() if (p != torch.arange(len(p))).any()), "")
    if not case:
        return "positions as they are"
    places, own = found[case], torch.arange(len(found[case]))
    wrong = (places != own).nonzero().flatten()
    first, last = int(wrong[0]), int(wrong[-1])
    steps = {int(n) for n in (places - own)[wrong]}
    where = "decoded tokens" if first >= scene.prompt(case) else f"tokens from {first} on"
    if len(steps) == 1:
        return f"positions of {where} {steps.pop():+d}"
    if len({int(n) for n in places[wrong]}) == 1:
        return f"positions of {where} all {int(places[first])}"
    if int(places[first]) == 0:
        return f"positions that start anew at {first}"
    return f"other positions of {where}: {first} becomes {int(places[first])}, {last} becomes {int(places[last])}"


Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _usual_shifts(scene: Scene) -> Iterator[tuple[str, Change, int]]:
    """Mistakes with positions, of a token's position, its step of decode from 1 on, and the start of its chunk.

    With each how many numbers of it were read off the candidate.
    """
    yield "with positions of decoded tokens +1", lambda p, step, _: p + (step > 0), 0
    yield "with positions of decoded tokens -1", lambda p, step, _: p - (step > 0).long(), 0
    yield "with positions of decoded tokens one further with every step", lambda p, step, _: p + step, 0
    yield "with positions that start anew in every chunk of a prompt", lambda p, _, start: p - start, 0
    window = scene.config.get("sliding_window")
    for size in (window, window - 1) if isinstance(window, int) else ():
        text = f"with positions of decoded tokens at most {size}"
        yield text, lambda p, step, _, size=size: torch.where(step > 0, p.clamp(max=size), p), 0  # type: ignore[misc]
    for size in first_wrong(scene)[:1]:
        yield f"with positions that start anew at {size}", lambda p, _, __, size=size: p % size, 1  # type: ignore[misc]
        text = f"with positions of at most {size - 1}"
        yield text, lambda p, _, __, size=size: p.clamp(max=size - 1), 1  # type: ignore[misc]


def _shifted(scene: Scene, attention: Attention, change: Change, side: int | None, case: str) -> torch.Tensor:
    place, prompt = torch.arange(scene.length(case)), scene.prompt(case)
    start = torch.where(place < prompt, chunk_starts(scene, case), 0)
    other = change(place, (place - prompt + 1).clamp(min=0), start)
    if scene.port == "key_cache":
        return predict(attention, case, attention.rotation, other)
    wrong = attention.turned(case, positions=other)
    right = attention.turned(case)
    heads = wrong if side is None else (wrong[0], right[1], right[2])
    return attention.predict(case, attention.output(heads))
