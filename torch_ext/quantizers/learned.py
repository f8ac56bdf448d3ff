"""Quantizers that learn their range (lsq and pact), and their parameters for an optimizer."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_ext import _C, ops
from torch_ext.ops.registry import fake_quant_info
from torch_ext.ops.registry_names import LearnedMethod, Rule
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.grid import is_float
from torch_ext.quantizers.parts.groups import follow_rows_
from torch_ext.quantizers.solve import Solution
from torch_ext.quantizers.state_table import DIFFERENTIATE, FOLLOW, QUANTIZE, FakeQuantState
from torch_ext.utils.arguments import bounded, parse_flag
from torch_ext.utils.sharded import whole
from torch_ext.utils.text import joined, label_of

# The rule that gives lsq's first scale without a calibration.
_START: Rule = "mean_abs"


class LearnedFakeQuantize(FakeQuantize, learns=True):
    """A :class:`FakeQuantize` whose range is learned by gradient; ``FakeQuantize("lsq")`` is one.

    ============  ==================================================================================
    ``lsq``       Parameter ``scale`` float32 [C]; with ``learn_zero_point`` also ``offset`` [C],
                  which is added to the zero point it started from, and rounded with it
    ``pact``      Parameter ``alpha`` float32 [1]; the range is [-alpha, alpha], or [0, alpha] on
                  an unsigned grid
    ============  ==================================================================================

    Learning starts from the calibrated range: lsq takes its scale and zero point, pact its largest
    magnitude. Without calibration lsq starts from ``2 * mean|x| / sqrt(quant_max)`` of the first
    batch in QAT (Esser et al. 2020) that is not all zero, per channel, and pact from the argument
    ``alpha``, 6 by default. The parameters get gradients in QAT only.

    ``range``, ``scale`` and ``zero_point`` are computed from the parameters when they are read.
    Arguments and errors are those of :class:`FakeQuantize`.

    Attributes:
        start_range: float32 [C,2], buffer: the range that learning started from; (0,0) for a
            channel that was all zero so far and has not started.
        start_zero_point: int32 [C], buffer: the zero point that learning started from.
    """

    start_range: Tensor
    start_zero_point: Tensor

    def _allocate(
        self, use_grad_scaling: bool, learn_zero_point: bool, alpha: float | None
    ) -> None:
        self.use_grad_scaling = parse_flag(self._who, "use_grad_scaling", use_grad_scaling)
        self.learn_zero_point = parse_flag(self._who, "learn_zero_point", learn_zero_point)
        info = fake_quant_info(self.method)
        if not info["learned"]:
            known = [method for method in _C.fake_quants() if fake_quant_info(method)["learned"]]
            raise ValueError(
                f"{type(self).__name__}: expected method to be one of {joined(known)}, got "
                f'"{self.method}", which learns no range'
            )
        self._parameter = info["parameter"]
        self._per_channel = info["per_channel"]
        self._start_value = info["start"]
        self._starting = False  # whether the next batch in QAT may set the parameter
        self._starts_by_channel = False  # whether `solved` does not tell that it must not
        self._keeps_start = False  # whether compiled code has what sets it, also afterwards
        self._check_grid()
        if self._start_value:
            self._start_value = self._parse_start(alpha)
        elif alpha is not None:
            raise ValueError(
                f"{self._who}: expected alpha to be None, got {bounded(alpha)}: only pact has one"
            )
        channels = self.observer.channel_len
        # register_parameter raises for a name that is a property of the class, such as `scale`.
        self._parameters[self._parameter] = nn.Parameter(torch.ones(channels, dtype=torch.float32))
        if self.learn_zero_point:
            self.offset = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("start_range", torch.empty(channels, 2, dtype=torch.float32))
        self.register_buffer("start_zero_point", torch.empty(channels, dtype=torch.int32))

    @property
    def _who(self) -> str:
        return f"FakeQuantize({self.method})"

    def _check_grid(self) -> None:
        """Raises ValueError for a grid or an argument that the method does not support."""
        observer, who = self.observer, self._who
        if observer.quant_max < 1:
            raise ValueError(
                f"{who}: expected quant_max to be at least 1, got {observer.quant_max}"
            )
        if observer.power_of_two:
            raise ValueError(
                f"{who}: expected power_of_two to be False, got True: the scale is learned"
            )
        if self.learn_zero_point and (observer.symmetric or not self._per_channel):
            raise ValueError(
                f"{who}: expected learn_zero_point to be False, got True: only lsq learns one, on "
                "an affine qscheme"
            )
        if self._per_channel:
            return
        if observer.group_size is not None:
            raise ValueError(f"{who}: expected group_size to be None, got {observer.group_size}")
        if not observer.symmetric or observer.ch_axis >= 0:
            scheme = str(observer.qscheme).removeprefix("torch.")
            raise ValueError(f"{who}: expected qscheme to be per_tensor_symmetric, got {scheme}")
        if observer.scale_rule != "grid":
            raise ValueError(f"{who}: expected scale_rule to be grid, got {observer.scale_rule}")
        if not self.use_grad_scaling:
            raise ValueError(
                f"{who}: expected use_grad_scaling to be True, got False: only lsq scales gradients"
            )

    def _parse_start(self, alpha: float | None) -> float:
        """The clipping level to start from: ``alpha``, or the method's default."""
        if alpha is None:
            return self._start_value
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"{self._who}: expected alpha to be a number, got {bounded(alpha)}")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"{self._who}: expected alpha to be finite and above 0, got {alpha}")
        return float(alpha)

    @property
    def keeps_range(self) -> bool:
        return True

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The learned parameters by name: ``scale`` and ``offset``, or ``alpha``."""
        return {
            name: parameter for name, parameter in self._parameters.items() if parameter is not None
        }

    def __setattr__(self, name: str, value: Any) -> None:
        # DataParallel sets its copies of the parameters as attributes of the module's copy.
        if "_is_replica" in vars(self) and name in ("scale", "offset", "alpha"):
            self._parameters[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def starts_from_data(self) -> bool:
        """Whether, without a calibration, the first batch in QAT sets the parameter (lsq)."""
        return not self._start_value

    # Properties, so that scale, zero_point and range can be read from quantizers of every method.
    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """float32 [C]: of lsq the parameter itself, of pact computed from ``alpha``."""
        parameter = self._parameters.get("scale")
        return self.calculate_qparams()[0] if parameter is None else parameter

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        """int32 [C], learned offset included."""
        return self.calculate_qparams()[1]

    @property
    def range(self) -> Tensor:  # type: ignore[override]
        """float32 [C,2]: the dequantized ``quant_min`` and ``quant_max``.

        On a symmetric signed grid it is as wide, and centred on 0.
        """
        scale, zero_point = (tensor.double() for tensor in self.calculate_qparams())
        observer = self.observer
        low, high = observer.quant_min - zero_point, observer.quant_max - zero_point
        if observer.symmetric and observer.quant_min < 0:
            low, high = (low - high) / 2, (high - low) / 2
        ends = torch.stack([low * scale, high * scale], 1)
        largest = torch.finfo(torch.float32).max
        return ends.clamp_(-largest, largest).float()

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale [C] float32, above 0, and zero point [C] int32 that it quantizes with.

        Raises:
            ValueError: a parameter is infinite or NaN.
        """
        self.check_finite()
        observer = self.observer
        parameter = _whole(self._parameters[self._parameter])
        grid = (observer.quant_min, observer.quant_max)
        floats = str(observer.dtype) if is_float(observer.dtype) else ""
        scales = _C.learned_scales(self.method, parameter.tolist(), *grid, floats)
        zero_point = self.start_zero_point
        if self.learn_zero_point:
            # The op rounds and clamps a learned zero point the same way.
            learned = zero_point + _whole(self.offset)
            zero_point = learned.round().clamp(*grid).to(torch.int32)
        scale = torch.tensor(scales, dtype=torch.float32, device=parameter.device)
        return scale, zero_point

    def check_finite(self) -> None:
        """Raises ValueError if a learned parameter is infinite or NaN."""
        for name, parameter in self.learned.items():
            values = _whole(parameter)
            if not bool(values.isfinite().all()):
                bad = int(torch.nonzero(~values.isfinite())[0])
                where = f"{self.label}.{name}".lstrip(".")
                raise ValueError(
                    f"{self._who}: expected {where} to be finite, got {float(values[bad])} in "
                    f"channel {bad}: the optimizer left the range of float32; lower the learning "
                    "rate of quantization_parameters, or clip gradients"
                )

    def check_enters(self, who: str, name: str, state: FakeQuantState) -> None:
        if state.value in QUANTIZE:
            self.check_finite()
        if state.value in FOLLOW and self._would_start_on_a_shard():
            raise RuntimeError(
                f"{who}: expected quantizers to have a range before fully_shard, got none for "
                f"{label_of(name)}: a first batch would set the scale of one rank's shard alone; "
                "calibrate or load_observer_params first"
            )

    def _would_start_on_a_shard(self) -> bool:
        """Whether the next batch would set the parameter, but FSDP2 has sharded it."""
        return self.starts_from_data and self._is_sharded and not bool(self.solved)

    @property
    def _is_sharded(self) -> bool:
        return hasattr(self._parameters[self._parameter], "full_tensor")

    def _started(self) -> Tensor:
        """Bool [C]: whether a channel's scale was set, from a calibration or a batch."""
        return (self.start_range != 0).any(1)

    def enter(self, state: FakeQuantState, *, pass_through: bool = False) -> None:
        super().enter(state, pass_through=pass_through)
        if state.value in FOLLOW:
            if not self.starts_from_data:
                self.solved.fill_(1)  # the range follows from the parameter's start value
            # A channel that was all zero has the scale 1 until there are values to scale.
            may_start = self.starts_from_data and not self._is_sharded
            waiting = may_start and (self.solved.is_meta or bool((~self._started()).any()))
            self._starting = waiting
            # A later graph without it would be one more of the same state.
            self._keeps_start = may_start and (waiting or self._keeps_start)
            # `solved` is one flag for all channels, and a calibration sets it for zeros too.
            self._starts_by_channel = waiting and (
                self.observer.channel_len > 1 or self.solved.is_meta or bool(self.solved)
            )

    def _fixed(self, action: str) -> str:
        return action  # the range is learned from every value that is quantized

    def _quantize_rows(self, x: Tensor, action: str) -> Tensor:
        # As in FakeQuantize: Module.__getattr__ is slow.
        observer: Any = self._modules["observer"]
        start_zero_point: Any = self._buffers["start_zero_point"]
        parameter: Tensor | None = self._parameters[self._parameter]
        assert parameter is not None
        learns = action in DIFFERENTIATE
        compiling = torch.compiler.is_dynamo_compiling()
        if action in FOLLOW and (self._keeps_start if compiling else self._starting):
            self._start(x, parameter.detach(), compiling or self._starts_by_channel)
            # follow_ wrote to these in place, and may again; autograd has to save others.
            parameter, start_zero_point = parameter.clone(), start_zero_point.clone()
        zero_point = start_zero_point if self._per_channel else None
        if self.learn_zero_point:
            zero_point = start_zero_point + (self.offset if learns else self.offset.detach())
        # Axis 0 of an activation is the batch; a weight has none.
        batch_axis = -1 if observer.transient or observer.ch_axis == 0 else 0
        try:
            return ops.learned_fake_quant(
                x,
                cast("LearnedMethod", self.method),
                parameter if learns else parameter.detach(),
                zero_point,
                ch_axis=observer.scale_axis,
                use_grad_scaling=self.use_grad_scaling,
                batch_axis=batch_axis,
                grid=observer.grid_text,
            )
        except RuntimeError:
            self.check_finite()
            raise

    def _start(self, x: Tensor, parameter: Tensor, by_channel: bool) -> None:
        """Sets the scale of the channels that have none and are not all zero in ``x``."""
        observer = self.observer
        # follow_ does nothing once `done` is 1, so no host sync is needed to read it.
        done = self.solved
        if by_channel:
            done = self._started().all().to(torch.uint8).view(1)
        tensors = (x, self.start_range, parameter, self.start_zero_point, done)
        arguments = self._follow_arguments() | {"rule": _START, "options": ()}
        follow = ops.follow_ if observer.group_size is None else follow_rows_
        follow(*tensors, 0.0, **arguments)
        if by_channel:
            # 1 if any channel has started; 2 stays, as a held range has.
            self.solved.copy_(torch.maximum(self.solved, done))

    def _set(self, solution: Solution) -> None:
        self.start_range.copy_(solution.range)
        self.start_zero_point.copy_(solution.zero_point)
        value = solution.scale
        if not self._per_channel:
            # alpha is the largest magnitude; on an unsigned grid the upper end.
            reach = solution.range[:, 1]
            if self.observer.quant_min < 0:
                reach = torch.maximum(reach, -solution.range[:, 0])
            value = torch.where(reach > 0, reach, torch.full_like(reach, self._start_value))
        _write(self._parameters[self._parameter], value)
        if self.learn_zero_point:
            _write(self.offset, torch.zeros_like(value))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._starting = self.starts_from_data
        self._keeps_start = self._starting and self._action in FOLLOW
        self._starts_by_channel = self._starting and self.observer.channel_len > 1

    def shared_values(self) -> Tensor:
        return torch.cat([_whole(parameter) for parameter in self.learned.values()])

    @torch.no_grad()
    def take_shared_(self, values: Tensor) -> None:
        parts = torch.split(values.float(), self.observer.channel_len)
        for parameter, value in zip(self.learned.values(), parts, strict=True):
            _write(parameter, value)
        self.solved.fill_(1)

    def extra_repr(self) -> str:
        words = [super().extra_repr()]
        words += ["learn_zero_point=True"] if self.learn_zero_point else []
        words += [] if self.use_grad_scaling else ["use_grad_scaling=False"]
        return ", ".join(words)


def _whole(parameter: Any) -> Tensor:
    """The detached values of all channels."""
    return whole(parameter.detach())


def _write(parameter: Any, value: Tensor) -> None:
    """Writes the values of all channels into a parameter; of a DTensor each rank's shard."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # slow to import

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.detach().copy_(value)


def quantization_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the model's quantizers learn: scales, offsets and clipping levels.

    Scales usually need another learning rate than weights, and no weight decay, which would shrink
    the ranges::

        torch.optim.SGD([
            {"params": quantization_parameters(model), "lr": 1e-3, "weight_decay": 0.0},
            {"params": float_parameters(model)},
        ], lr=1e-2, weight_decay=1e-4)

    Returns:
        Each parameter once; an empty list for methods that learn nothing (``fake_quant``).

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no quantizers.
    """
    return _learned_parameters("quantization_parameters", model)


def float_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but those of :func:`quantization_parameters`, each once.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no quantizers.
    """
    learned = {id(parameter) for parameter in _learned_parameters("float_parameters", model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in learned]


def _learned_parameters(who: str, model: nn.Module) -> list[nn.Parameter]:
    quantizers = PreparedModel(who, model).quantizers.values()
    return [
        parameter
        for quantizer in quantizers
        if isinstance(quantizer, LearnedFakeQuantize)
        for parameter in quantizer.parameters()
    ]
