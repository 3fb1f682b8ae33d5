"""The weights page: where each tensor landed, what went wrong with it, and what fills a fused parameter."""

from __future__ import annotations

import io
import random
import re
from typing import Any

import msgspec
import pytest
from rich.console import Console

from paritykit.reports.html.render import render
from paritykit.reports.html.strips import strips_of
from paritykit.reports.landings import grouped
from paritykit.reports.markdown import render as markdown
from paritykit.reports.weights import weight_tree
from paritykit.results import Results, WeightRow
from tests.report import runs
from tests.report.conftest import Open
from tests.report.test_contrast import contrast, palette
from tests.report.test_robust import HOSTILE

CLEAN, LOST = runs.weights_run(), runs.weights_run(lost=True)
LINES = "#weights-body tr[aria-level]"


def open_weights(open_report: Open, results: Results, *, state: str = "", **options: Any) -> Any:
    page = open_report(results, fragment=f"#/weights{state}", **options)
    page.wait_for_selector("#weights-tree[data-drawn]")
    return page


def labels(page: Any) -> list[str]:
    """The names in the tree, in order, as text."""
    return page.locator(f"{LINES} .tensor").evaluate_all(
        "cells => cells.map((c) => (c.querySelector('bdi') ?? c.querySelector('i')).textContent)"
    )


def counts(page: Any) -> list[str]:
    return [" ".join(part.split()) for part in page.locator(".weights .part").all_inner_texts()]


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.querySelector?.('.tensor bdi, .tensor i')?.textContent ?? ''")


def cells(page: Any, label: str) -> list[str]:
    """The texts of the first line with this name; the multiplication sign as an x."""
    row = page.locator(LINES, has=page.locator(f"bdi:text-is('{label}')")).first
    return [
        " ".join(text.split()).replace("\N{MULTIPLICATION SIGN}", "x") for text in row.locator("td").all_inner_texts()
    ]


def test_a_run_without_weights_has_no_such_page(open_report: Open) -> None:
    page = open_report(runs.failing_run(), fragment="#/weights")
    assert page.locator(".views, .weights, #data-weights").count() == 0
    assert "weights" not in render(runs.failing_run()).decode().lower()
    assert page.locator("#findings").is_visible()


def test_the_page_is_reached_and_left_by_its_tab(open_report: Open) -> None:
    page = open_report(LOST)
    assert page.locator(".weights").is_hidden()
    assert page.locator(".views b").inner_text().startswith("2")
    page.click(".views a:has-text('Weights')")
    page.wait_for_selector("#weights-tree[data-drawn]")
    assert page.evaluate("location.hash") == "#/weights"
    assert page.locator("#findings").is_hidden()
    assert page.locator("#verdict").is_visible()
    assert page.locator(".views [aria-current]").inner_text().startswith("Weights")
    assert page.evaluate("scrollY") == 0
    page.click(".views a:has-text('Overview')")
    page.wait_for_selector("#findings", state="visible")
    assert page.locator(".weights").is_hidden()


def test_what_is_wrong_comes_first_and_open(open_report: Open) -> None:
    page = open_weights(open_report, LOST)
    assert labels(page)[:4] == ["model", "layers", "2.self_attn", "k_proj.weight"]
    assert cells(page, "k_proj.weight")[:4] == ["k_proj.weight", "unread", "", "nowhere"]
    assert cells(page, "qkv_proj.weight")[:4] == ["qkv_proj.weight", "unwritten", "", "filled by nothing"]
    told = page.locator("#weights-body .told.wrong")
    assert told.count() == 2
    assert runs.LOST_MESSAGE in told.first.inner_text()
    assert told.first.bounding_box()["y"] < 800
    assert counts(page)[4:] == ["1 unread", "1 unwritten"]
    told.first.locator("a").click()
    page.wait_for_selector("#details:not([hidden])")
    assert runs.LOST_MESSAGE in page.locator("#details").inner_text()


def test_a_clean_run_shows_nothing_wrong(open_report: Open) -> None:
    page = open_weights(open_report, CLEAN)
    assert page.locator(".weights .wrong, .weights .told, .views b, .weights a.part").count() == 0
    assert counts(page) == ["37 tensors", "392,352 elements", "2 ranks", "37 landed", "0 problems"]
    page.check("#weights-wrong")
    assert page.locator("#weights-body").inner_text().strip() == "Nothing is wrong with any weight."


def test_layers_and_experts_alike_are_one_branch(open_report: Open) -> None:
    page = open_weights(open_report, CLEAN)
    assert "layers.{0-3}" in labels(page)
    assert "mlp.experts.{0-1}" in labels(page)
    page.check("#weights-apart")
    assert page.evaluate("location.hash") == "#/weights?apart=1"
    assert "layers.{0-3}" not in labels(page)
    assert {"0", "1", "2", "3"} <= set(labels(page))


def test_a_landing_tells_slice_parameter_rank_change_and_dtype(open_report: Open) -> None:
    page = open_weights(open_report, CLEAN)
    layers = cells(page, "input_layernorm.weight")
    assert layers == ["input_layernorm.weight x4", "pass", "[:]", "same name", "[:]", "0-1", "+1", "96", "bfloat16"]
    w3 = cells(page, "w3.weight")
    assert w3 == ["▾ w3.weight x8", "pass", "…", "w13_weight", "[*, 64:128, :]", "0-1", "", "12,288", "bfloat16"]
    assert cells(page, "o_proj.weight")[6] == "transposed"
    ranks = page.locator(f"{LINES}:has(bdi:text-is('o_proj.weight')) + tr + tr td").all_inner_texts()
    assert ranks == ["rank 1", "pass", "[64:128, :]", "same name", "[:, :]", "1", "transposed", "6,144", "bfloat16"]


FILTERS = {
    "k_proj": 4,
    "layers.2 k_proj": 1,
    "layers.{0-3} o_proj": 4,
    "s:unread": 1,
    "transposed": 4,
    "!s:pass": 2,
    "k_proj !layers": 0,
}


def test_the_filter(open_report: Open) -> None:
    page = open_weights(open_report, LOST)
    for query, found in FILTERS.items():
        page.fill("#weights-search", query)
        assert page.locator("#weights-shown").inner_text() == f"{found} of 38 names", query
        assert page.evaluate("location.hash").startswith("#/weights?q=")


def test_part_of_what_is_alike_is_shown_by_its_own_name(open_report: Open) -> None:
    page = open_weights(open_report, CLEAN, state="?q=layers.1+q_proj")
    assert page.locator("#weights-search").input_value() == "layers.1 q_proj"
    assert labels(page)[:2] == ["model.layers.1.self_attn", "q_proj.weight"]
    page.keyboard.press("Escape")
    assert "layers.{0-3}" in labels(page)
    assert page.evaluate("location.hash") == "#/weights"


def test_a_problem_kind_filters(open_report: Open) -> None:
    page = open_weights(open_report, LOST)
    page.click(".weights [data-kind=unwritten]")
    page.wait_for_selector(".weights [data-kind=unwritten][aria-current]")
    assert labels(page) == ["model.layers.2.self_attn", "qkv_proj.weight"]
    page.check("#weights-wrong")
    page.fill("#weights-search", "")
    assert [name for name in labels(page) if name.endswith("weight")] == ["k_proj.weight", "qkv_proj.weight"]


def test_keys_move_in_the_tree_and_fold_it(open_report: Open) -> None:
    page = open_weights(open_report, CLEAN)
    assert page.locator("#weights-tree").get_attribute("role") == "treegrid"
    assert page.locator("#weights-body tr[tabindex='0']").count() == 1
    page.keyboard.press("j")
    assert focused(page) == "embed_tokens.weight"
    page.keyboard.press("ArrowLeft")
    assert page.locator("tr:focus").get_attribute("aria-expanded") == "false"
    page.keyboard.press("ArrowLeft")
    assert focused(page) == "model"
    page.keyboard.press("ArrowLeft")
    assert labels(page) == ["model"]
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    assert focused(page) == "embed_tokens.weight"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert focused(page) == "rank 0"
    page.keyboard.press("End")
    assert focused(page) == labels(page)[-1]
    page.keyboard.press("Home")
    page.keyboard.press("/")
    page.keyboard.type("q_proj")
    assert page.evaluate("document.activeElement.id") == "weights-search"
    assert page.locator("#weights-shown").inner_text() == "4 of 37 names"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert "weights page" in page.locator("#help").inner_text()


def test_the_chart_and_the_first_divergence_after_a_visit(open_report: Open) -> None:
    results = msgspec.structs.replace(runs.failing_run(), weights=runs.landed())
    page = open_weights(open_report, results)
    page.keyboard.press("f")
    page.wait_for_selector("#details:not([hidden])")
    assert page.locator("#chart .u-over").bounding_box()["width"] > 300
    assert page.locator("#body tr.row").count() > 10


def widths(page: Any, name: str, lane: int) -> dict[str, float]:
    parts = page.locator(f".fused:has(bdi:text-is('{name}')) .lane").nth(lane).locator("li")
    return {li.inner_text().split()[0]: round(li.bounding_box()["width"]) for li in parts.all()}


def test_a_fused_parameter_is_drawn_in_proportion(open_report: Open) -> None:
    page = open_weights(open_report, CLEAN)
    parts = widths(page, "model.layers.{0-3}.self_attn.qkv_proj.weight", 1)
    assert list(parts) == ["q_proj", "k_proj", "v_proj"]
    assert parts["q_proj"] == pytest.approx(2 * parts["k_proj"], abs=4)
    names = page.locator(".fused figcaption").all_inner_texts()
    assert "model.layers.{0-3}.mlp.experts.w13_weight[0-1]" in names
    assert page.locator(".fused .unwritten").count() == 0


def test_gaps_of_a_parameter_are_told_from_padding() -> None:
    strips, _ = strips_of(LOST.weights)
    assert (strips[0].name, strips[0].wrong) == (runs.EMPTY, True)
    assert [(p.kind, p.percent) for p in strips[0].bars[0].parts] == [
        ("tensor", 50), ("unwritten", 25), ("tensor", 25)]  # fmt: skip
    padded = next(s for s in strips if s.name == "model.embed_tokens.weight")
    assert [[p.kind for p in bar.parts] for bar in padded.bars] == [["tensor"], ["tensor", "padding"]]
    assert padded.bars[1].parts[0].percent == pytest.approx(100 * 243 / 256, abs=0.01)
    assert not any(s.wrong for s in strips_of(CLEAN.weights)[0])


def test_a_lost_last_part_has_the_size_that_other_layers_show() -> None:
    rows = [r for r in CLEAN.weights if not r.tensor.endswith("layers.2.self_attn.v_proj.weight")]
    rows.append(WeightRow(parameter=runs.EMPTY, elements=6144, status="unwritten"))
    assert [p.percent for p in strips_of(rows)[0][0].bars[0].parts] == [50, 25, 25]


def test_it_reads_without_javascript(open_report: Open) -> None:
    page = open_report(LOST, fragment="#/weights", java_script_enabled=False)
    text = page.locator(".weights").inner_text()
    for said in (runs.LOST_MESSAGE, "unwritten", "model.layers.{0-3}.self_attn.o_proj.weight", "need JavaScript"):
        assert said in text
    assert counts(page)[3:] == ["36 landed", "1 unread", "1 unwritten"]
    assert page.locator("#weights-body tr .tensor").first.inner_text() == runs.LOST
    assert page.evaluate("document.querySelector('.weights').getBoundingClientRect().top") < 400
    assert page.locator("#weights-search").is_hidden()
    assert page.locator(".fused.wrong .unwritten").count() == 2


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("share", [0.14, 0.26])
def test_the_text_of_a_part_is_readable(theme: str, share: float) -> None:
    colours = palette(theme)
    channels = [
        round(share * int(colours["accent"][i : i + 2], 16) + (1 - share) * int(colours["raised"][i : i + 2], 16))
        for i in (1, 3, 5)
    ]
    assert contrast(colours["text"], "#" + "".join(f"{c:02x}" for c in channels)) >= 4.5


def test_it_is_dark_where_the_system_is(open_report: Open) -> None:
    page = open_weights(open_report, LOST, color_scheme="dark")
    colour = "getComputedStyle(document.querySelector('{}')).{}".format
    assert page.evaluate(colour("#weights-tree th", "backgroundColor")) == "rgb(21, 26, 33)"
    assert page.evaluate(colour("#weights-body .wrong .status", "color")) == "rgb(255, 146, 136)"


def test_a_narrow_screen_scrolls_the_table_and_not_the_page(open_report: Open) -> None:
    page = open_weights(open_report, LOST)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#weights-body .told div").first.bounding_box()
    assert box["x"] + box["width"] <= 390


def hostile(name: str) -> list[WeightRow]:
    row = runs.landed(layers=1)[0]
    row = msgspec.structs.replace(row, parameter=name, source=name, target=name, change=name, dtype=name)
    bad = msgspec.structs.replace(row, status=name, message=name, rank=1)
    names = (name, f"model.{name}.0.weight", f"model.{name}.1.weight", f"__proto__.{name}.constructor", name * 2)
    return [*(msgspec.structs.replace(row, tensor=n) for n in names), msgspec.structs.replace(bad, tensor=name + "!")]


def test_hostile_names_stay_text(open_report: Open) -> None:
    names = [*HOSTILE.values(), "9" * 5000, "a.*.{}.b", "." * 3000]
    results = runs.with_weights([row for name in names for row in hostile(name)])
    page = open_weights(open_report, results, state="?q=!no-such-name&apart=1")
    assert page.locator("#weights-shown").inner_text() == f"{6 * len(names)} of {6 * len(names)} names"
    assert page.locator(LINES).count() > 60
    assert page.locator(".weights img, .weights script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert not re.search("[\u2028\u202e\u2066]", page.locator(".weights").inner_text())
    for name in ("onerror=alert(2)", "__proto__", "\u05e9\u05dc", "%23/?#", "9" * 5000, "*"):
        page.fill("#weights-search", name)
        assert page.locator(LINES).count() > 0, name
    table = [line for line in markdown(results).decode().splitlines() if line.startswith("|")]
    assert "<" not in "".join(table)


def test_twenty_thousand_rows(open_report: Open) -> None:
    rows = runs.landed(layers=590, experts=6)[:20_000]
    lost = [msgspec.structs.replace(r, status="wrong-order", message=f"{r.tensor} is reversed") for r in rows[::97]]
    rows[::97] = lost
    assert len(rows) == 20_000
    results = msgspec.structs.replace(CLEAN, weights=rows)
    assert len(render(results)) < 1_500_000
    page = open_weights(open_report, results)
    took = page.evaluate("performance.now()")
    assert page.evaluate("document.querySelectorAll('*').length") < 3000
    page.check("#weights-apart")
    page.click("#weights-body .more button")
    assert took < 2000
    page.fill("#weights-search", "layers.540 q_proj")
    assert page.locator("#weights-shown").inner_text().startswith("1 of ")


def test_rows_that_have_nothing_in_common_stay_small() -> None:
    rng = random.Random(7)
    rows = [
        msgspec.structs.replace(r, source=f"[{rng.randrange(9999)}, :]", elements=rng.randrange(10**6))
        for r in runs.landed(layers=590, experts=6)[:20_000]
    ]
    assert len(render(msgspec.structs.replace(CLEAN, weights=rows))) < 1_500_000


def test_the_same_records_give_the_same_bytes() -> None:
    assert render(LOST) == render(runs.weights_run(lost=True))


def test_groups_that_would_have_one_name_are_all_kept() -> None:
    places = {(0, 0): "[0:2]", (1, 1): "[0:2]", (0, 1): "[2:4]", (1, 0): "[2:4]"}
    rows = [WeightRow(tensor=f"l.{a}.e.{b}.w", parameter="p", target=t) for (a, b), t in places.items()]
    found = grouped(rows)
    assert [g.name for g in found] == ["l.{0-1}.e.{0-1}.w"] * 2
    assert sum(len(g.tensors) for g in found) == 4
    console = Console(file=io.StringIO(), width=100)
    console.print(weight_tree(rows))
    assert "[0:2]" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "[2:4]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_markdown_lists_what_is_wrong_and_no_more_than_thirty() -> None:
    text = markdown(LOST).decode()
    assert "### 2 wrong landings of weights" in text
    assert f"| unread | `{runs.LOST}` | - | - | - | - |" in text
    assert "landings of weights" not in markdown(CLEAN).decode()
    rows = [msgspec.structs.replace(r, status="wrong-order") for r in CLEAN.weights[:40]]
    table = markdown(msgspec.structs.replace(CLEAN, weights=rows)).decode()
    assert table.count("| wrong-order |") == 30
    assert "| 10 more |" in table
