"""One plan of several runs in the same mode, for forwards that go several ways."""

from __future__ import annotations

from torch_ext.prepare.insertion.plan import CallPlan, FunctionPlan, Read


def merge_calls(into: CallPlan, other: CallPlan) -> None:
    """Adds what another run did in the same call; ``other`` is used up.

    Raises ValueError if the runs read the same place through different quantizers.
    """
    _merge_reads(into.reads, other.reads, f'"{into.module}"')
    into.output = into.output or other.output
    into.expected = tuple(sorted({*into.expected, *other.expected}))
    into.reads_inside = into.reads_inside or other.reads_inside
    for line, calls in other.lines.items():
        known = into.lines.setdefault(line, [])
        for i, call in enumerate(calls):
            if i == len(known):
                known.append(call)
            else:
                known[i] = _merged(known[i], call, line)
    for name, children in other.children.items():
        known_children = into.children.setdefault(name, [])
        for i, child in enumerate(children):
            if i == len(known_children):
                known_children.append(child)
            else:
                merge_calls(known_children[i], child)


def _merged(
    known: FunctionPlan | None, other: FunctionPlan | None, line: str
) -> FunctionPlan | None:
    if known is None or other is None:
        return known or other
    _merge_reads(known.reads, other.reads, line)
    return known


def _merge_reads(known: list[Read], others: list[Read], where: str) -> None:
    places = {(read.place, read.item): read for read in known}
    for other in others:
        read = places.get((other.place, other.item))
        if read is None:
            known.append(other)
            continue
        if read.quantizer != other.quantizer:
            raise ValueError(
                f"prepare_qat: expected every example to read the same at {where}, got "
                f"{read.quantizer} and {other.quantizer}; give the module qconfig=None"
            )
        read.memo = read.memo or other.memo
        read.observes = read.observes or other.observes
