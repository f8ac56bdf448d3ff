"""One run of a model on an example, written down as a graph of the functions and modules called.

The forward runs for real, on a copy of the model, so whatever Python does in it happens. Torch's
own modules without children are one node each, and modules in which nothing is to be quantized too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from torch_ext.prepare.insertion.functions import is_torchs, plain_name
from torch_ext.prepare.insertion.operations import DROPOUTS, PLANNED
from torch_ext.prepare.insertion.plan import CallPlan, counted
from torch_ext.prepare.insertion.run_graph import (
    RunGraph,
    made_of_random_numbers,
    sized_by_data,
)
from torch_ext.prepare.insertion.user_lines import (
    calling_lines,
    in_compiled_function,
    instructions,
)
from torch_ext.prepare.module_classes import own_type
from torch_ext.prepare.quantizable_modules import is_quant_stub

# Whether nothing in a module, by name, is to be quantized.
IsFloat = Callable[[str], bool]
# A call of a function in a plan: its line, and the how many of that line it is.
FunctionCall = tuple[CallPlan, str, int]
Key = tuple[Any, ...]

# Above what data reaches, below the magnitude of each dtype's least value and its half.
_LARGE = {torch.float16: 3e4}
_LARGE_ELSE = 1e30
# Of these only shape and dtype of other tensors are taken.
_SHAPE_ONLY = ("type_as", "expand_as", "view_as", "reshape_as", "to")
# These look at values, and return no tensor.
_LOOKS = {
    "setitem",
    "item",
    "tolist",
    "numpy",
    "array",
    "bool",
    "float",
    "int",
    "equal",
    "allclose",
}


class Recording(RunGraph):
    """A run, as placement looks at it.

    By node: ``calls`` and ``function_calls`` (its place in the plan) and ``keys`` (the same in
    another run). ``in_place``: nodes that write to their first argument. ``masks``: nodes with
    infinities or values near the end of their dtype. ``busy``: modules that call functions of the
    table, also inside torch's own. ``kept``: nodes of what the forward returns or keeps in
    attributes, and of what it looks at without making a tensor of it. ``result``: what the forward
    returns. ``sized``: nodes whose shape depends on values.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Any], is_float: IsFloat) -> None:
        """``example``: values by argument of the forward."""
        super().__init__(model)
        self.example = example
        self.training = model.training
        self.root = CallPlan("", model.training)
        self.calls: dict[fx.Node, CallPlan] = {}
        self.function_calls: dict[fx.Node, FunctionCall] = {}
        self.keys: dict[fx.Node, Key] = {}
        self.in_place: set[fx.Node] = set()
        self.masks: set[fx.Node] = set()
        self.busy: set[str] = set()
        self.kept: set[fx.Node] = set()
        self.sized: set[fx.Node] = set()
        self._looks: list[tuple[CallPlan, fx.Node]] = []
        self._arguments: dict[CallPlan, list[fx.Node]] = {}
        self._drawn = _python_random_state()
        self.runs_compiled = False  # functions that are compiled by themselves
        self.hidden = False  # inside a module that is one node
        self.result: Any = None
        self._is_float = is_float
        self._call = self.root
        self.call_keys: dict[CallPlan, Key] = {self.root: ()}
        self._counts: dict[Key, int] = {}
        # Tensors by address, kept so that none is used twice, with the version that was known.
        self._known: dict[int, tuple[Tensor, int, fx.Node]] = {}
        # By the address of a tensor of ``_known``: what was written to a part of it.
        self._set_items: dict[int, tuple[fx.Node, ...]] = {}
        self._names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self._constants = {id(t) for t in _attributes(model)}

    # Values

    def add(self, op: str, target: Any, args: Any, kwargs: Any, value: Any, key: Key) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        self.values[node], self.owners[node], self.keys[node] = value, self._call.module, key
        return node

    @property
    def all_calls(self) -> list[CallPlan]:
        return list(self.call_keys)

    def know(self, value: Any, node: fx.Node) -> None:
        """Results that are several tensors get a node each."""
        if isinstance(value, Tensor):
            self._known[id(value)] = (value, value._version, node)
            return
        for i, part in enumerate(_tensors(value)):
            known = self._known.get(id(part))
            if known is None or known[1] != part._version:
                key = (self.keys[node], i)
                item = self.add("call_function", _part, (node, i), {}, part, key)
                self.functions[item] = "getitem"
                self.know(part, item)

    def find(self, value: Tensor) -> fx.Node:
        """The node that made a tensor; after a write through a view, one that stands for that."""
        known = self._known.get(id(value))
        if known is not None and known[1] == value._version:
            return known[2]
        if known is not None:
            before = known[2]
            key = ("written", self.keys[before], value._version)
            into = self._set_items.pop(id(value), ())
            node = self.add("call_function", _written, (before, *into), {}, value, key)
            self.functions[node] = "written"
        elif id(value) in self._names:
            name = self._names[id(value)]
            node = self.add("get_attr", name, (), {}, value, ("attribute", name))
        else:  # made where no mode sees it, such as in compiled code: computed from the inputs
            constant = id(value) in self._constants
            inputs = () if constant else tuple(n for n in self.graph.nodes if n.op == "placeholder")
            key = self._counted("hidden", self.call_keys[self._call])
            node = self.add("call_function", _hidden, inputs, {}, value, key)
        self.know(value, node)
        return node

    def argument(self, name: str, value: Any) -> None:
        if _tensors(value):
            node = self.add("placeholder", name, (), {}, value, ("argument", name))
            self.know(value, node)

    def end(self, result: Any) -> None:
        """Notes what outlives the forward, and what in it depends on data or on random numbers."""
        self.result = result
        for tensor in (*_tensors(result), *_attributes(self.model)):
            if self._is_known(tensor):
                self.kept.add(self._known[id(tensor)][2])
        self._note_python_random(self.root)
        drawn = made_of_random_numbers(self)
        for call, node in self._looks:
            call.loose = call.loose or node in drawn
        self.sized = sized_by_data(self)
        for node, (call, line, _) in self.function_calls.items():
            if not self.sized.isdisjoint(node.all_input_nodes):
                call.repeating[line] = True
        for call, given in self._arguments.items():
            call.repeats = not self.sized.isdisjoint(given)

    def _note_python_random(self, call: CallPlan) -> None:
        """Python code that draws random numbers decides by them what to call."""
        state = _python_random_state()
        call.loose, self._drawn = call.loose or state != self._drawn, state

    def _mapped(self, value: Any) -> Any:
        """Tensors as nodes; what a graph cannot hold as text."""
        if isinstance(value, Tensor):
            return self.find(value)
        if isinstance(value, (tuple, list)):
            made = [self._mapped(v) for v in value]
            return tuple(made) if isinstance(value, tuple) else made
        if isinstance(value, dict):
            return {str(k): self._mapped(v) for k, v in value.items()}
        plain = value is None or type(value) in (int, float, bool, str)
        return value if plain or _is_plain_slice(value) else repr(type(value))

    def _counted(self, *stem: Any) -> Key:
        count = self._counts[stem] = self._counts.get(stem, -1) + 1
        return (*stem, count)

    # Calls

    def run_module(
        self, name: str, forward: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        module = self.model.get_submodule(name)
        if self.hidden:
            return forward(*args, **kwargs)
        outer = self._call
        call = CallPlan(name, module.training)
        outer.children.setdefault(name, []).append(call)
        key = self._counted(self.call_keys[outer], name, instructions(skipped=2))
        self._arguments[call] = [
            self._known[id(t)][2] for t in _tensors((args, kwargs)) if self._is_known(t)
        ]
        self._note_python_random(outer)
        self._call = call
        self.call_keys[call] = key
        try:
            if not self._is_whole(name, module):
                return forward(*args, **kwargs)
            call.free = True
            return self._run_whole(outer, call, key, forward, args, kwargs)
        finally:
            self._note_python_random(call)
            self._call = outer

    def _run_whole(
        self,
        outer: CallPlan,
        call: CallPlan,
        key: Key,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        self._call = outer
        inputs = [(t, t._version, self.find(t)) for t in _tensors((args, kwargs))]
        given = self._mapped(tuple(args)), self._mapped(dict(kwargs))
        self._call, self.hidden = call, True
        try:
            result = forward(*args, **kwargs)
            if isinstance(result, Tensor) and is_quant_stub(self.model.get_submodule(call.module)):
                result = result.view_as(result)  # told apart from its input
        finally:
            self.hidden = False
        self._call = outer
        if not self._is_known(result):
            node = self.add("call_module", call.module, *given, result, key)
            self.calls[node] = call
            self._note_writes(node, result, inputs, carries=False)
            self.know(result, node)
        return result

    def run_function(self, function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        name = plain_name(function) if is_torchs(function) else ""
        if self.hidden:
            if name in PLANNED:
                self.busy.add(self._call.module)
            return function(*args, **kwargs)
        lines = calling_lines()
        self.runs_compiled = self.runs_compiled or in_compiled_function()
        counts = name in (*PLANNED, *DROPOUTS) and not lines.apart and counted(name, args, kwargs)
        index = self._call.add_function_call(name + lines.text) if counts else -1
        inputs = [(t, t._version, self.find(t)) for t in _tensors((args, kwargs))]
        if name in PLANNED:
            self.masks.update(node for t, _, node in inputs if _is_mask(t))
        given = self._mapped(tuple(args)), self._mapped(dict(kwargs))
        if name.startswith("new_") or name.endswith("_like"):
            given = (), {}
        elif name in _SHAPE_ONLY:
            given = given[0][:1], {}
        key = self._counted(self.call_keys[self._call], name, instructions())
        result = function(*args, **kwargs)
        if name in _LOOKS:
            self.kept.update(node for _, _, node in inputs)
            self._looks += [(self._call, node) for _, _, node in inputs]
        if name == "setitem":
            before = self._set_items.get(id(args[0]), ())
            self._set_items[id(args[0])] = (*before, *map(self.find, _tensors(args[2])))
        if not _tensors(result) or self._is_known(result):
            return result
        node = self.add("call_function", function, *given, result, key)
        self.functions[node] = name or getattr(function, "__name__", "")
        if counts:
            self.function_calls[node] = (self._call, name + lines.text, index)
        self._note_writes(node, result, inputs, carries=name in DROPOUTS)
        self.know(result, node)
        return result

    def _note_writes(
        self, node: fx.Node, result: Any, inputs: list[tuple[Tensor, int, fx.Node]], carries: bool
    ) -> None:
        for tensor, version, source in inputs:
            if tensor._version != version and tensor is result:
                self.in_place.add(node)
                if not carries:
                    self.written[node] = source

    def _is_known(self, value: Any) -> bool:
        """Whether a result is a tensor that was there before, as it was."""
        known = self._known.get(id(value)) if isinstance(value, Tensor) else None
        return known is not None and known[1] == value._version

    def _is_whole(self, name: str, module: nn.Module) -> bool:
        if self._is_float(name) or is_quant_stub(module):
            return True
        return is_torchs_leaf(module)


def is_torchs_leaf(module: nn.Module) -> bool:
    """A module of torch that does not call others; also what computes a parametrized weight."""
    if isinstance(module, parametrize.ParametrizationList):
        return True
    children = {name for name, _ in module.named_children()} - {"parametrizations"}
    return own_type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not children


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        kept = {k: v for k, v in vars(module).items() if k != "_modules"}
        yield from _tensors(kept)


def _python_random_state() -> tuple[int, ...]:
    """Where Python's and NumPy's generators are; another number once they were used."""
    of_numpy: Any = numpy.random.get_state()
    return random.getstate()[1][-1], int(of_numpy[2])


def _is_plain_slice(value: Any) -> bool:
    ends = (value.start, value.stop, value.step) if isinstance(value, slice) else (value,)
    return all(end is None or type(end) is int for end in ends)


def is_wrapped(value: Tensor) -> bool:
    """Whether a tensor is one of those that ``torch.vmap`` and the like pass: without data."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return wrapped


def _is_mask(value: Tensor) -> bool:
    if not value.is_floating_point() or value.numel() == 0 or value.is_meta or is_wrapped(value):
        return False
    return not bool((value.abs() < _LARGE.get(value.dtype, _LARGE_ELSE)).all())


def _part(value: Any, index: int) -> Any:
    """Stands in a graph for one of several results."""


def _written(value: Any) -> Any:
    """Stands in a graph for a tensor that was written to through a view of it."""


def _hidden(*values: Any) -> Any:
    """Stands in a graph for what made a tensor out of sight."""
