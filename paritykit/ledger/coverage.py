"""What is missing, and what arrived more than once: both ways between checkpoint and parameters. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from paritykit.ledger.problem import Problem, boxes_text, on_rank, size_of
from paritykit.ledger.subject import WeightSubject
from paritykit.provenance.cells import Cells
from paritykit.provenance.weightmap import Spans, show, size


def unread(subject: WeightSubject) -> Iterator[Problem]:
    """Checkpoint elements that landed on no rank: of whole tensors, then of parts."""
    yield from lost(subject)
    for name in (n for n in _known(subject) if n in subject.by_tensor):
        cells = Cells((x.source for x in subject.by_tensor[name]), subject.shape(name))
        missing = cells.counts == 0
        if missing.any():
            count = cells.elements(missing)
            where = boxes_text(cells.where(missing), subject.shape(name))
            text = f"{name}{where} {'landed on no rank' if subject.ranks > 1 else 'did not arrive'} ({count} elements)"
            yield Problem(code="unread", name=name, message=text, elements=count)


def lost(subject: WeightSubject) -> Iterator[Problem]:
    """Checkpoint tensors that landed on no rank."""
    for name in (n for n in _known(subject) if n not in subject.by_tensor):
        handed, shape = name in subject.found.tensors, subject.expected.tensors[name][0]
        how = "was handed to the loader and ignored" if handed else "was not even read by the loader"
        yield Problem(code="unread", name=name, message=f"{name} {how}", elements=size_of(shape))


def _known(subject: WeightSubject) -> list[str]:
    """Tensors of which it is known where they landed: not the scattered ones, nor those that were not followed."""
    scattered = {g.tensor for g in subject.gaps if g.kind == "scattered"} | subject.unfollowed.keys()
    return [name for name in subject.expected.tensors if name not in scattered]


def unwritten(subject: WeightSubject) -> Iterator[Problem]:
    """Parameter elements that the loader never wrote, or wrote with something that is no weight."""
    for gap in subject.gaps:
        info = subject.parameters[gap.parameter, gap.rank]
        place = f"{gap.parameter}{show(gap.target, info.shape)}{on_rank(subject, gap.rank)}"
        padding = subject.ledgers[gap.rank].padding.get(gap.parameter)
        if gap.kind == "unfollowed" or (gap.kind == "unwritten" and info.buffer):
            continue
        if gap.kind == "constant" and padding and gap.value == 0 and gap.target[0].low >= padding[0]:
            continue
        told = {
            "unwritten": f"{place} is never written: it holds whatever was in memory",
            "constant": f"{place} is set to {gap.value} whatever the checkpoint holds",
            "unknown": f"{place} holds values made from the checkpoint in a way that was not recognised",
            "scattered": f"{place} holds elements of {gap.tensor} in no regular order",
        }[gap.kind]
        code = {"unknown": "changed", "scattered": "wrong-order"}.get(gap.kind, gap.kind)
        yield Problem(
            code=code, name=gap.tensor or gap.parameter, message=told, elements=size(gap.target), rank=gap.rank
        )


def written_twice(subject: WeightSubject) -> Iterator[Problem]:
    """A tensor handed over more than once: the last copy stays, and nobody chose which that is."""
    for name, info in subject.found.tensors.items():
        if info.copies > 1:
            kept = sorted({x.copy for x in subject.by_tensor.get(name, [])})
            last = f"copy {kept[-1] + 1}" if kept else "none"
            text = f"the loader is handed {info.copies} tensors named {name}, and {last} of them stays"
            yield Problem(code="written-twice", name=name, message=text, elements=size_of(info.shape))


def wrong_source(subject: WeightSubject) -> Iterator[Problem]:
    """A parameter filled from a tensor that is declared for another one, or one tensor in two parameters."""
    layout = subject.expected.reference
    for name, landings in subject.by_tensor.items():
        for rank in range(subject.ranks):
            places = list(dict.fromkeys(x.parameter for x in landings if x.rank == rank))
            if len(places) > 1 and _overlap(subject, name, (x.source for x in landings if x.rank == rank)):
                ends = {layout.embedding, layout.head} if layout else set()
                code = "tied-wrongly" if name in ends else "written-twice"
                why = "; the config does not tie them" if code == "tied-wrongly" and layout and not layout.tied else ""
                if code == "tied-wrongly" and layout and layout.tied:
                    continue
                text = f"{name} fills {' and '.join(places)}{on_rank(subject, rank)}{why}"
                yield Problem(code=code, name=name, message=text, elements=size_of(subject.shape(name)), rank=rank)


def written_apart(subject: WeightSubject) -> Iterator[Problem]:
    """A tensor in one parameter on some rank and in another on others: a stage with another's layer, say."""
    layout = subject.expected.reference
    shared = {layout.embedding, layout.head} if layout and layout.tied else set()
    for name, landings in subject.by_tensor.items():
        homes = {x.parameter: x.rank for x in reversed(landings)}
        boxes = [source for _, source in {(x.parameter, x.source) for x in landings}]
        if name in shared or len({*homes.values()}) < 2 or not _overlap(subject, name, boxes):
            continue
        places = (f"{p}{on_rank(subject, rank)}" for p, rank in sorted(homes.items()))
        text = f"{name} fills {' and '.join(places)}"
        yield Problem(code="written-twice", name=name, message=text, elements=size_of(subject.shape(name)))


def _overlap(subject: WeightSubject, name: str, sources: Iterable[Spans]) -> bool:
    return bool((Cells(sources, subject.shape(name)).counts > 1).any())


def ties(subject: WeightSubject) -> Iterator[Problem]:
    """Head and embedding share memory though the config unties them, or the reverse."""
    layout = subject.expected.reference
    if layout is None or not layout.embedding:
        return
    homes = {x.parameter for x in subject.by_tensor.get(layout.embedding, [])}
    heads = {x.parameter for x in subject.by_tensor.get(layout.head, [])}
    shared = [a for home in sorted(homes | heads) for a in subject.aliases.get(home, [])]
    own = {h for h in heads - homes if h not in subject.aliases}
    if shared and not layout.tied and layout.head in subject.expected.tensors:
        text = f"{shared[0]} shares the memory of the embedding, but the config has tie_word_embeddings false"
        yield Problem(code="tied-wrongly", name=layout.head, message=text, elements=size_of(subject.shape(layout.head)))
    if own and layout.tied:
        text = f"{sorted(own)[0]} is loaded from {layout.head}, but the config ties it to the embedding"
        yield Problem(code="untied-wrongly", name=layout.head, message=text)
