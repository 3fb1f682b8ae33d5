"""What the strategies draw is what they promise: it fits, it can be named, it can be built, it shrinks to the plain."""

from __future__ import annotations

import inspect
import shlex
import shutil
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from paritykit.case import EDGES, Case, CaseSet, edge_ids, write_text
from paritykit.engines.nano.config import NanoConfig
from paritykit.engines.nano.settings import Settings
from paritykit.errors import UnknownNameError, UsageError
from paritykit.strategies import conditions, edges, models, workloads
from paritykit.strategies.aspects import ASPECTS, WIDEST
from paritykit.strategies.conditions import CONDITIONS, SEQUENCES
from paritykit.strategies.fields import SILENT, Fields, Limits, defaults
from paritykit.strategies.models import HEAD_DIMS, ROPES
from paritykit.testing import TINY_FAMILIES, TinyModel

ANYTHING = Limits(head_dims=HEAD_DIMS, ropes=ROPES)
FEW = settings(max_examples=40)
SOON = settings(max_examples=400, derandomize=True, database=None, phases=(Phase.generate, Phase.shrink))
OF_NANO = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe")
ROPE = "rope_parameters"
DRAWN = {
    "qwen2": {"use_sliding_window", "sliding_window", "max_window_layers", f"{ROPE}.truncate", "vocab_size"},
    "llama": {"attention_bias", "mlp_bias", f"{ROPE}.low_freq_factor", f"{ROPE}.rope_theta", "tie_word_embeddings"},
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "layer_types"},
    "gemma3": {f"{ROPE}.full_attention.rope_type", f"{ROPE}.sliding_attention.rope_theta", "sliding_window"},
    "mixtral": {"num_local_experts", "num_experts_per_tok", "sliding_window", "head_dim", "rms_norm_eps"},
    "qwen3_moe": {"num_experts", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "moe_intermediate_size"},
    "phi3": {f"{ROPE}.partial_rotary_factor", "sliding_window", "num_key_value_heads", "num_hidden_layers"},
    "gpt2": {"activation_function", "layer_norm_epsilon", "intermediate_size", "hidden_size", "num_attention_heads"},
    "opt": {"do_layer_norm_before", "enable_bias", "word_embed_proj_dim", "intermediate_size"},
}


# Models


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_models_shrink_to_the_family_as_it_is(family: str) -> None:
    assert find(models(family), lambda _: True, settings=SOON) == TinyModel(f"tiny:{family}")


@pytest.mark.parametrize(("family", "what", "smallest"), [
    ("qwen2", lambda c: c["num_attention_heads"] == c["num_key_value_heads"], "hidden_size=64,num_attention_heads=2"),
    ("llama", lambda c: c["tie_word_embeddings"], "tie_word_embeddings=true"),
    ("llama", lambda c: c[ROPE]["rope_type"] == "linear", f"{ROPE}.factor=2.0,{ROPE}.rope_type=linear"),
    ("mistral", lambda c: c["sliding_window"] is None, "sliding_window=null"),
    ("gemma2", lambda c: c["num_hidden_layers"] == 2, "num_hidden_layers=2"),
    ("mixtral", lambda c: c["num_experts_per_tok"] == 3, "num_experts_per_tok=3"),
    ("gpt2", lambda c: c["n_head"] == 3, "hidden_size=96,num_attention_heads=3"),
])  # fmt: skip
def test_a_model_shrinks_to_what_it_takes(family: str, what: Any, smallest: str) -> None:
    found = find(models(family), lambda model: what(model.config), settings=SOON)
    assert str(found).partition(",")[2] == smallest


@FEW
@given(models())
def test_a_drawn_model_is_its_name(model: TinyModel) -> None:
    assert TinyModel(str(model)) == model == eval(repr(model), {"TinyModel": TinyModel})
    assert TinyModel.of(model.family, model.fields) == model
    assert shlex.quote(str(model)) == str(model)
    own = defaults(model.family)
    assert not {n: v for n, v in model.fields.items() if n in own and own[n] == v}


@pytest.mark.parametrize("sizes", [HEAD_DIMS, (64, 128), (24, 8)])
def test_sizes_fit_each_other_and_what_is_allowed(sizes: tuple[int, ...]) -> None:
    for model in seen(models(head_dims=sizes), 30):
        assert_fits(model, sizes)


def assert_fits(model: TinyModel, sizes: tuple[int, ...]) -> None:
    own = {**defaults(model.family), **model.fields}
    count, hidden = own["num_attention_heads"], own["hidden_size"]
    size = own.get("head_dim", hidden // count)
    assert size in sizes
    assert size * count <= WIDEST
    assert not hidden % count
    assert not count % own.get("num_key_value_heads", count)
    assert not own["intermediate_size"] % 16
    assert own["vocab_size"] % 64
    assert "head_dim" in own or size * count == hidden
    assert own.get("num_experts_per_tok", 0) <= own.get("num_local_experts", own.get("num_experts", 0))
    assert len(own.get("layer_types", [0] * own["num_hidden_layers"])) >= own["num_hidden_layers"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@settings(max_examples=15)
@given(data=st.data())
def test_ranks_can_share_what_is_drawn_for_them(ranks: int, data: st.DataObject) -> None:
    model = data.draw(models(OF_NANO, ranks=ranks))
    NanoConfig.read(model.config).check_parallel(ranks)


def test_grouped_heads_are_the_rule() -> None:
    drawn = seen(models("llama"), 100)
    grouped = [m for m in drawn if m.config["num_attention_heads"] != m.config["num_key_value_heads"]]
    assert len(grouped) > len(drawn) / 2
    assert len({m.config["head_dim"] for m in drawn}) == len(HEAD_DIMS)


@pytest.mark.parametrize("family", DRAWN)
def test_what_a_family_has_is_drawn(family: str) -> None:
    fields = {n for m in seen(models(family), 120) for n in m.fields}
    assert DRAWN[family] <= fields


def test_every_aspect_is_one_of_some_family() -> None:
    for name, aspect in ASPECTS.items():
        assert any(any(seen(aspect(defaults(f), ANYTHING), 20)) for f in TINY_FAMILIES), name


@FEW
@given(models("qwen3", ropes=("default", "yarn"), keep=("biases", "window", "heads")))
def test_what_is_kept_is_not_drawn(model: TinyModel) -> None:
    assert not {"attention_bias", "use_sliding_window", "num_attention_heads", "head_dim"} & model.fields.keys()
    assert model.fields.get(f"{ROPE}.rope_type", "yarn") == "yarn"


def test_a_family_that_has_none_of_the_kinds_keeps_its_own() -> None:
    assert not any(f"{ROPE}.rope_type" in m.fields for m in seen(models("phi3", ropes=("yarn", "linear")), 20))


@pytest.mark.parametrize(("options", "said"), [
    ({"keep": ("bias",)}, "unknown aspect of a model 'bias'; did you mean 'biases'"),
    ({"ropes": ("lineer",)}, "unknown kind of rotary embedding 'lineer'; did you mean 'linear'"),
    ({"family": "qwen"}, "unknown tiny model family 'qwen'; did you mean"),
])  # fmt: skip
def test_unknown_names_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UnknownNameError, match=said):
        models(**options)


def test_sizes_that_cannot_be_are_told() -> None:
    with pytest.raises(UsageError, match="no heads of 512 elements, 512 in all, for 2 ranks to share"):
        models("llama", head_dims=(512,), ranks=2)


@pytest.mark.parametrize("model_type", SILENT)
def test_silent_fields_are_as_the_config_class_has_them(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = transformers.CONFIG_MAPPING[model_type]
    own = inspect.signature(kind).parameters
    for name, value in SILENT[model_type].items():
        if name == "partial_rotary_factor":
            assert kind().rope_parameters[name] == value
        else:
            assert own[name].default == value, name


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_drawn_model_can_be_built(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    build_some(family, 2, tmp_path_factory)


@pytest.mark.deep
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_many_drawn_models_can_be_built(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    build_some(family, 30, tmp_path_factory)


def build_some(family: str, count: int, folders: pytest.TempPathFactory) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    @settings(SOON, max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(models(family).filter(lambda model: len(model.fields) > 3))
    def law(model: TinyModel) -> None:
        folder = model.build(folders.mktemp("models") / "model")
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        shutil.rmtree(folder.parent)  # dozens of them
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokens = torch.randint(0, model.config["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = loaded.eval()(tokens).logits
        assert logits.shape == (1, 40, model.config["vocab_size"])
        assert logits.isfinite().all()
        assert (logits - logits.mean(1, keepdim=True)).norm() > 0.1 * logits.norm(), "the model ignores its input"

    law()


# Workloads


def resolved(workload: CaseSet, *, vocab_size: int = 499) -> list[Case]:
    return workload.resolve(vocab_size=vocab_size, max_positions=512)


@FEW
@given(workloads(block_size=4, longest=40), st.integers(1, 2000))
def test_ids_are_in_range_and_unique(workload: CaseSet, vocab_size: int) -> None:
    cases = resolved(workload, vocab_size=vocab_size)
    assert 1 <= len(cases) <= 4
    assert all(0 <= t < vocab_size for c in cases for t in (*c.tokens, *c.forced))
    assert [c.id for c in cases] == CaseSet(workload.ids()).ids()
    assert {len(c.forced) for c in cases} <= {0, *(c.new_tokens for c in cases)}


@pytest.mark.parametrize(("what", "smallest"), [
    (lambda cases: True, ["len-1"]),
    (lambda cases: any(c.new_tokens for c in cases), ["len-1+1"]),
    (lambda cases: any(c.forced for c in cases), ["len-1+1f"]),
    (lambda cases: len({(c.tokens, c.new_tokens, c.forced) for c in cases}) < len(cases), ["len-1", "len-1:2"]),
    (lambda cases: any(len(c.tokens) > 16 for c in cases), ["len-17"]),
    (lambda cases: any(498 in c.tokens for c in cases), ["len-6"]),
    (lambda cases: any(shared(a, b) for a in cases for b in cases), ["len-2", "len-2@a1b"]),
])  # fmt: skip
def test_workloads_reach_and_shrink(what: Any, smallest: list[str]) -> None:
    found = find(workloads(longest=40), lambda workload: what(resolved(workload)), settings=SOON)
    assert found.ids() == smallest


def shared(one: Case, other: Case) -> int:
    """How many tokens two cases share before they part."""
    alike = [a == b for a, b in zip(one.tokens, other.tokens, strict=False)]
    return alike.index(False) if False in alike else 0


@pytest.mark.parametrize(("size", "window", "chunk"), [(16, 0, 0), (128, 0, 0), (16, 24, 7)])
def test_edges_have_what_breaks_engines(size: int, window: int, chunk: int) -> None:
    found = set(edges(block_size=size, window=window, chunk=chunk))
    assert {1, 2, size - 1, size, size + 1, 2 * size, 2 * size + 1} <= found
    assert {n + d for n in (window, chunk) if n for d in (-1, 0, 1)} <= found
    assert max(found) > 200


@given(st.integers(1, 3000))
def test_edges_of_the_vocabulary_come_in_a_long_text(vocab_size: int) -> None:
    ids = edge_ids(vocab_size)
    assert len(ids) == len(set(ids))
    assert all(0 <= n < vocab_size for n in ids)
    assert {*ids, vocab_size - 1} <= set(write_text("@a", EDGES * len(ids), vocab_size=vocab_size))
    padded = -(-vocab_size // 64) * 64
    assert {n for n in (padded // 2 - 1, padded // 2, padded // 4) if n < vocab_size} <= set(ids)


# Conditions


def test_conditions_shrink_to_none() -> None:
    assert find(conditions(), lambda _: True, settings=SOON) == {}
    assert find(conditions(), lambda c: "block_size" in c, settings=SOON) == {"block_size": 1}
    tight = {"max_num_batched_tokens": 7, "max_num_seqs": 7}
    assert find(conditions("vllm"), lambda c: "max_num_batched_tokens" in c, settings=SOON) == tight


@FEW
@given(conditions("nano", kv_dtype=("fp8",), dtype=("bfloat16",), tensor_parallel_size=(2,), block_size=()))
def test_conditions_are_arguments_of_the_engine(drawn: dict[str, Any]) -> None:
    given_ = msgspec.convert({"model": "m", **drawn}, Settings)
    assert all(getattr(given_, name) == value for name, value in drawn.items())
    assert "block_size" not in drawn
    assert drawn.get("max_num_seqs", 0) <= drawn.get("max_num_batched_tokens", SEQUENCES)


def test_what_is_asked_for_comes() -> None:
    drawn = seen(conditions("nano", pipeline_parallel_size=(2,)), 200)
    assert {n for c in drawn for n in c} == {*CONDITIONS["nano"], "pipeline_parallel_size"}
    assert seen(conditions("mine", kv_cache_dtype=("fp8",)), 20)
    with pytest.raises(
        UnknownNameError, match="unknown engine with conditions of its own 'nanno'; did you mean 'nano'"
    ):
        conditions("nanno")


def seen(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """So many draws, the same each time."""
    found: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None, deadline=None)
    @given(strategy)
    def draw(one: Fields) -> None:
        found.append(one)

    draw()
    return found
