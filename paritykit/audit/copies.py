"""Rules on weights that are there twice: which copy each engine takes, and whether the copies are equal."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch

import msgspec

from paritykit.audit.folder import Folder
from paritykit.audit.loaders import CONSOLIDATED, INDEX, SINGLE
from paritykit.audit.notice import Notice, Severity, count


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """How two sets of files agree: tensors by the same name that are equal, that differ, that were not compared."""

    equal: list[str] = []
    different: list[str] = []
    unread: list[str] = []
    extra: list[str] = []

    @property
    def same(self) -> bool:
        """Known to be equal, as far as both have the tensor, and there is something to compare."""
        return bool(self.equal) and not self.different and not self.unread

    def __str__(self) -> str:
        """In words, the worst first."""
        said = [
            f"{count(self.different)} by the same name with other values" if self.different else "",
            f"{count(self.unread)} by the same name whose values were not compared" if self.unread else "",
            f"{len(self.equal)} equal" if self.equal else "",
            f"{count(self.extra)} that the others do not have" if self.extra else "",
        ]
        return "; ".join(s for s in said if s) or "no tensor in common"


def overlap(folder: Folder, name: str, others: list[str]) -> Overlap:
    """The tensors of file ``name`` against those of ``others``."""
    found: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    extra = []
    for tensor in folder.files[name].tensors:
        holder = next((o for o in reversed(others) if o != name and tensor in folder.files[o].tensors), "")
        if holder:
            found[folder.same(tensor, name, holder)].append(tensor)
        else:
            extra.append(tensor)
    return Overlap(equal=found[True], different=found[False], unread=found[None], extra=extra)


def twice(folder: Folder) -> Iterator[Notice]:
    """One tensor name in two files that one engine reads."""
    for pair, tensors in _pairs(folder).items():
        same = {t: folder.same(t, *pair) for t in tensors}
        differ = [t for t in tensors if same[t] is False]
        unread = [t for t in tensors if same[t] is None]
        shown = differ or unread or tensors
        said = "with different values" if differ else "not compared" if unread else "with equal values"
        yield Notice(
            code="key-in-two-files",
            severity="error" if differ else "warning",
            place=shown[0],
            message=f"{count(shown)}, in both {pair[0]} and {pair[1]}, {said}",
            hf=_winner(folder.sources(folder.hf).get(shown[0], ""), pair, unordered=False),
            vllm=_winner(folder.sources(folder.vllm).get(shown[0], ""), pair, unordered=folder.vllm.unordered),
            fix="find out which file is right and delete the tensors from the other",
        )


def _pairs(folder: Folder) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for choice in (folder.hf, folder.vllm):
        seen: dict[str, str] = {}
        for name in choice.files:
            for tensor in folder.files[name].tensors if name in folder.files else ():
                if tensor in seen:
                    pair = min(seen[tensor], name), max(seen[tensor], name)
                    tensors = found.setdefault(pair, [])
                    tensors.extend([tensor] if tensor not in tensors else [])
                seen[tensor] = name
    return found


def _winner(source: str, pair: tuple[str, str], *, unordered: bool) -> str:
    if source not in pair:
        return f"reads neither: it takes {source}" if source else "reads neither"
    return "whichever the file system lists last wins" if unordered else f"{source} wins: it is read last"


def unordered_bins(folder: Folder) -> Iterator[Notice]:
    """Pickled files that vLLM picks up because they end in ``.bin``, and transformers does not."""
    if not folder.vllm.files or not folder.vllm.files[0].endswith((".bin", ".pt")):
        return
    for name in folder.vllm.files:
        if name in folder.hf.files or not folder.files[name].tensors:
            continue
        found = overlap(folder, name, [f for f in folder.vllm.files if f != name])
        yield Notice(
            code="stray-bin",
            severity="warning" if found.same and not found.extra else "error",
            place=name,
            message=f"{name} lies beside the weights: {found}",
            hf="does not read it" if not folder.hf.fails else f"fails: {folder.hf.fails}",
            vllm="reads every *.bin in the file system's order, index or not: it may overwrite the right weights",
            fix=f"move {name} out of the folder, or save the weights as safetensors",
        )


def stray_safetensors(folder: Folder) -> Iterator[Notice]:
    """Safetensors beside ``model.safetensors`` without an index: vLLM reads them too."""
    if INDEX in folder.indexes or SINGLE not in folder.hf.files:
        return
    for name in folder.vllm.files:
        if name == SINGLE or fnmatch(name, CONSOLIDATED) or name not in folder.files:
            continue
        found = overlap(folder, name, [SINGLE])
        loses = not found.extra and folder.vllm.files.index(name) < folder.vllm.files.index(SINGLE)
        yield Notice(
            code="stray-safetensors",
            severity="warning" if loses or (found.same and not found.extra) else "error",
            place=name,
            message=f"{name} lies beside {SINGLE} and there is no index: {found}",
            hf="does not read it",
            vllm=f"reads it too, {'before' if loses else 'and where a name is there twice, the last file wins:'} "
            + (SINGLE if loses else folder.vllm.files[-1]),
            fix=f"move {name} out of the folder",
        )


def single_beside_sharded(folder: Folder) -> Iterator[Notice]:
    """``model.safetensors`` and an index of shards: transformers reads the one, vLLM the others."""
    index = folder.indexes.get(INDEX)
    if index is None or index.trouble or SINGLE not in folder.names or SINGLE in index.files:
        return
    found = overlap(folder, SINGLE, [f for f in index.files if f in folder.files])
    lost = [t for t in index.weights if t not in folder.files[SINGLE].tensors]
    equal = found.same and not found.extra and not lost
    yield Notice(
        code="single-beside-sharded",
        severity="warning" if equal else "error",
        place=SINGLE,
        message=f"{SINGLE} lies beside {INDEX}, which lists {len(index.files)} other files: {found}"
        + (f"; {count(lost)} in the shards only" if lost else ""),
        hf=f"reads {SINGLE} and ignores the index",
        vllm="reads the files that the index lists" if folder.vllm.index == INDEX else f"reads {folder.vllm.files[0]}",
        fix="delete the copy that is out of date",
    )


def consolidated(folder: Folder) -> Iterator[Notice]:
    """``consolidated*.safetensors``, which makes vLLM read nothing else."""
    names = [n for n in folder.names if fnmatch(n.rpartition("/")[2], CONSOLIDATED)]
    if not names or not folder.hf.files or set(folder.hf.files) == set(folder.vllm.files):
        return
    found = overlap(folder, names[0], list(folder.hf.files)) if names[0] in folder.files else Overlap()
    lost = [t for t in folder.held(folder.hf) if t not in folder.held(folder.vllm)]
    native = "params.json" in folder.names
    yield Notice(
        code="consolidated-beside-sharded",
        severity=_consolidated_severity(native=native, equal=found.same and not found.extra and not lost),
        place=names[0],
        message=f"{names[0]} lies beside {folder.hf.files[0]}: {found}"
        + ("; params.json is there too" if native else "; there is no params.json"),
        hf=f"reads {', '.join(folder.hf.files[:3])}",
        vllm=f"fails: {folder.vllm.fails}"
        if folder.vllm.fails
        else f"reads {', '.join(folder.vllm.files[:3])} only"
        + (", and params.json instead of config.json" if native else ", with config.json"),
        fix='start vLLM with load_format="safetensors" (and config_format="hf"), or delete the copy that is not meant',
    )


def _consolidated_severity(*, native: bool, equal: bool) -> Severity:
    """Mistral's own releases have both forms with other names, and params.json: that is meant."""
    if native:
        return "note"
    return "warning" if equal else "error"


def bin_beside_safetensors(folder: Folder) -> Iterator[Notice]:
    """Pickled weights that nobody reads, since there are safetensors; older tools take them."""
    ours = set(folder.hf.files) | set(folder.vllm.files)
    kept = [
        f for f in folder.files.values() if f.tensors and not f.name.endswith(".safetensors") and f.name not in ours
    ]
    safe = [f.name for f in folder.files.values() if f.name.endswith(".safetensors") and f.name in ours]
    if not kept or not safe:
        return
    found = [overlap(folder, f.name, safe) for f in kept]
    different = [t for o in found for t in o.different]
    yield Notice(
        code="bin-beside-safetensors",
        severity="warning" if different else "note",
        place=kept[0].name,
        message=f"{len(kept)} pickled files beside safetensors; {kept[0].name}: {found[0]}",
        hf=f"reads {folder.hf.files[0]}" if folder.hf.files else f"fails: {folder.hf.fails}",
        vllm=f"reads {folder.vllm.files[0]}; with load_format='pt' or without the safetensors it would read these",
        fix="delete the pickled files",
    )


RULES = (twice, unordered_bins, stray_safetensors, single_beside_sharded, consolidated, bin_beside_safetensors)
