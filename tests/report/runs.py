"""Runs made up for the reports: four qwen2-like layers with a window that is ignored from layer 2 on, and variants."""

from __future__ import annotations

import random

import msgspec

from paritykit.diagnose.locate import find_culprits
from paritykit.results import (
    CaseInfo,
    Cause,
    Coverage,
    Divergence,
    Finding,
    Local,
    Origin,
    Results,
    Run,
    Side,
    Summary,
    Unmatched,
    Verdict,
    WeightRow,
)

PORTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj#input",
    "self_attn",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj#input",
    "mlp",
)
CASES = {"short": 7, "long-40": 40, "long-200": 200}
WINDOW = 32
WINDOWED = "model.layers.2.self_attn.o_proj#input"
CAUSE = Cause(
    code="PK102",
    name="sliding-window",
    confidence=0.98,
    evidence="the error starts at token 32 = config.sliding_window, and attention without a window reproduces it",
)
SOURCE = "3 x noise floor"


def points(layers: int) -> list[str]:
    """The points of a model with ``layers`` layers, in execution order."""
    inner = [f"model.layers.{n}.{port}" for n in range(layers) for port in PORTS]
    return ["model.embed_tokens", *inner, "model.norm", "#logits"]


def finding(
    point: str, *, case: str, order: int, fails: bool, rng: random.Random, origin: Origin | None = None
) -> Finding:
    """One judged point; a failing one is beyond tolerance from token 32 on."""
    length = CASES.get(case, 64)
    floor = 10 ** rng.uniform(-3.1, -2.6) * (1 + order / 60)
    value = floor * (rng.uniform(9, 18) if fails else rng.uniform(0.7, 1.5))
    pooled = min(length, 64)
    # Positions are pooled to at most 64 numbers, so position 32 of 200 is place 10.
    profile: list[float | None] = [
        value * (1.6 if fails and n * length // pooled >= WINDOW else 0.06 if fails else rng.uniform(0.5, 1.4))
        for n in range(pooled)
    ]
    return Finding(
        check="modules", case=case, point=point, verdict="fail" if fails else "pass", metric="rel_l2", value=value,
        allowed=3 * floor, allowed_source=SOURCE, noise_floor=floor, origin=origin,
        causes=[CAUSE] if origin == "introduced" else [],
        order=order, located=point.partition(".o_proj")[0] if fails and "o_proj" in point else "",
        candidate_point=point.replace("q_proj", "qkv_proj").replace("gate_proj", "gate_up_proj"),
        mapping="rows 0-63 of qkv_proj (provenance)" if "q_proj" in point else "",
        metrics={"rel_l2": value, "max_abs": value * 41, "cosine_gap": value**2 / 2, "scale_ratio": 1.0002},
        positions=(0, length - 1), failing=[(WINDOW, length - 1)] if fails else [], profile=profile,
        shape=[length, 64], dtypes=("float32", "bfloat16"),
    )  # fmt: skip


def failing_run(*, layers: int = 4) -> Results:
    """A run whose layer 2 attention ignores its window: the two long cases fail there and after."""
    rng = random.Random(11)
    found = []
    for case in CASES:
        bad = False
        for order, point in enumerate(points(layers)):
            introduced = point.endswith("layers.2.self_attn.o_proj#input") and case != "short"
            bad = bad or introduced
            origin: Origin | None = ("introduced" if introduced else "inherited") if bad else None
            found.append(finding(point, case=case, order=order, fails=bad, rng=rng, origin=origin))
    found += [_tokens(case, differs=case != "short") for case in CASES]
    failed = sum(f.verdict == "fail" for f in found)
    first = Divergence(
        check="modules", case="long-40", point="model.layers.2.self_attn", origin="introduced",
        seen_at="model.layers.2.self_attn.o_proj#input",
    )  # fmt: skip
    summary = Summary(
        verdict="fail", compared=len(found), failed=failed, skipped=1, unmatched=1, first_divergence=first,
        causes=[CAUSE], checks={"modules": "fail", "tokens": "fail"}, seconds=12.4,
    )  # fmt: skip
    return Results(run=_run(), cases=_cases(differ=True), coverage=_coverage(layers), findings=found, summary=summary)


def replayed_run(*, culprits: int = 2) -> Results:
    """The same with local errors: beside the window, the MLPs of the last layer and more are wrong by themselves."""
    results = failing_run()
    later = ["model.layers.3.mlp", "model.norm", "model.layers.3.input_layernorm", "model.layers.3.self_attn"]
    wrong = [WINDOWED, *later][:culprits]
    found = [_replayed(f, wrong) if f.check == "modules" else f for f in results.findings]
    summary = msgspec.structs.replace(results.summary, culprits=find_culprits(found))
    return msgspec.structs.replace(results, findings=found, summary=summary)


def _replayed(finding: Finding, wrong: list[str]) -> Finding:
    culprit = finding.point in wrong and finding.verdict == "fail"
    local = Local(
        level="leaves", verdict="fail" if culprit else "pass", metric="rel_l2", value=0.25 if culprit else 2e-4,
        allowed=1e-3, allowed_source=SOURCE, culprit=culprit,
    )  # fmt: skip
    origin: Origin | None = ("introduced" if culprit else "inherited") if finding.verdict == "fail" else None
    return msgspec.structs.replace(finding, local=local, origin=origin)


def passing_run(*, layers: int = 4) -> Results:
    """The same model with every point within noise."""
    rng = random.Random(11)
    found = [finding(p, case=c, order=n, fails=False, rng=rng) for c in CASES for n, p in enumerate(points(layers))]
    found += [_tokens(case, differs=False) for case in CASES]
    checks: dict[str, Verdict] = {"modules": "pass", "tokens": "pass"}
    summary = Summary(
        verdict="pass", compared=len(found), failed=0, skipped=1, unmatched=0, checks=checks, seconds=11.8
    )
    whole = Coverage(
        check="modules", points=len(points(layers)) + 1, compared=len(points(layers)), skipped=[_skipped()]
    )
    run = msgspec.structs.replace(_run(), checks=["modules", "tokens"])
    return Results(run=run, cases=_cases(differ=False), coverage=[whole], findings=found, summary=summary)


def nothing_compared() -> Results:
    """No point of one side met a point of the other."""
    lost = [Unmatched(side="reference", point=p) for p in points(2)]
    coverage = [Coverage(check="modules", points=len(lost), compared=0, unmatched=lost)]
    summary = Summary(verdict="inconclusive", compared=0, failed=0, skipped=0, unmatched=len(lost))
    return Results(run=_run(), cases=_cases(differ=False), coverage=coverage, summary=summary)


def inconclusive_run() -> Results:
    """Everything compared was within noise, but most points had no counterpart."""
    run = passing_run()
    lost = [Unmatched(side="reference", point=f"model.layers.{n}.mlp.experts") for n in range(20)]
    coverage = [Coverage(check="modules", points=67, compared=47, unmatched=lost)]
    summary = msgspec.structs.replace(
        run.summary, verdict="inconclusive", unmatched=20, message="coverage 70%, below the 90% asked for"
    )
    return Results(run=run.run, cases=run.cases, coverage=coverage, findings=run.findings, summary=summary)


def big_run(amount: int) -> Results:
    """``amount`` findings of one case, the last tenth of them failing."""
    rng = random.Random(3)
    names = points(amount // len(PORTS) + 1)[:amount]
    start = amount * 9 // 10
    found = [
        finding(
            name,
            case="long-200",
            order=n,
            fails=n >= start,
            rng=rng,
            origin=("introduced" if n == start else "inherited") if n >= start else None,
        )
        for n, name in enumerate(names)
    ]
    first = Divergence(check="modules", case="long-200", point=names[start], origin="introduced")
    summary = Summary(
        verdict="fail", compared=amount, failed=amount - start, skipped=0, unmatched=0, first_divergence=first
    )
    return Results(run=_run(), cases=_cases(differ=False), findings=found, summary=summary)


def renamed(results: Results, name: str) -> Results:
    """``results`` with every name a user controls replaced by ``name`` (points get their order after it)."""
    findings = [
        msgspec.structs.replace(f, point=f"{name}.{f.order}", case=name, check=name, allowed_source=name)
        for f in results.findings
    ]
    cases = [msgspec.structs.replace(c, id=name) for c in results.cases[:1]]
    first = Divergence(check=name, case=name, point=findings[-1].point, origin="introduced")
    side = msgspec.structs.replace(results.run.candidate, model=name, engine=name, args={name: name})
    run = msgspec.structs.replace(results.run, candidate=side, command=name, checks=[name], environment={name: name})
    summary = msgspec.structs.replace(results.summary, first_divergence=first, message=name, checks={}, causes=[
        Cause(code=name, name=name, confidence=0.5, evidence=name)])  # fmt: skip
    lost = [Unmatched(side="reference", point=name, reason=name)]
    return Results(
        run=run,
        cases=cases,
        coverage=[Coverage(check=name, points=1, compared=0, unmatched=lost)],
        findings=findings,
        summary=summary,
    )


def landed(*, layers: int = 4, experts: int = 2) -> list[WeightRow]:
    """A checkpoint on two ranks: fused, stacked, transposed and offset; the vocabulary is padded on the second."""
    embedding = "model.embed_tokens.weight"
    rows = [
        _row(embedding, place=(0, "[0:256, :]", "[:, :]"), elements=24576),
        _row(embedding, place=(1, "[256:499, :]", "[0:243, :]"), elements=23328),
    ]
    for n in range(layers):
        for rank in (0, 1):
            rows += _layer(f"model.layers.{n}", experts, rank)
    return rows


def _layer(at: str, experts: int, rank: int) -> list[WeightRow]:
    q, kv = f"[{64 * rank}:{64 * rank + 64}, :]", f"[{32 * rank}:{32 * rank + 32}, :]"
    fused, stack = f"{at}.self_attn.qkv_proj.weight", f"{at}.mlp.experts.w13_weight"
    rows = [
        _row(f"{at}.self_attn.q_proj.weight", to=fused, place=(rank, q, "[0:64, :]"), elements=6144),
        _row(f"{at}.self_attn.k_proj.weight", to=fused, place=(rank, kv, "[64:96, :]"), elements=3072),
        _row(f"{at}.self_attn.v_proj.weight", to=fused, place=(rank, kv, "[96:128, :]"), elements=3072),
        _row(f"{at}.self_attn.o_proj.weight", place=(rank, q, "[:, :]"), elements=6144, change="transposed"),
        _row(f"{at}.input_layernorm.weight", place=(rank, "[:]", "[:]"), elements=96, change="+1"),
    ]
    for e in range(experts):
        name = f"{at}.mlp.experts.{e}"
        rows += [
            _row(f"{name}.w1.weight", to=stack, place=(rank, q, f"[{e}, 0:64, :]"), elements=6144),
            _row(f"{name}.w3.weight", to=stack, place=(rank, q, f"[{e}, 64:128, :]"), elements=6144),
        ]
    return rows


def _row(tensor: str, *, place: tuple[int, str, str], elements: int, to: str = "", change: str = "") -> WeightRow:
    rank, source, target = place
    return WeightRow(
        tensor=tensor, parameter=to or tensor, rank=rank, source=source, target=target, change=change,
        elements=elements, dtype="bfloat16",
    )  # fmt: skip


LOST = "model.layers.2.self_attn.k_proj.weight"
EMPTY = "model.layers.2.self_attn.qkv_proj.weight"
LOST_MESSAGE = f"{LOST} was handed to the loader and ignored"


def weights_run(*, lost: bool = False, **sizes: int) -> Results:
    """A run of the check ``weights``; with ``lost``, a projection of layer 2 that landed nowhere."""
    rows = landed(**sizes)
    if lost:
        rows = [r for r in rows if r.tensor != LOST]
        rows += [
            WeightRow(tensor=LOST, elements=6144, dtype="bfloat16", status="unread", message=LOST_MESSAGE),
            WeightRow(
                parameter=EMPTY, elements=6144, status="unwritten", message=f"{EMPTY}[64:96, :] is never written"
            ),
        ]
    return with_weights(rows)


def with_weights(rows: list[WeightRow]) -> Results:
    """A run of the check ``weights`` with these records, and a finding for each name."""
    by_name = {r.tensor or r.parameter: r for r in rows}
    found = [
        Finding(
            check="weights", case="", point=name, verdict="pass" if r.status in ("pass", "skip") else "fail",
            metric=r.status, value=float(r.elements), allowed=0.0, order=n, message=r.message, origin="introduced",
        )
        for n, (name, r) in enumerate(by_name.items())
    ]  # fmt: skip
    failed = [f for f in found if f.verdict == "fail"]
    first = Divergence(check="weights", case="", point=failed[0].point, origin="introduced") if failed else None
    verdict: Verdict = "fail" if failed else "pass"
    summary = Summary(
        verdict=verdict, compared=len(found), failed=len(failed), skipped=0, unmatched=0, first_divergence=first,
        checks={"weights": verdict},
    )  # fmt: skip
    run = msgspec.structs.replace(_run(), checks=["weights"], command="paritykit weights tiny:qwen2")
    return Results(run=run, findings=found, weights=rows, summary=summary)


def _run() -> Run:
    model = "tiny/qwen2-window"
    digest = "sha256:9f2c17e0"
    return Run(
        paritykit="0.1.0", checks=["modules", "tokens", "kv_cache"], created="2026-08-14 09:30 UTC",
        reference=Side(engine="hf", model=model, dtype="float32", digest=digest, attention_backend="eager",
                       parallel={"tensor": 1}, versions={"torch": "2.13.0", "transformers": "5.19.0"}),
        candidate=Side(engine="vllm", model=model, dtype="bfloat16", digest=digest, attention_backend="CPU_ATTN",
                       parallel={"tensor": 2}, versions={"torch": "2.13.0", "vllm": "0.32.0"},
                       args={"block_size": "32"}),
        command="paritykit run tiny/qwen2-window --candidate vllm --check modules --check tokens --html parity.html",
        environment={"python": "3.11.9", "platform": "Linux-6.8-x86_64", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def _cases(*, differ: bool) -> list[CaseInfo]:
    rng = random.Random(5)
    made = []
    for name, length in CASES.items():
        line = [rng.randrange(997) for _ in range(8)]
        other = [*line[:3], 512, *[rng.randrange(997) for _ in range(4)]] if differ and name != "short" else line
        made.append(
            CaseInfo(
                id=name,
                tokens=[rng.randrange(997) for _ in range(length)],
                new_tokens=8,
                reference_tokens=line,
                candidate_tokens=other,
            )
        )
    return made


def _tokens(case: str, *, differs: bool) -> Finding:
    return Finding(
        check="tokens", case=case, point="#tokens", verdict="fail" if differs else "pass", metric="token_mismatch",
        value=0.625 if differs else 0.0, allowed=0.0, allowed_source="exact", order=900,
        origin="inherited" if differs else None,
        message="first difference at generated token 3" if differs else "",
    )  # fmt: skip


def _coverage(layers: int) -> list[Coverage]:
    total = len(points(layers))
    lost = [Unmatched(side="candidate", point="model.layers.0.self_attn.rotary_emb.cos_sin_cache")]
    return [Coverage(check="modules", points=total + 1, compared=total, skipped=[_skipped()], unmatched=lost)]


def _skipped() -> Unmatched:
    return Unmatched(
        side="reference", point="model.rotary_emb", reason="returns a tuple of cos and sin, compared inside attention"
    )
