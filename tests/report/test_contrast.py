"""WCAG AA: text on every background it is used on, in both palettes."""

from __future__ import annotations

import re

import pytest

from paritykit.reports.html.render import HERE

CSS = (HERE / "template" / "report.css").read_text(encoding="utf-8")
BACKGROUNDS = {
    "text": "bg panel raised hover picked fail-bg pass-bg warn-bg soft",
    "muted": "bg panel raised hover picked soft",
    "accent": "bg raised",
    "fail": "fail-bg raised hover picked",
    "pass": "pass-bg raised",
    "warn": "warn-bg raised panel hover picked",
    "skip": "skip-bg",
}
TEXT = [(front, back) for front, backs in BACKGROUNDS.items() for back in backs.split()]
MARKS = [
    *((front, "raised") for front in ("floor", "allowed", "accent", "fail")),
    ("ink", "fail"),
    ("ink", "pass"),
]


def palette(theme: str) -> dict[str, str]:
    selector = r":root \{" if theme == "light" else r':root\[data-theme="dark"\] \{'
    block = re.search(selector + r"(.*?)\n\}", CSS, re.DOTALL)
    assert block is not None
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block[1]))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_formula_knows_black_on_white() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("front", "back"), TEXT)
def test_text_is_readable(theme: str, front: str, back: str) -> None:
    colours = palette(theme)
    assert contrast(colours[front], colours[back]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("front", "back"), MARKS)
def test_marks_are_visible(theme: str, front: str, back: str) -> None:
    colours = palette(theme)
    assert contrast(colours[front], colours[back]) >= 3
