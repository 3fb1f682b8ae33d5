"""Which files of a folder each engine reads, and in which order: the rules of their own loaders, restated.

Transformers: ``_get_resolved_checkpoint_files`` of ``modeling_utils``. vLLM: ``DefaultModelLoader._prepare_weights``
with load format ``auto``, and ``weight_utils``. Tests hold both against the libraries on random folders. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch

import msgspec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
CONSOLIDATED = "consolidated*.safetensors"
CONSOLIDATED_INDEX = "consolidated.safetensors.index.json"
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine reads: ``files`` in load order, where the last writer of a tensor wins.

    ``index`` is the index it goes by, ``fails`` why it cannot load, ``unordered`` that the order is the file system's.
    """

    files: tuple[str, ...] = ()
    index: str = ""
    fails: str = ""
    unordered: bool = False


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """An index file: tensor name to file name. ``trouble`` says why it cannot be read."""

    name: str
    weights: dict[str, str] = {}
    has_metadata: bool = True
    trouble: str = ""

    @property
    def files(self) -> list[str]:
        """The files it lists, sorted."""
        return sorted(set(self.weights.values()))


def hf_choice(names: list[str], indexes: Mapping[str, Index]) -> Choice:
    """What transformers reads: one of four names, the first there is, and what an index lists."""
    for name in (SINGLE, INDEX, BIN, BIN_INDEX):
        if name not in names:
            continue
        if name in (SINGLE, BIN):
            return Choice(files=(name,))
        index = indexes[name]
        if index.trouble:
            return Choice(index=name, fails=f"{name} {index.trouble}")
        if not index.has_metadata:
            return Choice(files=tuple(index.files), index=name, fails=f"{name} has no 'metadata'")
        if lost := [f for f in index.files if f not in names]:
            return Choice(files=tuple(index.files), index=name, fails=f"{name} lists {lost[0]}, which is not there")
        return Choice(files=tuple(index.files), index=name)
    return Choice(fails=f"there is no {SINGLE}, {INDEX}, {BIN} or {BIN_INDEX}")


def vllm_choice(names: list[str], indexes: Mapping[str, Index]) -> Choice:
    """What vLLM reads: everything that matches a pattern, less what an index leaves out.

    ``names`` are relative to the folder; those of subfolders count only where vLLM looks for ``consolidated`` files.
    """
    top = [n for n in names if "/" not in n and not n.startswith(".")]
    if any(fnmatch(n.rpartition("/")[2], CONSOLIDATED) for n in names):
        return _safetensors([n for n in top if fnmatch(n, CONSOLIDATED)], CONSOLIDATED_INDEX, indexes, CONSOLIDATED)
    if found := [n for n in top if n.endswith(".safetensors")]:
        return _safetensors(found, INDEX, indexes, "*.safetensors")
    for ending in (".bin", ".pt"):
        if found := [n for n in top if n.endswith(ending)]:
            kept = tuple(sorted(n for n in found if not n.endswith(NOT_WEIGHTS)))
            return Choice(files=kept, unordered=len(kept) > 1, fails="" if kept else "no file holds weights")
    return Choice(fails="there is no *.safetensors, *.bin or *.pt file")


def _safetensors(found: list[str], name: str, indexes: Mapping[str, Index], pattern: str) -> Choice:
    if not found:
        return Choice(fails=f"{pattern} exists in a subfolder only, but makes vLLM look for nothing else")
    ordered = tuple(sorted(found, key=natural))
    index = indexes.get(name)
    if index is None:
        return Choice(files=ordered)
    if index.trouble:
        return Choice(index=name, fails=f"{name} {index.trouble}")
    if lost := [f for f in index.files if f not in found]:
        return Choice(files=tuple(index.files), index=name, fails=f"{name} lists {lost[0]}, which is not in the folder")
    kept = tuple(f for f in ordered if f in index.files)
    return Choice(files=kept, index=name, fails="" if kept else f"{name} lists no file")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by value.

    >>> sorted(["m-10", "m-9"], key=natural)
    ['m-9', 'm-10']
    """
    return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"(\d+)", name)]
