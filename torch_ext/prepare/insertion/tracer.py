"""A symbolic trace that knows the example's value of everything it records.

Values are fake tensors: shapes and dtypes without data. So control flow that depends on sizes can
be followed; the way taken is checked again at every call (:func:`as_captured`), and the sizes that
decide nothing stay free.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.utils import parametrize

from torch_ext.prepare.insertion.proxies import Factories, Value
from torch_ext.prepare.module_classes import own_type
from torch_ext.prepare.quantizable_modules import is_quant_stub
from torch_ext.utils.arguments import bounded
from torch_ext.utils.modes import eval_mode

# Whether a module, by name, is called as a whole.
IsWhole = Callable[[str], bool]

# By kind of argument: what fx writes before its name, and its value where a call gives none.
_STARS: Mapping[Any, tuple[str, Any]] = {
    inspect.Parameter.VAR_POSITIONAL: ("*", ()),
    inspect.Parameter.VAR_KEYWORD: ("**", {}),
}
TORCHS_OWN = "torch.nn"  # in place of a line that is not the user's
_OURS_AND_TORCHS = tuple(
    str(Path(str(package)).parent) + os.sep for package in (torch.__file__, __file__)
)


class Uncapturable(Exception):
    """Why a forward cannot be captured; the line is where it was raised."""


@fx.node.has_side_effect
def as_captured(value: Any, want: Any, where: str) -> None:
    """Raises in a call that would take another branch of the forward than the example took."""
    if value != want:
        raise ValueError(
            f"{where}: expected what decides here to be {want!r}, as for the example_inputs of "
            f"prepare_qat, got {bounded(value)}; prepare with inputs of these sizes"
        )


class Tracer(fx.Tracer):
    """Traces one forward in the mode that the model is in.

    After :meth:`trace`, by node: ``values`` (of the example), ``owners`` (the module whose forward
    it stands in), ``lines`` (``file:line``), ``seen`` (how often what it reads was written to) and
    ``written`` (what an in-place operation writes to).
    """

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, example: Mapping[str, Any], whole: IsWhole) -> None:
        super().__init__()
        self.model = model
        self.example = example
        self.whole = whole
        self.values: dict[fx.Node, Any] = {}
        self.owners: dict[fx.Node, str] = {}
        self.lines: dict[fx.Node, str] = {}
        self.seen: dict[fx.Node, dict[fx.Node, int]] = {}
        self.written: dict[fx.Node, fx.Node] = {}
        self.evaluating = False
        self._decided: set[fx.Node] = set()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self) -> fx.Graph:
        # The fused paths of attention would only add questions that eval mode asks.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), Factories(self):
                return self.trace(self.model)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    # What the graph is made of

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        args: list[Any] = [self.model]
        keywords: dict[str, Any] = {}
        for parameter in inspect.signature(self.model.forward).parameters.values():
            value = self._argument(parameter)
            if parameter.kind is parameter.VAR_POSITIONAL:
                args.extend(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords.update((key, value[key]) for key in self.values[value.node])
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keywords[parameter.name] = value
            else:
                args.append(value)

        def forward(*args: Any) -> Any:
            return root_fn(*args, **keywords)

        return forward, args

    def _argument(self, parameter: inspect.Parameter) -> Any:
        """A placeholder; for what holds no tensor the value, which every call has to give."""
        star, missing = _STARS.get(parameter.kind, ("", parameter.default))
        default = () if star or missing is parameter.empty else (missing,)
        value = self.example.get(parameter.name, missing)
        node = self.create_node("placeholder", star + parameter.name, default, {})
        with self.evaluation():
            self.values[node] = self._faked(value)
        if not star and not _has_tensor(value):
            self.decided(self.proxy(node))
            return value
        return self.proxy(node)

    def create_arg(self, a: Any) -> Any:
        # By type: a proxy passes for a tensor where isinstance asks.
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: Any = None,
        type_expr: Any = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        self.owners[node] = self.scope.module_path
        self.lines[node] = _calling_line()
        if kind in ("placeholder", "output"):
            return node
        tensors = {n: self.values[n] for n in node.all_input_nodes}
        tensors = {n: value for n, value in tensors.items() if isinstance(value, Tensor)}
        self.seen[node] = {n: value._version for n, value in tensors.items()}
        own_args, own_kwargs = fx.node.map_arg((args, kwargs), lambda n: self.values[n])
        with self.evaluation():
            self.values[node] = self._evaluate(kind, target, own_args, own_kwargs)
        for source, value in tensors.items():
            if value._version != self.seen[node][source]:
                self.written[node] = source
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.whole(module_qualified_name) or is_quant_stub(m):
            return True
        if isinstance(m, parametrize.ParametrizationList):
            return True
        own = own_type(m)
        children = {name for name, _ in m.named_children()} - {"parametrizations"}
        return own.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not children

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.evaluating:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
        if hooked and not self.is_leaf_module(m, name):
            raise Uncapturable(f'"{name}" has hooks, and its forward is taken apart')
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    # The example's values

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        before, self.evaluating = self.evaluating, True
        try:
            with self._fake:
                yield
        finally:
            self.evaluating = before

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "get_attr":
            return self._faked(operator.attrgetter(target)(self.model))
        if kind == "call_module":
            module = self.model.get_submodule(target)
            with eval_mode(module):  # a batch norm refuses to train on one value per channel
                return self._run_whole(module.forward, args, kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        marked = isinstance(target, FunctionType) and not target.__module__.startswith("torch.")
        return self._run_whole(target, args, kwargs) if marked else target(*args, **kwargs)

    def _run_whole(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What the user's code gives; it may look at values."""
        try:
            return function(*args, **kwargs)
        except DataDependentOutputException:
            return self._faked(_of_zeros(function, args, kwargs))

    def _faked(self, value: Any) -> Any:
        return fx.node.map_aggregate(
            value, lambda v: self._fake.from_tensor(v) if isinstance(v, Tensor) else v
        )

    # What Python asks of a proxy

    def proxy(self, node: fx.Node) -> Value:
        return Value(node, self)

    def value(self, proxy: fx.Proxy) -> Any:
        return self.values[proxy.node]

    def decided(self, proxy: fx.Proxy) -> Any:
        """A value that Python needs now, and that has to be the same in every call."""
        node, value = proxy.node, self.value(proxy)
        if isinstance(value, Tensor):
            raise Uncapturable("the forward asks for the values of a tensor")
        if node not in self._decided:
            self._decided.add(node)
            self.create_node("call_function", as_captured, (node, value, _calling_line()), {})
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decided(obj))

    def length(self, proxy: fx.Proxy) -> int:
        return int(self.decided(self.create_proxy("call_function", len, (proxy,), {})))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        if isinstance(self.value(obj), Mapping):
            return iter(self.value(obj))
        return iter([obj[i] for i in range(self.length(obj))])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        return self.value(obj).keys()


def _of_zeros(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Runs a data-dependent function on zeros, to learn its output's shapes."""
    with unset_fake_temporarily():
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs),
            lambda v: (
                torch.zeros(v.shape, dtype=v.dtype, device=v.device) if isinstance(v, Tensor) else v
            ),
        )
        return function(*args, **kwargs)


def _has_tensor(value: Any) -> bool:
    found: list[Any] = []
    fx.node.map_aggregate(value, lambda v: found.append(v) if isinstance(v, Tensor) else None)
    return bool(found)


def _is_users(filename: str) -> bool:
    return not filename.startswith((*_OURS_AND_TORCHS, "<"))


def _calling_line() -> str:
    """The line of the model that is being traced."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not Tracer.run.__code__:
        if _is_users(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return TORCHS_OWN


def failing_line(error: BaseException) -> str:
    """The innermost line that an error passed and that is neither torch's nor ours."""
    line = TORCHS_OWN
    step: TracebackType | None = error.__traceback__
    while step is not None:
        if _is_users(step.tb_frame.f_code.co_filename):
            line = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"
        step = step.tb_next
    return line
