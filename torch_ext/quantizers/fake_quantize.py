"""The quantizer module: an observer, the range that it gives, and fake-quantization with it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from torch_ext import ops
from torch_ext.ops.registry import fake_quant_info, observer_info
from torch_ext.ops.registry_names import Method, Rule
from torch_ext.quantizers.observer import KEYS as OBSERVER_KEYS
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.parts.groups import check_groups, follow_rows_
from torch_ext.quantizers.parts.keep_dtype import TensorMap, keep_dtype
from torch_ext.quantizers.parts.keys import check_dynamic, check_keys, check_learned
from torch_ext.quantizers.parts.range_and_scale import range_and_scale
from torch_ext.quantizers.solve import Solution, WeightSolution, weight_solution
from torch_ext.quantizers.state_table import (
    ACCUMULATE,
    FOLLOW,
    QUANTIZE,
    FakeQuantState,
    StateName,
    parse_state,
)
from torch_ext.quantizers.transition import change_state, check_copied, check_export, warn_of_state
from torch_ext.utils.arguments import parse_flag, parse_fraction
from torch_ext.utils.modes import is_exporting

# The classes of methods that learn their range, and of quantizers whose scales are dynamic, which
# are registered when they are defined; all others are FakeQuantize itself.
_CLASSES: dict[str, type[FakeQuantize]] = {}
_IDLE = FakeQuantState.FLOAT.value
_STATE = "state"  # the key of a checkpoint's metadata
HELD = 2  # the value of `solved` for a range that is held


class FakeQuantize(nn.Module):
    """Observes a tensor, or quantizes and dequantizes it, depending on its state.

    The state is a :class:`FakeQuantState`. ``set_fake_quantize`` sets it for a whole model;
    ``train()`` and ``eval()`` do not change it. A new quantizer is in FLOAT: it returns its input.

    Args:
        method: ``"fake_quant"``: straight-through estimator, the range follows the batches in QAT.
            ``"lsq"`` and ``"pact"`` learn the range and create a :class:`LearnedFakeQuantize`.
        observer: the rule that computes the range, see :class:`Observer`.
        averaging_constant: c in ``range += c * (range of the batch - range)`` in QAT, 0 to 1:
            0 keeps the range fixed, 1 takes each batch's, as for weights. In VALIDATION, exports
            and files the range of a weight is that of the present weight, unless this is 0. Methods
            that learn the range ignore it.
        optional: whether it may have seen no data when its range is needed; it then passes values
            through instead of raising. Not every call has a floating tensor for an input of a
            model or a second operand.
        use_grad_scaling: lsq: multiply the gradient of the scale by ``1 / sqrt(N * quant_max)``.
        learn_zero_point: lsq with an affine qscheme: learn the zero point too (LSQ+).
        alpha: pact: the clipping level to start from without a calibration; None is 6.
        dynamic: compute the scales from the values of each call, without a calibration; creates a
            :class:`DynamicFakeQuantize`, for activations.
        scale_dtype: with ``dynamic`` and ``group_size``: ``"float8_e4m3"`` rounds the groups'
            scales to that format, relative to a calibrated one of the tensor (NVFP4).
        **keys: the other arguments of :class:`Observer`, options of the rule included.

    Raises:
        TypeError, ValueError, RuntimeError: an unknown method, rule or key, or a wrong value.

    Attributes:
        range: float32 [C,2], buffer.
        scale: float32 [C], buffer.
        zero_point: int32 [C], buffer.
        solved: uint8 [1], buffer: 1 if there is a range, 2 if it is held, see ``hold_range``.
        observer: the :class:`Observer`, a child module.
        label: the name in the model, set by ``set_fake_quantize``.
    """

    _version = 1

    range: Tensor
    scale: Tensor
    zero_point: Tensor
    solved: Tensor

    is_dynamic = False  # whether the scales come from the values of each call

    def __init_subclass__(cls, learns: bool = False, dynamic: bool = False, **keys: Any) -> None:
        """``FakeQuantize(...)`` creates these subclasses, for lsq and pact and ``dynamic=True``."""
        super().__init_subclass__(**keys)
        if learns or dynamic:
            _CLASSES["dynamic" if dynamic else "learned"] = cls

    def __new__(cls, method: Method = "fake_quant", *args: Any, **keys: Any) -> FakeQuantize:
        if cls is FakeQuantize:
            learned = "learned" if fake_quant_info(method)["learned"] else ""
            return super().__new__(_CLASSES.get("dynamic" if keys.get("dynamic") else learned, cls))
        return super().__new__(cls)

    def __init__(
        self,
        method: Method = "fake_quant",
        observer: Rule = "min_max",
        averaging_constant: float = 0.01,
        *,
        optional: bool = False,
        use_grad_scaling: bool = True,
        learn_zero_point: bool = False,
        alpha: float | None = None,
        dynamic: bool = False,
        scale_dtype: str | torch.dtype | None = None,
        **keys: Any,
    ) -> None:
        super().__init__()
        fake_quant_info(method)
        observer_info(observer)
        check_keys(f"FakeQuantize({observer})", keys, observer, KEYS)
        self.method: Method = method
        self.averaging_constant = parse_fraction(
            "FakeQuantize", "averaging_constant", averaging_constant
        )
        self.optional = parse_flag("FakeQuantize", "optional", optional)
        self.unobserved_allowed = False
        self._holds = False  # what `solved` says, as reading that would wait for a GPU
        self._state = FakeQuantState.FLOAT
        self._action = FakeQuantState.FLOAT.value
        self.label = ""
        check_dynamic(type(self).__name__, dynamic, self.is_dynamic, scale_dtype)
        self.observer = self._make_observer(observer, scale_dtype, keys)
        check_groups(f"FakeQuantize({method})", self.observer.group_size, self.transient)
        self.register_buffer("solved", torch.empty(1, dtype=torch.uint8))
        self._allocate(use_grad_scaling, learn_zero_point, alpha)
        self.reset_parameters()

    def _make_observer(self, rule: Rule, scale_dtype: object, keys: dict[str, Any]) -> Observer:
        return Observer(rule, **keys)

    def _allocate(
        self, use_grad_scaling: bool, learn_zero_point: bool, alpha: float | None
    ) -> None:
        """Registers buffers or parameters; raises ValueError for arguments of other methods."""
        who = f"FakeQuantize({self.method})"
        if fake_quant_info(self.method)["learned"]:
            raise ValueError(
                f"{type(self).__name__}: expected method to be one that learns no range, got "
                f'"{self.method}"; derive the class from LearnedFakeQuantize'
            )
        check_learned(who, use_grad_scaling, learn_zero_point, alpha)
        channels = self.observer.channel_len
        self.register_buffer("range", torch.empty(channels, 2, dtype=torch.float32))
        self.register_buffer("scale", torch.empty(channels, dtype=torch.float32))
        self.register_buffer("zero_point", torch.empty(channels, dtype=torch.int32))

    @property
    def state(self) -> FakeQuantState:
        """The state. Setting it solves the observer on leaving CALIBRATION.

        Takes a :class:`FakeQuantState` or its value, such as ``"qat"``. A weight's quantizer cannot
        reach the weight: on leaving CALIBRATION it raises, and in VALIDATION it keeps the range
        that it has, whatever the weight is by then. Use ``set_fake_quantize``.
        """
        return self._state

    @state.setter
    def state(self, state: FakeQuantState | StateName) -> None:
        who = "FakeQuantize.state"
        change_state(who, {self.label: self}, parse_state(who, state), lambda _: None)

    @property
    def rangeless(self) -> bool:
        """Whether it has no range at all, as the values of each call give the scales."""
        return False

    @property
    def transient(self) -> bool:
        """Whether it quantizes a weight, from which the range is computed when it is needed."""
        return self.observer.transient

    @property
    def keeps_range(self) -> bool:
        """Whether the range that it has stays when the weight that it quantizes changes."""
        return self._holds or self.averaging_constant == 0 or self.observer.statistic == "none"

    @property
    def holds_range(self) -> bool:
        """Whether :meth:`hold_range` was called since its range was set."""
        return self._holds

    def hold_range(self) -> None:
        """Keeps a rounded weight's range until another is set; a learned one goes on learning."""
        if not fake_quant_info(self.method)["learned"]:
            self._holds = True
            self.solved.fill_(HELD)

    @property
    def accumulates_data(self) -> bool:
        """Whether its statistic accumulates data: not for weights nor for given scales."""
        return not self.transient and self.observer.statistic != "none"

    @property
    def quantizes(self) -> bool:
        """Whether it quantizes in its present state."""
        return self._action in QUANTIZE

    @property
    def idle(self) -> bool:
        """Whether it neither observes nor quantizes what passes through it now."""
        return self._action == _IDLE

    @property
    def passes_through(self) -> bool:
        """Whether it is in VALIDATION without a range, and returns its input unchanged."""
        return self._state is FakeQuantState.VALIDATION and self._action != self._state.value

    def check_enters(self, who: str, name: str, state: FakeQuantState) -> None:
        """Raises if it cannot enter ``state``, whatever was observed; ``name``: in the model."""

    def enter(self, state: FakeQuantState, *, pass_through: bool = False) -> None:
        """Sets the state, without the checks and solving that ``set_fake_quantize`` does first.

        With ``pass_through`` the quantizer returns its input unchanged in this state.
        """
        self._state = state
        self._action = (FakeQuantState.FLOAT if pass_through else state).value

    def forward(self, x: Tensor) -> Tensor:
        """Observes or fake-quantizes ``x``, a floating tensor of any shape; keeps shape and dtype.

        Raises RuntimeError where ``torch.export`` or ``torch.onnx.export`` cannot keep it.
        """
        action = self._action  # alone decides, so a compiled graph has a single guard
        if is_exporting():
            check_export(action)
        if action in ACCUMULATE and not self.observer.transient:
            self.observer(x)
        if action not in QUANTIZE:
            return x
        return self._quantize(x, action)

    def _slow_forward(self, *args: Any, **keys: Any) -> Any:
        # Called instead of `forward` while torch.jit.trace runs.
        if torch.onnx.is_in_onnx_export():
            check_export(self._action)
        return super()._slow_forward(*args, **keys)  # type: ignore[no-untyped-call]

    def _replicate_for_data_parallel(self) -> Self:
        check_copied(self.label, "" if self.transient else self._action)
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call,no-any-return]

    def quantize_only(self, x: Tensor) -> Tensor:
        """Quantizes ``x`` as ``forward`` does, and observes nothing: for what it saw elsewhere."""
        action = self._action
        if is_exporting():
            check_export(action)
        return self._quantize(x, self._fixed(action)) if action in QUANTIZE else x

    def _fixed(self, action: str) -> str:
        """The action that quantizes as this one does, with the range that there is."""
        return FakeQuantState.VALIDATION.value

    @contextlib.contextmanager
    def replaced(self, quantize: Callable[[Tensor], Tensor], after: bool = False) -> Iterator[None]:
        """Calls ``quantize`` instead of the native op, or on its result; exports trace this one."""
        own = self._quantize
        self.__dict__["_quantize"] = lambda x, action: quantize(own(x, action) if after else x)
        try:
            yield
        finally:
            del self.__dict__["_quantize"]

    def _quantize(self, x: Tensor, action: str) -> Tensor:
        observer: Any = self._modules["observer"]
        if observer.group_size is None:
            return self._quantize_rows(x, action)
        made: Tensor = observer.from_rows(self._quantize_rows(observer.as_rows(x), action), x)
        return made

    def _quantize_rows(self, x: Tensor, action: str) -> Tensor:
        """Quantizes what ops get: ``x``, or with groups one group a row."""
        # Module.__getattr__ takes as long as the rest of this function; its dicts do not.
        observer: Any = self._modules["observer"]
        buffers: Any = self._buffers
        if action in FOLLOW and observer.statistic != "none":
            tensors = (buffers["range"], buffers["scale"], buffers["zero_point"], buffers["solved"])
            constant = 0.0 if self._holds else self.averaging_constant
            if not observer.solves_in_parts:
                return ops.follow_fake_quant(x, *tensors, constant, **self._follow_arguments())
            follow_rows_(x, *tensors, constant, **self._follow_arguments())
        qparams, axis = (buffers["scale"], buffers["zero_point"]), observer.scale_axis
        return ops.fake_quant(x, *qparams, ch_axis=axis, grid=observer.grid_text)

    def _follow_arguments(self) -> dict[str, Any]:
        """The arguments of ``ops.follow_`` after ``averaging_constant``."""
        observer = self.observer
        return {
            "rule": observer.name,
            "options": observer.encoded_options,
            "ch_axis": observer.scale_axis,
            "mantissa_bits": observer.mantissa_bits,
            "octaves": observer.octaves,
            "grid": observer.grid_text,
        }

    def solve_weight(self, weight: Tensor) -> WeightSolution:
        """Computes the range and statistic of ``weight``, without changing the quantizer."""
        return weight_solution(self.observer, weight, self._follow_arguments())

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale [C] float32 and zero point [C] int32 that it quantizes with."""
        return self.scale, self.zero_point

    @torch.no_grad()
    def take_(self, solution: Solution) -> Self:
        """Copies a range, scale and zero point into the quantizer; it is solved then."""
        self._set(solution)
        self._holds = False
        self.solved.fill_(1)
        if self.passes_through:
            self.enter(self._state)
        return self

    def _set(self, solution: Solution) -> None:
        self.range.copy_(solution.range)
        self.scale.copy_(solution.scale)
        self.zero_point.copy_(solution.zero_point)

    def shared_values(self) -> Tensor:
        """The values that ``sync_observers`` averages over the ranks, as one row [n]."""
        return self.range.flatten()

    @torch.no_grad()
    def take_shared_(self, values: Tensor) -> None:
        """Sets the range from the mean of all ranks' :meth:`shared_values`."""
        range_ = values.view_as(self.range).float()
        scale, zero_point = ops.qparams(range_, grid=self.observer.grid_text)
        self.take_(Solution(range_, scale, zero_point))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets range and statistic; with a given scale (``fixed_scale``) restores its range.

        Deferred initialization calls it after ``to_empty``.
        """
        self._holds = False
        self.observer.reset_()
        self._set(Solution.nothing(self.observer.channel_len, self.solved.device))
        self.solved.zero_()
        if self.observer.statistic == "none":
            self.take_(Solution(self.observer.range(), *self.observer.calculate_qparams()))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:  # beside the version, as the state is no tensor
            metadata[_STATE] = self._state.value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)
        self._holds = not self.solved.is_meta and int(self.solved) == HELD
        warn_of_state(local_metadata.get(_STATE), self._state)
        if self._state is not FakeQuantState.VALIDATION:
            return
        has_range = bool(self.solved)
        if not has_range and not (self.optional or self.unobserved_allowed):
            more[-1].append(f"{prefix[:-1]}: loaded without a range while in VALIDATION")
        self.enter(self._state, pass_through=not has_range)

    def _apply(self, fn: TensorMap, recurse: bool = True) -> Self:
        return super()._apply(keep_dtype(fn), recurse)  # type: ignore[no-untyped-call,no-any-return]

    def extra_repr(self) -> str:
        words = [self.method, self._state.value, f"averaging_constant={self.averaging_constant}"]
        words += ["optional"] if self.optional else []
        words += ["passes through"] if self.passes_through else []
        words += ["holds its range"] if self._holds else []
        words += [range_and_scale(self)]
        return ", ".join(words)


# help() would show the signature of __new__, which only chooses the class.
_PARAMETERS = list(inspect.signature(FakeQuantize.__init__).parameters.values())[1:]
FakeQuantize.__signature__ = inspect.Signature(_PARAMETERS)  # type: ignore[attr-defined]

# The keys that every quantizer takes beside method, rule and the rule's options.
KEYS = (
    *(
        parameter.name
        for parameter in _PARAMETERS
        if parameter.kind is not parameter.VAR_KEYWORD
        and parameter.name not in ("method", "observer")
    ),
    *OBSERVER_KEYS,
)
