"""How fast nano is: against Hugging Face's ``generate``, and one of its ways against another, in one interleaved run.

    python -m benchmarks.nano_speed [--model tiny 150M] [--repeats 5] [--tensor-parallel] [--busy] [--folder /dev/shm]

Three workloads: one request of 64 prompt and 64 new tokens, eight ragged requests at once (left-padded for Hugging
Face), and the prefill of 512 tokens. All greedy, with a KV cache, in float32 on the CPU; every engine computes the same
tokens, which is checked. ``tiny`` is ParityKit's tiny Llama, ``150M`` a seeded Llama made from its config. Prints
medians of each round's ratio: above 1 the first named is the faster. ``--busy`` is for a machine with other work: one
thread, and its CPU time in place of seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.capture_speed import make_model
from paritykit.engines.nano.core import NanoLLM
from paritykit.testing import tiny_model

NEW = 64
LENGTHS = {"one": (64,), "eight": (64, 17, 100, 33, 5, 80, 48, 61), "prefill": (512,)}
CLOCKS = {False: time.perf_counter, True: time.thread_time}
Run = Callable[[], list[list[int]]]
Runs = dict[str, dict[str, Run]]
"""By workload, then by who runs it."""
NANO: dict[str, dict[str, Any]] = {
    "nano": {},
    "nano, blocks of 1": {"block_size": 1},
    "nano, blocks of 32": {"block_size": 32},
    "nano, contiguous": {"kv": "contiguous"},
    "nano, chunks of 64": {"max_num_batched_tokens": 64},
}
PAIRS = [
    ("nano", "hf sdpa"),
    ("nano", "hf eager"),
    *((name, "nano, contiguous") for name in ("nano, blocks of 1", "nano", "nano, blocks of 32")),
    ("nano, chunks of 64", "nano"),
    ("nano, 2 ranks", "nano"),
]


def prompts(workload: str, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS[workload]]


def new_tokens(workload: str) -> int:
    return 1 if workload == "prefill" else NEW


def run_nano(llm: NanoLLM, workload: str) -> list[list[int]]:
    return llm.generate(prompts(workload, llm.config.vocab_size), max_tokens=new_tokens(workload))


def run_hf(model: Any, workload: str) -> list[list[int]]:
    found = prompts(workload, model.config.vocab_size)
    length, count = max(map(len, found)), new_tokens(workload)
    ids = torch.tensor([[0] * (length - len(p)) + p for p in found])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in found])
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=mask, do_sample=False, use_cache=True,
            min_new_tokens=count, max_new_tokens=count, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    tokens: list[list[int]] = made[:, length:].tolist()
    return tokens


def write_150m(folder: Path) -> Path:
    make_model(torch.float32).save_pretrained(folder)
    return folder


def open_nano(folder: Path, *, ranks: int) -> dict[str, NanoLLM]:
    found = {name: NanoLLM(folder, **arguments) for name, arguments in NANO.items()}
    if ranks > 1:
        found[f"nano, {ranks} ranks"] = NanoLLM(folder, tensor_parallel_size=ranks)
        torch.set_num_threads(torch.get_num_threads() * ranks)  # the ranks took their share; the others get it back
    return found


def list_runs(nano: dict[str, NanoLLM], folder: Path) -> Runs:
    runs: Runs = {workload: {} for workload in LENGTHS}
    for workload, found in runs.items():
        found.update({name: partial(run_nano, llm, workload) for name, llm in nano.items()})
    for kind in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kind, dtype=torch.float32).eval()
        for workload, found in runs.items():
            found[f"hf {kind}"] = partial(run_hf, model, workload)
    return runs


def measure(runs: dict[str, Run], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every run by ``clock``; each round starts with another one. Exits if their tokens differ."""
    tokens = {name: run() for name, run in runs.items()}
    if any(t != tokens["nano"] for t in tokens.values()):
        sys.exit(f"these differ from nano: {[n for n, t in tokens.items() if t != tokens['nano']]}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(repeats):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            started = clock()
            runs[name]()
            seconds[name].append(clock() - started)
    return seconds


def report(name: str, workload: str, seconds: dict[str, list[float]]) -> None:
    """Tokens per second of nano, and the median ratio of every pair."""
    count = new_tokens(workload) * len(LENGTHS[workload]) if new_tokens(workload) > 1 else sum(LENGTHS[workload])
    print(f"{name}, {workload}: {count / statistics.median(seconds['nano']):.0f} tokens/s")
    for one, other in PAIRS:
        if one in seconds and other in seconds:
            print(f"  {one:<20} {_ratio(seconds[other], seconds[one]):5.2f} x {other}")


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def bench(name: str, folder: Path, options: argparse.Namespace) -> None:
    nano = open_nano(folder, ranks=2 if options.tensor_parallel else 1)
    runs = list_runs(nano, folder)
    for workload in options.workload:
        report(name, workload, measure(runs[workload], options.repeats, CLOCKS[options.busy]))
    for llm in nano.values():
        llm.close()


def main() -> None:
    """Run the benchmark and print one line a ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=("tiny", "150M"), default=["tiny", "150M"])
    parser.add_argument("--workload", nargs="*", choices=tuple(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tensor-parallel", action="store_true", help="also two ranks, each a process")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--busy", action="store_true", help="CPU time of one thread, for a machine with other work")
    options = parser.parse_args()
    if options.busy:
        torch.set_num_threads(1)
    for name in options.model:
        with tempfile.TemporaryDirectory(prefix="paritykit-bench-", dir=options.folder) as folder:
            model = write_150m(Path(folder)) if name == "150M" else tiny_model("llama", max_position_embeddings=1024)
            bench(name, model, options)


if __name__ == "__main__":
    main()
