"""The shipped suites: over the tiny models, or over ``--parity-model`` where it is given."""

from __future__ import annotations

import pytest

from paritykit.testing import TINY_FAMILIES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "parity_model" not in metafunc.fixturenames or metafunc.config.getoption("--parity-model") is not None:
        return
    models = [
        pytest.param(f"tiny:{family}", id=family, marks=pytest.mark.xdist_group(family)) for family in TINY_FAMILIES
    ]
    metafunc.parametrize("parity_model", models, scope="session")
