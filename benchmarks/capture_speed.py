"""How much slower a forward is when everything is captured, in one interleaved run.

    python -m benchmarks.capture_speed [--dtype bfloat16 float32] [--pairs 9] [--folder /dev/shm] [--busy]

By turns (a) a bare forward and one raw write of as many bytes as a capture has, and (b) the forward captured as the
``hf`` engine does it: every module's output and every leaf module's input, each written from inside its hook. The model
is a seeded Llama of about 150M parameters, made from its config. Prints medians, the ratio of each pair's two times,
and the peak of resident memory above the idle model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.compare_speed import seconds, status
from paritykit.captures.layout import DenseLayout
from paritykit.captures.manifest import Part, Segment
from paritykit.captures.recorder import Recorder, Selection
from paritykit.captures.stream import tensor_bytes
from paritykit.captures.writer import PartWriter
from paritykit.engines.reading import FirstTensor

Clock = Callable[[], float]
GOAL = 1.3
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 16384,
}


class Figures(NamedTuple):
    """Seconds of each pair's two sides, bytes and points of one capture."""

    floors: list[float]
    captures: list[float]
    size: int
    points: int


def make_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def capture(model: Any, ids: torch.Tensor, folder: Path) -> Part:
    """One forward with everything written into a new folder."""
    folder.mkdir()
    part, layout = PartWriter(folder), DenseLayout()
    batch, length = ids.shape
    layout.set(batch, length)
    with Recorder(model, part, reading=FirstTensor(), selection=Selection(), alias=True) as recorder:
        recorder.begin([Segment(n, 0, length) for n in range(batch)], layout.rows)
        model(input_ids=ids, use_cache=True)
        recorder.end()
    return part.finish()


def floor(model: Any, ids: torch.Tensor, path: Path, data: memoryview) -> None:
    """The bare forward, and one write."""
    model(input_ids=ids, use_cache=True)
    with path.open("wb", buffering=0) as file:
        left = data
        while left:
            left = left[file.write(left) :]


def empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def measure(dtype: torch.dtype, folder: Path, *, pairs: int, shape: tuple[int, int], clock: Clock) -> Figures:
    model = make_model(dtype)
    ids = torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
    floors, captures = [], []
    with torch.no_grad():
        part = capture(model, ids, folder / "first")
        size = sum(file.bytes for file in part.files)
        empty(folder)
        data = tensor_bytes(torch.randint(256, (size,), dtype=torch.uint8))
        for number in range(pairs):
            floors.append(seconds(lambda: floor(model, ids, folder / "raw", data), clock=clock))
            empty(folder)
            captures.append(seconds(partial(capture, model, ids, folder / f"{number}"), clock=clock))
            empty(folder)
    return Figures(floors, captures, size, len(part.points))


def peak(dtype: torch.dtype, shape: tuple[int, int], folder: Path | None) -> int:
    """Most resident memory during one forward (captured if there is a ``folder``), above the idle model's, in bytes."""
    model = make_model(dtype)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=True)
        Path("/proc/self/clear_refs").write_text("5")
        idle = status("VmRSS")
        ids = torch.zeros(shape, dtype=torch.int64)
        if folder is None:
            model(input_ids=ids, use_cache=True)
        else:
            capture(model, ids, folder / "peak")
    return status("VmHWM") - idle


def megabytes(dtype: torch.dtype, shape: tuple[int, int], folder: Path | None) -> float:
    """``peak`` in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(peak, dtype, shape, folder).result() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--shape", nargs=2, type=int, default=[1, 512], metavar=("BATCH", "LENGTH"))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--busy", action="store_true", help="one thread, CPU time: where the machine has other work")
    parser.add_argument("--folder", help="where the captures are written (a tmpfs keeps the disk out)")
    asked = parser.parse_args()
    shape = (asked.shape[0], asked.shape[1])
    clock = time.process_time if asked.busy else time.perf_counter
    torch.set_num_threads(1 if asked.busy else torch.get_num_threads())
    for name in asked.dtype:
        dtype = getattr(torch, name)
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            found = measure(dtype, Path(folder), pairs=asked.pairs, shape=shape, clock=clock)
            bare, captured = (megabytes(dtype, shape, f) for f in (None, Path(folder)))
        ratios = [c / f for c, f in zip(found.captures, found.floors, strict=True)]
        print(
            f"{name} {shape[0]}x{shape[1]}, {found.points} points, {found.size / 1e6:.0f} MB, {asked.pairs} pairs, "
            f"{torch.get_num_threads()} threads"
        )
        print(f"{'forward, write':<16}{statistics.median(found.floors):8.3f} s")
        print(f"{'captured':<16}{statistics.median(found.captures):8.3f} s")
        print(
            f"{'ratio':<16}{statistics.median(ratios):8.2f}   from {min(ratios):.2f} to {max(ratios):.2f}; goal {GOAL}"
        )
        print(f"{'peak memory':<16}{captured:8.0f} MB above the model; {bare:.0f} MB where nothing is captured\n")


if __name__ == "__main__":
    main()
