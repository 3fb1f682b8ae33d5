"""What each engine reads of a folder, held against transformers' own choice on random folders.

That vLLM's loader chooses as we say is tested in tests/integration/test_audit_vllm.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from paritykit.audit.folder import Folder
from paritykit.audit.loaders import Choice, hf_choice, natural, vllm_choice
from tests.audit_folders import FOLDERS, make_folder

IN_ONE_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


def transformers_choice(folder: Path) -> list[str] | None:
    """The files transformers itself would open, in order; None if it fails."""
    resolve = pytest.importorskip("transformers.modeling_utils")._get_resolved_checkpoint_files
    try:
        files, _ = resolve(
            str(folder), variant=None, gguf_file=None, use_safetensors=None, user_agent=None, is_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        return None
    return [str(Path(f).relative_to(folder)) for f in files] if all(Path(f).is_file() for f in files) else None


@IN_ONE_FOLDER
@given(FOLDERS)
def test_transformers_reads_what_we_say(tmp_path: Path, layout: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "m", layout)
    facts = Folder(folder)
    ours = hf_choice(facts.names, facts.indexes)
    assert transformers_choice(folder) == (None if ours.fails else list(ours.files)), ours
    shutil.rmtree(folder)


def test_numbers_are_sorted_by_value() -> None:
    names = ["m-10-of-10.safetensors", "m-9-of-10.safetensors", "a.safetensors"]
    assert sorted(names, key=natural) == ["a.safetensors", "m-9-of-10.safetensors", "m-10-of-10.safetensors"]


def test_vllm_takes_the_first_ending_there_is() -> None:
    assert vllm_choice(["a.pt", "b.bin", "c.safetensors"], {}).files == ("c.safetensors",)
    assert vllm_choice(["a.pt", "b.bin", "a.bin"], {}) == Choice(files=("a.bin", "b.bin"), unordered=True)
    assert vllm_choice(["a.pt"], {}).files == ("a.pt",)
    assert vllm_choice(["config.json"], {}).fails
    assert vllm_choice(["training_args.bin"], {}).fails == "no file holds weights"
