"""What ``paritykit list`` lists: names with one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from paritykit.case import RECIPES, SETS
from paritykit.checks import CHECKS
from paritykit.engines import ENGINES
from paritykit.passages import PASSAGES
from paritykit.reports import REPORTS

ENGINE_LINES = {
    "hf": "the reference: transformers, one case at a time",
    "vllm": "vLLM, hooked in its workers",
    "nano": "the embedded engine: paged or contiguous KV cache, tensor parallelism, no vLLM needed",
    "module": "any nn.Module of your own (from Python)",
}


def _engines() -> Iterable[tuple[str, str]]:
    return ((name, ENGINE_LINES.get(name, "from an installed package")) for name in ENGINES.names())


def _checks() -> Iterable[tuple[str, str]]:
    return ((name, check.question) for name, check in CHECKS.items())


def _cases() -> Iterable[tuple[str, str]]:
    yield from ((n, f"{r.length} tokens, {r.new_tokens} new") for n, r in RECIPES.items())
    yield from ((n, f"{p.kind}, for a model with a tokenizer") for n, p in PASSAGES.items())
    yield from ((n, "one batch of " + ", ".join(recipes)) for n, recipes in SETS.items())


def _models() -> Iterable[tuple[str, str]]:
    from paritykit.testing import REAL_MODELS, TINY_FAMILIES, TRANSPLANTS

    yield from ((f"tiny:{name}", "") for name in TINY_FAMILIES)
    yield from ((f"real:{name}", "trained; needs paritykit[real]") for name in REAL_MODELS)
    yield from ((f"real:smollm2,family={name}", "the same weights in another family") for name in TRANSPLANTS)


def _metrics() -> Iterable[tuple[str, str]]:
    from paritykit.comparison.measurement import METRICS

    yield from METRICS.items()


def _faults() -> Iterable[tuple[str, str]]:
    from paritykit.testing.faults import FAULTS

    return ((name, fault.what) for name, fault in FAULTS.items())


def _causes() -> Iterable[tuple[str, str]]:
    from paritykit.diagnose.catalogue import CAUSES

    return ((f"{kind.code} {name}", kind.what) for name, kind in CAUSES.items())


def _reports() -> Iterable[tuple[str, str]]:
    return ((name, "") for name in REPORTS.names())


LISTINGS: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
    "engines": _engines,
    "checks": _checks,
    "cases": _cases,
    "models": _models,
    "metrics": _metrics,
    "reports": _reports,
    "faults": _faults,
    "causes": _causes,
}
