"""Walks a prepared model's layers with quantized weights in the order of their execution.

The model's own forward runs. A layer is seen where its weight meets its input, in a convolution or
linear function of torch: there the input has been quantized, and nothing follows yet. For that the
weight is handed out in a class of tensors of ours, which torch's functions ask before they compute
(``__torch_function__``). What is computed does not change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from torch_ext.prepare.batch_norms.pair import LAYERS
from torch_ext.prepare.quantizable_modules import is_out_proj
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import (
    AnyWeightSource,
    HookedWeight,
    Pattern,
    PreparedModel,
    clean_name,
)
from torch_ext.quantizers.restore import one_call_at_a_time, restored
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import check_callable
from torch_ext.utils.batches import (
    Forward,
    check_batches,
    default_forward,
    digest,
    model_device,
    to_device,
)
from torch_ext.utils.modes import eval_mode, forked_rng, uncompiled
from torch_ext.utils.text import shown

# The functions in which a layer's weight meets its input, and how many axes follow the channels'.
_SPATIAL = {
    F.linear: 0,
    **{getattr(F, f"conv{n}d"): n for n in (1, 2, 3)},
    **{getattr(F, f"conv_transpose{n}d"): n for n in (1, 2, 3)},
}
_TENSORS = ("input", "weight", "bias")


class Layer(NamedTuple):
    """A convolution, transposed convolution or linear layer whose weight is quantized."""

    name: str
    module: nn.Module
    quantizer: FakeQuantize  # of its weight
    source: AnyWeightSource  # where the quantizer reads it


class LayerCall:
    """One call of a layer's function, which has not computed anything yet.

    Tensors are the forward's own: copy what is kept, as later operations may write into them.
    """

    def __init__(self, layer: Layer, batch: int, function: Any, args: Any, kwargs: Any) -> None:
        self.layer = layer
        self.batch = batch  # which of the data's batches
        self.function = function
        given = dict(zip(_TENSORS, args, strict=False)) | kwargs
        self.input: Tensor = given.pop("input")  # as the layer reads it, quantized or not
        self.weight: Tensor = given.pop("weight")
        self.bias: Tensor | None = given.pop("bias", None)
        self.options = args[len(_TENSORS) :]  # stride, padding, ...
        self.named_options = given

    @functools.cached_property
    def output(self) -> Tensor:
        """What the function makes of weight and bias as they were given to it."""
        return self.of(self.input, self.weight, self.bias)

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer makes of another input, weight or bias."""
        made: Tensor = self.function(x, weight, bias, *self.options, **self.named_options)
        return made

    def again(self) -> Tensor:
        """The output with the weight and bias that the layer has by now."""
        module, source = self.layer.module, self.layer.source
        hooked = isinstance(source, HookedWeight)
        weight = self.weight if hooked else _plain(getattr(module, source.parameter))
        bias: Any = getattr(module, "bias", None)
        return self.of(self.input, weight, bias)

    @property
    def ch_axis(self) -> int:
        """The axis of the output that holds its channels, counted from the end."""
        return -1 - _SPATIAL[self.function]


Visit = Callable[[LayerCall], None]
Finish = Callable[[Layer], None]


class LayerWalk:
    """The layers of a prepared model, and runs of the data that come by them.

    Everything happens within :meth:`guarded`. The first :meth:`run` finds the order::

        with walk.guarded():
            walk.enter(FakeQuantState.FLOAT)
            walk.run(visit)                      # every call of every layer, in the float model
            walk.enter(FakeQuantState.VALIDATION)
            for layer in walk.sequentially(list(walk.order), visit, finish):
                ...                              # layer k read what the changed layers before made

    Attributes:
        layers: all that may be walked, by name.
        order: the names of those that the data comes by, in the order of their first call.
        left: the name of each other quantized weight's module, and why it is not walked.
        digests: of the batches of the first run.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        data: Any,
        *,
        pattern: Pattern | None = None,
        forward: Forward | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Raises TypeError for arguments of a wrong kind, ValueError where there is no layer.

        Args:
            prepared: of the public function that errors name.
            data: batches that can be run over again.
            pattern: of quantizers; the layers are those whose weight's quantizer matches.
            forward, device: as in ``calibrate``.
        """
        who = self._who = prepared.who
        check_batches(who, "data", data)
        if isinstance(data, Iterator):
            raise TypeError(
                f"{who}: expected data to be batches that can be run over again, such as a list, "
                f"got {type(data).__name__}"
            )
        check_callable(who, "forward", forward)
        self.prepared = prepared
        self.layers, self.left = find_layers(prepared, pattern)
        self.order: list[str] = []
        self.digests: list[str] = []
        self._data = data
        self._forward = forward or default_forward(who)
        self._device = model_device(who, prepared.root, device)
        self._calls: list[dict[str, int]] = []  # of each batch: how often it calls each layer
        self._active: list[FakeQuantize] = []

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Eval mode, no gradients; at the end modes, random state and quantizers are restored.

        Quantizers are in VALIDATION in it at first. Raises RuntimeError, by name, for quantizers
        without a range.
        """
        prepared, root = self.prepared, self.prepared.root
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_call_at_a_time(self._who, root))
            stack.enter_context(restored(prepared.quantizers))
            stack.enter_context(eval_mode(root))
            stack.enter_context(forked_rng(root))
            stack.enter_context(torch.no_grad())
            stack.enter_context(uncompiled())
            change_states(self._who, root, FakeQuantState.VALIDATION)
            # One that saw no data, and need not, passes values through.
            self._active = [q for q in prepared.quantizers.values() if not q.passes_through]
            yield

    def enter(self, state: FakeQuantState) -> None:
        """Sets the state of all quantizers."""
        for quantizer in self._active:
            quantizer.enter(state)

    def run(self, visit: Visit | None = None, output: Callable[[Any], None] | None = None) -> None:
        """Runs all data; calls ``visit`` for each call of a layer, ``output`` for what is returned.

        Raises:
            ValueError: the data is empty, differs from that of the first run, or comes by no layer.
        """
        first = not self._calls

        def at_call(call: LayerCall) -> Tensor:
            name, calls = call.layer.name, counts[call.batch]
            calls[name] = calls.get(name, 0) + 1
            if first and name not in self.order:
                self.order.append(name)
            if visit is not None:
                visit(call)
            return call.output

        counts: list[dict[str, int]] = []
        with self._watched(at_call) as watch:
            for index, batch in enumerate(self._batches(first)):
                counts.append({})
                watch.batch = index
                made = self._forward(self.prepared.root, batch)
                if output is not None:
                    output(made)
        if first:
            self._calls = counts
            self._check_order()

    def collect(self, name: str, visit: Visit) -> None:
        """Runs each batch as far as the last call of one layer; ``visit`` is called for each."""
        seen = 0

        def at_call(call: LayerCall) -> Tensor:
            nonlocal seen
            if call.layer.name == name:
                seen += 1
                visit(call)
                if seen == self._calls[call.batch].get(name, 0):
                    raise _Enough
            return call.output

        with self._watched(at_call) as watch:
            for watch.batch, batch in enumerate(self._batches()):
                seen = 0
                self._forward_until_enough(batch)

    def sequentially(self, names: Sequence[str], visit: Visit, finish: Finish) -> Iterator[Layer]:
        """For one layer after the other: ``visit`` each of its calls, then ``finish`` it.

        What ``finish`` does to the layer is there for all that follows. Each layer costs a run of
        the data as far as the layer. A single batch is run once for all: its forward goes on with
        the finished layer, except where that is called several times in it.

        Gives each finished layer.
        """
        wanted = set(names)
        left = [name for name in self.order if name in wanted]
        while left:
            if len(self._calls) == 1 and self._calls[0][left[0]] == 1:
                done = self._in_one_run(left, visit, finish)
            else:
                done = left[:1]
                self.collect(left[0], visit)
                finish(self.layers[left[0]])
            left = left[len(done) :]
            yield from (self.layers[name] for name in done)

    def _in_one_run(self, names: list[str], visit: Visit, finish: Finish) -> list[str]:
        """Walks the first of ``names`` in one forward, up to one that is called several times."""
        several = (i for i, name in enumerate(names) if self._calls[0][name] > 1)
        left = names[: next(several, len(names))]
        done: list[str] = []

        def at_call(call: LayerCall) -> Tensor:
            if len(done) == len(left) or call.layer.name != left[len(done)]:
                return call.output
            visit(call)
            finish(call.layer)
            done.append(call.layer.name)
            if len(done) == len(left):
                raise _Enough
            return call.again()

        with self._watched(at_call):
            for batch in self._batches():
                self._forward_until_enough(batch)
        if not done:
            raise RuntimeError(
                f'{self._who}: expected the forward to call "{left[0]}" as it does in FLOAT, got a '
                "forward without it; leave the layer out by pattern"
            )
        return done

    def _forward_until_enough(self, batch: Any) -> None:
        with contextlib.suppress(_Enough):
            self._forward(self.prepared.root, batch)

    def _batches(self, first: bool = False) -> Iterator[Any]:
        count = 0
        for batch in self._data:
            found = digest(batch)
            if first:
                self.digests.append(found)
            elif count >= len(self.digests) or self.digests[count] != found:
                raise ValueError(
                    f"{self._who}: expected data to give the same batches each time it is run "
                    f"over, got another batch {count + 1}; pass a list, or a DataLoader without "
                    "shuffling and random changes"
                )
            count += 1
            yield to_device(batch, self._device)
        if count == 0 or count < len(self.digests):
            have = "none" if count == 0 else f"{count} where there were {len(self.digests)}"
            raise ValueError(f"{self._who}: expected data to give batches, got {have}")

    def _check_order(self) -> None:
        missed = [name for name in self.layers if name not in self.order]
        self.left |= dict.fromkeys(missed, "the data does not come by it")
        if not self.order:
            raise ValueError(
                f"{self._who}: expected data to come by a layer with a quantized weight, got none "
                f"of {shown(list(self.layers))}"
            )

    @contextlib.contextmanager
    def _watched(self, at_call: Callable[[LayerCall], Tensor]) -> Iterator[_Watch]:
        """Hands out the layers' weights watched; at the end all is as before."""
        watch = _Watch(at_call)
        with contextlib.ExitStack() as stack:
            for layer in self.layers.values():
                source, hook = layer.source, functools.partial(watch.weight, layer)
                if isinstance(source, HookedWeight):
                    # The watched weight is assigned to the module.
                    kept = vars(source.module)[source.parameter]
                    stack.callback(setattr, source.module, source.parameter, kept)
                    stack.callback(layer.quantizer.register_forward_hook(hook).remove)
                else:
                    stack.callback(source.chain.register_forward_hook(hook).remove)
            yield watch


class _Enough(BaseException):  # noqa: N818: no error; one that handlers of errors let pass
    """Ends a forward of which the rest is not needed."""


class _Watch:
    """Makes the watched weights of one run; ``batch`` is the index of the present one."""

    def __init__(self, at_call: Callable[[LayerCall], Tensor]) -> None:
        self.at_call = at_call
        self.batch = 0

    def weight(self, layer: Layer, _: nn.Module, __: object, weight: Tensor) -> Tensor:
        """A forward hook of what computes the layer's weight."""
        watched = weight.as_subclass(_WatchedWeight)
        watched.plain = weight

        def called(function: Any, args: Any, kwargs: Any) -> Tensor:
            return self.at_call(LayerCall(layer, self.batch, function, args, kwargs))

        watched.called = called
        return watched


class _WatchedWeight(Tensor):
    """A weight that tells when a convolution or linear function reads it."""

    plain: Tensor
    called: Callable[[Any, Any, Any], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        args, kwargs = tree_map(_plain, (args, kwargs))
        if func in _SPATIAL and isinstance(weight, _WatchedWeight):
            return weight.called(func, args, kwargs)
        return func(*args, **kwargs)


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, _WatchedWeight) else value


def find_layers(
    prepared: PreparedModel, pattern: Pattern | None
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers whose weight's quantizer matches, by name; and why each other module is none.

    Raises:
        TypeError, ValueError: as ``select`` does for the pattern; or no layer matches.
    """
    modules = {clean_name(name): module for name, module in prepared.root.named_modules()}
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    chosen = prepared.select(pattern)
    for quantizer in chosen.values():
        source = prepared.weights.get(quantizer)
        if source is None:
            continue
        name, module = source.owner, modules[source.owner]
        parent = modules.get(name.rpartition(".")[0]) if name else None
        if not isinstance(module, LAYERS) or source.parameter != "weight":
            left[name] = f"a {type(module).__name__} is no convolution nor linear layer"
        elif is_out_proj(parent, module):
            left[name] = "attention reads its weight without calling it"
        else:
            layers[name] = Layer(name, module, quantizer, source)
    if not layers:
        raise ValueError(
            f"{prepared.who}: expected convolutions or linear layers with quantized weights, got "
            f"none among {shown(list(chosen))}"
        )
    return layers, left
