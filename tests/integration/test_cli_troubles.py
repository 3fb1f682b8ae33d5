"""Models that cannot be used and machines that are not in order: one clear message, exit code 2 or 3, nothing left."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paritykit.testing import tiny_model
from tests.integration.commands import Attempt, shadow, write


@pytest.fixture
def attempt(capfd: pytest.CaptureFixture[str], importable: None) -> Attempt:
    return Attempt(capfd)


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model("qwen2")


@pytest.fixture
def copy(tmp_path: Path, model: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(model, tmp_path / "model")


def edit_config(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


# What is wrong with the model


def test_model_that_is_no_checkpoint_is_refused(attempt: Attempt, tmp_path: Path) -> None:
    file = write(tmp_path / "file", "")
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, said in {
        tmp_path / "nothing": f"no such folder: {tmp_path}/nothing",
        file: f"{file} is a file; give the checkpoint's folder",
        empty: f"{empty} is not a checkpoint: it has no config.json",
    }.items():
        outcome = attempt("run", given, "--candidate", "hf")
        assert (outcome.code, outcome.message) == (2, said)


@pytest.mark.parametrize(("text", "said"), [
    ("{", "config.json cannot be read: Expecting property name"),
    ("[]", "config.json is not a JSON object"),
    ("{}", "config.json names neither a model_type nor architectures"),
])  # fmt: skip
def test_broken_config_is_refused(attempt: Attempt, copy: Path, text: str, said: str) -> None:
    write(copy / "config.json", text)
    outcome = attempt("run", copy, "--candidate", "hf")
    assert outcome.code == 2
    assert said in outcome.message


def test_config_without_vocab_size_is_refused(attempt: Attempt, copy: Path) -> None:
    outcome = attempt("run", edit_config(copy, vocab_size=None), "--candidate", "hf")
    assert outcome.code == 2
    assert outcome.message.endswith("config.json has no usable vocab_size: None")


@pytest.mark.parametrize(
    ("size", "said"), [(-1000, "model.safetensors is truncated:"), (4, "is not a safetensors file")]
)
@pytest.mark.parametrize("command", ["run", "capture"])
def test_truncated_weights_are_refused(attempt: Attempt, copy: Path, size: int, said: str, command: str) -> None:
    weights = copy / "model.safetensors"
    with weights.open("rb+") as file:
        file.truncate(size % weights.stat().st_size)
    start = ("run", copy, "--candidate", "hf") if command == "run" else ("capture", "hf", copy, "-o", copy / "capture")
    outcome = attempt(*start)
    assert outcome.code == 2
    assert said in outcome.message


def test_folder_without_weights_is_refused(attempt: Attempt, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    outcome = attempt("run", copy, "--candidate", "hf")
    assert outcome.code == 2
    assert outcome.message == f"{copy} is not a checkpoint: it has no .safetensors or .bin weights"


def test_hub_id_is_refused_offline(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = attempt("run", "somebody/a-model", "--candidate", "hf")
    assert outcome.code == 2
    assert outcome.message.startswith("'somebody/a-model' is neither a folder nor a hub model that can be reached:")


def test_unknown_tiny_family_is_refused(attempt: Attempt) -> None:
    outcome = attempt("run", "tiny:qwen", "--candidate", "hf")
    assert outcome.code == 2
    assert outcome.message.startswith("unknown tiny model family 'qwen'; did you mean 'qwen3' or 'qwen2'")


def test_architecture_unknown_to_both(attempt: Attempt, copy: Path) -> None:
    edit_config(copy, model_type="invented", architectures=["InventedForCausalLM"])
    for arguments in (("run", copy, "--candidate", "hf"), ("capture", "vllm", copy, "-o", copy / "capture")):
        outcome = attempt(*arguments)
        assert outcome.code == 3
        assert "model type `invented`" in outcome.message


def test_architecture_unknown_to_vllm(attempt: Attempt, tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 67, "n_positions": 64, "n_ctx": 64, "n_embd": 64, "n_layer": 1, "n_head": 4}
    config = transformers.CodeGenConfig(**sizes, rotary_dim=8, bos_token_id=None, eos_token_id=None)
    transformers.CodeGenForCausalLM(config).save_pretrained(tmp_path / "codegen")
    outcome = attempt("capture", "vllm", tmp_path / "codegen", "-o", tmp_path / "capture")
    assert outcome.code == 3
    assert "CodeGenForCausalLM" in outcome.message
    assert "not supported" in outcome.message


# What is wrong with the machine


def test_missing_vllm_names_what_to_install(
    attempt: Attempt, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow(tmp_path / "path", "vllm", "raise ModuleNotFoundError(\"No module named 'vllm'\", name='vllm')", monkeypatch)
    outcome = attempt("capture", "vllm", model, "-o", tmp_path / "capture")
    assert outcome.code == 3
    assert outcome.message.startswith("vLLM is not installed: pip install 'paritykit[vllm]'")


def test_broken_vllm_points_to_the_doctor(
    attempt: Attempt, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    shadow(tmp_path / "path", "vllm", code, monkeypatch)
    outcome = attempt("capture", "vllm", model, "-o", tmp_path / "capture")
    assert outcome.code == 3
    assert outcome.message == (
        "vLLM does not import: operator torchvision::nms does not exist; `paritykit doctor` explains"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that takes half a megabyte: a file system of its own for root, else a limit on the size of files."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, limits[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_full_disk_ends_a_capture_and_leaves_nothing(
    attempt: Attempt, model: Path, small_disk: Path, engine: str
) -> None:
    outcome = attempt("capture", engine, model, "-o", small_disk / "capture")
    assert outcome.code == 3
    assert re.search("No space left on device|File too large", outcome.message)
    assert list(small_disk.iterdir()) == []


def test_full_disk_ends_a_run_and_leaves_nothing(
    attempt: Attempt, model: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(small_disk))
        outcome = attempt("run", model, "--candidate", "hf")
    assert outcome.code == 3
    assert re.search("No space left on device|File too large", outcome.message)
    left = [file for file in small_disk.rglob("*") if file.is_file()]
    assert [str(file) in outcome.message for file in left] == [True] * len(left), "only a log that is told of"
