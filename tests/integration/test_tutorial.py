"""The tutorial, done as it is written: every file, edit, command and output of the page, in a fresh folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.commands import Attempt
from tests.tutorial import Block, difference, edit, read_blocks, read_commands

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "tutorial.md"
TOY = DOCS / "tutorial" / "toy_engine.py"
SHOWN = [
    "FAIL  249 of 328 comparisons; first at model.layers.0.self_attn; case short",
    "...",
    "  mapping           blocks.0.attn.qkv_proj columns 0:128 (weight provenance)",
    "  rel_l2            0.743   allowed 1.0e-05 ...",
]
PRINTED = """\
FAIL  251 of 1,330 comparisons; first at model.layers.0.self_attn; case short
  sides             toy
  mapping           blocks.0.attn.qkv_proj columns 0:128 (weight provenance)
  rel_l2            7.4e-01   allowed 2.0e-05 (why)
"""


class Reader:
    """Does what the page says; every command's output must be the one shown."""

    def __init__(self, folder: Path, attempt: Attempt) -> None:
        self.folder, self._attempt = folder, attempt
        self._code = 0

    def follow(self, block: Block) -> None:
        if block.kind == "console":
            for command in read_commands(block.text):
                found = difference(command.shown, self._run(command.line))
                assert not found, f"$ {command.line}\n{found}"
            return
        assert block.title, f"this block is nobody's:\n{block.text}"
        path = self.folder / block.title
        path.write_text(edit(path.read_text(), block.text) if block.kind == "diff" else block.text)

    def _run(self, line: str) -> str:
        name, *arguments = shlex.split(line)
        if line == "echo $?":
            return f"{self._code}\n"
        if name == "paritykit":
            sys.argv[1:] = arguments
            outcome = self._attempt(*arguments)
            self._code = outcome.code
            assert "Traceback" not in outcome.err
            return outcome.out
        program = shutil.which(name, path=str(Path(sys.executable).parent))
        assert program, f"no such program: {name}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"COLUMNS": "80"}
        done = subprocess.run([program, *arguments], check=False, stdout=subprocess.PIPE, text=True, env=environment)
        self._code = done.returncode
        return done.stdout


def test_every_step_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["paritykit"])
    blocks = read_blocks(PAGE)
    assert [b.kind for b in blocks].count("console") >= 5
    reader = Reader(tmp_path, Attempt(capfd))
    for block in blocks:
        reader.follow(block)
    page = (tmp_path / "rope.html").read_text()
    assert "model.layers.0.self_attn" in page


def test_the_file_is_the_one_on_the_page() -> None:
    [shown] = [b.text for b in read_blocks(PAGE) if (b.kind, b.title) == ("python", TOY.name)]
    assert shown == TOY.read_text()


def test_the_page_is_linked() -> None:
    assert "(tutorial.md)" in (DOCS / "index.md").read_text()
    assert "(docs/tutorial.md)" in (DOCS.parent / "README.md").read_text()
    assert "- tutorial.md" in (DOCS.parent / "mkdocs.yml").read_text()


def test_numbers_may_differ() -> None:
    assert difference(SHOWN, PRINTED) == ""
    assert difference(["1"], "1,000\n") == ""


@pytest.mark.parametrize(("old", "new", "line"), [
    ("FAIL", "PASS", 1),
    ("layers.0.self_attn;", "layers.1.self_attn;", 1),
    ("case short", "case long-40", 1),
    ("columns 0:128", "columns 0:129", 3),
    ("weight provenance", "equal name", 3),
    ("rel_l2", "rel_max", 4),
    ("7.4e-01", "none", 4),
    ("  sides", "  mapping\n  sides", None),
    (" (why)", "", 4),
    (" (why)\n", " (why)\nmore\n", 5),
])  # fmt: skip
def test_what_may_not_differ(old: str, new: str, line: int | None) -> None:
    assert old in PRINTED
    found = difference(SHOWN, PRINTED.replace(old, new, 1))
    assert bool(found) == bool(line)
    assert found.startswith(f"line {line} " if line else "")


def test_edits_must_fit() -> None:
    assert edit("a\nb\nc\n", " a\n-b\n+d\n+e\n") == "a\nd\ne\nc\n"
    for diff in ("-x\n+y\n", "-a\n+y\n"):
        with pytest.raises(ValueError, match=r"in the file [02] times"):
            edit("a\nb\na\n", diff)


def test_output_needs_a_command() -> None:
    with pytest.raises(ValueError, match="output before any command: PASS"):
        read_commands("PASS\n$ true\n")
