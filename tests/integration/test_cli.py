"""The command line: what it says and the exit code it gives, for good requests and for those that cannot be met."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paritykit.cli import cli, execute
from paritykit.progress import ProgressLine
from paritykit.results import read_jsonl
from paritykit.testing import tiny_model
from tests.integration.commands import OWN, Attempt, shadow, write

COLOUR = re.compile(r"\x1b\[[0-9;]*\b3[0-7]")


@pytest.fixture
def attempt(capfd: pytest.CaptureFixture[str], importable: None) -> Attempt:
    return Attempt(capfd)


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path, importable: None) -> Path:
    """A folder with the captures ``ref``, ``cand`` (which follows it) and ``faulty``, and the records of a run."""
    folder = tmp_path_factory.mktemp("made")
    short = ("--case", "short", "--quiet")
    assert execute(["capture", "hf", str(model), "-o", f"{folder}/ref", *short]) == 0
    follow = ("--follow", f"{folder}/ref")
    assert execute(["capture", "hf", str(model), "-o", f"{folder}/cand", *follow, *short, "--dtype", "fp32"]) == 0
    assert execute(["capture", f"{OWN}faulty", str(model), "-o", f"{folder}/faulty", *follow, *short]) == 0
    compare = ["compare", f"{folder}/ref", f"{folder}/faulty", "--quiet", "--jsonl", f"{folder}/run.jsonl"]
    assert execute(compare) == 1
    return folder


# What works


def test_equal_engines_are_at_parity(attempt: Attempt, tmp_path: Path) -> None:
    files = {n: tmp_path / "new" / f"run.{n}" for n in ("jsonl", "html", "markdown", "junit")}
    reports = [word for name, path in files.items() for word in (f"--{name}", path)]
    outcome = attempt(
        "run", "tiny:qwen2", "--candidate", "hf", "--dtype", "auto", "--reference-dtype", "auto", *reports
    )
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert outcome.out.startswith("PASS")
    assert f"report            {files['html']}" in outcome.out
    results = read_jsonl(files["jsonl"])
    assert results.summary.verdict == "pass"
    assert results.summary.checks == {
        "checkpoint": "pass", "weights": "skip", "modules": "pass", "logits": "pass", "tokens": "pass",
    }  # fmt: skip
    assert [c.id for c in results.cases] == ["short", "long-40", "long-200"]
    assert (results.run.candidate.dtype, results.run.reference.dtype) == ("float32", "float64")
    assert all(path.stat().st_size > 500 for path in files.values())


def test_own_engine_with_a_mistake_diverges_where_it_is(attempt: Attempt, model: Path) -> None:
    arguments = ("--candidate", f"{OWN}faulty", "--engine-arg", "layer=1", "--case", "short", "--check", "modules")
    outcome = attempt("run", model, *arguments)
    assert outcome.code == 1
    assert outcome.out.startswith("FAIL")
    assert "first divergence  model.layers.1.self_attn.v_proj    introduced here" in outcome.out


def test_captures_on_disk_are_compared(attempt: Attempt, made: Path) -> None:
    outcome = attempt("compare", made / "ref", made / "cand")
    assert (outcome.code, outcome.out[:4]) == (0, "PASS")
    outcome = attempt("compare", made / "ref", made / "faulty", "--check", "modules")
    assert outcome.code == 1
    assert "model.layers.2.self_attn.v_proj" in outcome.out
    assert "modules fail" in outcome.out


def test_capture_says_what_it_recorded(attempt: Attempt, tmp_path: Path, model: Path) -> None:
    target = tmp_path / "capture"
    outcome = attempt("capture", "hf", model, "-o", target, "--case", "one", "--point", "model.layers.*.mlp")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"{target}: 4 points of 1 cases on 1 rank(s)\n"


def test_capture_of_points_that_are_not_there_keeps_nothing(attempt: Attempt, tmp_path: Path, model: Path) -> None:
    target = tmp_path / "capture"
    outcome = attempt("capture", "hf", model, "-o", target, "--case", "one", "--point", "layers.0")
    assert outcome.code == 2
    assert outcome.message == "no point of hf matches layers.0; nothing was kept"
    assert list(tmp_path.iterdir()) == []


def test_reports_are_made_again_from_records(attempt: Attempt, made: Path, tmp_path: Path) -> None:
    outcome = attempt("report", made / "run.jsonl", "--html", tmp_path / "a.html", "--jsonl", tmp_path / "a.jsonl")
    assert outcome.code == 0
    assert outcome.out.startswith("FAIL")
    assert (tmp_path / "a.jsonl").read_bytes() == (made / "run.jsonl").read_bytes()
    assert "v_proj" in (tmp_path / "a.html").read_text()


def test_show_gives_all_that_was_measured(attempt: Attempt, made: Path) -> None:
    outcome = attempt("show", made / "run.jsonl", "model.layers.2.self_attn.v_proj")
    assert outcome.code == 0
    assert outcome.out.startswith("model.layers.2.self_attn.v_proj\n")
    assert "FAIL  modules / short" in outcome.out
    assert "norm_ratio" in outcome.out


@pytest.mark.parametrize(("kind", "name"), [
    ("engines", "vllm"),
    ("checks", "modules"),
    ("cases", "long-200"),
    ("models", "tiny:gemma3"),
    ("metrics", "rel_l2"),
    ("reports", "junit"),
])  # fmt: skip
def test_list_has_a_line_for_each(attempt: Attempt, kind: str, name: str) -> None:
    outcome = attempt("list", kind)
    assert outcome.code == 0
    assert name in [line.split()[0] for line in outcome.out.splitlines()]


def test_doctor_answers_in_json(attempt: Attempt) -> None:
    outcome = attempt("doctor", "--json")
    checks = json.loads(outcome.out)
    assert {"torch", "vllm"} <= {c["name"] for c in checks}
    assert outcome.code == (3 if any(c["status"] == "bad" for c in checks) else 0)


@pytest.mark.parametrize("command", ["", *cli.commands])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_has_an_example(attempt: Attempt, command: str, flag: str) -> None:
    outcome = attempt(*filter(None, (command, flag)))
    assert outcome.code == 0
    assert outcome.out.startswith(f"Usage: paritykit {command}".rstrip())
    assert re.search(rf"^  paritykit {command or 'run'}", outcome.out, re.MULTILINE)


def test_quiet_prints_nothing(attempt: Attempt, made: Path) -> None:
    for arguments in (("compare", made / "ref", made / "cand"), ("report", made / "run.jsonl")):
        outcome = attempt(*arguments, "--quiet")
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    outcome = attempt("compare", made / "ref", made / "faulty", "-q")
    assert (outcome.code, outcome.out, outcome.err) == (1, "", "")


def test_no_color_is_honoured(attempt: Attempt, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert COLOUR.search(attempt("report", made / "run.jsonl").out)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(attempt("report", made / "run.jsonl").out)


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_progress_shows_only_where_somebody_looks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], terminal: bool, quiet: bool, shown: bool
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    with ProgressLine(quiet=quiet) as line:
        line("starting hf", 0, 0)
        line("hf", 1, 3)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("hf" in err) == shown


# What is wrong with the request


@pytest.mark.parametrize(("arguments", "said"), [
    (["--candidate", "hff"], "unknown engine 'hff'; did you mean 'hf'?"),
    (["--reference", "vlm"], "unknown engine 'vlm'; did you mean 'vllm'?"),
    (["--candidate", "module"], "engine 'module' as candidate needs a live object; name a factory"),
    (["--check", "module"], "unknown check 'module'; did you mean 'modules'?"),
    (["--case", "shrt"], "unknown case 'shrt'; did you mean 'short'?"),
    (["--dtype", "float31"], "unknown dtype 'float31'; did you mean 'float32'"),
    (["--reference-dtype", "flot64"], "unknown dtype 'flot64'; did you mean 'float64'"),
    (["--engine-arg", "padding"], "--engine-arg 'padding' is not of the form KEY=VALUE"),
    (["--candidate", "vllm", "--tensor-parallel-size", "3"], "does not divide the model's 4 attention heads"),
    (["--candidate", "vllm", "--tensor-parallel-size", "8"], "does not divide the model's 4 attention heads"),
    (["--tensor-parallel-size", "0"], "tensor_parallel_size must be at least 1, not 0"),
    (["--html", "."], "Invalid value for '--html': File '.' is a directory."),
    (["--canddate", "hf"], "No such option '--canddate'"),
    (["--map", "no/such.toml"], "map file no/such.toml: [Errno 2] No such file"),
    (["--cases", "no/such.jsonl"], "cannot read cases from no/such.jsonl: [Errno 2] No such file"),
])  # fmt: skip
def test_request_that_cannot_be_met_is_refused(attempt: Attempt, model: Path, arguments: list[str], said: str) -> None:
    outcome = attempt("run", model, "--candidate", "hf", *arguments)
    assert outcome.code == 2
    assert said in outcome.message


@pytest.mark.parametrize(("engine", "argument", "said"), [
    ("hf", "paddding=left", "paddding"),
    ("hf", "padding=right", "padding must be 'none' or 'left', not 'right'"),
    ("vllm", "block_sise=32", "unknown vLLM argument 'block_sise'; did you mean 'block_size'"),
    ("vllm", "tensor_parallel_size=3", "does not divide the model's 4 attention heads"),
    (f"{OWN}no_such", "layer=1", "has no attribute 'no_such'"),
])  # fmt: skip
def test_argument_that_the_engine_refuses(
    attempt: Attempt, model: Path, tmp_path: Path, *, engine: str, argument: str, said: str
) -> None:
    outcome = attempt("capture", engine, model, "-o", tmp_path / "capture", "--engine-arg", argument)
    assert outcome.code == 2
    assert said in outcome.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "said"), [
    ("[[rule]", "map file {}: Expected ']]'"),
    ("[[rules]]", "map file {}: Object contains unknown field `rules`"),
    ("", "map file {} has no [[rule]]"),
    ('[[rule]]\nreference = "lm_head"', "{}, rule 1 (lm_head): give either 'candidate' or 'ignore'"),
    ('[[rule]]\nreference = "model.layers.{i}.mpl"\nignore = "x"',
     "{}, rule 1: no reference point matches 'model.layers.{i}.mpl'; did you mean 'model.layers.0.mlp'"),
    ('[[rule]]\nreference = "model.layers.{i}.mlp"\ncandidate = "model.layers.{i}.mpl"',
     "{}, rule 1: the candidate has no point 'model.layers.0.mpl'; did you mean 'model.layers.0.mlp'"),
])  # fmt: skip
def test_bad_map_is_refused(attempt: Attempt, made: Path, tmp_path: Path, text: str, said: str) -> None:
    rules = write(tmp_path / "rules.toml", text)
    outcome = attempt("compare", made / "ref", made / "cand", "--map", rules)
    assert outcome.code == 2
    assert outcome.message.startswith(said.replace("{}", str(rules)))


@pytest.mark.parametrize(("text", "said"), [
    ("x", "{}, line 1: JSON is malformed"),
    ("", "{} has no cases"),
    ('{"id": "a", "tokens": [1, 2]}\n{"id": "b", "token": [1]}', "{}, line 2: Object contains unknown field `token`"),
    ('{"id": "a", "tokens": [1, 499]}', "case 'a': token id 499 is outside the vocabulary (0 to 498)"),
    ('{"id": "a", "tokens": [1]}\n{"id": "a", "tokens": [2]}', "case id 'a' is used twice"),
    ('{"id": "a", "tokens": [1], "new_tokens": 600}', "case 'a': 1 tokens and 600 new ones are more than"),
    ('{"id": "a", "text": "hello"}', '{}, line 1: "text" needs a tokenizer, and this model has none'),
])  # fmt: skip
def test_bad_cases_file_is_refused(attempt: Attempt, model: Path, tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path / "cases.jsonl", text)
    outcome = attempt("run", model, "--candidate", "hf", "--cases", file)
    assert outcome.code == 2
    assert outcome.message.startswith(said.replace("{}", str(file)))


def test_case_that_the_file_lacks_is_refused(attempt: Attempt, model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "cases.jsonl", '{"id": "first", "tokens": [1, 2]}')
    outcome = attempt("run", model, "--candidate", "hf", "--cases", file, "--case", "frist")
    assert outcome.code == 2
    assert outcome.message == f"unknown case in {file} 'frist'; did you mean 'first'? (have: first)"


def test_capture_is_never_overwritten(attempt: Attempt, made: Path, model: Path) -> None:
    before = (made / "ref" / "manifest.json").read_bytes()
    outcome = attempt("capture", "hf", model, "-o", made / "ref")
    assert outcome.code == 2
    assert outcome.message == f"{made}/ref exists already; remove it or choose another folder"
    assert (made / "ref" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(("arguments", "said"), [
    (["compare", "{made}/ref", "{made}/none"], "{made}/none: no such folder"),
    (["compare", "{made}/ref", "{made}"], "{made} is not a complete capture: it has no manifest.json"),
    (["compare", "{made}/ref", "{made}/cand", "--check", "tokns"], "unknown check 'tokns'; did you mean 'tokens'?"),
    (["report", "{made}/none.jsonl"], "cannot read {made}/none.jsonl: No such file or directory"),
    (["report", "{made}/ref/manifest.json"], "{made}/ref/manifest.json, line 1: not a ParityKit record"),
    (["show", "{made}/run.jsonl", "model.layers.2.self_atn"],
     "unknown point 'model.layers.2.self_atn'; did you mean 'model.layers.2.self_attn'"),
    (["capture", "hf", "{model}", "-o", "{made}/x", "--follow", "{made}/none"], "{made}/none: no such folder"),
    (["capture", "hf", "{model}", "-o", "{made}/x", "--follow", "{made}/ref", "--case", "one"],
     "{made}/ref has no case 'one' to follow"),
])  # fmt: skip
def test_files_that_cannot_be_used_are_refused(
    attempt: Attempt, made: Path, model: Path, arguments: list[str], said: str
) -> None:
    outcome = attempt(*(a.replace("{made}", str(made)).replace("{model}", str(model)) for a in arguments))
    assert outcome.code == 2
    assert outcome.message.startswith(said.replace("{made}", str(made)))


def test_report_that_cannot_be_written_costs_no_other(attempt: Attempt, made: Path, tmp_path: Path) -> None:
    blocked = write(tmp_path / "file", "") / "report.html"
    wanted = ("--html", blocked, "--jsonl", tmp_path / "a.jsonl", "--markdown", tmp_path / "a.md")
    outcome = attempt("compare", made / "ref", made / "cand", *wanted)
    assert outcome.code == 2
    assert outcome.out.startswith("PASS")
    assert outcome.err == f"paritykit: cannot write {blocked}: File exists\n"
    assert read_jsonl(tmp_path / "a.jsonl").summary.verdict == "pass"
    assert (tmp_path / "a.md").stat().st_size > 0


def test_missing_torch_is_named_and_reports_need_none(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    shadow(tmp_path / "path", "torch", code, monkeypatch)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "paritykit.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("compare", str(made / "ref"), str(made / "cand"))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "paritykit: this needs torch: pip install 'paritykit[hf]'; see `paritykit doctor`\n"
    assert run("report", str(made / "run.jsonl"), "--html", str(tmp_path / "a.html")).returncode == 0
    assert "v_proj" in (tmp_path / "a.html").read_text()
