"""How the ranks of vLLM begin; nothing of vLLM is imported."""

from __future__ import annotations

import json
import os
from mmap import mmap
from multiprocessing import context
from pathlib import Path
from typing import Any

import pytest

from paritykit.engines.vllm import warm
from paritykit.engines.vllm.shared import forget_names


def tell(path: str, **_: Any) -> None:
    import torch

    told = {"cores": sorted(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "rank": os.environ["RANK"]}
    Path(path).write_text(json.dumps({**told, "left": "LEFT_OVER" in os.environ, "parent": os.getppid()}))


def test_a_rank_has_the_environment_and_the_cores_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the process that it is forked from began under the first one's."""
    found = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LEFT_OVER", "of the first")
    for rank in range(2):
        core = sorted(os.sched_getaffinity(0))[-1 if rank else 0]
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("GOMP_CPU_AFFINITY", str(core))
        path = tmp_path / f"{rank}.json"
        process = warm.WarmContext().Process(target=tell, kwargs={"path": str(path)}, name=f"rank{rank}", daemon=True)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        told = json.loads(path.read_text())
        assert (told["cores"], told["threads"], told["rank"], told["left"]) == ([core], 1, str(rank), rank == 0)
        found.append(told["parent"])
        monkeypatch.delenv("LEFT_OVER", raising=False)
    assert found[0] == found[1] != os.getpid()


def test_a_rank_of_several_threads_is_a_new_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    made = warm.WarmContext().Process(target=tell, kwargs={"path": ""})
    assert type(made) is context.SpawnProcess


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory with names on this machine")
def test_segments_lose_their_names_and_keep_their_numbers() -> None:
    mine, other = (Path(f"/dev/shm/paritykit-{os.getpid()}-{kind}_0") for kind in ("cpushm", "other"))
    try:
        for path in (mine, other):
            path.write_bytes(b"12345678")
        with mine.open("r+b") as a, other.open("r+b") as b, mmap(a.fileno(), 8) as kept, mmap(b.fileno(), 8):
            forget_names()
            forget_names()
            assert (mine.exists(), other.exists()) == (False, True)
            assert kept[:] == b"12345678"
    finally:
        for path in (mine, other):
            path.unlink(missing_ok=True)
