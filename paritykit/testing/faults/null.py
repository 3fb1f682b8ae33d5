"""Faults that are none: the machinery of planting runs and nothing changes. What reports one of these is at fault."""

from __future__ import annotations

import copy

from paritykit.testing.faults.folder import Copy
from paritykit.testing.faults.loading import Stream
from paritykit.testing.faults.site import Site
from paritykit.testing.faults.table import fault

NULL = {"kind": "null", "cause": "", "point": "", "checks": ()}


@fault("null-forward", **NULL)
def forward(site: Site) -> None:
    """Nothing: a module's forward is wrapped and gives what it gave."""
    site.on_output(site.block.input_layernorm, lambda right, *_: right)


@fault("null-parameter", **NULL)
def parameter(site: Site) -> None:
    """Nothing: a weight is copied onto itself."""
    weight = site.changes.keep(site.block.input_layernorm.weight)
    weight.copy_(weight.clone())


@fault("null-rotation", **NULL)
def rotation(site: Site) -> None:
    """Nothing: a layer gets a rotary embedding of its own, equal to the shared one."""
    site.changes.set(site.attention, "rotary_emb", copy.deepcopy(site.attention.rotary_emb))


@fault("null-attention", **NULL)
def attention(site: Site) -> None:
    """Nothing: the attention core is computed twice and the second result taken."""
    site.on_attention(lambda core: core.run())


@fault("null-loading", stage="loading", **NULL)
def loading(stream: Stream) -> None:
    """Nothing: every tensor passes through one more hand while it is loaded."""
    stream.between(lambda name, tensor: [(name, tensor)])


@fault("null-files", stage="checkpoint", **NULL)
def files(copied: Copy) -> None:
    """Nothing: the file of weights is read and written again."""
    copied.write(copied.tensors)
