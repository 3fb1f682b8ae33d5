"""JUnit XML: one testcase for each check and case, so that a CI page lists them like tests."""

from __future__ import annotations

import re
from collections import defaultdict
from xml.etree import ElementTree as Xml

from paritykit.reports.alike import TITLE, alike_lines
from paritykit.reports.failure import failure_text, judged
from paritykit.reports.wording import count, shorten, sides, state
from paritykit.results import Finding, Results

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TAGS = {"fail": "failure", "error": "error", "inconclusive": "error", "skip": "skipped"}
_RANK = ("fail", "error", "inconclusive", "pass", "skip")
SHOWN = 20


def render(results: Results) -> bytes:
    """The run as one ``<testsuite>``; inconclusive counts as an error, never as a pass."""
    groups = _groups(results)
    suite = Xml.Element("testsuite", name="paritykit", tests=str(len(groups)))
    for (check, case), findings in groups.items():
        _testcase(suite, check, case, findings)
    if state(results) != "pass" and not suite.findall(".//failure") + suite.findall(".//error"):
        _run_error(suite, results)
    for tag, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(name, str(len(suite.findall(f"./testcase/{tag}"))))
    suite.set("tests", str(len(suite.findall("./testcase"))))
    if results.summary.notes:
        Xml.SubElement(suite, "system-out").text = _clean("\n".join(f"note: {n}" for n in results.summary.notes))
    root = Xml.Element("testsuites")
    root.append(suite)
    Xml.indent(root)
    data: bytes = Xml.tostring(root, encoding="utf-8", xml_declaration=True)
    return data + b"\n"


def _groups(results: Results) -> dict[tuple[str, str], list[Finding]]:
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in results.findings:
        groups[finding.check, finding.case].append(finding)
    seen = {check for check, _ in groups}
    for check in results.run.checks:
        if check not in seen:
            groups[check, ""] = []
    return groups


def _testcase(suite: Xml.Element, check: str, case: str, findings: list[Finding]) -> None:
    node = Xml.SubElement(suite, "testcase", classname=_clean(f"paritykit.{check}"), name=_clean(case or check))
    verdict = min((f.verdict for f in findings), key=_RANK.index, default="skip")
    if verdict in _TAGS:
        _told(node, verdict, findings)
    alike = alike_lines(findings)
    if alike:
        shown = [*alike[:SHOWN], *([f"and {len(alike) - SHOWN:,} more"] if len(alike) > SHOWN else [])]
        Xml.SubElement(node, "system-out").text = _clean("\n".join([TITLE, *shown]))


def _told(node: Xml.Element, verdict: str, findings: list[Finding]) -> None:
    told = [f for f in findings if f.verdict == verdict]
    child = Xml.SubElement(node, _TAGS[verdict], message=_clean(_message(verdict, told, findings)))
    child.text = _clean("\n".join(_line(f) for f in told[:SHOWN]))
    if len(told) > SHOWN:
        child.text += f"\nand {len(told) - SHOWN:,} more"


def _message(verdict: str, told: list[Finding], findings: list[Finding]) -> str:
    if not findings:
        return "not run: no finding was recorded"
    first = min((f for f in told if f.origin == "introduced"), key=lambda f: f.order, default=told[0])
    return f"{verdict}: {len(told):,} of {count(len(findings), 'point')}; first {shorten(first.point, 300)}"


def _line(finding: Finding) -> str:
    parts = [
        shorten(finding.point, 300),
        finding.origin or "",
        finding.metric and f"{finding.metric} {judged(finding)}",
    ]
    return "   ".join(part for part in [*parts, finding.message] if part)


def _run_error(suite: Xml.Element, results: Results) -> None:
    """A run that is not a pass must not look like one, even where no finding carries its verdict."""
    node = Xml.SubElement(suite, "testcase", classname="paritykit", name="run")
    tag = "failure" if state(results) == "fail" else "error"
    child = Xml.SubElement(node, tag, message=_clean(f"{state(results)}: {sides(results)}"))
    child.text = _clean(failure_text(results))


def _clean(text: str) -> str:
    """``text`` without the characters XML 1.0 cannot hold."""
    return _ILLEGAL.sub("�", text)
