"""The shipped suites: over models made on the spot against vLLM and ``nano``, or over ``--parity-model``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from paritykit.testing import TINY_FAMILIES, nano_families
from paritykit.testing.real import INSTALL, SHORTENED, missing_packages

NO_VLLM = "vLLM is not installed: pip install 'paritykit[vllm]'"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    if "parity_model" not in metafunc.fixturenames or option("--parity-model") is not None:
        return
    wanted = option("--parity-candidate")
    found = [
        pytest.param(model, engine, id=f"{name}-{engine}", marks=marks(name, model, engine))
        for name, model, in_nano in models()
        for engine in ([wanted] if wanted else ["vllm", "nano"])
        if engine != "nano" or in_nano
    ]
    metafunc.parametrize(("parity_model", "parity_engine"), found, scope="session")


def models() -> Iterator[tuple[str, str, bool]]:
    """Names, models, and whether engine ``nano`` has them: tiny seeded ones, then trained weights in their families."""
    nano = nano_families()
    yield from ((family, f"tiny:{family}", family in nano) for family in TINY_FAMILIES)
    yield from ((f"smollm2_{family}", model, family in nano) for family, model in SHORTENED.items())


def marks(name: str, model: str, engine: str) -> list[pytest.MarkDecorator]:
    """One worker for all tests of a model in an engine, which then starts once; skipped where something is missing."""
    group = pytest.mark.xdist_group(f"{name}-{engine}")
    missing = missing_packages("smollm2") if model in SHORTENED.values() else []
    if missing:
        return [group, pytest.mark.skip(f"{' and '.join(missing)} not installed: {INSTALL}")]
    return [group, pytest.mark.skip(NO_VLLM)] if engine == "vllm" and find_spec("vllm") is None else [group]
