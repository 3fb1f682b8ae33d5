"""The first screen, deep links, filter, sort, keys and theme, as a reader meets them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.report import runs
from tests.report.conftest import Open

FIRST = "#/point/modules/long-40/model.layers.2.self_attn.o_proj%23input"


def points(page: Any) -> list[str]:
    return page.locator("#body tr.row .point bdi").all_inner_texts()


def statuses(page: Any) -> set[str]:
    return set(page.locator("#body tr.row .status").all_inner_texts())


@pytest.mark.parametrize(
    ("results", "word"),
    [
        (runs.failing_run(), "FAIL"),
        (runs.passing_run(), "PASS"),
        (runs.inconclusive_run(), "INCONCLUSIVE"),
        (runs.nothing_compared(), "NOTHING COMPARED"),
    ],
    ids=["fail", "pass", "inconclusive", "nothing"],
)
def test_the_verdict_is_in_the_title_and_the_heading(open_report: Open, results: Any, word: str) -> None:
    page = open_report(results)
    assert page.title().startswith(word)
    assert page.locator("#verdict").inner_text().startswith(word)
    assert page.locator(".verdict svg.icon").count() == 1


def test_the_first_screen_needs_no_scrolling(open_report: Open) -> None:
    page = open_report(runs.failing_run())
    for name in ("#verdict", "#sides", "#first", "#coverage", "#profile", "#matrix", "#chart canvas"):
        box = page.locator(name).bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 800, name
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_only_rows_that_differ_are_bold(open_report: Open) -> None:
    page = open_report(runs.failing_run())
    bold = page.locator("#sides tr.differs th").all_inner_texts()
    assert [text.split()[0] for text in bold] == [
        "engine",
        "dtype",
        "attention",
        "parallel",
        "transformers",
        "vllm",
        "arg",
    ]


def test_a_deep_link_opens_its_finding(open_report: Open) -> None:
    page = open_report(runs.failing_run(), fragment=FIRST)
    details = page.locator("#details:not([hidden])")
    text = details.inner_text()
    assert "model.layers.2.self_attn.o_proj#input" in text
    assert "3 x noise floor" in text
    assert "PK102 sliding-window" in text
    assert "positions 32-39 of 0-39" in text
    assert details.locator(".spark rect.bad").count() == 8


def test_local_errors_stand_beside_the_others(open_report: Open) -> None:
    page = open_report(runs.replayed_run(), fragment="#/point/modules/long-40/model.layers.3.mlp")
    text = page.locator("#details:not([hidden])").inner_text()
    assert "introduced here (wrong on the reference's own values)" in text
    assert "rel_l2 0.25" in text
    assert "model.layers.3.mlp" in page.locator("#first").inner_text()
    page.goto(page.url.partition("#")[0] + "#/?q=k:modules+c:long-40&sort=-local")
    page.reload()
    assert set(points(page)[:2]) == {"model.layers.2.self_attn.o_proj#input", "model.layers.3.mlp"}
    assert page.locator("#body tr.row .local").first.inner_text() == "0.25"


def test_the_search_and_the_sort_come_back_from_the_address(open_report: Open) -> None:
    page = open_report(runs.failing_run(), fragment="#/?q=k:modules+l:3&sort=-ratio")
    assert page.locator("#search").input_value() == "k:modules l:3"
    assert all(".layers.3." in point for point in points(page))
    assert page.locator("th.ratio").get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize(
    ("query", "amount"),
    [
        ("s:fail", 42),
        ("s:fail o:introduced", 2),
        ("s:fail k:modules c:long-40", 20),
        ("l:2-3 c:short", 22),
        ("k:modules c:short !layers", 3),
        ("s:unmatched", 1),
        ("s:skip,notrun", 2),
        ("m:token_mismatch", 3),
        ("no-such-point", 0),
    ],
)
def test_the_search_language(open_report: Open, query: str, amount: int) -> None:
    page = open_report(runs.failing_run())
    page.fill("#search", query)
    assert page.locator("#shown").inner_text() == f"{amount} of 147 rows"
    assert page.evaluate("location.hash").startswith("#/?q=")


def test_the_parts_of_the_coverage_strip_filter(open_report: Open) -> None:
    page = open_report(runs.failing_run())
    page.click("#coverage [data-status=unmatched]")
    page.wait_for_selector("#coverage [data-status=unmatched][aria-current]")
    assert statuses(page) == {"unmatched"}
    assert "candidate side: reason unknown" in page.locator("#body").inner_text()


def test_a_cell_of_the_matrix_filters(open_report: Open) -> None:
    page = open_report(runs.failing_run())
    page.click("#matrix a.cell[aria-label='modules, long-200: fail']")
    page.wait_for_selector("#shown:has-text('47 of 147 rows')")
    assert page.locator("#search").input_value() == "k:modules c:long-200"
    assert page.locator("#matrix .cell").all_inner_texts() == list("PFFPFF···")


def test_inherited_failures_are_folded_under_their_origin(open_report: Open) -> None:
    page = open_report(runs.failing_run(), fragment="#/?q=s:fail+k:modules")
    assert points(page) == ["model.layers.2.self_attn.o_proj#input"] * 2
    page.locator(".fold").first.click()
    assert len(points(page)) == 2 + 19
    assert page.locator("tr.row.inherited").count() == 19


def test_sorting_by_a_column_goes_down_up_and_away(open_report: Open) -> None:
    page = open_report(runs.failing_run(), fragment="#/?q=k:modules")
    sorts = []
    for _ in range(3):
        page.click("th.value button")
        sorts.append(
            (
                page.locator("th.value").get_attribute("aria-sort"),
                page.locator("#body tr.row td.num").first.inner_text(),
            )
        )
    assert [name for name, _ in sorts] == ["descending", "ascending", "none"]
    assert float(sorts[0][1]) > float(sorts[1][1])


def test_keys(open_report: Open) -> None:
    page = open_report(runs.failing_run())
    page.keyboard.press("f")
    page.wait_for_selector("#details:not([hidden])")
    assert page.evaluate("location.hash") == FIRST
    page.keyboard.press("j")
    page.wait_for_selector("#details[data-point*='long-200']")
    page.keyboard.press("k")
    page.wait_for_selector("#details[data-point*='long-40']")
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("s:pass")
    page.keyboard.press("Enter")
    page.wait_for_selector("#details:not([hidden])")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.locator("#search").input_value() == ""
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


def test_the_theme_toggles_from_what_the_system_says(open_report: Open) -> None:
    page = open_report(runs.failing_run(), color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.keyboard.press("t")
    light = page.evaluate(background)
    page.click("#theme")
    assert (dark, light, page.evaluate(background)) == ("rgb(14, 17, 22)", "rgb(255, 255, 255)", "rgb(14, 17, 22)")


def test_the_chart_opens_a_point_and_has_a_table_twin(open_report: Open) -> None:
    page = open_report(runs.failing_run())
    box = page.locator("#chart .u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 50)
    assert "noise floor" in page.locator("#chart .tip").inner_text()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + 50)
    page.wait_for_selector("#details:not([hidden])")
    page.keyboard.press("Escape")
    page.click("#twin")
    assert page.locator("#search").input_value() == "k:modules c:long-40 m:rel_l2"
    assert points(page)[:2] == ["model.embed_tokens", "model.layers.0.input_layernorm"]


def test_the_first_different_token_is_marked(open_report: Open) -> None:
    page = open_report(runs.failing_run())
    case = page.locator(".tokens[data-case='long-40']")
    assert "first difference at generated token 3 (position 43); 3 of 8 agree" in case.inner_text()
    marked = case.locator("td.first").all_inner_texts()
    assert len(marked) == 2
    assert marked[0] != marked[1]
    assert page.locator(".tokens[data-case='short'] td.first").count() == 0
