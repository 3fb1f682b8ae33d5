"""Mistakes in rotary embedding and in the positions it is given."""

from __future__ import annotations

import torch

from paritykit.testing.faults import needs
from paritykit.testing.faults.conditions import BEYOND_DECODE, CHUNKS, DECODE, LATE_DECODE
from paritykit.testing.faults.site import Rotation, Site
from paritykit.testing.faults.table import fault

Pair = tuple[torch.Tensor, torch.Tensor]
ATTENTION = "model.layers.{layer}.self_attn"
ALWAYS = {"kind": "rotary", "point": ATTENTION, "checks": ("modules", "logits"), "graded": True}
TABLE = 24
"""Positions of a rotary table that is too short."""
CLIP = 16


def turned(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """``x`` ``[tokens, heads, dim]`` rotated in halves by ``positions * frequencies``."""
    angle = positions.float()[:, None] * frequencies.to(positions.device)
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    first, second = x.float().chunk(2, dim=-1)
    quarter = torch.cat((-second, first), dim=-1)
    return (x.float() * angle.cos() + quarter * angle.sin()).to(x.dtype)


def with_frequencies(call: Rotation, frequencies: torch.Tensor) -> Pair:
    """Query and key, rotated by other frequencies."""
    return turned(call.query, call.positions, frequencies), turned(call.key, call.positions, frequencies)


def with_base(site: Site, factor: float) -> None:
    """Rotate by a base that is ``factor`` times the layer's own."""

    def wrong(call: Rotation) -> Pair:
        pairs = len(call.frequencies)
        return with_frequencies(call, call.frequencies * factor ** (-torch.arange(pairs) / pairs))

    site.on_rotation(wrong)


@fault(
    "rope-pairing",
    cause="rope-pairing",
    seen=("vLLM #941", "SGLang #13495", "mlx-examples #170"),
    **ALWAYS,
)
def pairing(site: Site) -> None:
    """Neighbouring elements are rotated as pairs where the model pairs the halves of a head."""

    def apart(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)

    def together(x: torch.Tensor) -> torch.Tensor:
        return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)

    def wrong(call: Rotation) -> Pair:
        query, key = call.turn(apart(call.query), apart(call.key), call.positions)
        return together(query), together(key)

    site.on_rotation(wrong)


@fault(
    "rope-theta",
    cause="rope-theta",
    seen=("TGI #2212", "vLLM #1841"),
    needs=(needs.PLAIN_ROPE,),
    **ALWAYS,
)
def theta(site: Site) -> None:
    """The rotary base is a constant, and not the one in the config."""
    with_base(site, 2.0)


@fault(
    "rope-local-theta",
    cause="rope-theta",
    needs=(needs.TWO_ROPES,),
    **ALWAYS,
)
def local_theta(site: Site) -> None:
    """Layers with a window rotate with the base of the layers with full attention."""
    with_base(site, 40.0)


@fault(
    "rope-partial",
    cause="rope-partial",
    seen=("vLLM #41185",),
    needs=(needs.PLAIN_ROPE,),
    **ALWAYS,
)
def partial(site: Site) -> None:
    """Only the first half of each head is rotated."""

    def half(x: torch.Tensor, call: Rotation) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((turned(first, call.positions, call.frequencies[::2]), second), dim=-1)

    site.on_rotation(lambda call: (half(call.query, call), half(call.key, call)))


@fault(
    "rope-skipped",
    cause="rope-partial",
    seen=("vLLM #23918",),
    **ALWAYS,
)
def skipped(site: Site) -> None:
    """A layer is taken for one without rotary embedding."""
    site.on_rotation(lambda call: (call.query, call.key))


@fault(
    "rope-query-only",
    cause="rope-partial",
    seen=("kvcache-ai/sglang #31",),
    **ALWAYS,
)
def query_only(site: Site) -> None:
    """Queries are rotated, and the rotated keys are lost on the way to the scores."""
    site.on_rotation(lambda call: (call.rotated[0], call.key))


@fault(
    "rope-scaling-dropped",
    cause="rope-scaling",
    seen=("vLLM #6693",),
    needs=(needs.LINEAR_ROPE,),
    **ALWAYS,
)
def scaling_dropped(site: Site) -> None:
    """The config's rotary scaling is not read."""
    site.on_rotation(lambda call: with_frequencies(call, call.frequencies / call.frequencies[0]))


@fault(
    "rope-scaling-doubled",
    cause="rope-scaling",
    seen=("mlx-lm #1606", "TGI #783"),
    needs=(needs.LINEAR_ROPE,),
    **ALWAYS,
)
def scaling_doubled(site: Site) -> None:
    """Frequencies that are scaled already are divided by the factor again."""
    site.on_rotation(lambda call: with_frequencies(call, call.frequencies * call.frequencies[0]))


@fault(
    "rope-magnitude",
    cause="rope-scaling",
    seen=("vLLM #5628", "TGI #2060", "mlx-lm #660"),
    **ALWAYS,
)
def magnitude(site: Site) -> None:
    """Cos and sin are multiplied by an attention factor that the model has not."""
    site.on_rotation(lambda call: (call.rotated[0] * 1.1, call.rotated[1] * 1.1))


@fault(
    "rope-table-short",
    cause="position-shift",
    seen=("vLLM #3919", "TGI #1571"),
    **ALWAYS,
)
def table_short(site: Site) -> None:
    """The table of cos and sin is shorter than the text, and positions beyond it start anew."""
    site.on_rotation(lambda call: call.turn(call.query, call.key, call.positions % TABLE))


@fault(
    "position-clipped-in-decode",
    kind="rotary",
    cause="position-shift",
    point=ATTENTION,
    checks=("modules", "logits", "decode_prefill"),
    seen=("vLLM #2088",),
    needs=(needs.WINDOW,),
    when=BEYOND_DECODE,
    graded=True,
)
def clipped(site: Site) -> None:
    """The position of a new token is clipped to the sliding window's length."""

    def wrong(call: Rotation) -> Pair:
        clipped = call.positions.clamp(max=CLIP - 1)
        return call.turn(call.query, call.key, torch.where(call.decode, clipped, call.positions))

    site.on_rotation(wrong)


@fault(
    "position-shift-in-decode",
    kind="rotary",
    cause="position-shift",
    point=ATTENTION,
    checks=("modules", "logits", "decode_prefill"),
    when=DECODE,
    graded=True,
)
def shifted(site: Site) -> None:
    """New tokens are given the position after their own."""

    def wrong(call: Rotation) -> Pair:
        return call.turn(call.query, call.key, call.positions + call.decode.to(call.positions.dtype))

    site.on_rotation(wrong)


@fault(
    "position-drift",
    kind="rotary",
    cause="position-shift",
    point=ATTENTION,
    checks=("modules", "logits", "decode_prefill"),
    seen=("vLLM #37884",),
    when=LATE_DECODE,
    graded=True,
)
def drifting(site: Site) -> None:
    """Positions are added to in place, so that every step of decode is further off."""
    steps = [0]

    def wrong(call: Rotation) -> Pair:
        steps[0] = steps[0] + 1 if bool(call.decode.any()) else 0
        return call.turn(call.query, call.key, call.positions + call.decode.to(call.positions.dtype) * steps[0])

    site.on_rotation(wrong)


@fault(
    "position-restart-in-chunk",
    kind="rotary",
    cause="position-shift",
    point=ATTENTION,
    checks=("modules", "logits", "chunking"),
    seen=("vLLM #10388", "vLLM #10403"),
    when=CHUNKS,
    graded=True,
)
def restarted(site: Site) -> None:
    """Positions start at 0 in every chunk of a prompt."""
    site.on_rotation(lambda call: call.turn(call.query, call.key, call.positions - call.start))
