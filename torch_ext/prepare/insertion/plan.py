"""What is read quantized where: made once by ``prepare_qat``, not changed afterwards.

A tree over the calls of modules in an observed run, for each of train and eval mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from torch_ext.prepare.insertion.operations import JOINS, PAIRS
from torch_ext.utils.arguments import Structures


class Read:
    """One tensor that goes through a quantizer before it is used."""

    axis: int | None = None  # where groups lie, for a quantizer with dynamic scales

    def __init__(
        self, place: int | str, item: int, name: str, memo: str, quantizer: str, observes: bool
    ) -> None:
        """
        Args:
            place: position among the positional arguments, or a keyword.
            item: position in the argument, where that is a list of tensors; else -1.
            name: of the argument, for a module's call, which may give it either way; else "".
            memo: the same for all reads of one tensor in a run; empty if it is read once.
            quantizer: its name in the model.
            observes: whether the quantizer observes here; a value is observed once.
        """
        self.place, self.item, self.name, self.memo = place, item, name, memo
        self.quantizer, self.observes = quantizer, observes


class FunctionPlan:
    """What one call of a function reads quantized, and whether its result is."""

    def __init__(self, in_place: bool, required: bool = True) -> None:
        """``required``: whether a call of the module in which it does not happen raises."""
        self.in_place, self.required = in_place, required
        self.reads: list[Read] = []
        self.output: Read | None = None

    def as_optional(self) -> FunctionPlan:
        made = FunctionPlan(self.in_place, required=False)
        made.reads, made.output = self.reads, self.output
        return made

    def all_reads(self) -> list[Read]:
        """Those of operands, and that of the result."""
        return self.reads if self.output is None else [*self.reads, self.output]


class CallPlan:
    """One call of one module."""

    def __init__(self, module: str, training: bool) -> None:
        self.module = module
        self.training = training
        self.free = False  # functions in it are not looked at
        self.loose = False  # random numbers decide which functions it calls
        self.repeats = False  # how often it is called depends on data
        self.reads: list[Read] = []  # of its arguments
        self.output: Read | None = None
        # A function's name and the lines that lead to it; for each call None, or its reads.
        self.lines: dict[str, list[FunctionPlan | None]] = {}
        # Those that may come by any number of times, as data decides; one plan stands for all.
        self.repeating: dict[str, bool] = {}
        self.children: dict[str, list[CallPlan]] = {}
        self.expected: tuple[int, ...] = (0,)  # how many calls of functions that have reads
        self.reads_inside = False
        self.twin: CallPlan | None = None  # the same call in the other mode

    def add_function_call(self, line: str) -> int:
        calls = self.lines.setdefault(line, [])
        calls.append(None)
        return len(calls) - 1

    def finish(self, functions: frozenset[str]) -> None:
        """Keeps the lines of ``functions``, those that have a site somewhere, and counts."""
        self.lines = {k: v for k, v in self.lines.items() if k.partition(" ")[0] in functions}
        self.repeating = {k: True for k in self.repeating if k in self.lines}
        for line in self.repeating:
            some = next((call for call in self.lines.get(line, []) if call is not None), None)
            self.lines[line] = [some and some.as_optional()]
        planned = [call for calls in self.lines.values() for call in calls if call is not None]
        self.expected = (sum(call.required for call in planned),)
        for child in self.calls():
            child.finish(functions)
        inside = any(child.reads_inside for child in self.calls())
        self.reads_inside = bool(self.reads or self.output or planned or inside)

    def calls(self) -> Iterator[CallPlan]:
        for children in self.children.values():
            yield from children

    def outline(self) -> tuple[Any, ...]:
        """What decides whether two calls of one module read the same."""
        lines = [
            (line, [call and [r.quantizer for r in call.all_reads()] for call in calls])
            for line, calls in self.lines.items()
            if any(calls)
        ]
        below = [child.outline() for child in self.calls() if child.reads_inside]
        own = [read.quantizer for read in self.reads]
        return (own, self.output and self.output.quantizer, lines, below)


class Plan:
    """Of one model; shared by its copies."""

    def __init__(self, roots: list[CallPlan], layers: frozenset[str], given: Structures) -> None:
        """
        Args:
            roots: of eval mode, then of train mode if the example runs there.
            layers: modules whose call has a read wherever it stands, so that none may be missed.
            given: the examples' arguments.
        """
        self.root = roots[0]
        # Whether the forward calls functions that are compiled by themselves, which would hide
        # what they do; they then run as they are written.
        self.runs_compiled = False
        self.given = given
        self.functions = dict.fromkeys(sorted(functions_with_reads(roots)), True)
        self.layers = dict.fromkeys(sorted(layers), True)
        # Their names, and these in parts.
        names = sorted({read.quantizer for root in roots for read in _reads(root)})
        self.quantizers = {name: tuple(name.split(".")) for name in names}
        # How a module is called by itself; None where its calls differ.
        self.alone: dict[str, CallPlan | None] = {}
        for root in roots:
            _collect(root, self.alone)

    def __deepcopy__(self, memo: Any) -> Plan:
        return self


class Link:
    """What the modules of one prepared model know of it: its plan, and the model itself."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._root: weakref.ref[nn.Module] | None = None

    @property
    def root(self) -> nn.Module | None:
        return None if self._root is None else self._root()

    def set_root(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        made = Link(self.plan)
        # A copy of a part alone belongs to no model.
        root = memo.get(id(self.root)) if self._root is not None else None
        if root is not None:
            made.set_root(root)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan, "root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.plan, self._root = state["plan"], None
        if state["root"] is not None:
            self.set_root(state["root"])


class Place:
    """Where a tracked module stands."""

    def __init__(self, name: str, link: Link) -> None:
        self.name, self.link = name, link
        self.prefix = f"{name}." if name else ""
        self.depth = self.prefix.count(".")
        self.key = f".{name}"  # under which its calls are counted; no function's line begins so


def counted(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a function may have a site: numbers and integers have none."""
    if name in PAIRS:
        first = args[0] if len(args) > 0 else kwargs.get("input")
        other = args[1] if len(args) > 1 else kwargs.get("other")
        return _is_floating(first) and _is_floating(other)
    if name in JOINS:
        given = args[0] if len(args) > 0 else kwargs.get("tensors", ())
        for tensor in given:
            if not _is_floating(tensor):
                return False
    return True


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def functions_with_reads(roots: Iterable[CallPlan]) -> frozenset[str]:
    """The functions that have a read somewhere, by torch's names."""
    return frozenset(line.partition(" ")[0] for root in roots for line in _lines_with_reads(root))


def _lines_with_reads(call: CallPlan) -> Iterator[str]:
    for line, calls in call.lines.items():
        if any(calls):
            yield line
    for child in call.calls():
        yield from _lines_with_reads(child)


def _reads(call: CallPlan) -> Iterator[Read]:
    yield from call.reads
    if call.output is not None:
        yield call.output
    for calls in call.lines.values():
        for function in calls:
            if function is not None:
                yield from function.all_reads()
    for child in call.calls():
        yield from _reads(child)


def _collect(call: CallPlan, found: dict[str, CallPlan | None]) -> None:
    known = found.setdefault(call.module, call)
    same_mode = known is not None and known.training == call.training
    if known is not None and same_mode and known.outline() != call.outline():
        found[call.module] = None
    for child in call.calls():
        _collect(child, found)


def link_twins(left: CallPlan, right: CallPlan, keys: Mapping[CallPlan, Any]) -> None:
    """Links the calls of two runs, of eval and of train mode, that are the same call."""
    left.twin, right.twin = right, left
    for name, children in left.children.items():
        others = {keys[child]: child for child in right.children.get(name, [])}
        for child in children:
            if keys[child] in others:
                link_twins(child, others[keys[child]], keys)
    _complete(left, right)


def _complete(left: CallPlan, right: CallPlan) -> None:
    """Lets each of two calls know what only the other came by, which it may come by too.

    A layer that one run skipped at random, or a part of the model that is in the other mode.
    """
    for name in {**left.children, **right.children}:
        mine, theirs = left.children.get(name, []), right.children.get(name, [])
        left.children[name] = mine + theirs[len(mine) :]
        right.children[name] = theirs + mine[len(theirs) :]
    for line in {**left.lines, **right.lines}:
        one, two = left.lines.get(line, []), right.lines.get(line, [])
        left.lines[line] = one + [call and call.as_optional() for call in two[len(one) :]]
        right.lines[line] = two + [call and call.as_optional() for call in one[len(two) :]]
    left.repeating = right.repeating = {**left.repeating, **right.repeating}
    left.loose = right.loose = left.loose or right.loose


def merge_calls(into: CallPlan, other: CallPlan) -> None:
    """Adds what another run did in the same call; ``other`` is used up.

    Raises ValueError if the runs read the same place through different quantizers.
    """
    _merge_reads(into.reads, other.reads, f'"{into.module}"')
    into.output = into.output or other.output
    into.expected = tuple(sorted({*into.expected, *other.expected}))
    into.reads_inside = into.reads_inside or other.reads_inside
    into.repeating.update(other.repeating)
    into.loose, into.repeats = into.loose or other.loose, into.repeats or other.repeats
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
    known.output = known.output or other.output
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
