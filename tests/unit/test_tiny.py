"""Tiny models: seeded, reproducible, lively, safe to build from several processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paritykit.errors import UnknownNameError, UsageError
from paritykit.testing import TINY_FAMILIES, tiny, tiny_config, tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

FIRST_QUERY = "model.layers.0.self_attn.q_proj.weight"
LOCAL_ROPE = {"rope_type": "default", "rope_theta": 5000.0}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {family: tiny_model(family, root / family) for family in TINY_FAMILIES}


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "paritykit" / "tiny"


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def tensors(folder: Path) -> dict[str, Any]:
    return dict(safetensors_torch.load_file(folder / "model.safetensors"))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def norms(folder: Path) -> Iterator[tuple[str, Any]]:
    for name, value in tensors(folder).items():
        if value.ndim == 1 and name.endswith("weight"):
            yield name, value


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_checkpoint_loads_back_without_a_loss(
    family: str, folders: dict[str, Path], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folders[family], output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path)
    again, once = tensors(tmp_path), tensors(folders[family])
    assert again.keys() == once.keys()
    assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_building_is_silent_and_leaves_the_random_state(
    family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    before = torch.random.get_rng_state()
    tiny_model(family, tmp_path / family)
    assert torch.equal(before, torch.random.get_rng_state())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_scale_is_sane(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family])
    tokens = torch.randint(0, 499, (2, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    for hidden in out.hidden_states:
        assert 0.1 < hidden.square().mean().sqrt() < 30
    assert 0.3 < out.logits.std() < 6
    repeated = (out.logits.argmax(-1) == tokens).float().mean()
    assert repeated < 0.25, "the model mostly repeats its input"
    assert out.logits.argmax(-1).unique().numel() > 30, "the model mostly ignores its input"


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_values_are_far_from_their_defaults(family: str, folders: dict[str, Path]) -> None:
    for name, weight in norms(folders[family]):
        assert weight.std() > 0.2, name
        assert (weight - 1).abs().mean() > 0.2, name
        assert weight.abs().mean() > 0.2, name
    for name, bias in tensors(folders[family]).items():
        assert not name.endswith("bias") or bias.std() > 0.1, name


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_config_hides_nothing(family: str, folders: dict[str, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(folders[family])
    assert config.vocab_size % 64
    assert config.max_position_embeddings == 512
    assert config.eos_token_id is None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert head_dim == 32
    if family not in {"gpt2", "opt"}:
        assert config.num_key_value_heads < config.num_attention_heads
    if family.startswith("gemma"):
        assert min(Counter(config.layer_types).values()) >= 2
        assert config.sliding_window == 16


@pytest.mark.parametrize(
    ("family", "ignored"),
    [
        ("llama", {"rms_norm_eps": 1e-6}),
        ("llama", {"rope_parameters": {**LOCAL_ROPE, "rope_theta": 10000.0}}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 17}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 6}),
        ("gemma3", {"rope_parameters": {"full_attention": LOCAL_ROPE, "sliding_attention": LOCAL_ROPE}}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("gpt2", {"layer_norm_epsilon": 1e-5}),
        ("gpt2", {"activation_function": "gelu"}),
        ("opt", {"activation_function": "gelu"}),
    ],
)
def test_an_ignored_switch_shows(
    family: str, ignored: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    tokens = torch.randint(0, 499, (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        right = load(folders[family])(tokens).logits
        wrong = load(tiny_model(family, tmp_path / "m", **ignored))(tokens).logits
    change = (right - wrong).norm() / right.norm()
    assert change > 3e-5, "fp32 noise is about 1e-6"


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt2", "opt"])
def test_tied_weights_are_stored_once(family: str, folders: dict[str, Path]) -> None:
    heads = [name for name in tensors(folders[family]) if name.endswith("lm_head.weight")]
    assert len(heads) == (1 if family == "llama" else 0)


def test_checkpoint_names_are_those_on_the_hub(folders: dict[str, Path]) -> None:
    assert "model.layers.3.block_sparse_moe.experts.3.w1.weight" in tensors(folders["mixtral"])
    qwen = tensors(folders["qwen3_moe"])
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in qwen
    assert "model.layers.1.mlp.gate_proj.weight" in qwen
    assert "model.layers.0.self_attn.qkv_proj.weight" in tensors(folders["phi3"])


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path, folders: dict[str, Path]) -> None:
    again = tiny_model("mixtral", tmp_path / "again")
    assert content(again) == content(folders["mixtral"])
    other = tensors(tiny_model("mixtral", tmp_path / "other", seed=1))
    assert all(not torch.equal(other[name], value) for name, value in tensors(folders["mixtral"]).items())


def test_a_parameter_depends_on_its_name_and_seed_alone(tmp_path: Path, folders: dict[str, Path]) -> None:
    short = tensors(tiny_model("llama", tmp_path / "short", num_hidden_layers=2))
    long = tensors(folders["llama"])
    assert len(short) < len(long)
    assert all(torch.equal(short[name], long[name]) for name in short)
    assert not torch.equal(long[FIRST_QUERY], long[FIRST_QUERY.replace(".0.", ".1.")])


def test_dtype_rounds_the_same_values(tmp_path: Path, folders: dict[str, Path]) -> None:
    rounded = tiny_model("qwen2", tmp_path / "m", dtype="bfloat16")
    full = tensors(folders["qwen2"])
    assert all(torch.equal(value, full[name].bfloat16()) for name, value in tensors(rounded).items())
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"


def test_overrides_are_config_fields(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path / "m", num_hidden_layers=2, tie_word_embeddings=True, vocab_size=77)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.num_hidden_layers, config.tie_word_embeddings, config.vocab_size) == (2, True, 77)
    assert tensors(folder)["model.embed_tokens.weight"].shape[0] == 77


def test_layer_kinds_follow_the_number_of_layers() -> None:
    assert tiny_config("gemma2", num_hidden_layers=3)["layer_types"] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    assert tiny_config("gpt2", num_hidden_layers=2)["n_layer"] == 2


def test_a_config_is_a_copy() -> None:
    tiny_config("gemma3")["rope_parameters"]["full_attention"]["rope_theta"] = 1.0
    assert tiny_config("gemma3")["rope_parameters"]["full_attention"]["rope_theta"] != 1.0


def test_an_unknown_family_is_named_with_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown tiny model family 'qwen'; did you mean 'qwen"):
        tiny_model("qwen", tmp_path / "m")


def test_an_unknown_field_is_named_with_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'num_hiden_layers'; did you mean 'num_hidden_layers'"):
        tiny_model("llama", tmp_path / "m", num_hiden_layers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("llama", {"num_hidden_layers": "two"}, "tiny model 'llama'"),
        ("llama", {"model_type": "qwen2"}, "cannot be overridden"),
        ("llama", {"hidden_act": "sillu"}, "sillu"),
        ("llama", {"hidden_size": -1}, "-1"),
        ("llama", {"num_attention_heads": 0}, "zero"),
        ("gemma2", {"num_hidden_layers": "two"}, "num_hidden_layers must be an int"),
        ("llama", {"rope_parameters": object()}, "not plain data"),
        ("llama", {"dtype": "int8"}, "tiny model dtype 'int8'"),
    ],
)
def test_a_refused_value_is_a_usage_error(family: str, overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_model(family, tmp_path / "m", **overrides)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        tiny_model("llama", tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the tiny model 'llama'"):
        tiny_model("llama", tmp_path / "file" / "m")


def test_the_cache_is_keyed_and_reused(assets: Path) -> None:
    folder = tiny_model("llama")
    assert folder.parent == assets
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_model("llama") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    others = [
        tiny_model("llama", seed=1),
        tiny_model("llama", dtype="bfloat16"),
        tiny_model("llama", num_hidden_layers=2),
    ]
    assert len({folder, *others}) == 4
    assert sorted(assets.iterdir()) == sorted([folder, *others])


def test_a_damaged_cache_folder_is_built_again(assets: Path) -> None:
    folder = tiny_model("llama")
    good = content(folder)
    (folder / "model.safetensors").unlink()
    assert content(tiny_model("llama")) == good
    assert list(assets.iterdir()) == [folder]


def test_the_folder_of_a_faster_process_stays(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = tiny._build
    stamps = []

    def overtaken(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(tiny, "_build", build)
        stamps.append((tiny_model("llama") / "config.json").stat().st_mtime_ns)
        build(*args, **options)

    monkeypatch.setattr(tiny, "_build", overtaken)
    folder = tiny_model("llama")
    assert [(folder / "config.json").stat().st_mtime_ns] == stamps
    assert list(assets.iterdir()) == [folder]


def test_processes_at_once_give_one_good_folder(tmp_path: Path, folders: dict[str, Path]) -> None:
    code = "from paritykit.testing import tiny_model; print(tiny_model('llama'))"
    command = [sys.executable, "-c", code]
    environment = {**_environment(), "HF_ASSETS_CACHE": str(tmp_path)}
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate(timeout=120)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert len(set(printed)) == 1
    assert content(Path(printed[0])) == content(folders["llama"])
    assert list((tmp_path / "paritykit" / "tiny").iterdir()) == [Path(printed[0])]


def test_importing_the_names_loads_no_torch() -> None:
    code = (
        "import sys; from paritykit.testing import TINY_FAMILIES, tiny_config, tiny_model; tiny_config('gemma3');"
        "sys.exit(str([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules] or ''))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stderr.strip() == ""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
