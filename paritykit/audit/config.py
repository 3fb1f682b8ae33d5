"""Rules on ``config.json``: is it understood, by both engines, and is every key of it read?"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from paritykit.audit.folder import Folder
from paritykit.audit.notice import Notice
from paritykit.audit.reads import package, transformers_reads, vllm_has_config, vllm_model, vllm_reads

GENERAL = {"architectures", "model_type", "auto_map", "transformers_version", "torch_dtype", "dtype"}
GENERAL |= {"quantization_config", "compression_config", "sub_configs", "transformers.js_config"}


def refused(folder: Folder) -> Iterator[Notice]:
    """A config from which transformers builds no model; what rests on the model was not audited."""
    model = folder.model
    if not model.refused:
        return
    remote = "auto_map" in folder.config
    if model.quantized:
        yield _unchecked("quantized", "the checkpoint is quantized: shapes, names and tying were not audited")
        return
    if model.unknown and remote:
        yield _unchecked("remote-code", "the model comes with its own code, which was not run: shapes were not audited")
        return
    kind = folder.config.get("model_type", "none")
    own = vllm_has_config(str(kind))
    yield Notice(
        code="model-unknown" if model.unknown else "config-refused",
        severity="error",
        place="model_type" if model.unknown else "config.json",
        message=f"transformers builds no model from config.json (model_type {kind!r}): {model.refused}",
        hf="fails to load",
        vllm="has a config class of its own for it" if own else "asks transformers for the config, and fails",
        fix="correct the value it names" if not model.unknown else "install the version of transformers that has it",
    )


def _unchecked(code: str, message: str) -> Notice:
    return Notice(
        code=code,
        severity="note",
        place="config.json",
        message=message,
        hf="loads it if what it needs is installed",
        vllm="loads it if it supports the form",
        fix="none needed; compare the engines' weights instead",
    )


def architecture(folder: Folder) -> Iterator[Notice]:
    """``architectures``, which vLLM goes by, against ``model_type``, which transformers goes by."""
    model, named = folder.model, folder.config.get("architectures")
    names = [str(n) for n in named] if isinstance(named, list) else []
    theirs = [vllm_model(n) for n in names]
    if model.built and names and model.class_name not in names and vllm_model(model.class_name) not in theirs:
        yield Notice(
            code="architecture-mismatch",
            severity="error" if any(module for module, _ in theirs) else "warning",
            place="architectures",
            message=f"architectures says {', '.join(names)}, but model_type {folder.config.get('model_type')!r} "
            f"makes transformers build {model.class_name}",
            hf=f"builds {model.class_name}",
            vllm=f"builds its {theirs[0][1]}" if theirs[0][1] else f"has no {names[0]}",
            fix="make architectures and model_type name one model",
        )
    elif names and package("vllm") and not any(module for module, _ in theirs):
        yield Notice(
            code="architecture-unknown-to-vllm",
            severity="note",
            place="architectures",
            message=f"the installed vLLM has no model of its own for {', '.join(names)}",
            hf="builds it" if model.built else "was not asked",
            vllm="runs transformers' code where it can, or refuses",
            fix="none needed unless a model of its own was expected",
        )


def unread(folder: Folder) -> Iterator[Notice]:
    """Keys that no one reads; one that is nearly the name of a known key is probably misspelt."""
    model = folder.model
    if not model.source:
        return
    known = {*model.known, *model.aliases}
    for key in folder.config:
        if key in GENERAL or key in known or key.startswith("_") or transformers_reads(key, model.source):
            continue
        theirs = vllm_reads(key, tuple(str(a) for a in folder.config.get("architectures") or ()))
        near = get_close_matches(key, [k for k in known if k not in folder.config], n=1, cutoff=0.85)
        if theirs:
            yield _one_side(folder, key)
        else:
            yield _unread(folder, key, near, vllm=theirs is not None)


def _unread(folder: Folder, key: str, near: list[str], *, vllm: bool) -> Notice:
    whom = "neither transformers nor vLLM reads it" if vllm else "transformers does not read it (vLLM is not installed)"
    hint = f"; did you mean {near[0]!r}, which has its default {folder.model.config.get(near[0])!r}?" if near else ""
    return Notice(
        code="config-key-unread",
        severity="warning" if near else "note",
        place=key,
        message=f"config.json gives {key} = {_short(folder.config[key])}, but {whom}{hint}",
        hf="ignores it",
        vllm="ignores it" if vllm else "was not looked at",
        fix=f"rename it to {near[0]}" if near else "delete it, or find out which version reads it",
    )


def _one_side(folder: Folder, key: str) -> Notice:
    return Notice(
        code="config-key-vllm-only",
        severity="note",
        place=key,
        message=f"config.json gives {key} = {_short(folder.config[key])}: vLLM's sources name it, "
        "transformers' for this model do not",
        hf="ignores it",
        vllm="may read it",
        fix="check that both engines are meant to differ here",
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


RULES = (refused, architecture, unread)
