"""Rules on names and shapes: the checkpoint against the model that its config describes."""

from __future__ import annotations

from collections.abc import Iterator

from paritykit.audit.defaults import filled
from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice, by_pattern, count


def shapes(folder: Folder) -> Iterator[Notice]:
    """Tensors of another shape than the effective config asks for."""
    model = folder.model
    why = _cause(folder)
    wrong = {m.name: m for m in model.mismatched}
    for names in by_pattern(wrong):
        first = wrong[names[0]]
        yield Notice(
            code="shape-mismatch",
            severity="error",
            place=first.name,
            message=f"{count(names)}: stored as {list(first.stored)}, "
            f"but {model.config_class} makes it {list(first.expected)}{why}",
            hf="refuses to load; with ignore_mismatched_sizes=True it starts with random values",
            vllm="fails while loading, or cuts the tensor to its own shape",
            fix="correct config.json" if why else "compare config.json with the checkpoint it came with",
        )


def _cause(folder: Folder) -> str:
    """Keys that config.json does not give: the likeliest reason for wrong shapes."""
    if folder.model.text_key_missing:
        return "; config.json has no text_config, so all of it was filled with defaults"
    names = filled(folder)
    return f"; config.json does not give {', '.join(names)}, filled with defaults" if names else ""


def text_config(folder: Folder) -> Iterator[Notice]:
    """A model of several parts whose config lacks the part of the language model."""
    model = folder.model
    if not model.text_key_missing:
        return
    yield Notice(
        code="text-config-missing",
        severity="error" if model.mismatched or model.missing or model.refused else "note",
        place="text_config",
        message=f"config.json has no text_config; {model.config_class} filled it with defaults, and "
        f"{len(model.mismatched)} tensors have another shape, {len(model.missing)} are missing",
        hf="builds a model of its default sizes" + (" and fails to load" if model.mismatched else ""),
        vllm="asks the same config class, and fails where shapes differ" if model.mismatched else "does the same",
        fix="write the text_config of the original checkpoint into config.json",
    )


def missing(folder: Folder) -> Iterator[Notice]:
    """Tensors the model needs and the checkpoint lacks; not told of files that cannot be read at all."""
    model = folder.model
    unreadable = any(f.trouble for f in folder.files.values())
    lost = [] if unreadable else [n for n in model.missing if n not in (model.head, model.embedding)]
    for names in by_pattern(lost):
        shape = model.expected[names[0]]
        own = len(model.expected.get(f"{names[0].rpartition('.')[0]}.weight", shape)) == 1
        yield Notice(
            code="missing-tensor",
            severity="error",
            place=names[0],
            message=f"{count(names)} {list(shape)}: not in the checkpoint, but {model.class_name} has it",
            hf="warns and starts with random values, others at each start",
            vllm="refuses: weights were not initialized from the checkpoint"
            if own
            else "loads without a word and computes with what the memory held",
            fix="get the file that holds it, or correct the config if the model should not have it",
        )


def unexpected(folder: Folder) -> Iterator[Notice]:
    """Tensors that the model has no place for."""
    model = folder.model
    for names in by_pattern(model.unexpected):
        shape = list(folder.tensors[names[0]].shape)
        yield Notice(
            code="unexpected-tensor",
            severity="warning",
            place=names[0],
            message=f"{count(names)} {shape}: {model.class_name} has no place for it under this config",
            hf="warns and ignores it",
            vllm="ignores it without a word"
            if names[0].endswith(".bias")
            else "refuses it in most models, or skips it",
            fix="find out what it is for: a switch in config.json (bias, number of layers) may be wrong",
        )


RULES = (shapes, text_config, missing, unexpected)
