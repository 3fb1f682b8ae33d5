"""What a float64 truth costs beside plain runs of the same model, in one interleaved run.

    python -m benchmarks.truth_speed [--model tiny 100M] [--rounds 7] [--busy]

By turns the reference engine runs one case (64 prompt tokens, or 1 and then 8 decode steps; no points recorded) in
float32, in float64 with transformers' own casts to float32 left in (``widen=False``), and as a truth. ``tiny`` is
ParityKit's tiny Llama, ``100M`` a seeded Llama made from its config. Prints medians of each round's ratio.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.compare_speed import seconds
from paritykit.captures.recorder import Selection
from paritykit.case import Case
from paritykit.engines.hf import HFEngine
from paritykit.testing import tiny_model

CASES = {
    "prefill of 64": Case(id="a", tokens=tuple(range(64))),
    "1 + 8 tokens": Case(id="a", tokens=(1,), new_tokens=9),
}
RUNS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "plain float64": {"dtype": "float64", "widen": False},
    "truth": {"dtype": "float64"},
}
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16384,
}


def find_model(name: str, folder: Path) -> Path:
    if name == "tiny":
        return tiny_model("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder / "model")
    return folder / "model"


def measure(model: Path, folder: Path, *, rounds: int, clock: Any) -> None:
    engines = {name: HFEngine(str(model), **arguments) for name, arguments in RUNS.items()}
    for name, engine in engines.items():
        print(f"  open, {name}: {seconds(engine.open, clock=clock):.2f} s")
    number = itertools.count()
    for what, case in CASES.items():
        taken: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds + 1):
            for name, engine in engines.items():
                out = folder / str(next(number))
                once = seconds(partial(engine.run, [case], points=Selection(()), out=out), clock=clock)
                if turn:
                    taken[name].append(once)
        for other in ("float32", "plain float64"):
            ratios = [a / b for a, b in zip(taken["truth"], taken[other], strict=True)]
            ours, theirs = (1e3 * statistics.median(taken[name]) for name in ("truth", other))
            print(
                f"  {what}: truth takes {statistics.median(ratios):.2f} x {other} ({ours:.1f} ms against {theirs:.1f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny", "100M"], choices=["tiny", "100M"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--busy", action="store_true", help="one thread, CPU time: where the machine has other work")
    parser.add_argument("--folder", help="where captures and the model are written")
    asked = parser.parse_args()
    torch.set_num_threads(1 if asked.busy else torch.get_num_threads())
    clock = time.process_time if asked.busy else time.perf_counter
    for name in asked.model:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            print(name)
            measure(find_model(name, Path(folder)), Path(folder), rounds=asked.rounds, clock=clock)


if __name__ == "__main__":
    main()
