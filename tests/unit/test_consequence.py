"""What is computed from a point, and what silence there proves: on graphs as the hooks see them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paritykit.diagnose.consequence import Flow, is_sink
from paritykit.diagnose.locate import Graph
from paritykit.diagnose.tree import Tree
from tests.made import manifest

LAYER = ["norm#input", "norm", "mix.q", "mix.k", "mix#key_cache", "mix.o#input", "mix.o", "mix", "after#input"]
LAYER += ["after", "mlp.up", "mlp.down#input", "mlp.down", "mlp", ""]
KEYS = [
    "embed",
    *(f"layers.{n}.{k}".rstrip(".") for n in (0, 1) for k in LAYER),
    "norm#input",
    "norm",
    "head",
    "#logits",
]
SOURCES = {
    "norm#input": "layers.1",
    "layers.0.norm#input": "embed",
    "layers.1.norm#input": "layers.0",
    "#logits": "head",
}
SOURCES |= {f"layers.{n}.{k}": f"layers.{n}.{s}" for n in (0, 1) for k, s in (("mix", "mix.o"), ("mlp", "mlp.down"))}
MANIFEST = manifest(dict.fromkeys(KEYS, 4), sources=SOURCES)


def flow(*failing: str) -> Flow:
    return Flow(Graph(MANIFEST), Tree(MANIFEST), compared={k: k in failing for k in KEYS})


def silent(*failing: str) -> set[str]:
    return flow(*failing).silent(failing)


def test_a_point_goes_into_what_is_computed_from_it_first() -> None:
    found = flow()
    assert found.after("layers.0.mlp.down") == {"layers.0.mlp"}
    assert found.after("layers.0.mlp") == {"layers.0"}
    assert found.after("layers.0") == {"layers.1.norm#input"}
    assert found.after("layers.0.mix.o#input") == {"layers.0.mix.o"}
    assert {"layers.0.mix.o#input", "layers.0.mix#key_cache"} <= found.after("layers.0.mix.k")
    assert "layers.0" in found.around("layers.0.after#input")
    assert found.after("head") == {"#logits"}
    assert found.after("#logits") == set()


def test_what_nothing_shows_is_silent() -> None:
    assert silent("layers.0.mix") == {"layers.0.mix"}
    assert silent("layers.0.mix", "layers.0.mix.o") == {"layers.0.mix", "layers.0.mix.o"}
    assert silent("layers.0.mix", "layers.1.mlp", "layers.1") == {"layers.0.mix", "layers.1.mlp", "layers.1"}


def test_what_goes_on_to_the_logits_is_not() -> None:
    last = ("layers.1.mlp", "layers.1", "norm#input", "norm", "head", "#logits")
    assert silent(*last) == set()
    assert silent("layers.0.mix", *last) == {"layers.0.mix"}


def test_a_sink_is_never_silent_and_keeps_what_made_it_from_being_so() -> None:
    assert silent("#logits") == set()
    assert silent("layers.0.mix.k", "layers.0.mix#key_cache") == set()
    assert silent("layers.0.mix.k") == {"layers.0.mix.k"}
    assert is_sink("layers.0.mix#key_cache")


def test_a_cache_whose_readers_agree_may_be_in_another_order() -> None:
    found = ("layers.0.mix.k", "layers.0.mix#key_cache")
    assert flow(*found).alike(found) == set(found)
    wrong = KEYS[KEYS.index("layers.1.mix.k") :]
    assert flow(*wrong).alike(wrong) == set()
    assert flow("#logits").alike(["#logits"]) == set()


def test_an_error_is_seen_first_at_what_agrees_after_it() -> None:
    found = flow("layers.0.mix", "layers.0.mix.o")
    assert found.shown("layers.0.mix.o", {"layers.0.mix", "layers.0.mix.o"}) == {"layers.0.after#input"}


@given(st.sets(st.sampled_from(KEYS)))
def test_whatever_fails_what_is_silent_has_nothing_after_it_that_is_not(failing: set[str]) -> None:
    found, quiet = flow(*failing), silent(*failing)
    assert quiet <= failing
    for key in quiet:
        assert all(k in quiet or k not in failing for k in found.after(key))
        assert found.shown(key, quiet)
        assert not found.shown(key, quiet) & failing
