"""What the page must survive: no scripts, an old browser, hostile names, many points, a second build."""

from __future__ import annotations

import re
from typing import Any

import pytest

from paritykit.reports.html.columns import pack
from paritykit.reports.html.render import render
from paritykit.reports.html.rows import rows_of
from tests.report import runs
from tests.report.conftest import Open

HOSTILE = {
    "script": "</script><script>alert(1)</script><img src=x onerror=alert(2)>",
    "template": "{{ 7 * 7 }}</style><!-- <title>",
    "line-ends": "a\u2028b\u2029c\nd\x00e",
    "right-to-left": "\u202e\u05e9\u05dc\u05d5\u05dd\u2066",
    "long": "x" * 5000,
    "quotes": "\"'`&amp;%23/?#",
}


def test_it_reads_without_javascript(open_report: Open) -> None:
    page = open_report(runs.failing_run(), java_script_enabled=False)
    text = page.inner_text("main")
    for said in (
        "FAIL",
        "model.layers.2.self_attn",
        "introduced here",
        "PK102 sliding-window",
        "--check modules --case long-40",
    ):
        assert said in text
    assert page.locator("#body tr.row").count() == 40
    assert page.locator("#body tr.row .point").first.inner_text() == "model.layers.2.self_attn.o_proj#input"
    assert page.locator("#search").is_hidden()
    assert page.locator("#theme").is_hidden()


def test_a_browser_without_its_own_inflater(open_report: Open) -> None:
    page = open_report(runs.failing_run(), before="delete window.DecompressionStream")
    assert page.evaluate("typeof window.DecompressionStream") == "undefined"
    page.keyboard.press("f")
    page.wait_for_selector("#details:not([hidden])")
    assert "cosine_gap" in page.locator("#details").inner_text()


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_stay_text(open_report: Open, name: str) -> None:
    page = open_report(runs.renamed(runs.failing_run(), name))
    page.keyboard.press("f")
    page.wait_for_selector("#details:not([hidden])")
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 4
    shown = page.locator("#details h2").inner_text()
    assert shown.startswith(name[:1] if name.isprintable() else ("a" if name[0] == "a" else "\\u202e"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert not re.search("[\u2028\u202e\u2066]", page.inner_text("#first dl"))


def test_ten_thousand_points(open_report: Open) -> None:
    page = open_report(runs.big_run(10_000))
    assert page.evaluate("document.querySelectorAll('*').length") < 3000
    page.fill("#search", "s:fail")
    page.locator(".fold").first.click()
    page.evaluate("document.querySelector('#viewport').scrollTop = 20000")
    page.wait_for_selector("#body tr.row[aria-rowindex='750']")
    assert page.evaluate("document.querySelectorAll('*').length") < 3000


@pytest.mark.parametrize(("amount", "budget"), [(300, 1_000_000), (10_000, 8_000_000)])
def test_size(amount: int, budget: int) -> None:
    assert len(render(runs.big_run(amount))) <= budget


def test_the_shell_alone_is_small() -> None:
    results = runs.nothing_compared()
    packed = pack(rows_of(results))
    assert len(render(results)) - len(packed.columns) - sum(map(len, packed.chunks)) <= 150_000


def test_too_many_profiles_are_left_out_and_the_page_says_so() -> None:
    page = render(runs.big_run(16_000)).decode()
    assert "the per-position profiles of 14,400 passing findings are left out" in page
    assert "are left out" not in render(runs.failing_run()).decode()


def test_the_same_records_give_the_same_bytes() -> None:
    assert render(runs.failing_run()) == render(runs.failing_run())


@pytest.mark.parametrize("results", [runs.failing_run(), runs.passing_run()], ids=["fail", "pass"])
def test_nothing_points_to_the_network(results: Any) -> None:
    page = render(results).decode()
    # The vendored library's licence line and the two XML namespaces name addresses without asking for them.
    allowed = ("https://github.com/leeoniya/uPlot", "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml")
    found = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert found <= set(allowed)
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//|@import|url\(", page)
