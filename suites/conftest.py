"""The shipped suites: over the tiny models against vLLM and ``nano``, or over ``--parity-model`` where it is given."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from paritykit.testing import TINY_FAMILIES, nano_families


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    if "parity_model" not in metafunc.fixturenames or option("--parity-model") is not None:
        return
    wanted, nano = option("--parity-candidate"), nano_families()
    found = [
        pytest.param(f"tiny:{family}", engine, id=f"{family}-{engine}", marks=marks(family, engine))
        for family in TINY_FAMILIES
        for engine in ([wanted] if wanted else ["vllm", "nano"])
        if engine != "nano" or family in nano
    ]
    metafunc.parametrize(("parity_model", "parity_engine"), found, scope="session")


def marks(family: str, engine: str) -> list[pytest.MarkDecorator]:
    group = pytest.mark.xdist_group(f"{family}-{engine}")
    missing = engine == "vllm" and find_spec("vllm") is None
    return [group, pytest.mark.skip("vLLM is not installed: pip install 'paritykit[vllm]'")] if missing else [group]
