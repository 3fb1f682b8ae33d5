"""Mistakes between a checkpoint's files and the parameters, planted in a model that is still empty."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from paritykit.testing.faults import needs
from paritykit.testing.faults.conditions import FOUR_RANKS, TWO_RANKS
from paritykit.testing.faults.table import fault

Pair = tuple[str, torch.Tensor]
LAYER = "model.layers.{layer}"
ALWAYS = {"kind": "weights", "stage": "loading", "checks": ("weights", "modules")}
SHARDED = {
    "kind": "parallel",
    "stage": "loading",
    "checks": ("weights", "modules", "tensor_parallel"),
    "cause": "tp-shard",
}


class Stream:
    """The tensors on their way from files to a model: name and tensor, as ``model.load_weights`` is handed them."""

    def __init__(self, model: Any, *, rank: int, layer: int, engine: str) -> None:
        self.model, self.rank, self.layer, self.engine = model, rank, layer, engine

    @property
    def block(self) -> Any:
        """The decoder layer."""
        return self.model.model.layers[self.layer]

    @property
    def ranks(self) -> int:
        """How many ranks share a layer."""
        modules = list(self.model.modules())
        groups = [m._group for m in modules if hasattr(m, "_group")]
        return max([1, *(int(m.tp_size) for m in modules if hasattr(m, "tp_size")), *(int(g.size) for g in groups)])

    def own(self, name: str) -> str:
        """A tensor's full name: ``name`` within the layer."""
        return f"model.layers.{self.layer}.{name}"

    def between(self, change: Callable[[str, torch.Tensor], Iterable[Pair]]) -> None:
        """Let ``change`` make other pairs of every pair."""
        load = self.model.load_weights

        def changed(weights: Iterable[Pair]) -> Any:
            return load(new for name, tensor in weights for new in change(name, tensor))

        self.model.load_weights = changed

    def afterwards(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Let ``change`` work on the parameters after every load."""
        load = self.model.load_weights

        def changed(weights: Iterable[Pair]) -> Any:
            loaded = load(weights)
            with torch.no_grad():
                change(dict(self.model.named_parameters(remove_duplicate=False)))
            return loaded

        self.model.load_weights = changed

    def replace(self, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Another tensor, or None, in the place of one of the layer."""
        wanted = self.own(name) if "." in name and not name.startswith("model.") else name

        def only(found: str, tensor: torch.Tensor) -> Iterator[Pair]:
            new = change(tensor) if found == wanted else tensor
            if new is not None:
                yield found, new

        self.between(only)

    def exchange(self, one: str, other: str) -> None:
        """Two tensors of the layer under each other's name."""

        def swap(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
            if f".layers.{self.layer}." in name and (one in name or other in name):
                name = name.replace(one, other) if one in name else name.replace(other, one)
            yield name, tensor

        self.between(swap)


@fault(
    "weight-not-loaded",
    cause="weight-not-loaded",
    seen=("vLLM #21725", "vLLM #43213"),
    point=f"{LAYER}.self_attn.k_proj",
    **ALWAYS,
)
def not_loaded(stream: Stream) -> None:
    """No rule sends the keys' projection to its place in the fused one."""
    stream.replace("self_attn.k_proj.weight", lambda _: None)


@fault(
    "bias-not-loaded",
    cause="bias-missing",
    seen=("vLLM #8442", "vLLM #39663"),
    point=f"{LAYER}.self_attn.v_proj",
    needs=(needs.BIAS,),
    **ALWAYS,
)
def bias_not_loaded(stream: Stream) -> None:
    """A rule that skips surplus biases skips one that is none."""
    stream.replace("self_attn.v_proj.bias", lambda _: None)


@fault(
    "queries-and-keys-exchanged",
    cause="rows-permuted",
    point=f"{LAYER}.self_attn.q_proj",
    needs=(needs.ALL_HEADS,),
    **ALWAYS,
)
def queries_and_keys(stream: Stream) -> None:
    """The projections of queries and keys are loaded into each other's place."""
    stream.exchange("q_proj", "k_proj")


@fault(
    "gate-and-up-exchanged",
    cause="gate-up-swapped",
    seen=("SGLang #13113",),
    point=f"{LAYER}.mlp.gate_proj",
    needs=(needs.DENSE,),
    **ALWAYS,
)
def gate_and_up(stream: Stream) -> None:
    """Gate and up are loaded into each other's place."""
    stream.exchange("gate_proj", "up_proj")


@fault(
    "key-rows-permuted",
    cause="rows-permuted",
    seen=("llama2.c #286", "vLLM #34243"),
    point=f"{LAYER}.self_attn.k_proj",
    **ALWAYS,
)
def key_rows(stream: Stream) -> None:
    """A rotary permutation of the keys' rows is undone that was never made."""
    stream.replace("self_attn.k_proj.weight", lambda w: torch.cat([w[0::2], w[1::2]]))


@fault(
    "norm-offset-baked-in",
    cause="norm-offset",
    seen=("utensils/mold #1078",),
    point=f"{LAYER}.input_layernorm",
    **ALWAYS,
)
def norm_offset(stream: Stream) -> None:
    """1 is added to a norm weight while it is loaded."""
    stream.replace("input_layernorm.weight", lambda w: w + 1)


@fault(
    "embedding-scaled-in-file",
    cause="scale-factor",
    point="model.embed_tokens",
    needs=(needs.SCALED_EMBEDDING,),
    **ALWAYS,
)
def embedding_scaled(stream: Stream) -> None:
    """The factor on the embedding is multiplied into its weight, and applied again."""
    stream.replace("model.embed_tokens.weight", lambda w: w * 11.5)


@fault(
    "square-weight-transposed",
    cause="weight-corrupt",
    seen=("gpt-fast 776b733",),
    point=f"{LAYER}.self_attn.o_proj",
    needs=(needs.SQUARE,),
    **ALWAYS,
)
def transposed(stream: Stream) -> None:
    """A square weight is loaded transposed: nothing shows in its shape."""
    stream.replace("self_attn.o_proj.weight", lambda w: w.T.contiguous())


@fault(
    "experts-exchanged",
    cause="moe-routing",
    point=f"{LAYER}.mlp.experts",
    needs=(needs.EXPERTS,),
    **{**ALWAYS, "kind": "moe"},
)
def experts(stream: Stream) -> None:
    """Two experts' gates are loaded into each other's place."""

    def swap(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
        if f".layers.{stream.layer}." in name and name.endswith((".w1.weight", ".gate_proj.weight")):
            places = {"experts.1.": "experts.3.", "experts.3.": "experts.1."}
            name = next((name.replace(a, b) for a, b in places.items() if a in name), name)
        yield name, tensor

    stream.between(swap)


@fault(
    "expert-not-loaded",
    cause="weight-not-loaded",
    seen=("SGLang #13113",),
    point=f"{LAYER}.mlp.experts",
    needs=(needs.EXPERTS,),
    **{**ALWAYS, "kind": "moe"},
)
def expert_not_loaded(stream: Stream) -> None:
    """One expert's gate has no place to go to."""

    def drop(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
        gate = name.endswith((".w1.weight", ".gate_proj.weight"))
        if not (gate and f".layers.{stream.layer}." in name and "experts.1." in name):
            yield name, tensor

    stream.between(drop)


@fault(
    "head-overwritten",
    cause="weight-shared-wrongly",
    seen=("SGLang #15398", "SGLang #18024"),
    point="lm_head",
    needs=(needs.UNTIED,),
    **ALWAYS,
)
def head_overwritten(stream: Stream) -> None:
    """A head of its own is overwritten with the embedding after loading."""

    def overwrite(parameters: dict[str, torch.Tensor]) -> None:
        parameters["lm_head.weight"].copy_(parameters["model.embed_tokens.weight"])

    stream.afterwards(overwrite)


@fault(
    "weight-of-another-layer",
    cause="weight-shared-wrongly",
    seen=("vLLM #39650", "vLLM #43464"),
    point=f"{LAYER}.self_attn.o_proj",
    needs=(needs.BEFORE,),
    **ALWAYS,
)
def of_another_layer(stream: Stream) -> None:
    """A loader that reuses its buffer gives a layer the weight of the one before."""
    before, own = f"model.layers.{stream.layer - 1}.self_attn.o_proj.weight", stream.own("self_attn.o_proj.weight")

    def twice(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
        if name != own:
            yield name, tensor
        if name == before:
            yield own, tensor

    stream.between(twice)


@fault(
    "value-corrupt",
    cause="weight-corrupt",
    seen=("vLLM #53537",),
    point=f"{LAYER}.mlp.down_proj",
    needs=(needs.DENSE,),
    **ALWAYS,
)
def corrupt(stream: Stream) -> None:
    """One number of a weight is wrong."""

    def change(parameters: dict[str, torch.Tensor]) -> None:
        parameters[stream.own("mlp.down_proj.weight")][3, 5] += 0.25

    stream.afterwards(change)


@fault(
    "value-corrupt-in-use",
    cause="weight-corrupt",
    seen=("vLLM #53537",),
    point=f"{LAYER}.mlp.down_proj",
    needs=(needs.DENSE,),
    **ALWAYS,
)
def corrupt_in_use(stream: Stream) -> None:
    """One number of a weight is wrong among real weights only, which a loader handed anything else does not show."""

    def change(parameters: dict[str, torch.Tensor]) -> None:
        weight = parameters[stream.own("mlp.down_proj.weight")]
        if (weight < 0).any():
            weight[3, 5] *= 1.5

    stream.afterwards(change)


@fault(
    "layer-not-loaded",
    cause="weight-not-loaded",
    seen=("vLLM #10327", "SGLang #16235"),
    point=f"{LAYER}.self_attn.q_proj",
    engines=("nano",),
    **ALWAYS,
)
def layer_not_loaded(stream: Stream) -> None:
    """One layer's weights are skipped, and it keeps what memory held."""
    linear = (".self_attn.", ".mlp.")

    def skip(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
        if not (f".layers.{stream.layer}." in name and any(part in name for part in linear)):
            yield name, tensor

    stream.between(skip)


@fault(
    "shard-of-rank-0",
    when=TWO_RANKS,
    seen=("vLLM #2208", "vLLM #49987"),
    point=f"{LAYER}.mlp.down_proj",
    needs=(needs.DENSE,),
    **SHARDED,
)
def shard_of_rank_0(stream: Stream) -> None:
    """Every rank cuts the first rank's part out of one projection."""
    linear = stream.block.mlp.down_proj
    if stream.engine == "nano":
        linear.weight.weight_loader = Shifted(linear, rank=0).rows
    else:
        pretend(linear, rank=0)


@fault(
    "queries-of-another-rank",
    when=TWO_RANKS,
    seen=("vLLM #8055", "vLLM #45200"),
    point=f"{LAYER}.self_attn.q_proj",
    **SHARDED,
)
def queries_of_another_rank(stream: Stream) -> None:
    """Each rank holds the query heads of the next."""

    def roll(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
        mine = name.startswith(stream.own("self_attn.q_proj."))
        yield name, tensor.roll(tensor.shape[0] // 2, dims=0) if mine else tensor

    stream.between(roll)


@fault(
    "gate-up-cut-before-split",
    when=TWO_RANKS,
    seen=("vLLM #36242", "vLLM #34476"),
    point=f"{LAYER}.mlp.gate_proj",
    needs=(needs.DENSE,),
    **SHARDED,
)
def cut_before_split(stream: Stream) -> None:
    """The fused gate and up is cut for ranks as one block: one rank has all of the gate."""
    held: dict[str, torch.Tensor] = {}

    def recut(name: str, tensor: torch.Tensor) -> Iterator[Pair]:
        if not name.startswith((stream.own("mlp.gate_proj."), stream.own("mlp.up_proj."))):
            yield name, tensor
            return
        held[name] = tensor
        kind = name.rpartition(".")[2]
        pair = [stream.own(f"mlp.{part}.{kind}") for part in ("gate_proj", "up_proj")]
        if all(n in held for n in pair):
            gate, up = (held.pop(n) for n in pair)
            halves = [*gate.chunk(2), *up.chunk(2)]
            yield pair[0], torch.cat((halves[0], halves[2]))
            yield pair[1], torch.cat((halves[1], halves[3]))

    stream.between(recut)


@fault(
    "kv-heads-replicated-in-turn",
    when=FOUR_RANKS,
    seen=("TGI #2203", "TGI #2202", "transformers #48307"),
    point=f"{LAYER}.self_attn.k_proj",
    needs=(needs.GROUPED,),
    engines=("nano",),
    **SHARDED,
)
def replicated_in_turn(stream: Stream) -> None:
    """With more ranks than kv heads, ranks take kv heads in turn, not in groups."""
    linear = stream.block.self_attn.qkv_proj
    right = linear.source_start

    def start(part: Any) -> int:
        kv_heads = part.total // part.local
        found: int = stream.rank % kv_heads * part.local if part.replicas > 1 else right(part)
        return found

    linear.source_start = start


class Shifted:
    """The weight loader of a row-parallel linear that takes another rank's columns."""

    def __init__(self, linear: Any, *, rank: int) -> None:
        self._inputs, self._rank = linear._inputs, rank

    def rows(self, parameter: torch.Tensor, tensor: torch.Tensor, shard: Any = None) -> None:
        """See ``WeightLoader``."""
        del shard
        local = parameter.shape[1]
        parameter.data.copy_(tensor.narrow(1, self._rank * local, local))


def pretend(linear: Any, *, rank: int) -> None:
    """Let a linear of vLLM load as another rank would."""
    linear.tp_rank = rank
    for parameter in linear.parameters():
        parameter.tp_rank = rank
