"""Beside a noise floor: what is wrong in part, what noise hides, and what a first look leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paritykit.diagnose.bench.attention import Core, attend
from paritykit.diagnose.catalogue import CAUSES, CauseKind
from paritykit.diagnose.causes.cap import smallest
from paritykit.diagnose.explain import causes_of
from paritykit.diagnose.screening import first_look, screen
from paritykit.diagnose.trial import Bar, Trial
from paritykit.results import Finding
from tests.scenes import TOKENS, numbers, scene_of

WIDTH = 64
FLOOR = 1e-3


def unit(seed: int) -> torch.Tensor:
    """``[TOKENS, WIDTH]``, of the size of a reference that ``noisy`` makes."""
    return numbers(TOKENS, WIDTH, seed=seed)


def noisy(folder: Path, effect: torch.Tensor, *, floor: float = FLOOR) -> Bar:
    """A candidate that differs by an effect and by noise of the size of the floor."""
    ours = unit(0).double()
    noise = numbers(TOKENS, WIDTH, seed=99) * FLOOR
    return Bar(scene_of(folder, "m", {"m": ours}, {"m": (ours + effect + noise).double()}, floor=floor))


@pytest.mark.parametrize("times", [2.5, 10.0])
def test_a_mistake_in_part_is_known_by_its_direction(tmp_path: Path, times: float) -> None:
    bar = noisy(tmp_path, times * FLOOR * unit(1))
    wrong = bar.hold(Trial("wrong", lambda _: bar.reference + unit(1)))
    other = bar.hold(Trial("other", lambda _: bar.reference + unit(2)))
    assert wrong.fits
    assert wrong.residual < 1.3 / times
    assert wrong.trial.free == 1
    assert "in part" in wrong.trial.label
    assert not other.fits
    assert wrong.weight > 100 * other.weight


def test_more_than_all_of_a_mistake_and_its_opposite_are_no_part_of_it(tmp_path: Path) -> None:
    bar = noisy(tmp_path, 10 * FLOOR * unit(1))
    small = bar.hold(Trial("small", lambda _: bar.reference + 2 * FLOOR * unit(1)))
    opposite = bar.hold(Trial("opposite", lambda _: bar.reference - unit(1)))
    assert not small.fits
    assert not opposite.fits


def test_a_part_that_leaves_more_than_noise_is_no_explanation(tmp_path: Path) -> None:
    bar = noisy(tmp_path, 20 * FLOOR * unit(1) + 3 * FLOOR * unit(3))
    tried = bar.hold(Trial("wrong", lambda _: bar.reference + unit(1)))
    assert tried.residual < 0.2
    assert not tried.fits


def test_all_of_a_mistake_counts_for_more_than_a_part(tmp_path: Path) -> None:
    bar = noisy(tmp_path, 10 * FLOOR * unit(1))
    whole = bar.hold(Trial("whole", lambda _: bar.reference + 10 * FLOOR * unit(1)))
    part = bar.hold(Trial("part", lambda _: bar.reference + unit(1)))
    assert (whole.trial.free, part.trial.free) == (0, 1)
    assert whole.weight > 10 * part.weight


def test_without_a_floor_half_of_the_difference_is_to_be_explained(tmp_path: Path) -> None:
    bar = noisy(tmp_path, FLOOR * unit(1), floor=0.0)
    assert not bar.hold(Trial("wrong", lambda _: bar.reference + unit(1))).fits


def test_noise_alone_is_explained_by_nothing(tmp_path: Path) -> None:
    bar = noisy(tmp_path, torch.zeros(TOKENS, WIDTH))
    assert not any(bar.hold(Trial(f"{n}", lambda _, n=n: bar.reference + unit(n))).fits for n in range(1, 90))  # type: ignore[misc]


@given(at=st.floats(-3.0, 3.0), low=st.floats(-9.0, -4.0), high=st.floats(4.0, 9.0))
def test_the_smallest_error_is_found(at: float, low: float, high: float) -> None:
    assert smallest(lambda x: (x - at) ** 2, low, high) == pytest.approx(at, abs=1e-5)


def test_what_sees_a_key_that_is_not_known_is_not_known() -> None:
    query, key, value = (numbers(4, 1, 2, seed=n) for n in range(3))
    key[2] = torch.nan
    core = Core(1.0)
    found = attend(query, key, value, core=core, mask=core.sees)
    assert found.isfinite().all(1).tolist() == [True, True, False, False]
    clean = attend(query[:2], key[:2], value[:2], core=core, mask=core.sees)
    assert torch.allclose(found[:2], clean)


# which are named


@pytest.mark.parametrize(("more", "shown"), [(0.0, 2), (0.1, 2), (3.0, 1)])
def test_only_what_may_be_the_cause_as_well_is_named_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: float, shown: int
) -> None:
    """``more``: what the second leaves beyond the noise, in units of it."""

    def of(*seeds: int) -> Any:
        def trials(scene: Any) -> Iterator[Trial]:
            change = unit(1) + sum((more * FLOOR * unit(n) for n in seeds), torch.zeros(TOKENS, WIDTH))
            yield Trial("changed", lambda case: scene.reference(scene.point, case) + change)

        return trials

    module = SimpleNamespace(one=of(), other=of(7))
    monkeypatch.setitem(__import__("sys").modules, "odd.module", module)
    made = {
        n: CauseKind(code=f"PK19{len(n)}", name=n, what="w", tested="t", look="l", tests=(f"odd.module:{n}",))
        for n in ("one", "other")
    }
    monkeypatch.setattr(CAUSES, "_values", made)
    found = causes_of(noisy(tmp_path, unit(1))._scene)
    assert len(found) == shown
    assert found[0].confidence > (0.45 if shown == 2 else 0.99)
    assert found[0].name == "one" or not more


# a first look


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Two causes alone, one of them right; every prediction by label and how many positions it was for."""
    made: list[tuple[str, int]] = []

    def trials(scene: Any) -> Iterator[Trial]:
        for label, seed in (("right", 1), ("wrong", 2)):

            def predict(case: str, label: str = label, seed: int = seed) -> torch.Tensor:
                made.append((label, scene.length(case)))
                return scene.reference(scene.point, case) + unit(seed)[: scene.length(case)]

            yield Trial(label, predict)

    kind = CauseKind(code="PK198", name="odd", what="w", tested="t", look="l", tests=("odd.module:trials",))
    monkeypatch.setitem(__import__("sys").modules, "odd.module", SimpleNamespace(trials=trials))
    monkeypatch.setattr(CAUSES, "_values", {"odd": kind})
    return made


def test_what_is_refuted_by_few_positions_is_not_held_against_all(
    tmp_path: Path, counted: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paritykit.diagnose.screening.ENOUGH", 4)
    monkeypatch.setattr("paritykit.diagnose.screening.WRONG", 2)
    bar = noisy(tmp_path, unit(1))
    found = screen(bar._scene, bar)
    assert counted == [("right", 4), ("wrong", 4), ("right", TOKENS)]
    assert [n.tried.trial.label for n in found.named] == ["right"]
    assert causes_of(bar._scene)[0].name == "odd"


def test_few_positions_are_all_looked_at_once(tmp_path: Path, counted: list[tuple[str, int]]) -> None:
    bar = noisy(tmp_path, unit(1))
    screen(bar._scene, bar)
    assert counted == [("right", TOKENS), ("wrong", TOKENS)]


def test_a_first_look_goes_on_until_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paritykit.diagnose.screening.ENOUGH", 3)
    late = unit(1) * (torch.arange(TOKENS) >= 7)[:, None]
    bar = noisy(tmp_path, late)
    monkeypatch.setattr("paritykit.diagnose.screening.WRONG", 2)
    assert first_look(bar._scene, bar) == {"a": 9}
    part = bar._scene.cut({"a": 9})
    assert (part.length("a"), part.whole, bar._scene.whole) == (9, False, True)
    assert torch.equal(part.candidate("m", "a"), bar._scene.candidate("m", "a")[:9])


def test_the_floor_is_that_of_the_whole_point_whatever_it_was_judged_by() -> None:
    from paritykit.diagnose.limits import allowed_of, floor_of

    metrics: dict[str, float | None] = {"rel_l2": 1e-2, "floor_ratio": 10.0}
    by_scale = Finding(
        check="modules",
        case="a",
        point="m",
        verdict="fail",
        metric="scale",
        value=1.0,
        noise_floor=1e-5,
        metrics=metrics,
    )
    assert floor_of(by_scale) == pytest.approx(1e-3)
    assert allowed_of([by_scale], floor_of(by_scale)).whole == pytest.approx(2e-3)
