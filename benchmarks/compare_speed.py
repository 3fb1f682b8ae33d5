"""How fast two captures are compared, against touching their bytes once, in one interleaved run.

    python -m benchmarks.compare_speed [--gigabytes 1.1] [--dtype float32] [--repeats 5] [--folder /dev/shm]

Writes two safetensors files, then by turns (a) maps both and reads every byte once and (b) maps both and measures every
tensor pair with ``Meter``. Prints medians, the ratio, what one tiny pair costs, and the memory it took above idle.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from paritykit.comparison.metrics import Meter, measure

ROWS, FEATURES = 2048, 4096


def write_pair(folder: Path, *, gigabytes: float, dtype: torch.dtype) -> tuple[Path, Path]:
    """Two files of ``gigabytes`` each, of ``[rows, features]`` tensors a little apart."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(ROWS, FEATURES, generator=generator)
    candidate = reference * (1 + 1e-3 * torch.randn(ROWS, FEATURES, generator=generator))
    paths = folder / "reference.safetensors", folder / "candidate.safetensors"
    for path, tensor in zip(paths, (reference.to(dtype), candidate.to(dtype)), strict=True):
        count = max(1, round(gigabytes * 1e9 / (tensor.numel() * tensor.element_size())))
        save_file({f"point.{i}": tensor.clone() for i in range(count)}, path)
    return paths


def touch(paths: tuple[Path, Path]) -> None:
    """Read every byte of both files once through a memory map."""
    for path in paths:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        torch.frombuffer(mapped, dtype=torch.float32, count=len(mapped) // 4).sum()


def compare(paths: tuple[Path, Path]) -> int:
    """Measure every pair; the largest anonymous memory seen while a meter was alive, in bytes."""
    peak = 0
    with safe_open(paths[0], "pt") as reference, safe_open(paths[1], "pt") as candidate:
        for name in reference.keys():  # noqa: SIM118  (not a dict)
            meter = Meter()
            meter.update(reference.get_tensor(name), candidate.get_tensor(name))
            meter.result()
            peak = max(peak, status("RssAnon"))
    return peak


def status(field: str) -> int:
    """A field of this process's memory status in bytes (Linux); 0 elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def seconds(work: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def time_tiny_pair(dtype: torch.dtype, *, count: int = 1000) -> float:
    """Microseconds for one pair of ``[8, 64]``."""
    reference = torch.randn(8, 64).to(dtype)
    candidate = (reference.float() * 1.001).to(dtype)
    return seconds(lambda: [measure(reference, candidate) for _ in range(count)]) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.1, help="of each file")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the files are written (a tmpfs keeps the disk out)")
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        # Written by another process, so that this one's memory before measuring is really idle.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
            paths = writer.submit(write_pair, Path(folder), gigabytes=asked.gigabytes, dtype=dtype).result()
        gigabytes = sum(path.stat().st_size for path in paths) / 1e9
        time_tiny_pair(dtype)
        touch(paths)
        idle, taken = status("RssAnon"), 0
        floors, times, tiny = [], [], []
        for _ in range(asked.repeats):
            floors.append(seconds(lambda: touch(paths)))
            start = time.perf_counter()
            taken = max(taken, compare(paths) - idle)
            times.append(time.perf_counter() - start)
            tiny.append(time_tiny_pair(dtype))
    floor, used = statistics.median(floors), statistics.median(times)
    ratio = statistics.median(t / f for t, f in zip(times, floors, strict=True))
    print(
        f"{asked.dtype}, {gigabytes:.2f} GB on both sides, {torch.get_num_threads()} threads, {asked.repeats} repeats"
    )
    print(f"{'touch once':<14}{floor:8.3f} s {gigabytes / floor:8.2f} GB/s")
    print(f"{'all metrics':<14}{used:8.3f} s {gigabytes / used:8.2f} GB/s   {ratio:.1f} x the floor")
    print(f"{'best':<14}{min(times):8.3f} s {gigabytes / min(times):8.2f} GB/s")
    print(f"{'[8, 64] pair':<14}{statistics.median(tiny):8.0f} us")
    print(f"{'memory':<14}{taken / 1e6:8.1f} MB above idle (anonymous; mapped pages of the files not counted)")


if __name__ == "__main__":
    main()
