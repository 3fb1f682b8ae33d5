"""The simpler judges see what they can see; strengths are found; places are near or far."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from paritykit.captures.manifest import Segment
from paritykit.captures.reader import Capture
from paritykit.checks.base import LOGITS
from paritykit.mapping.build import build_mapping
from paritykit.results import Divergence
from paritykit.testing.scoreboard.judges import JUDGES, judge_simply
from paritykit.testing.scoreboard.places import is_near, named, shown
from paritykit.testing.scoreboard.strength import LEAST, NEAR, find_strength, ratio_at, subject_of
from tests.made import manifest, write_capture

ROWS, WIDTH = 6, 32
KEYS = ("model.layers.0.mlp", "model.layers.0", "model.layers.1", LOGITS)


def made(folder: Path, changed: dict[str, torch.Tensor] | None = None, *, dtype: str = "float32") -> Capture:
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(ROWS, WIDTH, generator=generator) for key in KEYS} | (changed or {})
    tensors = {key: t.to(getattr(torch, dtype)) for key, t in tensors.items()}
    return write_capture(folder, [([Segment(0, 0, ROWS)], tensors)], dtype=dtype)


def judged(tmp_path: Path, changed: dict[str, torch.Tensor], *, dtype: str = "float32") -> set[str]:
    twin, candidate = made(tmp_path / "twin", dtype=dtype), made(tmp_path / "candidate", changed, dtype=dtype)
    found = judge_simply(twin, candidate, build_mapping(twin.manifest, candidate.manifest))
    assert found.keys() == JUDGES.keys()
    return {name for name, failed in found.items() if failed}


def plain(tmp_path: Path, key: str) -> torch.Tensor:
    return made(tmp_path / "plain").rows(key, "a").clone()


def test_simple_judges_are_quiet_where_nothing_differs(tmp_path: Path) -> None:
    assert judged(tmp_path, {}) == set()


def test_allclose_looks_at_every_point(tmp_path: Path) -> None:
    wrong = plain(tmp_path, "model.layers.0.mlp")
    wrong[3, 3] += 1e-3
    assert judged(tmp_path, {"model.layers.0.mlp": wrong}) == {"allclose"}


def test_allclose_has_the_tolerances_of_the_dtype(tmp_path: Path) -> None:
    wrong = plain(tmp_path, "model.layers.0.mlp") * 1.005
    assert judged(tmp_path, {"model.layers.0.mlp": wrong}, dtype="bfloat16") == set()
    assert judged(tmp_path / "finer", {"model.layers.0.mlp": wrong}) == {"allclose"}


def test_cosine_looks_at_layers_only(tmp_path: Path) -> None:
    assert judged(tmp_path, {"model.layers.1": plain(tmp_path, "model.layers.1").roll(1, 0)}) == {"allclose", "cosine"}
    mlp = plain(tmp_path / "more", "model.layers.0.mlp").roll(1, 0)
    assert judged(tmp_path / "more", {"model.layers.0.mlp": mlp}) == {"allclose"}


def test_cosine_does_not_see_a_factor(tmp_path: Path) -> None:
    assert judged(tmp_path, {"model.layers.1": 2 * plain(tmp_path, "model.layers.1")}) == {"allclose"}


def test_the_choices_are_held_against_the_other_sides_best(tmp_path: Path) -> None:
    logits = plain(tmp_path, LOGITS)
    near = logits.clone()
    best = near[2].topk(2).indices
    near[2, best] = near[2, best.flip(0)]
    assert judged(tmp_path, {LOGITS: near}) == {"allclose", "allclose-logits"}
    far = logits.clone()
    far[2, int(far[2].argmin())] = 100.0
    assert judged(tmp_path / "far", {LOGITS: far}) == {"allclose", "allclose-logits", "top-5"}
    sunk = logits.clone()
    sunk[2, int(sunk[2].argmax())] = -100.0
    assert "top-5" in judged(tmp_path / "sunk", {LOGITS: sunk})


def test_a_nan_fails_all_but_those_that_do_not_look(tmp_path: Path) -> None:
    wrong = plain(tmp_path, "model.layers.1")
    wrong[0, 0] = math.nan
    assert judged(tmp_path, {"model.layers.1": wrong}) == {"allclose", "cosine"}


# how strong


@given(added=st.floats(1.0, 1e7), power=st.floats(0.8, 2.0), target=st.sampled_from([2.0, 10.0]))
def test_a_strength_is_found_where_the_effect_is_a_power_of_it(added: float, power: float, target: float) -> None:
    def ratio(strength: float) -> float:
        return math.sqrt(1 + (added * strength**power) ** 2)

    needed = (math.sqrt(target**2 - 1) / added) ** (1 / power)
    assume(LEAST <= needed <= 1)
    strength, reached = find_strength(ratio, target=target, full=ratio(1.0))
    assert reached == ratio(strength)
    assert 1 / NEAR <= reached / target <= NEAR


def test_the_nearest_that_was_tried_is_taken() -> None:
    asked = list[float]()

    def stepped(strength: float) -> float:
        asked.append(strength)
        return 40.0 if strength > 0.3 else 1.0

    strength, reached = find_strength(stepped, target=10.0, full=50.0)
    assert reached == 40.0
    assert strength in asked
    assert len(asked) <= 6
    assert strength < 0.5


def test_where_nothing_grows_a_tenth_is_tried() -> None:
    """Such as a fault that is as large at half its strength, and of which a small share is nothing."""

    def saturated(strength: float) -> float:
        return 50.0 if strength > 1e-3 else 1 + 9e3 * strength

    strength, reached = find_strength(saturated, target=9.0, full=50.0)
    assert strength < 1e-3
    assert reached == pytest.approx(9.0, rel=NEAR - 1)


def test_an_error_that_is_no_number_ends_the_search() -> None:
    assert find_strength(lambda _: None, target=2.0, full=50.0) == (1.0, 50.0)


def test_a_ratio_is_of_the_floor_at_that_point(tmp_path: Path) -> None:
    noise = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    truth = made(tmp_path / "truth")
    values = plain(tmp_path, "model.layers.1")
    twin = made(tmp_path / "twin", {"model.layers.1": values + 1e-4 * noise})
    candidate = made(tmp_path / "candidate", {"model.layers.1": values + 7e-4 * noise, LOGITS: values * math.nan})
    subject = subject_of(truth, twin, candidate)
    assert ratio_at(subject, "model.layers.1") == pytest.approx(7, rel=1e-3)
    assert ratio_at(subject, "model.layers.0") == 0.0
    assert ratio_at(subject, LOGITS) is None
    assert ratio_at(subject, "model.norm") is None


def test_where_there_is_no_noise_half_a_unit_in_the_last_place_is_the_floor(tmp_path: Path) -> None:
    truth = made(tmp_path / "truth", dtype="bfloat16")
    values = plain(tmp_path, "model.layers.1")
    candidate = made(tmp_path / "candidate", {"model.layers.1": values * 1.1}, dtype="bfloat16")
    found = ratio_at(subject_of(truth, truth, candidate), "model.layers.1")
    assert found == pytest.approx(0.1 / 0.0015, rel=0.1)


# how near


GRAPH = manifest(
    dict.fromkeys(
        [
            "model.embed",
            "model.layers.0.norm",
            "model.layers.0.attn.q",
            "model.layers.0.attn.k",
            "model.layers.0.attn",
            "model.layers.0.mlp",
            "model.layers.0",
            "model",
        ],
        4,
    )
)


@pytest.mark.parametrize(("found", "wanted", "near"), [
    ("model.layers.0.attn", "model.layers.0.attn", True),
    ("model.layers.0", "model.layers.0.attn", True),
    ("model.layers.0.attn.q", "model.layers.0.attn", True),
    ("model.layers.0.mlp", "model.layers.0.attn", True),
    ("model.layers.0.norm", "model.layers.0.attn.q", True),
    ("model.layers.0.norm", "model.layers.0.mlp", False),
    ("model.layers.0.attn.q", "model.layers.0.mlp", False),
    ("model.layers.0.norm", "model.layers.0.attn.k", False),
    ("model.embed", "model.layers.0.mlp", False),
    ("elsewhere", "model.layers.0.mlp", False),
])  # fmt: skip
def test_near_is_around_inside_or_beside(found: str, wanted: str, near: bool) -> None:
    assert is_near(found, wanted, GRAPH) is near
    assert is_near(wanted, found, GRAPH) is near


def test_the_nearest_module_that_is_shown_stands_for_what_is_not() -> None:
    assert shown("model.layers.0.mlp.act", {"model.layers.0.mlp"}) == "model.layers.0.mlp"
    assert shown("model.layers.0.mlp", {"model.layers.0.mlp", "model.layers.0"}) == "model.layers.0.mlp"
    assert shown("#logits", {"model"}) == "#logits"
    assert shown("nowhere", {"model"}) == "nowhere"


def test_what_is_no_module_is_named_by_the_point_that_shows_it() -> None:
    first = Divergence(check="logits", case="a", point="lm_head", seen_at="#logits")
    assert (named(first, "#logits"), named(first, "lm_head"), named(None, "lm_head")) == ("#logits", "lm_head", "")
