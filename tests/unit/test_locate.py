"""Where a difference starts, and what only passes it on: on graphs as the hooks see them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paritykit.diagnose.locate import Graph, first_divergence, locate
from paritykit.results import Finding
from tests.made import finding, manifest

EMBED = "model.embed"


def layer(number: int, before: str) -> tuple[list[str], dict[str, str]]:
    """A decoder layer's points in order of completion, and the sources of its inputs; ``before`` is what it is fed."""
    own = f"model.layers.{number}"
    attention, mlp = f"{own}.self_attn", f"{own}.mlp"
    keys = [f"{own}.norm#input", f"{own}.norm"]
    sources = {f"{own}.norm#input": before}
    for name in "qkv":
        keys += [f"{attention}.{name}#input", f"{attention}.{name}"]
        sources[f"{attention}.{name}#input"] = f"{own}.norm"
    keys += [f"{attention}.o#input", f"{attention}.o", attention, f"{own}.norm2#input", f"{own}.norm2"]
    sources[attention] = f"{attention}.o"
    for name in ("gate", "up"):
        keys += [f"{mlp}.{name}#input", f"{mlp}.{name}"]
        sources[f"{mlp}.{name}#input"] = f"{own}.norm2"
    keys += [f"{mlp}.down#input", f"{mlp}.down", mlp, own]
    sources[mlp] = f"{mlp}.down"
    return keys, sources


def model(layers: int) -> tuple[list[str], Graph]:
    keys, sources, before = [EMBED], dict[str, str](), EMBED
    for number in range(layers):
        more, fed = layer(number, before)
        keys, sources, before = keys + more, sources | fed, f"model.layers.{number}"
    keys += ["model.norm#input", "model.norm", "model", "lm_head#input", "lm_head", "#logits"]
    sources |= {"model.norm#input": before, "model": "model.norm", "lm_head#input": "model.norm", "#logits": "lm_head"}
    return keys, Graph(manifest(dict.fromkeys(keys, 4), sources=sources))


KEYS, GRAPH = model(3)


def located(*failing: str, compared: list[str] | None = None) -> dict[str, Finding]:
    found = [
        finding(k, "fail" if k in failing else "pass", order=GRAPH.order(k))
        for k in KEYS
        if compared is None or k in compared
    ]
    return {f.point: f for f in locate(reversed(found), GRAPH) if f.verdict == "fail"}


def origins(*failing: str, compared: list[str] | None = None) -> dict[str, str | None]:
    return {k: f.origin for k, f in located(*failing, compared=compared).items()}


def start(found: dict[str, Finding]) -> tuple[str, str, str | None]:
    first = first_divergence(found.values())
    assert first is not None
    return first.point, first.seen_at, first.origin


def after(key: str) -> list[str]:
    return KEYS[KEYS.index(key) :]


def test_nothing_failing_is_no_divergence() -> None:
    assert located() == {}
    assert first_divergence(locate([finding(k, "pass") for k in KEYS], GRAPH)) is None
    assert first_divergence([]) is None
    assert first_divergence([finding("a", "error"), finding("b", "inconclusive"), finding("c", "skip")]) is None


@pytest.mark.parametrize("culprit", [EMBED, "model.layers.0.norm", "model.layers.1.norm2", "model.norm", "lm_head"])
def test_one_culprit_and_everything_after_it(culprit: str) -> None:
    found = located(*after(culprit))
    assert found[culprit].origin == "introduced"
    assert {k for k, f in found.items() if f.origin == "introduced"} == {culprit}
    assert start(found) == (culprit, culprit, "introduced")


@given(st.sampled_from([k for k in KEYS if not k.endswith("#input")]))
def test_any_culprit_is_the_first_divergence(culprit: str) -> None:
    _, seen_at, origin = start(located(*after(culprit)))
    assert (seen_at, origin) == (culprit, "introduced")


def test_two_faults_side_by_side_are_both_introduced() -> None:
    """Gate and up swapped: both are wrong, neither was fed by the other."""
    mlp = "model.layers.1.mlp"
    found = origins(f"{mlp}.gate", f"{mlp}.up#input", f"{mlp}.up", *after(f"{mlp}.down#input"))
    del found[f"{mlp}.up#input"]
    assert {k for k, o in found.items() if o == "introduced"} == {f"{mlp}.gate"}
    found = origins(f"{mlp}.gate", f"{mlp}.up", *after(f"{mlp}.down#input"))
    assert {k for k, o in found.items() if o == "introduced"} == {f"{mlp}.gate", f"{mlp}.up"}


def test_two_faults_one_after_the_other() -> None:
    """The later one hides behind the first: it is inherited as far as anyone can see."""
    found = origins(*after("model.layers.0.norm2"))
    assert found["model.layers.2.norm"] == "inherited"
    healed = origins("model.layers.0.norm2", "model.layers.2.self_attn.q")
    assert healed == {"model.layers.0.norm2": "introduced", "model.layers.2.self_attn.q": "introduced"}


def test_a_wrong_context_is_the_attentions_own_doing() -> None:
    attention = "model.layers.1.self_attn"
    found = located(*after(f"{attention}.o#input"))
    assert start(found) == (attention, f"{attention}.o#input", "introduced")
    assert found[f"{attention}.o"].origin == "inherited"
    fed = located(f"{attention}.v", *after(f"{attention}.o#input"))
    assert fed[f"{attention}.o#input"].origin == "inherited"
    assert start(fed)[0] == f"{attention}.v"


def test_a_wrong_residual_sum_is_the_layers_own_doing() -> None:
    own = "model.layers.1"
    assert start(located(*after(f"{own}.norm2#input"))) == (own, f"{own}.norm2#input", "introduced")
    found = located(*after(own))
    assert start(found) == (own, own, "introduced")
    assert found["model.layers.2.norm"].origin == "inherited"


def test_a_wrong_product_of_gate_and_up() -> None:
    mlp = "model.layers.2.mlp"
    assert start(located(*after(f"{mlp}.down#input"))) == (mlp, f"{mlp}.down#input", "introduced")


def test_logits_that_are_the_heads_very_tensor_blame_the_head() -> None:
    assert start(located("#logits", compared=[k for k in KEYS if k != "lm_head"])) == (
        "lm_head",
        "#logits",
        "introduced",
    )
    found = located("lm_head", "#logits")
    assert found["#logits"].origin == "inherited"
    assert start(found)[0] == "lm_head"


def test_logits_of_their_own_inherit_from_everything_before() -> None:
    graph = Graph(manifest({"model.norm": 4, "lm_head": 4, "#logits": 4}))
    found = locate([finding(k, "fail", order=graph.order(k)) for k in ("model.norm", "#logits")], graph)
    assert [(f.origin, f.located) for f in found] == [("introduced", "model.norm"), ("inherited", "#logits")]
    alone = locate([finding("#logits", "fail")], graph)
    assert [(f.origin, f.located) for f in alone] == [("introduced", "#logits")]


def test_an_alias_passes_on_what_it_is() -> None:
    found = located("model.layers.0.mlp.down", "model.layers.0.mlp")
    assert found["model.layers.0.mlp"].origin == "inherited"
    only = located("model.layers.0.mlp", compared=[k for k in KEYS if not k.endswith("mlp.down")])
    assert start(only) == ("model.layers.0.mlp.down", "model.layers.0.mlp", "introduced")


def test_what_a_module_is_handed_unseen_comes_from_around_it() -> None:
    """A block of experts reshapes what it is fed, so that its router's input is nobody's very tensor."""
    keys = ["layer.norm#input", "layer.norm", "layer.mlp.gate#input", "layer.mlp.gate", "layer.mlp"]
    graph = Graph(manifest(dict.fromkeys(keys, 4)))
    compared = [k for k in keys if k != "layer.mlp.gate#input"]

    def origins(*failing: str) -> dict[str, str | None]:
        found = [finding(k, "fail" if k in failing else "pass", order=graph.order(k)) for k in compared]
        return {f.point: f.origin for f in locate(found, graph) if f.verdict == "fail"}

    assert origins("layer.norm", "layer.mlp.gate") == {"layer.norm": "introduced", "layer.mlp.gate": "inherited"}
    assert origins("layer.mlp.gate", "layer.mlp") == {"layer.mlp.gate": "introduced", "layer.mlp": "inherited"}


def test_what_a_module_around_gives_is_handed_on() -> None:
    """The block is wrong though what it ends with is right; a norm is fed with the block's very tensor."""
    keys = ["mlp.down", "mlp", "norm#input", "norm"]
    graph = Graph(manifest(dict.fromkeys(keys, 4), sources={"mlp": "mlp.down", "norm#input": "mlp.down"}))
    found = [finding(k, "pass" if k == "mlp.down" else "fail", order=graph.order(k)) for k in keys]
    origins = {f.point: f.origin for f in locate(found, graph) if f.verdict == "fail"}
    assert origins == {"mlp": "introduced", "norm#input": "inherited", "norm": "inherited"}
    lost = [finding(k, "fail" if k.startswith("norm") else "pass", order=graph.order(k)) for k in keys]
    origins = {f.point: f.origin for f in locate(lost, graph) if f.verdict == "fail"}
    assert origins == {"norm#input": "introduced", "norm": "inherited"}


def test_what_is_lost_between_two_modules_is_not_the_first_ones_fault() -> None:
    """The layer before is right, and what the next one is given is not what it gave: a stage of a pipeline, say."""
    own, mlp = "model.layers.1", "model.layers.1.mlp"
    assert start(located(*after(f"{own}.norm#input"))) == (own, f"{own}.norm#input", "introduced")
    assert start(located(*after(f"{mlp}.gate#input"))) == (mlp, f"{mlp}.gate#input", "introduced")
    assert start(located("model.layers.0.mlp")) == ("model.layers.0.mlp", "model.layers.0.mlp", "introduced")


def test_points_that_were_not_compared_are_seen_through() -> None:
    """No inputs compared, as with an engine that records none: q is fed by the norm, the norm by the layer before."""
    outputs = [k for k in KEYS if not k.endswith("#input")]
    found = origins(*[k for k in after("model.layers.1.norm") if k in outputs], compared=outputs)
    assert [k for k, o in found.items() if o == "introduced"] == ["model.layers.1.norm"]


def test_a_fault_that_norms_hide_is_inherited_through_the_residual() -> None:
    """A layer's output twice too large: norms and all that they feed pass, and every residual sum after it fails."""
    outputs = [k for k in KEYS if not k.endswith("#input")]
    sums = ["model.layers.0", "model.layers.1", "model.layers.2"]
    wanted: dict[str, str | None] = {sums[0]: "introduced", sums[1]: "inherited", sums[2]: "inherited"}
    assert origins(*sums, compared=outputs) == wanted


def test_the_second_call_has_origins_of_its_own() -> None:
    keys = ["a", "s#input", "s", "b", "s@1#input", "s@1"]
    graph = Graph(manifest(dict.fromkeys(keys, 4), sources={"s#input": "a", "s@1#input": "b"}))
    found = locate([finding(k, "fail", order=graph.order(k)) for k in ("b", "s@1")], graph)
    assert [(f.point, f.origin) for f in found] == [("b", "introduced"), ("s@1", "inherited")]


def test_a_point_that_nobody_knows_is_its_own_culprit() -> None:
    (found,) = locate([finding("strange", "fail")], GRAPH)
    assert (found.origin, found.located) == ("introduced", "strange")
    assert GRAPH.order("strange") == len(KEYS)


def test_the_earliest_introduced_failure_over_all_cases_is_first() -> None:
    found = [
        finding("late", "fail", order=9, case="a", origin="introduced"),
        finding("passed on", "fail", order=1, case="b", origin="inherited"),
        finding("early", "fail", order=4, case="c", origin="introduced", located="its module"),
        finding("fine", "pass", order=0, case="c"),
    ]
    first = first_divergence(found)
    assert first is not None
    assert (first.case, first.point, first.seen_at) == ("c", "its module", "early")
    inherited = first_divergence(found[1:2])
    assert inherited is not None
    assert inherited.origin == "inherited"


def test_findings_come_back_in_order_and_passing_ones_untouched() -> None:
    found = [finding(k, "pass", order=GRAPH.order(k)) for k in KEYS]
    assert locate(reversed(found), GRAPH) == found


def test_a_large_model_is_located_in_time() -> None:
    """Every one of 80 layers' points failing: seconds, not minutes."""
    keys, graph = model(80)
    found = locate([finding(k, "fail", order=graph.order(k)) for k in keys], graph)
    assert [f.point for f in found if f.origin == "introduced"] == [EMBED]
