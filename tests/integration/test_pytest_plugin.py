"""The plugin as users meet it: in a pytest of its own, over a project with two small engines."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from paritykit.results import read_jsonl
from paritykit.testing import tiny_model

ROOT = Path(__file__).parents[2]
ENGINES = """
import paritykit as pk
import pytest
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(499, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, 499)

    def forward(self, tokens):
        return self.head(self.second(self.first(self.embed(tokens))))

def engine(spoil=None):
    network = Network()
    if spoil:
        getattr(network, spoil).bias.data += 0.1
    return pk.engine("module", model=network, forward=lambda model, ids, positions: model(ids), head="head")

@pytest.fixture(scope="session")
def parity_reference():
    return engine()

@pytest.fixture(scope="session")
def parity_candidate():
    return engine({spoil!r})
"""
MODULES = """
import paritykit as pk

@pk.cases("one", "short")
def test_modules(parity, case):
    parity.check("modules", case)
"""
TWO_MODELS = """
import pytest

@pytest.fixture(scope="session", params={})
def parity_model(request):
    return request.param
"""
OUR_FRAME = re.compile(r"paritykit/[\w/]+\.py")
Run = Callable[..., pytest.RunResult]


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs pytest on the files of the folder, with this plugin alone; temporary files go to ``scratch``."""
    pytester.mkdir("scratch")
    monkeypatch.setenv("TMPDIR", str(pytester.path / "scratch"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nstrict_markers = true\nfilterwarnings = error")

    def run(*arguments: str) -> pytest.RunResult:
        result = pytester.runpytest_subprocess("-p", "paritykit.pytest_plugin", *arguments)
        assert [p for p in (pytester.path / "scratch").iterdir() if "paritykit" in p.name] == []
        return result

    return run


@pytest.fixture
def model() -> str:
    return str(tiny_model("qwen2"))


def engines(pytester: pytest.Pytester, *, spoil: str | None = None) -> None:
    pytester.makeconftest(ENGINES.replace("{spoil!r}", repr(spoil)))


def text_of(result: pytest.RunResult) -> str:
    return result.stdout.str() + result.stderr.str()


def test_cases_make_one_test_each_and_pass(project: Run, pytester: pytest.Pytester, model: str) -> None:
    engines(pytester)
    pytester.makepyfile(MODULES)
    result = project(f"--parity-model={model}", "-v")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*::test_modules[[]one[]] PASSED*", "*::test_modules[[]short[]] PASSED*"])
    result.stdout.fnmatch_lines(["*= parity =*", "PASS *: * compared, 0 failed"])
    assert result.ret == 0


def test_failure_is_the_text_alone(project: Run, pytester: pytest.Pytester, model: str) -> None:
    engines(pytester, spoil="second")
    pytester.makepyfile(MODULES)
    result = project(f"--parity-model={model}")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines([
        '>       parity.check("modules", case)',
        "E       paritykit.errors.ParityFailure: modules / one: module (float32) differs from module (float32)",
        "E         first divergence *second *introduced here*",
        f"E         repro  *pytest * --parity-model={model}",
        "test_failure_is_the_text_alone.py:5: ParityFailure",
    ])  # fmt: skip
    assert OUR_FRAME.search(result.stdout.str()) is None


def test_case_with_nothing_to_look_at_is_skipped(project: Run, pytester: pytest.Pytester, model: str) -> None:
    engines(pytester)
    cases = pytester.path / "cases.jsonl"
    cases.write_text('{"id": "prompt", "tokens": [1, 2]}\n{"id": "more", "tokens": [3, 4], "new_tokens": 2}')
    pytester.makepyfile(MODULES.replace('"one", "short"', f"file={str(cases)!r}").replace('"modules"', '"tokens"'))
    result = project(f"--parity-model={model}", "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*check 'tokens' has nothing to compare in case 'prompt'"])


def test_only_cases_of_selected_tests_are_run(project: Run, pytester: pytest.Pytester, model: str) -> None:
    engines(pytester)
    pytester.makepyfile(MODULES + MODULES.replace('"one", "short"', '"smoke"').replace("test_", "test_all_"))
    result = project(f"--parity-model={model}", "-k", "test_modules", "--parity-jsonl", "run.jsonl")
    result.assert_outcomes(passed=2, deselected=2 + 1)
    assert [c.id for c in read_jsonl(pytester.path / "run.jsonl").cases] == ["one", "short"]


def test_reports_and_junit_are_written(project: Run, pytester: pytest.Pytester, model: str) -> None:
    engines(pytester, spoil="second")
    pytester.makepyfile(MODULES)
    reports = ("--parity-html", "new/p.html", "--parity-jsonl", "p.jsonl", "--parity-markdown", "p.md")
    result = project(f"--parity-model={model}", *reports, "--junit-xml", "junit.xml")
    result.stdout.fnmatch_lines(["FAIL *: * compared, * failed", "*new/p.html", "*p.jsonl", "*p.md"])
    summary = read_jsonl(pytester.path / "p.jsonl").summary
    assert summary.first_divergence is not None
    assert (summary.verdict, summary.first_divergence.point) == ("fail", "second")
    assert "second" in (pytester.path / "new" / "p.html").read_text()
    assert "second" in (pytester.path / "p.md").read_text()
    found = ET.parse(pytester.path / "junit.xml").findall(".//testcase[@name='test_modules[one]']//property")
    properties = {p.get("name"): p.get("value") for p in found}
    assert properties.pop("parity_worst") is not None
    assert properties == {"parity_verdict": "fail", "parity_first_divergence": "second"}


def test_report_that_cannot_be_written_costs_no_other(project: Run, pytester: pytest.Pytester, model: str) -> None:
    engines(pytester)
    pytester.makepyfile(MODULES)
    (pytester.path / "file").touch()
    result = project(f"--parity-model={model}", "--parity-html", "file/p.html", "--parity-jsonl", "p.jsonl")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["cannot write file/p.html: File exists"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in text_of(result)
    assert read_jsonl(pytester.path / "p.jsonl").summary.verdict == "pass"


def test_two_models_have_a_report_each(project: Run, pytester: pytest.Pytester, model: str) -> None:
    other = str(tiny_model("qwen2", seed=1))
    pytester.makeconftest(TWO_MODELS.format([model, other]))
    pytester.makepyfile(MODULES)
    result = project("--parity-candidate", "hf", "--parity-jsonl", "p.jsonl")
    result.assert_outcomes(passed=4)
    found = {p.name: read_jsonl(p).run for p in pytester.path.glob("p*.jsonl")}
    assert {n: r.reference.model for n, r in found.items()} == {f"p-{Path(m).name}.jsonl": m for m in (model, other)}
    for run in found.values():
        assert run.command.startswith(f"paritykit run {run.reference.model} --candidate hf --dtype auto --case one")


def test_a_report_of_an_engine_against_itself_names_that_engine(
    project: Run, pytester: pytest.Pytester, model: str
) -> None:
    """Though neither the candidate nor the reference was captured beside the other."""
    pytester.makepyfile("def test_repeat(parity):\n    parity.explore('repeat')")
    arguments = (f"--parity-model={model}", "--parity-candidate", "nano", "--parity-dtype", "float32")
    project(*arguments, "--parity-jsonl", "p.jsonl").assert_outcomes(passed=1)
    run = read_jsonl(pytester.path / "p.jsonl").run
    assert (run.candidate.engine, run.checks) == ("nano", ["repeat"])


def test_workers_share_one_report(project: Run, pytester: pytest.Pytester, model: str) -> None:
    engines(pytester)
    names = ("one", "short", "long-40", "long-200")
    pytester.makepyfile(MODULES.replace('"one", "short"', str(names)[1:-1]))
    arguments = ("-p", "xdist", "-n", "2", f"--parity-model={model}", "--parity-jsonl", "p.jsonl")
    result = project(*arguments, "-v")
    result.assert_outcomes(passed=4)
    result.stdout.fnmatch_lines_random(["[[]gw0[]]*PASSED*", "[[]gw1[]]*PASSED*"])
    records = read_jsonl(pytester.path / "p.jsonl")
    assert records.summary.verdict == "pass"
    assert {f.case for f in records.findings} == set(names)
    assert len(records.findings) == len({(f.case, f.point) for f in records.findings})
    assert records.run.command.endswith(" ".join(arguments) + " -v")
    result.stdout.fnmatch_lines([f"PASS *: {len(records.findings)} compared, 0 failed"])


@pytest.mark.parametrize(("options", "said"), [
    ([], "give --parity-model, or override the fixture parity_model"),
    (["--parity-model={model}", "--parity-candidate", "hff"], "unknown engine 'hff'; did you mean 'hf'? *"),
    (["--parity-model=./no-such"], "no such folder: ./no-such"),
    (["--parity-model={model}", "--parity-tensor-parallel-size", "3"], "tensor_parallel_size 3 does not divide *"),
    (["--parity-model={model}", "--parity-engine-arg", "x"], "--engine-arg 'x' is not of the form KEY=VALUE"),
])  # fmt: skip
def test_usage_errors_are_short(
    project: Run, pytester: pytest.Pytester, model: str, options: list[str], said: str
) -> None:
    pytester.makepyfile(MODULES)
    result = project(*(o.replace("{model}", model) for o in options))
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        ["*ERROR at setup of test_modules[[]one[]]*", said, "*ERROR at setup*"], consecutive=True
    )
    assert OUR_FRAME.search(result.stdout.str()) is None


def test_errors_of_a_test_are_short(project: Run, pytester: pytest.Pytester, model: str) -> None:
    engines(pytester)
    pytester.makepyfile(
        MODULES.replace('"modules"', '"module"') + "\ndef test_plain(parity):\n    parity.check('modules', 'x')"
    )
    result = project(f"--parity-model={model}")
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(["E *UnknownNameError: unknown check 'module'; did you mean 'modules'? *"])
    result.stdout.fnmatch_lines(
        ["E *UnknownNameError: unknown case (mark the test with paritykit.cases) 'x'* (have: *"]
    )
    assert OUR_FRAME.search(result.stdout.str()) is None


def test_engine_that_does_not_start_fails_each_test_with_its_reason(
    project: Run, pytester: pytest.Pytester, model: str
) -> None:
    engines(pytester)
    conftest = pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text().replace("def parity_candidate():", "def theirs():"))
    pytester.makepyfile(MODULES)
    result = project(f"--parity-model={model}", "--parity-candidate", "hf", "--parity-engine-arg", "padding=right")
    result.assert_outcomes(failed=2)
    lines = [line for line in result.stdout.lines if line.startswith("E ")]
    assert lines == ["E       paritykit.errors.UsageError: padding must be 'none' or 'left', not 'right'"] * 2


def test_project_without_parity_tests_pays_nothing(project: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_plain="""
        import os, sys, tempfile

        def test_nothing():
            assert not {"torch", "numpy", "paritykit.pytest_session"} & set(sys.modules)
            assert os.listdir(tempfile.gettempdir()) == []
        """
    )
    result = project()
    result.assert_outcomes(passed=1)
    assert not [line for line in result.stdout.lines if "parity" in line and "rootdir" not in line]


def test_options_have_one_group_and_one_prefix(project: Run) -> None:
    result = project("--help")
    result.stdout.fnmatch_lines(["parity of two engines (ParityKit):", "  --parity-model=*", "  --parity-html=*"])
