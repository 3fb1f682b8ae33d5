"""Trained models for tests: there, or a test that says why it is skipped. In CI they must be there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from paritykit.testing import real_model
from paritykit.testing.real import INSTALL, missing_packages


def trained(name: str, **changes: Any) -> Path:
    """The folder of a trained model. Where its packages are not installed the test is skipped, and in CI it fails.

    Tests that ask for one belong to ``xdist_group("real")``: it is made once, and is large.
    """
    missing = missing_packages(name)
    if missing and not os.environ.get("CI"):
        pytest.skip(f"needs {' and '.join(missing)}: {INSTALL}")
    assert not missing, f"CI tests without {' and '.join(missing)}: {INSTALL}"
    return real_model(name, **changes)
