"""One run of a model on an example, written down as a graph of the functions and modules called.

The forward runs for real, on a copy of the model, so whatever Python does in it happens. Torch's
own modules without children are one node each, and modules in which nothing is to be quantized too.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from torch_ext.prepare.insertion.functions import LAYER_BY_LAYER, OPENED, is_torchs, plain_name
from torch_ext.prepare.insertion.operations import DROPOUTS, PLANNED
from torch_ext.prepare.insertion.plan import CallPlan, counted
from torch_ext.prepare.insertion.user_lines import (
    begins_call,
    calling_lines,
    instructions,
    user_line,
)
from torch_ext.prepare.module_classes import own_type
from torch_ext.prepare.quantizable_modules import is_quant_stub
from torch_ext.utils.arguments import bound_arguments
from torch_ext.utils.modes import forked_rng

# Whether nothing in a module, by name, is to be quantized.
IsFloat = Callable[[str], bool]
# A call of a function in a plan: its line, and the how many of that line it is.
FunctionCall = tuple[CallPlan, str, int]
Key = tuple[Any, ...]

_OTHERWISE = "call prepare_qat without example_inputs, or give the class a forward"
_LARGE = 1e30  # below the least value of float32, above what data reaches
# Of these only shape and dtype of other tensors are taken.
_SHAPE_ONLY = ("type_as", "expand_as", "view_as", "reshape_as", "to")


class Recording:
    """A run, as placement looks at it.

    By node: ``values`` (of the example), ``owners`` (the module whose forward it stands in),
    ``functions`` (torch's name of a function), ``calls`` and ``function_calls`` (its place in the
    plan), ``keys`` (the same in another run), ``written`` (what an in-place operation writes to).
    ``masks``: nodes with infinities or values near the end of their dtype. ``busy``: modules
    that call functions of the table, also inside torch's own.
    """

    def __init__(self, model: nn.Module, is_float: IsFloat) -> None:
        self.model = model
        self.training = model.training
        self.root = CallPlan("", model.training)
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.owners: dict[fx.Node, str] = {}
        self.functions: dict[fx.Node, str] = {}
        self.calls: dict[fx.Node, CallPlan] = {}
        self.function_calls: dict[fx.Node, FunctionCall] = {}
        self.keys: dict[fx.Node, Key] = {}
        self.written: dict[fx.Node, fx.Node] = {}
        self.in_place: set[fx.Node] = set()
        self.masks: set[fx.Node] = set()
        self.busy: set[str] = set()
        self.hidden = False  # inside a module that is one node
        self._is_float = is_float
        self._call = self.root
        self.call_keys: dict[CallPlan, Key] = {self.root: ()}
        self._counts: dict[Key, int] = {}
        # Tensors by address, kept so that none is used twice, with the version that was known.
        self._known: dict[int, tuple[Tensor, int, fx.Node]] = {}
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
                key = (*self.keys[node], i)
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
            key = ("written", *self.keys[before], value._version)
            node = self.add("call_function", _written, (before,), {}, value, key)
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
        self._call = call
        self.call_keys[call] = key
        try:
            if not self._is_whole(name, module):
                return forward(*args, **kwargs)
            call.free = True
            return self._run_whole(outer, call, key, forward, args, kwargs)
        finally:
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


def record(
    model: nn.Module, example: Mapping[str, Any], training: bool, is_float: IsFloat
) -> Recording:
    """Runs a copy of the model in one mode; the model and torch's random state stay as they are.

    ``example``: values by argument of the forward. Batch norms evaluate also while training, since
    they refuse to train on one value per channel.
    """
    twin = copy.deepcopy(model)
    twin.train(training)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    recording = Recording(twin, is_float)
    bound = inspect.signature(twin.forward).bind_partial()
    bound.arguments.update(tree_map(_cloned, dict(example)))
    for name, value in bound.arguments.items():
        recording.argument(name, value)
    forward = layered(twin)
    for name, module in twin.named_modules():
        if name and "forward" not in vars(module):
            _wrap(recording, name, module)

    def recorded_forward() -> None:
        forward(*bound.args, **bound.kwargs)

    begins_call(recorded_forward.__code__)
    with torch.no_grad(), forked_rng(model), _RecordMode(recording):
        recorded_forward()
    return recording


def record_modes(
    who: str, model: nn.Module, example_inputs: Any, is_float: IsFloat
) -> list[Recording]:
    """Recordings of eval mode and, if the examples run there too, of train mode.

    Raises ValueError with the line if an example does not run in eval mode.
    """
    if "forward" in vars(model):
        raise ValueError(
            f"{who}: expected the model's class to define its forward, got one that is an "
            f"attribute of the instance; {_OTHERWISE}"
        )
    examples = [bound_arguments(who, model, given) for given in _examples(example_inputs)]
    recordings = []
    for training, example in itertools.product((False, True), examples):
        try:
            recordings.append(record(model, example, training, is_float))
        except Exception as error:  # the user's forward: anything may come
            problem = f"at {_failing_line(error)} {type(error).__name__}: {error}"
            if not training:
                raise ValueError(
                    f"{who}: expected example_inputs that the model can run, got {problem}"
                ) from error
            warnings.warn(  # it may want targets
                f"{who}: the example does not run in train mode ({problem}), so calls in train "
                "mode are expected to be like those in eval mode",
                stacklevel=4,
            )
    return recordings


def _examples(example_inputs: Any) -> list[Any]:
    """A list of tuples or mappings has several examples; all else is one."""
    several = isinstance(example_inputs, list) and bool(example_inputs)
    if several and all(isinstance(given, (tuple, Mapping)) for given in example_inputs):
        return list(example_inputs)
    return [example_inputs]


def _failing_line(error: BaseException) -> str:
    """The innermost line of the user's that an error passed."""
    frames = []
    step = error.__traceback__
    while step is not None:
        frames.append((step.tb_frame.f_code.co_filename, step.tb_lineno))
        step = step.tb_next
    return user_line(frames)


class _RecordMode(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPENED and not self.recording.hidden:
            with self:
                return OPENED[func](*args, **(kwargs or {}))
        return self.recording.run_function(func, args, kwargs or {})


def _wrap(recording: Recording, name: str, module: nn.Module) -> None:
    """Lets the recording see the module's calls."""
    forward = layered(module)

    @functools.wraps(module.forward)
    def recorded_forward(*args: Any, **kwargs: Any) -> Any:
        return recording.run_module(name, forward, args, kwargs)

    begins_call(recorded_forward.__code__)
    module.__dict__["forward"] = recorded_forward


def layered(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, without torch's fused paths that call no layer."""
    forward = module.forward
    replaced = LAYER_BY_LAYER.get(getattr(forward, "__func__", None))
    return forward if replaced is None else types.MethodType(replaced, module)


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        kept = {k: v for k, v in vars(module).items() if k != "_modules"}
        yield from _tensors(kept)


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
    return not bool((value.abs() < _LARGE).all())


def _part(value: Any, index: int) -> Any:
    """Stands in a graph for one of several results."""


def _written(value: Any) -> Any:
    """Stands in a graph for a tensor that was written to through a view of it."""


def _hidden(*values: Any) -> Any:
    """Stands in a graph for what made a tensor out of sight."""
