"""Cases of real text: what a tokenizer makes of it, cut to the model, and told where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import paritykit as pk
from paritykit.case import SETS, CaseSet, Written, cases, read_cases
from paritykit.errors import UsageError
from paritykit.models import cases_for, resolve_model, tokenizer_of
from paritykit.passages import PASSAGES, Passage
from paritykit.plan import make_plan
from tests.tokenized import byte_tokenizer, tokenized

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenized(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenized(tmp_path_factory.mktemp("text") / "plain", template=None)


def in_file(tmp_path: Path, *lines: dict[str, Any]) -> CaseSet:
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return cases(file=path)


def text_of(tokens: tuple[int, ...]) -> str:
    return byte_tokenizer().decode(tokens)


def test_the_set_is_of_different_kinds_and_lengths() -> None:
    assert cases("text").ids() == list(PASSAGES) == list(SETS["text"])
    texts = [Passage.tokens(p, Words()) for p in PASSAGES.values()]
    assert [len(t) for t in texts] == sorted(len(t) for t in texts)
    assert len({t[0] for t in texts}) == len(texts)


class Words:
    """A tokenizer of characters, without a template: a chat is plain lines."""

    has_template = False

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def render(self, messages: Any) -> list[int]:
        raise AssertionError("asked for a template that is not there")


@given(name=st.sampled_from(sorted(PASSAGES)), most=st.none() | st.integers(9, 9000))
def test_a_text_is_cut_to_the_model_and_no_shorter(name: str, most: int | None) -> None:
    whole = PASSAGES[name].tokens(Words())
    (case,) = CaseSet([name]).resolve(vocab_size=0x110000, max_positions=most, tokenizer=Words())
    assert list(case.tokens) == whole[: len(case.tokens)]
    assert len(case.tokens) == min(len(whole), (most or 1 << 20) - case.new_tokens)


def test_a_model_with_a_tokenizer_gets_the_texts(folder: Path, tmp_path: Path) -> None:
    found = {c.id: c for c in cases_for(resolve_model(str(folder)), cases("text", "short"))}
    assert list(found) == [*PASSAGES, "short"]
    assert text_of(found["text-numbers"].tokens) == "3,17,51\n-4,1e3,-4000\n99,0.5,"
    assert text_of(found["text-chat"].tokens).startswith("<system>You answer")
    assert text_of(found["text-chat"].tokens).endswith("two minutes earlier?</><assistant>")
    assert text_of(found["text-prose"].tokens).startswith("The Lamp at Harrow Point\n\nWhen")
    assert len(found["text-prose"].tokens) + 8 == 512


def test_the_default_stays_what_it_was(folder: Path) -> None:
    assert [c.id for c in make_plan(str(folder), given={}).resolve_cases()] == list(SETS["smoke"])


def test_a_chat_without_a_template_is_plain_lines(plain: Path) -> None:
    (case,) = cases_for(resolve_model(str(plain)), cases("text-chat"))
    assert text_of(case.tokens).startswith("system: You answer in one short sentence.\nuser: My kettle")


@pytest.mark.parametrize("name", ["text", "text-chat", "text-prose"])
def test_a_model_without_a_tokenizer_is_told(name: str) -> None:
    with pytest.raises(UsageError, match="is text, and this model has no tokenizer; take a case like 'smoke' instead"):
        make_plan("tiny:qwen2", given={}, case_names=[name]).resolve_cases()
    assert tokenizer_of(resolve_model("tiny:qwen2")) is None


def test_lines_of_a_file_are_read_as_the_tokenizer_has_them(folder: Path, tmp_path: Path) -> None:
    found = in_file(
        tmp_path,
        {"id": "a", "tokens": [1, 2]},
        {"id": "b", "text": "né", "new_tokens": 2, "forced": [7], "batch": 1},
        {"id": "c", "messages": HELLO, "new_tokens": 1},
        {"id": "d", "messages": [*HELLO, {"role": "assistant", "content": "Well"}]},
    )
    one, two, three, four = cases_for(resolve_model(str(folder)), found)
    assert one.tokens == (1, 2)
    assert (text_of(two.tokens), two.new_tokens, two.forced, two.batch) == ("né", 2, (7,), 1)
    assert text_of(three.tokens) == "<user>Hello</><assistant>"
    assert text_of(four.tokens) == "<user>Hello</><assistant>Well"
    plan = make_plan(str(folder), given={}, cases_file=tmp_path / "cases.jsonl", case_names=["c"])
    assert plan.resolve_cases() == [three]


def test_text_in_python_meets_the_model_later(folder: Path, tmp_path: Path) -> None:
    found = in_file(tmp_path, {"id": "b", "text": "Hello", "new_tokens": 1})
    assert found.ids() == ["b"]
    capture = pk.capture(pk.engine("nano", str(folder)), cases=found, points=["lm_head"])
    assert text_of(capture.cases["b"].tokens) == "Hello"


@pytest.mark.parametrize(("line", "said"), [
    ({"text": "Hello"}, 'line 1: "text" needs a tokenizer, and this model has none; give "tokens"'),
    ({"messages": HELLO}, 'line 1: "messages" needs a tokenizer, and this model has none'),
])  # fmt: skip
def test_a_line_that_needs_a_tokenizer_says_so(line: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        cases_for(resolve_model("tiny:qwen2"), in_file(tmp_path, {"id": "a", **line}))


@pytest.mark.parametrize(("line", "said"), [
    ({"messages": "Hello"}, r"Expected `array \| null`, got `str` - at `\$.messages`"),
    ({"messages": ["Hello"]}, r"Expected `object`, got `str` - at `\$.messages\[0\]`"),
    ({"messages": [{"role": "user"}]}, r"missing required field `content` - at `\$.messages\[0\]`"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "Expected `str`, got `array`"),
    ({"messages": [{**HELLO[0], "name": "Ann"}]}, "unknown field `name`"),
    ({"messages": []}, 'no "tokens", and "messages" is empty'),
    ({"text": ""}, 'no "tokens", and "text" is empty'),
    ({"text": "a", "tokens": [1]}, '"tokens" and "text" say the same; give one of them'),
    ({"text": "a", "messages": HELLO}, '"text" and "messages" say the same; give one of them'),
])  # fmt: skip
def test_a_line_of_the_wrong_shape_is_named(line: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"cases.jsonl, line 1: .*{said}"):
        in_file(tmp_path, {"id": "a", **line})


def test_a_template_that_is_missing_or_refuses_is_told(folder: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1: the tokenizer of .* has no chat template; give \"text\""):
        cases_for(resolve_model(str(plain)), in_file(tmp_path, {"id": "a", "messages": HELLO}))
    tool = in_file(tmp_path, {"id": "a", "messages": [{"role": "tool", "content": "4"}]})
    with pytest.raises(UsageError, match=r"line 1: the chat template of .* refuses these messages: no tools here"):
        cases_for(resolve_model(str(folder)), tool)


def test_a_tokenizer_that_is_damaged_is_told(tmp_path: Path) -> None:
    damaged = tokenized(tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UsageError, match=r"case 'text-numbers': the tokenizer of .* cannot be loaded"):
        cases_for(resolve_model(str(damaged)), cases("text-numbers"))


def test_ids_beyond_the_vocabulary_are_told(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"case 'text-code': token id .* is outside the vocabulary"):
        CaseSet(["text-code"]).resolve(vocab_size=20, tokenizer=tokenizer_of(resolve_model(str(folder))))


def test_a_written_case_is_one_thing_twice(tmp_path: Path) -> None:
    found = in_file(tmp_path, {"id": "a", "messages": HELLO}).fixed
    again = read_cases(tmp_path / "cases.jsonl")
    assert isinstance(found[0], Written)
    assert len({*found, *again}) == 1
