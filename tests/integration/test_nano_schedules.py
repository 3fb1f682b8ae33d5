"""However nano schedules and stores, it gives what each request gets alone on the contiguous cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from paritykit.engines.nano.core import NanoLLM
from paritykit.engines.nano.sampling import Sampling
from paritykit.testing import tiny_model
from tests.nano import ThreadTeam, Told, drive, one_thread, poison_free_blocks

FAMILIES = ["llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe"]
VARIED = ["mistral", "gemma2", "gemma3", "mixtral"]
"""Families that differ in what a schedule could spoil; the others see the hardest conditions only."""
PROMPTS = [tuple((7 * n + 3 * k + n * k) % 499 for k in range(length)) for n, length in enumerate((40, 1, 13))]
NEW = 12
WORST = 1e-5

CONDITIONS: dict[str, dict[str, Any]] = {
    "contiguous": {"kv": "contiguous"},
    "blocks of 1": {"block_size": 1},
    "blocks of 3": {"block_size": 3},
    "token by token": {"max_num_batched_tokens": 1},
    "chunks of 5": {"max_num_batched_tokens": 5},
    "one at a time": {"max_num_seqs": 1},
    "prefix caching": {"enable_prefix_caching": True, "block_size": 4, "max_num_batched_tokens": 16},
    "preemption": {"block_size": 4, "num_blocks": 16},
    "all at once": {"block_size": 3, "num_blocks": 20, "max_num_batched_tokens": 7, "enable_prefix_caching": True},
}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def model_of(family: str) -> Path:
    return tiny_model(family, num_hidden_layers=3 if family == "gemma3" else 2)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Told]]:
    """Each family's prompts, one request after the other on the contiguous cache."""
    found = {}
    for family in FAMILIES:
        with NanoLLM(model_of(family), kv="contiguous", max_num_seqs=1) as llm:
            found[family] = drive(llm, PROMPTS, max_tokens=NEW)
    return found


@pytest.mark.parametrize(
    ("family", "condition"),
    [(f, c) for f in FAMILIES for c in CONDITIONS if f in VARIED or c in ("token by token", "all at once")],
)
def test_every_request_gets_what_it_gets_alone(alone: dict[str, list[Told]], family: str, condition: str) -> None:
    with NanoLLM(model_of(family), **CONDITIONS[condition]) as llm:
        requests = [llm.add_request(p, max_tokens=NEW) for p in PROMPTS]
        watched = [llm.scheduler.find(r) for r in requests]
        told = {r: Told() for r in requests}
        while llm.unfinished:
            for output in llm.step():
                told[output.id].take(output)
            poison_free_blocks(llm)
        assert max(a.error(b) for a, b in zip(alone[family], told.values(), strict=True)) < WORST
        assert not any(llm.blocks.references)
        if condition == "preemption":
            assert sum(r.preemptions for r in watched if r) > 0


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_share_the_work(alone: dict[str, list[Told]], family: str, ranks: int) -> None:
    """Two kv heads: at four ranks, two of them hold the same one."""
    with NanoLLM(model_of(family), block_size=3, max_num_batched_tokens=16) as llm:
        llm.team = ThreadTeam(llm.settings, ranks)  # type: ignore[assignment]
        assert max(a.error(b) for a, b in zip(alone[family], drive(llm, PROMPTS, max_tokens=NEW), strict=True)) < WORST


@pytest.mark.parametrize("block_size", [1, 3, 16, 32])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_paged_gives_the_bits_of_contiguous(family: str, block_size: int) -> None:
    schedule = {"max_num_batched_tokens": 11}
    with (
        NanoLLM(model_of(family), kv="contiguous", **schedule) as plain,
        NanoLLM(model_of(family), block_size=block_size, **schedule) as paged,
    ):
        pairs = zip(drive(plain, PROMPTS, max_tokens=NEW), drive(paged, PROMPTS, max_tokens=NEW), strict=True)
        assert all(a.same_bits(b) for a, b in pairs)


def test_a_repeated_prompt_is_found_in_the_cache_and_gives_the_same() -> None:
    model = tiny_model("gemma2")
    with NanoLLM(model, enable_prefix_caching=True, block_size=4) as llm:
        prompt = PROMPTS[0]
        first = drive(llm, [prompt], max_tokens=NEW)[0]
        llm.add_request(prompt, max_tokens=NEW)
        scheduled, _ = llm.scheduler.plan()
        assert scheduled[0][1].start == len(prompt) - 1
        llm.abort(scheduled[0][0].id)
        again = drive(llm, [prompt, prompt, (*prompt, *first.tokens, 5)], max_tokens=NEW)
        assert first.error(again[0]) < WORST
        assert first.error(again[1]) < WORST
        with NanoLLM(model, kv="contiguous") as plain:
            assert drive(plain, [(*prompt, *first.tokens, 5)], max_tokens=NEW)[0].error(again[2]) < WORST
        assert not any(llm.blocks.references)


@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_forks_go_on_alike_and_apart(kv: str) -> None:
    with NanoLLM(tiny_model("qwen2"), kv=kv, **({"block_size": 4} if kv == "paged" else {})) as llm:
        parent = llm.add_request(PROMPTS[0], max_tokens=NEW)
        told = {parent: Told()}
        for output in llm.step():
            told[output.id].take(output)
        same = llm.fork(parent)
        other = llm.fork(parent, sampling=Sampling(temperature=9.0, seed=1))
        told |= {same: Told(list(told[parent].tokens), list(told[parent].logits)), other: Told()}
        while llm.unfinished:
            for output in llm.step():
                told[output.id].take(output)
            poison_free_blocks(llm)
        assert told[parent].error(told[same]) < WORST
        assert told[other].tokens != told[parent].tokens[1:]
        assert not any(llm.blocks.references)


def test_forced_tokens_are_fed() -> None:
    with NanoLLM(tiny_model("qwen2")) as llm:
        forced = drive(llm, [PROMPTS[2]], max_tokens=3, forced=(7, 8))[0]
        whole = drive(llm, [(*PROMPTS[2], 7, 8)], max_tokens=1)[0]
        assert forced.tokens[2] == whole.tokens[0]
        torch.testing.assert_close(forced.logits[2], whole.logits[0])


def test_sampling_does_not_depend_on_the_schedule() -> None:
    sampling = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=3, logprobs=2)
    texts = []
    for settings in ({}, {"block_size": 4, "num_blocks": 16, "max_num_batched_tokens": 5}):
        with NanoLLM(tiny_model("qwen2"), **settings) as llm:
            texts.append(llm.generate(PROMPTS, max_tokens=NEW, sampling=sampling))
    assert texts[0] == texts[1]
    with NanoLLM(tiny_model("qwen2")) as llm:
        assert llm.generate(PROMPTS, max_tokens=NEW) != texts[0]
        llm.add_request(PROMPTS[0], max_tokens=1, sampling=sampling)
        (output,) = llm.step()
        assert output.logits is not None
        assert output.token is not None
        expected = output.logits.double().log_softmax(-1)
        assert output.logprobs[output.token] == pytest.approx(float(expected[output.token]))
        assert set(output.logprobs) == {output.token, *expected.topk(2).indices.tolist()}


@pytest.mark.parametrize(
    ("kv_dtype", "allowed"), [("float16", 2e-3), ("bfloat16", 2e-2), ("fp8", 2e-1), ("float32", 1e-9)]
)
@pytest.mark.parametrize("kv", ["paged", "contiguous"])
def test_a_cache_in_another_dtype_is_near(kv: str, kv_dtype: str, allowed: float) -> None:
    forced = tuple(range(NEW - 1))
    with NanoLLM(tiny_model("qwen2"), kv=kv) as exact, NanoLLM(tiny_model("qwen2"), kv=kv, kv_dtype=kv_dtype) as near:
        pairs = [drive(llm, PROMPTS, max_tokens=NEW, forced=forced) for llm in (exact, near)]
    for a, b in zip(*pairs, strict=True):
        mine, theirs = torch.stack(a.logits), torch.stack(b.logits)
        error = float((mine - theirs).norm() / mine.norm())
        assert error < allowed
        assert (error > allowed / 100) is (kv_dtype != "float32")


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda s: s["rope_type"],
)
def test_scaled_rope_in_a_whole_model(scaling: dict[str, Any], tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, **scaling}
    model = tiny_model("llama", num_hidden_layers=2, max_position_embeddings=64, rope_parameters=rope)
    prompt = [(17 * k) % 499 for k in range(60)]
    new = 20 if scaling["rope_type"] == "dynamic" else 4
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    tokens, expected = list(prompt), []
    with torch.no_grad():
        cache = None
        for n in range(new):
            output = reference(torch.tensor([tokens if n == 0 else tokens[-1:]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            expected.append(output.logits[0, -1])
            tokens.append(int(expected[-1].argmax()))
    with NanoLLM(model, block_size=3, max_num_batched_tokens=7) as llm:
        (told,) = drive(llm, [tuple(prompt)], max_tokens=new)
    assert told.error(Told(tokens[len(prompt) :], expected)) < WORST


def test_half_precision_runs() -> None:
    for dtype in ("bfloat16", "float16", "float64", "auto"):
        with NanoLLM(tiny_model("gemma2"), dtype=dtype) as llm:
            (told,) = drive(llm, PROMPTS[:1], max_tokens=2)
            assert str(told.logits[0].dtype) == f"torch.{llm.settings.dtype}"
            assert not told.logits[0].isnan().any()
