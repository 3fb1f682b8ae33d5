"""Descending from layers to leaves: every module that is wrong by itself is named, and none that only passes it on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from paritykit.captures.manifest import split_key
from paritykit.diagnose.locate import Graph, find_culprits, first_divergence, locate
from paritykit.diagnose.replay import Descent, Look, Replayed, local_of, refine
from paritykit.diagnose.tree import Tree
from paritykit.results import Finding, Local
from tests.made import finding, manifest
from tests.unit.test_locate import layer

LAYERS = 3


def points(layers: int = LAYERS) -> tuple[list[str], dict[str, str]]:
    keys, sources, before = ["model.embed"], dict[str, str](), "model.embed"
    for number in range(layers):
        more, fed = layer(number, before)
        keys, sources, before = keys + more, sources | fed, f"model.layers.{number}"
    keys += ["model.norm#input", "model.norm", "model", "lm_head#input", "lm_head", "#logits"]
    sources |= {"model.norm#input": before, "model": "model.norm", "lm_head#input": "model.norm", "#logits": "lm_head"}
    return keys, sources


KEYS, SOURCES = points()
MANIFEST = manifest(dict.fromkeys(KEYS, 4), sources=SOURCES)
GRAPH, TREE = Graph(MANIFEST), Tree(MANIFEST)
WORK = [k for k in KEYS if k not in SOURCES]
"""Points where something is computed: the others are the very tensor of another."""


class Candidate:
    """An engine of which only is known which points are computed wrongly from right values, and what can be replaced.

    What is computed of something wrong is wrong, unless that was replaced.
    """

    def __init__(self, wrong: Sequence[str], *, fixed: Sequence[str] = ()) -> None:
        self.wrong, self.fixed = set(wrong), set(fixed)
        self.runs: list[tuple[list[str], list[str]]] = []

    def __call__(self, replaced: Sequence[str], shown: Sequence[str]) -> Look:
        self.runs.append((list(replaced), list(shown)))
        done = frozenset(replaced) - self.fixed
        bad = self.states(done)
        found = {("a", k): finding(k, "fail" if bad[k] else "pass", order=GRAPH.order(k)) for k in shown}
        return Look(found, done)

    def states(self, replaced: frozenset[str]) -> dict[str, bool]:
        """Which points are wrong as they are seen; what goes on from them is right where they were replaced."""
        seen: dict[str, bool] = {}
        stream = False
        for key in KEYS:
            source, own = SOURCES.get(key), key in self.wrong
            if source is not None:
                seen[key] = own or (seen[source] and source not in replaced)
            else:
                seen[key] = own or self._fed(key, seen, replaced, stream)
            if key.endswith("norm2#input"):
                stream = seen[key]  # replaced for the norm alone: the sum that follows has it as it is
            elif key.endswith("norm#input"):
                stream = seen[key]
        return seen

    @staticmethod
    def _fed(key: str, seen: dict[str, bool], replaced: frozenset[str], stream: bool) -> bool:
        def goes_on(name: str) -> bool:
            return seen[name] and name not in replaced

        module, port, _ = split_key(key)
        own = f"{module}#input"
        if not port and own in seen:
            return goes_on(own)
        parent = module.rpartition(".")[0]
        parts = {"o": "qkv", "down": ("gate", "up"), "norm2": ("self_attn",), "lm_head": ()}
        last = module.rpartition(".")[2]
        if port == "input" and last in parts:
            return any(goes_on(f"{parent}.{p}") for p in parts[last]) or (last == "norm2" and stream)
        if not port and last.isdecimal():  # a layer: the stream and what its MLP gives
            return goes_on(f"{module}.mlp") or stream
        return False


def descend(candidate: Candidate, free: Sequence[Finding] = ()) -> Replayed:
    return Descent(graph=GRAPH, tree=TREE, points=KEYS, free=free, run=candidate).replay()


def freely(candidate: Candidate) -> list[Finding]:
    bad = candidate.states(frozenset())
    return locate([finding(k, "fail" if bad[k] else "pass", order=GRAPH.order(k)) for k in KEYS], GRAPH)


def blamed(key: str) -> str:
    return GRAPH.blame(key) if split_key(key)[1] == "input" else split_key(key)[0] or key


def test_the_tree_starts_at_the_layers_and_what_stands_beside_them() -> None:
    assert TREE.top == ["lm_head", "model.embed", *(f"model.layers.{n}" for n in range(LAYERS)), "model.norm", ""]
    assert TREE.inside("model.layers.1") == [f"model.layers.1.{n}" for n in ("norm", "self_attn", "norm2", "mlp")]
    assert TREE.inside("model.layers.1.mlp") == [f"model.layers.1.mlp.{n}" for n in ("gate", "up", "down")]
    assert TREE.inside("model.norm") == []


@pytest.mark.parametrize(
    ("keys", "top"),
    [
        (["wte", "h.0.attn", "h.0", "h.1.attn", "h.1", "ln", "#logits"], ["wte", "h.0", "h.1", "ln", ""]),
        (["embed", "head", "#logits"], ["embed", "head", ""]),
        (["model.layers.0.mlp.experts.3", "model.layers.0.mlp", "model.layers.0", "model"], ["model.layers.0", ""]),
        (["vision.0", "vision", "text.layers.0", "text"], ["text.layers.0", "vision.0", ""]),
    ],
)
def test_trees_of_other_shapes(keys: list[str], top: list[str]) -> None:
    assert sorted(Tree(manifest(dict.fromkeys(keys, 4))).top) == sorted(top)


@pytest.mark.parametrize("wrong", WORK)
def test_one_wrong_computation_is_the_only_culprit(wrong: str) -> None:
    candidate = Candidate([wrong])
    free = freely(candidate)
    replayed = descend(candidate, free)
    assert set(replayed.culprits.values()) == {blamed(wrong)}
    refined = refine(free, replayed)
    introduced = [f for f in refined if f.origin == "introduced"]
    assert {f.located for f in introduced} == {blamed(wrong)}
    first = first_divergence(refined)
    assert first is not None
    assert first.point == blamed(wrong)


SEPARATE = st.lists(st.sampled_from([k for k in WORK if not k.endswith("norm2#input")]), unique=True, max_size=6)


@given(SEPARATE)
def test_all_independent_culprits_are_named_and_no_other(wrong: list[str]) -> None:
    candidate = Candidate(wrong)
    free = freely(candidate)
    replayed = descend(candidate, free)
    assert set(replayed.culprits.values()) == {blamed(k) for k in wrong}
    found = [c.point for c in find_culprits(refine(free, replayed))]
    assert sorted(found) == sorted({blamed(k) for k in wrong})
    orders = [GRAPH.order(c.seen_at) for c in find_culprits(refine(free, replayed))]
    assert orders == sorted(orders)


@given(st.lists(st.sampled_from(WORK), unique=True, min_size=1, max_size=6))
def test_whatever_is_wrong_nobody_else_is_blamed_and_the_first_always_is(wrong: list[str]) -> None:
    """A sum in the residual stream may hide another in the same layer; the first wrong computation is never hidden."""
    replayed = descend(Candidate(wrong), freely(Candidate(wrong)))
    assert set(replayed.culprits.values()) <= {blamed(k) for k in wrong}
    assert blamed(min(wrong, key=GRAPH.order)) in replayed.culprits.values()


@given(st.lists(st.sampled_from(WORK), unique=True, max_size=4))
def test_only_what_is_suspicious_is_looked_into(wrong: list[str]) -> None:
    candidate = Candidate(wrong)
    descend(candidate, freely(candidate))
    assert len(candidate.runs) <= 3
    layers = {k.split(".")[2] for _, shown in candidate.runs[1:] for k in shown}
    assert layers == {k.split(".")[2] for k in wrong if k.startswith("model.layers.")}
    for before, after in zip(candidate.runs, candidate.runs[1:], strict=False):
        assert set(before[0]) <= set(after[0])


def test_a_right_candidate_is_run_once_and_has_no_culprit() -> None:
    candidate = Candidate([])
    replayed = descend(candidate)
    assert replayed.culprits == {}
    assert len(candidate.runs) == 1
    assert {local.level for local in replayed.local.values()} == {"layers"}


def test_a_fault_too_weak_for_its_layer_is_found_where_the_free_run_saw_it() -> None:
    """The layer passes by itself, and so does its attention; the projection inside does not."""
    key = "model.layers.1.self_attn.q"

    class Weak(Candidate):
        def states(self, replaced: frozenset[str]) -> dict[str, bool]:
            return dict.fromkeys(KEYS, False) | {key: True}

    candidate = Weak([key])
    assert descend(candidate).culprits == {}
    assert set(descend(candidate, freely(candidate)).culprits.values()) == {key}


def test_a_module_of_which_all_parts_pass_is_itself_the_culprit() -> None:
    """Rounding that only together is too much: nothing smaller explains it."""
    module = "model.layers.2.mlp"

    class Together(Candidate):
        def states(self, replaced: frozenset[str]) -> dict[str, bool]:
            alone = f"{module}.down" in replaced
            return dict.fromkeys(KEYS, False) | {module: not alone, "model.layers.2": module not in replaced}

    replayed = descend(Together([]))
    assert set(replayed.culprits.values()) == {module}
    assert replayed.local["a", module].level == "blocks"


def test_what_cannot_be_replaced_hides_only_what_comes_after_it_in_its_module() -> None:
    gate = "model.layers.1.mlp.gate"
    wrong = [gate, "model.layers.1.mlp.down", "model.layers.2.norm"]
    replayed = descend(Candidate(wrong, fixed=[gate]), freely(Candidate(wrong)))
    assert set(replayed.culprits.values()) == {gate, "model.layers.2.norm"}


def test_origins_follow_the_local_errors() -> None:
    """What had too weak a failure before it is inherited after all; a fault behind another one is introduced."""
    keys = ["model.layers.0.norm", "model.layers.0.mlp", "model.layers.2.mlp"]
    free = [
        finding(keys[0], "pass", order=1),
        finding(keys[1], "fail", order=2, origin="introduced", located="elsewhere"),
        finding(keys[2], "fail", order=3, origin="inherited", needs={"factor": 3.0, "tolerance": 0.1}),
        finding("#mapping", "fail", order=4, origin="introduced"),
    ]
    local = {("a", k): Local(verdict="pass", level="blocks") for k in keys[:2]}
    local["a", keys[2]] = Local(verdict="fail", level="blocks", value=0.5, needs={"factor": 30.0})
    found = refine(free, Replayed(local, {("a", keys[2]): keys[2]}))
    assert [f.origin for f in found] == [None, "inherited", "introduced", "introduced"]
    assert [f.located for f in found] == ["", "elsewhere", keys[2], ""]
    assert [f.local.culprit if f.local else None for f in found] == [False, False, True, None]
    assert [f.verdict for f in found] == ["pass", "fail", "fail", "fail"]
    assert found[2].needs == {"factor": 30.0}, "it is to pass in both"
    assert [c.point for c in find_culprits(found)] == [keys[2]]


def test_a_local_error_keeps_what_was_measured() -> None:
    found = finding("p", "fail", metric="rel_l2", value=0.5, allowed=1e-5, allowed_source="table", message="why")
    assert local_of(found, level="leaves") == Local(
        verdict="fail", level="leaves", metric="rel_l2", value=0.5, allowed=1e-5, allowed_source="table", message="why"
    )


class Renamed(Candidate):
    """One that means something else by a part of its MLP: replaced, it makes the MLP ``worse`` than the fault does."""

    def __init__(self, wrong: Sequence[str], *, renamed: str, worse: float) -> None:
        super().__init__([*wrong, renamed])
        self.renamed, self.worse = renamed, worse

    def __call__(self, replaced: Sequence[str], shown: Sequence[str]) -> Look:
        look = super().__call__(replaced, shown)
        scale = self.worse if self.renamed in replaced else 1.0
        errors = {place: scale if place[1] == "model.layers.1.mlp" else 1.0 for place in look.findings}
        found = {p: replace(f, metrics={"rel_l2": 0.1 * errors[p]}) for p, f in look.findings.items()}
        return Look(found, look.replaced)


class Turned(Candidate):
    """One whose queries and keys are in another order: where they are replaced, what attention gives is wrong."""

    def __call__(self, replaced: Sequence[str], shown: Sequence[str]) -> Look:
        look = super().__call__(replaced, shown)
        found = {p: replace(f, metrics={"rel_l2": 1.0}) for p, f in look.findings.items()}
        place = ("a", "model.layers.1.self_attn.o#input")
        if place in found and any(k.endswith((".q", ".k")) for k in replaced):
            found[place] = replace(found[place], verdict="fail", metrics={"rel_l2": 0.5})
        return Look(found, look.replaced)


@pytest.mark.parametrize("error", [1e-7, 0.5])
def test_parts_are_doubted_whose_replacing_makes_right_what_comes_of_them_wrong(error: float) -> None:
    parts = {"model.layers.1.self_attn.q", "model.layers.1.self_attn.k"}
    free = [
        finding(k, "fail" if k in parts else "pass", order=GRAPH.order(k), origin="introduced" if k in parts else None,
                metrics={"rel_l2": 1.0 if k in parts else error})
        for k in KEYS
    ]  # fmt: skip
    assert descend(Turned(sorted(parts)), free).doubted == (parts if error < 0.1 else set())


@pytest.mark.parametrize(("worse", "doubted"), [(5.0, {"model.layers.1.mlp.up"}), (1.0, set()), (0.2, set())])
def test_a_part_whose_replacing_makes_its_module_worse_is_doubted(worse: float, doubted: set[str]) -> None:
    candidate = Renamed(["model.layers.1.mlp"], renamed="model.layers.1.mlp.up", worse=worse)
    assert descend(candidate, freely(candidate)).doubted == doubted
