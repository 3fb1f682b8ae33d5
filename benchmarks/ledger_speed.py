"""What the ledger of weights costs: time against reading the checkpoint once, memory against the engine without it.

    python -m benchmarks.ledger_speed [--gigabytes 2] [--repeats 3] [--folder /dev/shm]

Writes a Llama checkpoint in bfloat16, then by turns starts real vLLM with the loader watched and without, each in a
process of its own. Prints medians: the ledger's seconds, the ratio to reading every byte of the files, and by how much
the peak of resident memory that is not the mapped checkpoint grew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paritykit.engines.checkpoint import CHUNK, Checkpoint

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
LAYER = HIDDEN * (2 * HIDDEN + 2 * 512) + 3 * HIDDEN * INTERMEDIATE


def write_model(folder: Path, *, gigabytes: float) -> None:
    """A Llama of about that size, its weights random."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(2, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / LAYER))
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")
    torch.set_default_dtype(torch.float32)


def start(model: str, *, watched: bool) -> dict[str, float]:
    """Open vLLM in this process; seconds of the ledger and peak of anonymous memory while loading, in bytes."""
    from paritykit.engines.vllm.engine import VllmEngine

    engine = VllmEngine(model, dtype="bfloat16", provenance=watched)
    peak, stop = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, stop))
    watcher.start()
    started = time.monotonic()
    engine.open()
    opened = time.monotonic() - started
    stop.set()
    watcher.join()
    found = engine.ledger() if watched else []
    errors = [r.error for r in found if r.error] + [a.tensor for r in found for a in r.arrived if a.differing]
    engine.close()
    if errors:
        sys.exit(f"the ledger is not clean: {errors[:3]}")
    return {"peak": peak[0], "seconds": sum(r.seconds for r in found), "open": opened}


def _watch(peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.005):
        peak[0] = max(peak[0], anonymous())


def anonymous() -> int:
    """Resident memory of this process that is no file's, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def read_once(model: Path) -> float:
    """Seconds to read every byte of the weight files."""
    started = time.monotonic()
    for file in Checkpoint(model).weight_files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(CHUNK):
                pass
    return time.monotonic() - started


def in_own_process(model: Path, *, watched: bool) -> dict[str, float]:
    """``start``, in a fresh interpreter."""
    line = [sys.executable, "-m", "benchmarks.ledger_speed", "--one", str(model), "--watched", str(int(watched))]
    answer = subprocess.run(line, check=True, stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def median(make: Callable[[dict[str, Any]], float], rounds: list[dict[str, Any]]) -> float:
    """The median of a figure over all rounds."""
    return statistics.median(make(r) for r in rounds)


def main() -> None:
    """Run the benchmark and print one line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--watched", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(start(options.one, watched=bool(options.watched))))
        return
    with tempfile.TemporaryDirectory(prefix="paritykit-bench-", dir=options.folder) as name:
        model = Path(name)
        write_model(model, gigabytes=options.gigabytes)
        size = sum(f.stat().st_size for f in Checkpoint(model).weight_files)
        rounds = [
            {
                "read": read_once(model),
                "plain": in_own_process(model, watched=False),
                "watched": in_own_process(model, watched=True),
            }
            for _ in range(options.repeats)
        ]
    seconds = median(lambda r: r["watched"]["seconds"], rounds)
    more = median(lambda r: r["watched"]["peak"] - r["plain"]["peak"], rounds)
    print(f"checkpoint          {size / 1e9:.2f} GB, bfloat16")
    print(f"reading it once     {median(lambda r: r['read'], rounds):.2f} s")
    print(f"ledger              {seconds:.2f} s")
    print(f"ratio               {median(lambda r: r['watched']['seconds'] / r['read'], rounds):.1f} x reading it once")
    print(f"start of the engine {median(lambda r: r['watched']['open'] / r['plain']['open'], rounds):.2f} x as long")
    print(f"peak memory         {more / 1e6:+.0f} MB above the engine without the ledger")


if __name__ == "__main__":
    main()
