"""Engines by factory: what is wrong with one is said before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paritykit as pk
from paritykit.engines import build_engine

HERE = f"{__name__}:"


def forgetful(folder: str) -> Any:
    return pk.engine("module", model=nn.Linear(1, 1))


def bare(folder: str, dtype: str) -> nn.Module:
    return nn.Linear(1, 1)


def place(folder: str, dtype: str) -> Path:
    return Path(folder)


def whole(folder: str, dtype: str) -> Any:
    return pk.engine("module", model=nn.Linear(1, 1), dtype=dtype, name="whole")


def broken(folder: str, dtype: str) -> Any:
    return torch.zeros(1) + "one"  # type: ignore[operator]


def test_a_factory_without_dtype_is_told_what_it_is_called_with() -> None:
    with pytest.raises(pk.UsageError, match=r"unexpected keyword argument 'dtype'; a factory is called with the model"):
        build_engine(f"{HERE}forgetful", "folder", {"dtype": "float32"})


def test_a_module_is_no_engine() -> None:
    with pytest.raises(pk.UsageError, match=r"bare' returned Linear, which is no engine; for an nn.Module return"):
        build_engine(f"{HERE}bare", "folder", {"dtype": "float32"})


def test_a_factory_that_gives_an_engine() -> None:
    engine = build_engine(f"{HERE}whole", "folder", {"dtype": "float32"})
    engine.open()
    assert engine.describe().engine == "whole"


def test_other_errors_are_its_own() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        build_engine(f"{HERE}broken", "folder", {"dtype": "float32"})


def test_a_named_engine_says_nothing_of_factories() -> None:
    with pytest.raises(pk.UsageError, match=r"unexpected keyword argument 'forwards'$"):
        build_engine("module", nn.Linear(1, 1), {"forwards": None})
