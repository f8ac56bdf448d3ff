"""Records runs of a model on examples, in eval and in train mode."""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from torch_ext.prepare.insertion.assign import align
from torch_ext.prepare.insertion.functions import LAYER_BY_LAYER, OPENED
from torch_ext.prepare.insertion.recording import IsFloat, Recording
from torch_ext.prepare.insertion.user_lines import begins_call, user_line
from torch_ext.prepare.module_classes import copied
from torch_ext.utils.arguments import bound_arguments
from torch_ext.utils.modes import uncompiled, undisturbed

_OTHERWISE = "without example_inputs, or give the class a forward"
_VERSION = Tensor._version.__get__  # type: ignore[attr-defined]


def record_modes(
    who: str,
    model: nn.Module,
    example_inputs: Any,
    is_float: IsFloat,
    modes: tuple[bool, ...] = (False, True),
) -> list[Recording]:
    """Recordings of eval mode and, if the examples run there too, of train mode.

    ``modes``: those to record, eval mode (False) among them. Raises ValueError with the line if an
    example does not run in eval mode.
    """
    if "forward" in vars(model):
        raise ValueError(
            f"{who}: expected the model's class to define its forward, got one that is an "
            f"attribute of the instance; call {who} {_OTHERWISE}"
        )
    examples = [bound_arguments(who, model, given) for given in examples_of(example_inputs)]
    recordings: list[Recording] = []
    for training in modes:
        problems: list[tuple[str, Exception]] = []
        for example in examples:
            twins = copied(who, model), copied(who, model)
            try:
                recordings += _first_and_later(model, twins, example, training, is_float)
            except Exception as error:  # the user's forward: anything may come
                text = str(error).partition("\n")[0]
                text = f"at {_failing_line(error)} {type(error).__name__}: {text}"
                problems.append((text, error))
        if not training and problems:
            raise ValueError(
                f"{who}: expected example_inputs that the model can run, got {problems[0][0]}"
            ) from problems[0][1]
        if len(problems) == len(examples):  # it may want targets
            warnings.warn(
                f"{who}: the example does not run in train mode ({problems[0][0]}), so calls in "
                "train mode are expected to be like those in eval mode; if they are not, pass an "
                "example that runs in both too, as one of example_inputs=[(first,), (second,)]",
                stacklevel=4,
            )
    for other in recordings[1:]:
        align(recordings[0], other)
    return recordings


def examples_of(example_inputs: Any) -> list[Any]:
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


def _first_and_later(
    model: nn.Module,
    twins: tuple[nn.Module, nn.Module],
    example: Mapping[str, Any],
    training: bool,
    is_float: IsFloat,
) -> list[Recording]:
    """A run; and another after it if the first left something behind, as it may go another way.

    ``twins``: copies of the model.
    """
    recording = record(twins[0], example, training, is_float)
    if _attributes_of(recording.model) == _attributes_of(model):
        return [recording]
    warm = twins[1].train(training)
    _keep_norms_in_eval(warm)
    with torch.no_grad(), undisturbed(warm):
        bound = _bound(warm, example)
        warm(*bound.args, **bound.kwargs)
    return [recording, record(warm, example, training, is_float)]


def _attributes_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Shapes of tensors that modules have as plain attributes, lengths of containers, numbers."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            own = key == "training" or (key.startswith("_") and isinstance(value, dict))
            if own:  # torch's
                continue
            if isinstance(value, (Tensor, tuple, list, dict)):
                shapes = [t.shape for t in tree_leaves(value) if isinstance(t, Tensor)]
                found.append((f"{name}.{key}", (type(value), shapes)))
            elif value is None or isinstance(value, (int, float, str)):
                found.append((f"{name}.{key}", value))
    return found


def _keep_norms_in_eval(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _bound(model: nn.Module, example: Mapping[str, Any]) -> inspect.BoundArguments:
    bound = inspect.signature(model.forward).bind_partial()
    bound.arguments.update(tree_map(_cloned, dict(example)))
    return bound


def record(
    twin: nn.Module, example: Mapping[str, Any], training: bool, is_float: IsFloat
) -> Recording:
    """Runs a model in one mode and leaves it changed; see :func:`undisturbed` for what stays.

    ``twin``: a copy that nothing else uses. ``example``: values by argument of the forward. Batch
    norms evaluate also while training, since
    they refuse to train on one value per channel.
    """
    twin.train(training)
    _keep_norms_in_eval(twin)
    recording = Recording(twin, example, is_float)
    bound = _bound(twin, example)
    for name, value in bound.arguments.items():
        recording.argument(name, value)
    forward = _layered(twin)
    for name, module in twin.named_modules():
        if name and "forward" not in vars(module):
            _wrap(recording, name, module)

    def recorded_forward() -> None:
        recording.end(forward(*bound.args, **bound.kwargs))

    begins_call(recorded_forward.__code__)
    # Functions that the forward has compiled run as they are written.
    with torch.no_grad(), undisturbed(twin), uncompiled(), _RecordMode(recording):
        recorded_forward()
    return recording


class _RecordMode(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # the user's own torch.compile, flex_attention's too
            return func(*args, **(kwargs or {}))
        if func == _VERSION:  # asked by the recording itself, between calls of modules
            return func(*args)
        if func in OPENED and not self.recording.hidden:
            with self:
                return OPENED[func](*args, **(kwargs or {}))
        return self.recording.run_function(func, args, kwargs or {})


def _wrap(recording: Recording, name: str, module: nn.Module) -> None:
    """Lets the recording see the module's calls."""
    forward = _layered(module)

    def recorded_forward(*args: Any, **kwargs: Any) -> Any:
        return recording.run_module(name, forward, args, kwargs)

    begins_call(recorded_forward.__code__)
    module.__dict__["forward"] = functools.wraps(module.forward)(recorded_forward)


def _layered(module: nn.Module) -> Callable[..., Any]:
    """The module's forward, without torch's fused paths that call no layer."""
    forward = module.forward
    layer_by_layer: Mapping[Any, Any] = LAYER_BY_LAYER
    replaced = layer_by_layer.get(getattr(forward, "__func__", None))
    return forward if replaced is None else types.MethodType(replaced, module)


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
