"""Who reads a config key: a search for its name in the installed sources. Imports neither library.

For vLLM that is the architecture's own module with what it imports from its neighbours, the shared layers, and the
config code; for transformers the model's folder and the shared modelling code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

TRANSFORMERS_SHARED = (
    "configuration_utils.py",
    "modeling_utils.py",
    "modeling_rope_utils.py",
    "masking_utils.py",
    "cache_utils.py",
    "generation/configuration_utils.py",
)
VLLM_SHARED = ("config", "model_executor/layers", "transformers_utils", "v1/worker", "v1/spec_decode")
REGISTRY = "model_executor/models/registry.py"
CONFIGS = "transformers_utils/config.py"
NEIGHBOUR = re.compile(r"from (?:\.|vllm\.model_executor\.models\.)(\w+) import")


@cache
def package(name: str) -> Path | None:
    """Where a library is installed; None if it is not."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def transformers_reads(key: str, module: str) -> bool:
    """Whether transformers' sources for the config class of ``module`` name the key."""
    root = package("transformers")
    return root is not None and _names(key, _transformers_text(root, module))


def vllm_reads(key: str, architectures: tuple[str, ...]) -> bool | None:
    """Whether vLLM's sources for these architectures name the key; None where vLLM is not installed."""
    root = package("vllm")
    return None if root is None else _names(key, _vllm_text(root, architectures))


def vllm_model(architecture: str) -> tuple[str, str]:
    """File (without ending) and class of vLLM's model for an architecture; empty if it has none or is not installed."""
    root = package("vllm")
    pattern = rf'"{re.escape(architecture)}":\s*\(\s*"(\w+)",\s*"(\w+)"'
    found = re.search(pattern, _text(root / REGISTRY)) if root else None
    return (found[1], found[2]) if found else ("", "")


def vllm_module(architecture: str) -> str:
    """The file of vLLM's model for an architecture; empty if it has none."""
    return vllm_model(architecture)[0]


def vllm_has_config(model_type: str) -> bool:
    """Whether vLLM brings a config class of its own for this model_type, with defaults of its own."""
    root = package("vllm")
    return bool(root and re.search(rf"^\s+{re.escape(model_type)}=\"\w+\",", _text(root / CONFIGS), re.MULTILINE))


def vllm_looks_for_head() -> bool:
    """Whether the installed vLLM keeps a stored head that the config says is tied, as transformers 5 does."""
    root = package("vllm")
    return bool(root and (root / "model_executor/model_loader/weight_tying.py").is_file())


def _names(key: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", text) is not None


@cache
def _transformers_text(root: Path, module: str) -> str:
    parts = module.split(".")[1:-1]
    own = sorted(root.joinpath(*parts).glob("*.py")) if parts else []
    return "\n".join(_text(p) for p in (*own, *(root / name for name in TRANSFORMERS_SHARED)))


@cache
def _vllm_text(root: Path, architectures: tuple[str, ...]) -> str:
    files = list(_closure(root, [m for a in architectures if (m := vllm_module(a))]))
    for part in VLLM_SHARED:
        files.extend(sorted((root / part).rglob("*.py")))
    return "\n".join(_text(p) for p in files)


def _closure(root: Path, names: list[str]) -> Iterator[Path]:
    """Model files by name, and those they import, and so on."""
    seen: set[str] = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        path = root / "model_executor/models" / f"{name}.py"
        yield path
        names.extend(NEIGHBOUR.findall(_text(path)))


@cache
def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
