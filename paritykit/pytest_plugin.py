"""The pytest plugin: options, fixtures and reports. It imports nothing heavy until a parity test runs.

::

    import paritykit as pk

    @pk.cases("short", "long-40")
    def test_modules(parity, case):
        parity.check("modules", case)
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from paritykit.case import CaseSet
    from paritykit.engines.process import HostPool
    from paritykit.plan import Plan
    from paritykit.pytest_session import Parity, ParitySession

OPTIONS = {
    "model": "checkpoint folder, hub id or tiny:FAMILY to test",
    "reference": "reference engine (default: hf)",
    "candidate": "candidate engine, or package.module:factory (default: vllm)",
    "dtype": "the candidate's dtype (default: auto, the checkpoint's own)",
    "reference-dtype": "the reference's dtype (default: one precision above the candidate's)",
    "profile": "how long drawn workloads are looked for: ci (default) or deep",
    "map": "TOML file with mapping rules",
    "html": "write an HTML report",
    "jsonl": "write the records of the run",
    "markdown": "write a Markdown summary",
}
REPORTS = ("html", "jsonl", "markdown")
PARTS = pytest.StashKey[Path]()
CASES: pytest.StashKey[list[CaseSet]] = pytest.StashKey()
LINES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """One group, one prefix."""
    group = parser.getgroup("parity", "parity of two engines (ParityKit)")
    for name, text in OPTIONS.items():
        group.addoption(f"--parity-{name}", default=None, help=text)
    group.addoption("--parity-tensor-parallel-size", type=int, default=1, help="ranks of the candidate (default: 1)")
    group.addoption("--parity-local", action="store_true", default=None,
                    help="replay every module in every case (default: in the shortest, where all passes)")  # fmt: skip
    group.addoption("--parity-no-local", action="store_false", dest="parity_local", default=None,
                    help="replay nothing where all passes")  # fmt: skip
    group.addoption("--parity-no-explain", action="store_true", help="replay nothing, and look for no causes")
    group.addoption("--parity-engine-arg", action="append", default=[], metavar="KEY=VALUE",
                    help="argument of the candidate (repeatable)")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Markers, and the name of a folder where every process that tested something leaves its part of the records."""
    config.addinivalue_line("markers", "parity_cases(cases): the cases a parity test needs (set by paritykit.cases)")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    inherited = getattr(config, "workerinput", {}).get("parity_parts")
    config.stash[PARTS] = Path(inherited or f"{tempfile.gettempdir()}/paritykit-parts-{uuid.uuid4().hex}")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Workers of pytest-xdist leave their parts in the controller's folder."""
    node.workerinput["parity_parts"] = str(node.config.stash[PARTS])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All cases any test that was not deselected asks for are captured together, once."""
    config.stash[CASES] = [mark.args[0] for item in items for mark in item.iter_markers("parity_cases")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The controller merges the parts and writes the reports."""
    config = session.config
    if not hasattr(config, "workerinput") and any(config.stash[PARTS].glob("*.jsonl")):
        from paritykit.pytest_session import merge_parts

        wanted = {name: config.getoption(f"--parity-{name}") for name in REPORTS}
        lines, errors = merge_parts(config.stash[PARTS], wanted)
        config.stash[LINES] = lines + errors
        if errors:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A short section: a line for each model, and where the reports are."""
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("parity")
        for line in lines:
            terminalreporter.line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folder of parts."""
    if not hasattr(config, "workerinput") and PARTS in config.stash:
        import shutil

        shutil.rmtree(config.stash[PARTS], ignore_errors=True)


@pytest.fixture(scope="session")
def parity_model(pytestconfig: pytest.Config) -> str:
    """The model under test, from ``--parity-model``. Override it to give your own."""
    model: str | None = pytestconfig.getoption("--parity-model")
    if model is None:
        pytest.fail("give --parity-model, or override the fixture parity_model", pytrace=False)
    return model


@pytest.fixture(scope="session")
def parity_engine(pytestconfig: pytest.Config) -> str | None:
    """The candidate's name, from ``--parity-candidate``; None for the configured one."""
    name: str | None = pytestconfig.getoption("--parity-candidate")
    return name


@pytest.fixture(scope="session")
def parity_plan(parity_model: str, parity_engine: str | None, pytestconfig: pytest.Config) -> Plan:
    """What was asked for on the command line, for this model."""
    from paritykit.pytest_session import plan_from_options, told_briefly

    cases = pytestconfig.stash[CASES]
    with told_briefly():
        return plan_from_options(parity_model, pytestconfig.getoption, cases=cases, candidate=parity_engine)


@pytest.fixture(scope="session")
def parity_hosts() -> Iterator[HostPool]:
    """Processes that engines of several models share, one after the other."""
    from paritykit.engines.process import HostPool

    hosts = HostPool()
    yield hosts
    hosts.stop()


@pytest.fixture(scope="session")
def parity_reference(parity_plan: Plan, parity_hosts: HostPool) -> Any:
    """The reference engine. Override it to give your own."""
    from paritykit.pytest_session import told_briefly

    with told_briefly():
        return parity_plan.reference_engine(parity_hosts.get("reference"))


@pytest.fixture(scope="session")
def parity_candidate(parity_plan: Plan, parity_hosts: HostPool) -> Any:
    """The candidate engine. Override it to put your own under test: ``pk.engine("module", model=...)``."""
    from paritykit.pytest_session import told_briefly

    with told_briefly():
        return parity_plan.candidate_engine(parity_hosts.get("candidate"))


@pytest.fixture(scope="session")
def parity_session(
    parity_plan: Plan,
    parity_reference: Any,
    parity_candidate: Any,
    parity_hosts: HostPool,
    pytestconfig: pytest.Config,
) -> Iterator[ParitySession]:
    """Both engines on all collected cases; what was checked is left as a part of the records at the end."""
    from paritykit.pytest_session import ParitySession, told_briefly

    hosts = {side: getattr(e, "host", None) for side, e in (("r", parity_reference), ("c", parity_candidate))}
    planned = all(host in parity_hosts for host in hosts.values())
    with told_briefly():
        session = ParitySession(
            parity_plan,
            reference=parity_plan.reference(parity_reference, host=hosts["r"])
            if hosts["r"] in parity_hosts
            else parity_reference,
            candidate=parity_candidate,
            hosts=parity_hosts,
            profile=pytestconfig.getoption("--parity-profile"),
            command=None if planned else _command(pytestconfig),
        )
    yield session
    session.finish(pytestconfig.stash[PARTS])


@pytest.fixture
def parity(parity_session: ParitySession, request: pytest.FixtureRequest) -> Parity:
    """``parity.check("modules", case)``: raises ParityFailure, with where and how much, unless the check passes."""
    from paritykit.pytest_session import Parity

    return Parity(parity_session, request.node)


def _command(config: pytest.Config) -> list[str]:
    """How this pytest was started; a worker of pytest-xdist answers for its controller."""
    started = getattr(config, "workerinput", {}).get("mainargv")
    return ["pytest", *(started[1:] if started else map(str, config.invocation_params.args))]
