"""Random checkpoint folders: names of weight files, and indexes over them that may be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

WEIGHTS = [
    "model.safetensors",
    "model-1-of-10.safetensors",
    "model-2-of-10.safetensors",
    "model-10-of-10.safetensors",
    "consolidated.safetensors",
    "consolidated-00002.safetensors",
    "original/consolidated.safetensors",
    "sub/model-3.safetensors",
    "adapter_model.safetensors",
    ".hidden.safetensors",
    "pytorch_model.bin",
    "pytorch_model-1-of-2.bin",
    "delta-1.bin",
    "training_args.bin",
    "optimizer.bin",
    "model.pt",
]
INDEXES = ["model.safetensors.index.json", "pytorch_model.bin.index.json", "consolidated.safetensors.index.json"]
ENTRIES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"weight_map": st.dictionaries(st.sampled_from("abcd"), st.sampled_from(WEIGHTS), min_size=1)},
    optional={"metadata": st.just({})},
)
FOLDERS = st.fixed_dictionaries({
    "files": st.lists(st.sampled_from(WEIGHTS), unique=True, min_size=1, max_size=6),
    "indexes": st.dictionaries(st.sampled_from(INDEXES), ENTRIES, max_size=2),
})  # fmt: skip


def make_folder(folder: Path, layout: dict[str, Any]) -> Path:
    """The folder, its weight files empty."""
    for name in layout["files"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name, content in layout["indexes"].items():
        (folder / name).write_text(json.dumps(content))
    (folder / "config.json").write_text("{}")
    return folder
