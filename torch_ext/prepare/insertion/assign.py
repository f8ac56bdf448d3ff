"""Makes the plan of the placements of one model's recordings: which read has which quantizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from torch_ext.prepare.attach import OUTPUT, SUFFIX
from torch_ext.prepare.blocks.dynamic_axes import Reader
from torch_ext.prepare.insertion.operations import operation, option, summed_axis
from torch_ext.prepare.insertion.placement import Ask, Placement, Site
from torch_ext.prepare.insertion.plan import (
    CallPlan,
    FunctionPlan,
    Plan,
    Read,
    functions_with_reads,
    link_twins,
    merge_calls,
)
from torch_ext.prepare.insertion.recording import Key, Recording, is_torchs_leaf
from torch_ext.utils.arguments import Structures

_STEPS_RUN_BY_TORCH = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Makes the quantizer of a site, in one of the placements; returns its name.
MakeQuantizer = Callable[[Placement, Site], str]
# Position or keyword of an argument, and the position in it or -1.
_Place = tuple[int | str, int]


class Assignment:
    """Quantizers of sites; the same value, and the same reader, has one in all recordings."""

    def __init__(self, make: MakeQuantizer) -> None:
        self._make = make
        self._of_value: dict[Key, str] = {}
        self._of_read: dict[tuple[Key, _Place], str] = {}
        self._memos: dict[Key, str] = {}

    def add(self, placement: Placement) -> None:
        """Writes the reads of one recording into its plan."""
        recording = placement.recording
        asks: dict[fx.Node, list[Ask]] = {}
        for ask in placement.asks.values():
            asks.setdefault(ask.value, []).append(ask)
        quantizers: dict[fx.Node, str] = {}
        for site in placement.sites:
            mine = [ask for value in site.values for ask in asks.get(value, [])]
            if not mine and placement.outputs.keys().isdisjoint(site.values):
                continue
            name = self._known(recording, site, mine) or self._make(placement, site)
            for value in site.values:
                quantizers[value] = name
                self._of_value.setdefault(recording.keys[value], name)
            for ask in mine:
                for place in _places(ask.reader, ask.operand):
                    self._of_read.setdefault((recording.keys[ask.reader], place), name)
        for node in placement.outputs:
            read = Read(0, -1, "", "", quantizers[node], observes=True)
            if node in recording.calls:
                recording.calls[node].output = read
            else:
                _function_plan(recording, node).output = read
        reads: dict[fx.Node, int] = {}
        for ask in placement.asks.values():
            count = len(_places(ask.reader, ask.operand))
            reads[ask.operand] = reads.get(ask.operand, 0) + count
        order = {node: i for i, node in enumerate(recording.graph.nodes)}
        for value, some in asks.items():
            some.sort(key=lambda ask: order[ask.reader])
            observing = _observing(placement, some)
            for ask in some:
                memo = self._memo(recording, ask.operand) if reads[ask.operand] > 1 else ""
                _write(placement, ask, memo, quantizers[value], ask in observing)

    def _known(self, recording: Recording, site: Site, asks: list[Ask]) -> str | None:
        for value in site.values:
            if (name := self._of_value.get(recording.keys[value])) is not None:
                return name
        for ask in asks:
            for place in _places(ask.reader, ask.operand):
                name = self._of_read.get((recording.keys[ask.reader], place))
                if name is not None:
                    return name
        return None

    def _memo(self, recording: Recording, operand: fx.Node) -> str:
        return self._memos.setdefault(recording.keys[operand], f"value {len(self._memos)}")


def align(first: Recording, other: Recording) -> None:
    """Gives calls of modules in another run the keys that they have in the first.

    Keys have the lines of calls. A module that is called equally often in the same place is the
    same call, also where a branch for one mode calls it at a line of its own.
    """
    renamed: dict[Key, Key] = {}
    known: dict[Key, Key] = {}

    def translated(key: Key) -> Key:
        if key not in known:
            inner = tuple(translated(x) if isinstance(x, tuple) else x for x in key)
            known[key] = renamed.get(inner, inner)
        return known[key]

    def walk(mine: CallPlan, theirs: CallPlan) -> None:
        for name, children in theirs.children.items():
            others = mine.children.get(name, [])
            mine_keys = {first.call_keys[child]: child for child in others}
            keys = [translated(other.call_keys[child]) for child in children]
            if len(others) == len(children) and mine_keys.keys().isdisjoint(keys):
                renamed.update(zip(keys, mine_keys, strict=True))
                known.clear()
                pairs = list(zip(others, children, strict=True))
            else:
                found = zip(keys, children, strict=True)
                pairs = [(mine_keys[key], child) for key, child in found if key in mine_keys]
            for pair in pairs:
                walk(*pair)

    walk(first.root, other.root)
    if renamed:
        other.keys = {node: translated(key) for node, key in other.keys.items()}
        other.call_keys = {call: translated(key) for call, key in other.call_keys.items()}


def make_plan(
    forward: Callable[..., Any], recordings: list[Recording], layers: frozenset[str]
) -> Plan:
    """The plan of recordings of eval and, if there are some, of train mode.

    ``forward``: the model's. ``layers``: modules of which no call may be missed, beside those that
    read something.
    """
    calls = [call for recording in recordings for call in recording.all_calls]
    reading = {call.module for call in calls if call.reads or call.output}
    functions = functions_with_reads(recording.root for recording in recordings)
    roots: dict[bool, CallPlan] = {}
    for recording in recordings:
        recording.root.finish(functions)
        root = roots.setdefault(recording.training, recording.root)
        if root is not recording.root:
            merge_calls(root, recording.root)
    if len(roots) == 2:
        keys = {call: key for recording in recordings for call, key in recording.call_keys.items()}
        link_twins(roots[False], roots[True], keys)
    given = Structures(forward, [recording.example for recording in recordings])
    plan = Plan(list(roots.values()), layers | reading, given)
    plan.runs_compiled = any(recording.runs_compiled for recording in recordings)
    return plan


def tracked_modules(model: nn.Module, recordings: list[Recording], plan: Plan) -> list[str]:
    """Their names, the model's own first.

    Torch's modules that read nothing quantized and call no function of the table do without; so
    does what is inside of a module that is left float as a whole.
    """
    busy = set().union(*(recording.busy for recording in recordings))
    whole = {call.module for recording in recordings for call in recording.all_calls if call.free}
    found = []
    for name, module in model.named_modules():
        inside_whole = any(name.startswith(f"{other}.") for other in whole)
        plain = is_torchs_leaf(module) and not (name in busy or name in plan.layers)
        computes_weight = isinstance(module, parametrize.ParametrizationList)
        if not (inside_whole or plain or computes_weight or "forward" in vars(module)):
            found.append(name)
    return found


def _observing(placement: Placement, asks: list[Ask]) -> list[Ask]:
    """The reads that observe a value: one of the whole, else one of each part that is read."""
    parts: dict[Any, Ask] = {}
    for ask in asks:
        part = _part(placement, ask)
        if part is ask.value:
            return [ask]
        value = placement.recording.values[part]
        if isinstance(value, Tensor):  # the same part, taken twice
            parts.setdefault((value.data_ptr(), value.shape, value.stride()), ask)
    return list(parts.values())


def _part(placement: Placement, ask: Ask) -> fx.Node:
    """The value, or what of it is left before operations that only move values."""
    recording = placement.recording
    size = _size(recording, ask.operand)
    part = step = ask.operand
    while step is not ask.value:
        if "max_pool" in operation(recording, step):
            break
        step = placement.carried(step)[0]
        if (before := _size(recording, step)) != size and before >= 0:
            break
        if before >= 0:
            part = step
    return part


def _size(recording: Recording, node: fx.Node) -> int:
    value = recording.values[node]
    return value.numel() if isinstance(value, Tensor) else -1


def _write(placement: Placement, ask: Ask, memo: str, quantizer: str, observes: bool) -> None:
    recording, reader = placement.recording, ask.reader
    if reader in recording.calls:
        reads = recording.calls[reader].reads
        forward = recording.model.get_submodule(recording.calls[reader].module).forward
    else:
        reads, forward = _function_plan(recording, reader).reads, None
    factory, by = placement.site_of[ask.value].factory, _reader(recording, reader)
    for place, item in _places(reader, ask.operand):
        name = _argument(forward, place) if forward else ""
        summed, shape = summed_axis(recording, reader, place), recording.values[ask.operand].shape
        axis = placement.dynamic.of_read(by, summed, shape, factory, quantizer)
        # Read along another axis, a tensor becomes another.
        own = f"{memo} {axis}" if memo and axis is not None else memo
        read = Read(place, item, name, own, quantizer, observes)
        read.axis = axis
        reads.append(read)
        observes = False


def _reader(recording: Recording, node: fx.Node) -> Reader:
    """What errors on groups that do not fit call a node."""
    what, is_function = operation(recording, node), node not in recording.calls
    module = recording.owners[node] if is_function else recording.calls[node].module
    groups = option(recording, node, "groups", 6, "1") if what.startswith("conv") else "1"
    return Reader(module, what, int(groups) if groups.isdigit() else 1, is_function)


def _function_plan(recording: Recording, node: fx.Node) -> FunctionPlan:
    call, line, index = recording.function_calls[node]
    function = call.lines[line][index]
    if function is None:
        function = call.lines[line][index] = FunctionPlan(node in recording.in_place)
    return function


def _places(reader: fx.Node, operand: fx.Node) -> list[_Place]:
    found: list[_Place] = []
    arguments: list[tuple[int | str, Any]] = [*enumerate(reader.args), *reader.kwargs.items()]
    for place, given in arguments:
        if given is operand:
            found.append((place, -1))
        elif isinstance(given, (tuple, list)):
            found += [(place, i) for i, item in enumerate(given) if item is operand]
    return found


def _argument(forward: Callable[..., Any], place: int | str) -> str:
    if isinstance(place, str):
        return place
    names = list(inspect.signature(forward).parameters)
    return names[place] if place < len(names) else ""


class Names:
    """Where the quantizer of a value hangs: a module's name, and the child's.

    A result of a module that is one node: ``<module>.activation_quantizer``. A function's: on the
    module whose forward calls it, ``add_quantizer``. A parameter: ``<parameter>_quantizer``. From
    the second call of the same in the forward on, a number follows: ``add_quantizer_1``. The calls
    of the first recording are counted first.
    """

    def __init__(self, recordings: list[Recording]) -> None:
        self._of: dict[Key, tuple[str, str]] = {}
        calls: dict[tuple[str, str], int] = {}
        for recording in recordings:
            for node in recording.graph.nodes:
                key = recording.keys[node]
                if key in self._of:
                    continue
                home, stem = _home(recording, node)
                count = calls[home, stem] = calls.get((home, stem), -1) + 1
                self._of[key] = (home, f"{stem}_{count}" if count else stem)

    def of(self, key: Key) -> tuple[str, str]:
        return self._of[key]


def _home(recording: Recording, node: fx.Node) -> tuple[str, str]:
    target = str(node.target)
    if node.op == "call_module":
        module = recording.model.get_submodule(target)
        # One that has children may run each of them.
        steps = {name for name, _ in module.named_children()} - {"parametrizations"}
        return _above(recording, target, OUTPUT) if steps else (target, OUTPUT)
    if node.op == "get_attr":
        holder, _, name = target.rpartition(".")
        return _host(recording, holder, f"{name}{SUFFIX}")
    kind = operation(recording, node) or getattr(node.target, "__name__", target).strip("_")
    return _host(recording, recording.owners[node], f"{kind}{SUFFIX}")


def _host(recording: Recording, name: str, stem: str) -> tuple[str, str]:
    """The module itself, or the next one above that is no container of steps.

    Such a container would run the quantizer as a step. If the model is one, it is its first step
    that is none.
    """
    module = recording.model.get_submodule(name)
    if not isinstance(module, _STEPS_RUN_BY_TORCH):
        return name, stem
    if name:
        return _above(recording, name, stem)
    steps = (n for n, m in module.named_modules() if not isinstance(m, _STEPS_RUN_BY_TORCH))
    return next(steps, name), stem


def _above(recording: Recording, name: str, stem: str) -> tuple[str, str]:
    parent, _, own = name.rpartition(".")
    return _host(recording, parent, f"{own}_{stem}")
