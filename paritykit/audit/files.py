"""Rules on files and indexes: what is damaged, and what the two loaders would read of it."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch

from paritykit.audit.folder import Folder
from paritykit.audit.header import WeightFile
from paritykit.audit.loaders import CONSOLIDATED, INDEX, SINGLE, Choice
from paritykit.audit.notice import Notice, Severity

IGNORED = "does not read it"
FIXES = {
    "pickle-refused": "do not load it in any other way: get the weights as safetensors from someone you trust",
    "pickle-legacy": "save it again as safetensors; its tensors were not audited",
}


def damaged(folder: Folder) -> Iterator[Notice]:
    """Empty, cut, broken, not downloaded, or pickled in a way that must not be run."""
    for file in folder.files.values():
        if not file.trouble:
            continue
        otherwise = "reads it whole, if it is plain" if file.trouble == "pickle-legacy" else "fails to load it"
        yield Notice(
            code=file.trouble,
            severity=_severity(folder, file),
            place=file.name,
            message=f"{file.name}: {file.reason}",
            hf=_fate(folder.hf, file, otherwise),
            vllm=_fate(folder.vllm, file, otherwise),
            fix=FIXES.get(file.trouble, "download it again and compare its size and digest with the source's"),
        )


def _severity(folder: Folder, file: WeightFile) -> Severity:
    used = file.name in folder.hf.files or file.name in folder.vllm.files
    return "error" if used and file.trouble != "pickle-legacy" else "warning"


def _fate(choice: Choice, file: WeightFile, otherwise: str) -> str:
    return otherwise if file.name in choice.files else IGNORED


def holds_nothing(folder: Folder) -> Iterator[Notice]:
    """A file that an engine reads and that holds no tensor by name."""
    for file in folder.files.values():
        if file.tensors or file.trouble or file.name not in (*folder.hf.files, *folder.vllm.files):
            continue
        yield Notice(
            code="no-tensors",
            severity="warning",
            place=file.name,
            message=f"{file.name} ({file.size} bytes) holds no tensor by name",
            hf=_fate(folder.hf, file, "reads it and gets nothing"),
            vllm=_fate(folder.vllm, file, "reads it and gets nothing, or fails on what is no tensor"),
            fix="move it out of the folder if it holds no weights",
        )


def unreadable_index(folder: Folder) -> Iterator[Notice]:
    """An index that is no index, or that lacks the part transformers insists on."""
    for index in folder.indexes.values():
        if index.trouble:
            reads = {side: choice.index == index.name for side, choice in (("hf", folder.hf), ("vllm", folder.vllm))}
            yield Notice(
                code="index-unreadable",
                severity="error" if any(reads.values()) else "warning",
                place=index.name,
                message=f"{index.name} {index.trouble}",
                hf="fails to load" if reads["hf"] else IGNORED,
                vllm="fails to load" if reads["vllm"] else IGNORED,
                fix="write the index again from the shards' headers",
            )
        elif not index.has_metadata:
            yield Notice(
                code="index-without-metadata",
                severity="error" if folder.hf.index == index.name else "note",
                place=index.name,
                message=f"{index.name} has no 'metadata' entry",
                hf="fails with KeyError: 'metadata'" if folder.hf.index == index.name else IGNORED,
                vllm="reads it without" if folder.vllm.index == index.name else IGNORED,
                fix='add "metadata": {} to it',
            )


def lost_files(folder: Folder) -> Iterator[Notice]:
    """Files that an index lists and that are not there, or not where vLLM looks."""
    for index in folder.indexes.values():
        for name in index.files:
            if name in folder.names and "/" not in name:
                continue
            gone = name not in folder.names
            tensors = [t for t, f in index.weights.items() if f == name]
            reads_hf, reads_vllm = folder.hf.index == index.name, folder.vllm.index == index.name
            yield Notice(
                code="index-without-file" if gone else "index-names-subfolder",
                severity="error" if (gone and reads_hf) or reads_vllm else "warning",
                place=name,
                message=f"{index.name} puts {len(tensors)} tensors into {name}, which is "
                + ("not there" if gone else "in a subfolder"),
                hf=("fails: no such file" if gone else "reads it") if reads_hf else "does not read the index",
                vllm="fails: a file of the index is missing" if reads_vllm else "does not read the index",
                fix=f"download {name}" if gone else f"move {name} next to the index",
            )


def lost_keys(folder: Folder) -> Iterator[Notice]:
    """Tensors that an index puts into a file which does not hold them."""
    for index in folder.indexes.values():
        by_file: dict[str, list[str]] = {}
        for tensor, name in index.weights.items():
            if name in folder.files and not folder.files[name].trouble and tensor not in folder.files[name].tensors:
                by_file.setdefault(name, []).append(tensor)
        for name, tensors in by_file.items():
            lost = [t for t in tensors if not set(folder.holders(t)) & set(index.files)]
            yield Notice(
                code="index-without-key",
                severity="error" if lost else "warning",
                place=(lost or tensors)[0],
                message=f"{index.name} puts {len(tensors)} tensors into {name} that it does not hold, "
                f"{len(lost)} of them in no listed file; the first is {(lost or tensors)[0]}",
                hf="starts with random values for it, and warns" if lost else "finds it in another file",
                vllm="loads without it: see missing-tensor" if lost else "finds it in another file",
                fix="get the shard that holds it, or write the index again",
            )


def unlisted_keys(folder: Folder) -> Iterator[Notice]:
    """Tensors of listed files that the index does not name."""
    for index in folder.indexes.values():
        for name in index.files:
            tensors = folder.files[name].tensors if name in folder.files else {}
            if extra := [t for t in tensors if t not in index.weights]:
                yield Notice(
                    code="key-not-in-index",
                    severity="warning",
                    place=extra[0],
                    message=f"{name} holds {len(extra)} tensors that {index.name} does not list, the first {extra[0]}",
                    hf="loads them all the same: it reads all of a listed file",
                    vllm="loads them all the same: it reads all of a listed file",
                    fix="write the index again, or take the tensors out",
                )


def unlisted_files(folder: Folder) -> Iterator[Notice]:
    """Safetensors files that the index leaves out."""
    index = folder.indexes.get(INDEX)
    if index is None or index.trouble:
        return
    for file in _safetensors(folder):
        if file.name in index.files or file.name == SINGLE or fnmatch(file.name, CONSOLIDATED):
            continue
        only = [t for t in file.tensors if t not in folder.tensors]
        yield Notice(
            code="file-not-in-index",
            severity="warning",
            place=file.name,
            message=f"{file.name} ({len(file.tensors)} tensors, {len(only)} of them in no file that is read) "
            f"is not listed in {INDEX}",
            hf="skips it",
            vllm="skips it" if file.name not in folder.vllm.files else "reads it",
            fix=f"delete {file.name}, or list it if its tensors belong to the model",
        )


def no_index(folder: Folder) -> Iterator[Notice]:
    """Several shards and no index: vLLM reads them all, transformers none."""
    names = [f.name for f in _safetensors(folder) if not fnmatch(f.name, CONSOLIDATED)]
    if not names or INDEX in folder.indexes or SINGLE in names:
        return
    reads = f"reads {folder.hf.files[0]} instead" if folder.hf.files else f"fails: {folder.hf.fails}"
    yield Notice(
        code="index-missing",
        severity="error",
        place=names[0],
        message=f"{len(names)} safetensors files, but neither {SINGLE} nor {INDEX}",
        hf=reads,
        vllm=f"reads {', '.join(folder.vllm.files)}",
        fix=f"add {INDEX}" if len(names) > 1 else f"rename {names[0]} to {SINGLE}",
    )


def nothing_to_read(folder: Folder) -> Iterator[Notice]:
    """A folder from which one of the engines cannot load, where no other rule says why."""
    for side, choice, other in (("transformers", folder.hf, folder.vllm), ("vLLM", folder.vllm, folder.hf)):
        told = choice.index or (side == "transformers" and any(True for _ in no_index(folder)))
        if not choice.fails or told:
            continue
        ours, theirs = f"fails: {choice.fails}", f"reads {', '.join(other.files)}" if not other.fails else other.fails
        yield Notice(
            code="nothing-to-read",
            severity="error",
            place=next(iter(other.files or folder.files), "config.json"),
            message=f"{side} finds no weights: {choice.fails}",
            hf=ours if side == "transformers" else theirs,
            vllm=ours if side == "vLLM" else theirs,
            fix=f"save the weights as {SINGLE}",
        )


def _safetensors(folder: Folder) -> list[WeightFile]:
    return [f for f in folder.files.values() if f.name.endswith(".safetensors") and "/" not in f.name]


RULES = (
    damaged,
    holds_nothing,
    unreadable_index,
    lost_files,
    lost_keys,
    unlisted_keys,
    unlisted_files,
    no_index,
    nothing_to_read,
)
