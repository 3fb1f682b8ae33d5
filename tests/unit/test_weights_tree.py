"""The tree of landed weights on the terminal: one branch for alike layers, one line for each slice."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from paritykit.reports.landings import grouped
from paritykit.reports.weights import print_weights
from paritykit.results import Results, WeightRow
from tests.report import runs


def rows(parameter: str, *, layers: int = 3) -> list[WeightRow]:
    return [
        WeightRow(tensor=f"model.layers.{n}.mlp.up.weight", parameter=parameter.format(n), source="[:]", target="[0:4]")
        for n in range(layers)
    ]


def printed(found: list[WeightRow], *, width: int, terminal: bool = False, verbose: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    print_weights(with_rows(found), console=console, verbose=verbose)
    return stream.getvalue()


def with_rows(found: list[WeightRow]) -> Results:
    results = runs.weights_run(lost=False)
    results.weights[:] = found
    return results


@pytest.mark.parametrize(("parameter", "place"), [
    ("blocks.{}.ffn.up.weight", "blocks.{0-2}.ffn.up.weight"),
    ("model.layers.{}.mlp.gate_up.weight", "gate_up.weight"),
    ("stack.weight", "stack.weight"),
])  # fmt: skip
def test_the_parameter_of_alike_layers_has_one_name(parameter: str, place: str) -> None:
    [group] = grouped(rows(parameter))
    assert (group.name, group.places) == ("model.layers.{0-2}.mlp.up.weight", [place])
    assert f"up.weight  [:] -> {place}[0:4]  pass" in printed(rows(parameter), width=200)


def test_a_parameter_of_another_layer_shows_its_whole_name() -> None:
    crossed = [rows("model.layers.{}.mlp.up.weight")[0], rows("model.layers.7.mlp.up.weight")[1]]
    [group] = grouped(crossed)
    assert group.places == ["model.layers.{0,7}.mlp.up.weight"]


def test_each_layer_by_itself_has_its_own_place() -> None:
    text = printed(rows("blocks.{}.ffn.up.weight"), width=200, verbose=True)
    assert [f"blocks.{n}.ffn.up.weight[0:4]" in text for n in range(4)] == [True, True, True, False]


def test_a_file_gets_whole_lines_and_a_terminal_its_own_width() -> None:
    long = rows("blocks.{}." + "very_long_name." * 12 + "weight")
    lines = printed(long, width=60).splitlines()
    assert sum("pass" in line and "[:] ->" in line for line in lines) == 1
    assert all(len(line) <= 60 for line in printed(long, width=60, terminal=True).splitlines())
