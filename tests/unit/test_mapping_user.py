"""Rules from a TOML file: what they do, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paritykit.errors import UsageError
from paritykit.mapping.build import Mapping, build_mapping
from paritykit.mapping.rules import Block
from paritykit.mapping.user import compile_pattern, read_rules
from tests.made import manifest

OURS: dict[str, Any] = {
    "model.layers.0.q_proj": 8,
    "model.layers.1.q_proj": 8,
    "model.layers.0.act_fn": 6,
    "model.norm#input": 4,
    "model.norm": 4,
}
THEIRS: dict[str, Any] = {
    "blocks.0.qkv": 24,
    "blocks.1.qkv": 24,
    "blocks.0.conv": [2, 4],
    "final": 4,
    "residual": 4,
    "wide": 16,
}


def built(tmp_path: Path, text: str, *, ranks: int = 1, theirs: dict[str, Any] | None = None) -> Mapping:
    (tmp_path / "map.toml").write_text(text)
    candidate = manifest(theirs or THEIRS, ranks=ranks)
    return build_mapping(manifest(OURS), candidate, user=read_rules(tmp_path / "map.toml"))


def test_columns_of_every_layer(tmp_path: Path) -> None:
    text = '[[rule]]\nreference = "model.layers.{i}.q_proj"\ncandidate = "blocks.{i}.qkv"\ncolumns = [8, 16]\n'
    found = {r.reference: r for r in built(tmp_path, text).rules}
    assert {k: (r.candidate, r.blocks) for k, r in found.items()} == {
        "model.layers.0.q_proj": ("blocks.0.qkv", (Block(0, 8, 8),)),
        "model.layers.1.q_proj": ("blocks.1.qkv", (Block(0, 8, 8),)),
    }
    assert found["model.layers.0.q_proj"].source.endswith("map.toml, rule 1")


def test_transpose_plus_and_inputs(tmp_path: Path) -> None:
    text = """
        [[rule]]
        reference = "model.layers.0.q_proj"
        candidate = "blocks.0.conv"
        transpose = true
        [[rule]]
        reference = "model.norm#input"
        candidate = "final"
        plus = "residual"
    """
    found = {r.reference: r for r in built(tmp_path, text).rules}
    assert found["model.layers.0.q_proj"].transpose
    assert found["model.norm#input"].plus == "residual"
    assert {"final", "residual"}.isdisjoint(u.point for u in built(tmp_path, text).unmatched)


def test_ignored_points_carry_the_reason(tmp_path: Path) -> None:
    text = '[[rule]]\nreference = "model.layers.{i}.act_fn"\nignore = "fused"\n'
    assert [(u.point, u.reason) for u in built(tmp_path, text).skipped if u.side == "reference"] == [
        ("model.layers.0.act_fn", "fused")
    ]


def test_without_columns_they_follow_from_the_sizes(tmp_path: Path) -> None:
    text = '[[rule]]\nreference = "model.layers.0.q_proj"\ncandidate = "half"\n'
    mapping = built(tmp_path, text, ranks=2, theirs={"half": 4})
    assert mapping.rules[0].blocks == (Block(0, 0, 4), Block(1, 0, 4))


def test_other_sizes_are_a_failing_shape_and_no_crash(tmp_path: Path) -> None:
    mapping = built(tmp_path, '[[rule]]\nreference = "model.norm"\ncandidate = "wide"\n')
    assert [(m.reference, m.candidate) for m in mapping.misfits] == [("model.norm", "wide")]
    assert mapping.misfits[0].message == "4 features against 16 on each of 1 rank(s) of wide"


def test_the_users_rule_wins_over_an_equal_name(tmp_path: Path) -> None:
    text = '[[rule]]\nreference = "model.norm"\ncandidate = "final"\n'
    mapping = built(tmp_path, text, theirs={"final": 4, "model.norm": 4})
    assert [r.candidate for r in mapping.rules] == ["final"]


RULE = '[[rule]]\nreference = "model.norm"\n'
WRONG = {
    "no rule": ("", r"map\.toml has no \[\[rule\]\]"),
    "bad toml": ("[[rule]\n", r"map\.toml: .*line 1"),
    "unknown key": (RULE + 'candidat = "final"\n', r"unknown field `candidat`"),
    "unknown table": ('[[rules]]\nreference = "a"\n', "unknown field `rules`"),
    "no reference": ('[[rule]]\ncandidate = "final"\n', "missing required field `reference`"),
    "wrong kind": (RULE + "candidate = 3\n", "Expected `str`"),
    "three columns": (RULE + 'candidate = "final"\ncolumns = [0, 2, 4]\n', "length 2"),
    "columns reversed": (RULE + 'candidate = "final"\ncolumns = [4, 0]\n', "first < end, not"),
    "columns negative": (RULE + 'candidate = "final"\ncolumns = [-4, 0]\n', "first < end, not"),
    "neither": (RULE, r"rule 1 \(model\.norm\): give either 'candidate' or 'ignore'"),
    "both": (RULE + 'candidate = "final"\nignore = "no"\n', "give either 'candidate' or 'ignore'"),
    "unbound name": (RULE + 'candidate = "blocks.{i}.qkv"\n', r"\{i\} in 'blocks\.\{i\}\.qkv' is not in the reference"),
    "matches nothing": (
        '[[rule]]\nreference = "model.layers.{i}.q_prj"\nignore = "x"\n',
        r"no reference point matches 'model\.layers\.\{i\}\.q_prj'; did you mean 'model\.layers\.0\.q_proj'",
    ),
    "a number as name": ('[[rule]]\nreference = "layers.{0}.q_proj"\nignore = "x"\n', "no reference point matches"),
    "an odd name": ('[[rule]]\nreference = "layers.{²}.q_proj"\nignore = "x"\n', "no reference point matches"),
    "no such candidate": (RULE + 'candidate = "finall"\n', "candidate has no point 'finall'; did you mean 'final'"),
    "no such plus": (RULE + 'candidate = "final"\nplus = "residue"\n', "no point 'residue'; did you mean 'residual'"),
    "columns outside": (RULE + 'candidate = "final"\ncolumns = [2, 6]\n', r"columns \[2, 6\] of 'final', which has 4"),
    "columns of another size": (RULE + 'candidate = "wide"\ncolumns = [0, 8]\n', "not the 4 features of 'model.norm'"),
    "nothing to transpose": (RULE + 'candidate = "final"\ntranspose = true\n', "one axis only"),
    "plus of another size": (RULE + 'candidate = "final"\nplus = "wide"\n', r"'wide' has rows \[16\]"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_rule_is_a_usage_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        built(tmp_path, text)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "map.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UsageError, match=r"map file .*map\.toml"):
        read_rules(path)
    with pytest.raises(UsageError, match="No such file"):
        read_rules(tmp_path / "gone.toml")


@pytest.mark.parametrize(("pattern", "key", "matches"), [
    ("model.layers.{i}.mlp", "model.layers.12.mlp", True),
    ("model.layers.{i}.mlp", "model.layers.1.2.mlp", False),
    ("model.layers.{i}.mlp", "model.layers.1.mlp#input", False),
    ("model.layers.{i}.mlp", "model-layers.1.mlp", False),
    ("{a}.{b}", "x.y", True),
    ("{a}.{a}", "x.x", True),
    ("{a}.{a}", "x.y", False),
    ("a{", "a{", True),
])  # fmt: skip
def test_patterns(pattern: str, key: str, matches: bool) -> None:
    assert bool(compile_pattern(pattern).fullmatch(key)) is matches


def test_a_later_rule_replaces_an_earlier_one(tmp_path: Path) -> None:
    text = """
        [[rule]]
        reference = "model.layers.{i}.q_proj"
        ignore = "elsewhere"
        [[rule]]
        reference = "model.layers.1.q_proj"
        candidate = "blocks.1.qkv"
        columns = [0, 8]
    """
    found = built(tmp_path, text)
    assert [r.reference for r in found.rules if r.source.endswith("rule 2")] == ["model.layers.1.q_proj"]
    assert [u.point for u in found.skipped if u.reason == "elsewhere"] == ["model.layers.0.q_proj"]
