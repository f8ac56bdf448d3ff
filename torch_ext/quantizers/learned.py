"""Quantizers whose range is a parameter: lsq and pact, and what an optimizer needs of them."""

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
from torch_ext.quantizers.solve import Solution
from torch_ext.quantizers.state_table import DIFFERENTIATE, FOLLOW, QUANTIZE, FakeQuantState
from torch_ext.utils.arguments import bounded, parse_flag
from torch_ext.utils.text import joined, label_of

# The rule whose scale an uncalibrated method starts from.
_START: Rule = "mean_abs"


class LearnedFakeQuantize(FakeQuantize, learns=True):
    """A :class:`FakeQuantize` whose range is learned by gradient; ``FakeQuantize("lsq")`` is one.

    ============  ==================================================================================
    ``lsq``       Parameter ``scale`` float32 [C]; with ``learn_zero_point`` also ``offset`` [C],
                  which is added to the zero point it started from, and rounded with it
    ``pact``      Parameter ``alpha`` float32 [1]; the range is [-alpha, alpha], or [0, alpha] on
                  an unsigned grid
    ============  ==================================================================================

    They start from the calibrated range: lsq takes its scale and zero point, pact its largest
    magnitude. Without calibration lsq starts from ``2 * mean|x| / sqrt(quant_max)`` of the first
    batch in QAT, and pact from the key ``alpha`` (6). Gradients reach them in QAT alone.

    ``range``, ``scale`` and ``zero_point`` are computed from the parameters when they are read.
    Buffers beside ``solved``: ``start_range`` float32 [C,2] and ``start_zero_point`` int32 [C],
    where learning began.
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
        self._starting = False  # whether the next batch may have to set the parameter
        self._check_grid()
        if self._start_value:
            self._start_value = self._parse_start(alpha)
        elif alpha is not None:
            raise ValueError(
                f"{self._who}: expected alpha to be None, got {bounded(alpha)}: pact has one"
            )
        channels = self.observer.channel_len
        # Not by register_parameter: a property of the class may have the name.
        self._parameters[self._parameter] = nn.Parameter(torch.ones(channels, dtype=torch.float32))
        if self.learn_zero_point:
            self.offset = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("start_range", torch.empty(channels, 2, dtype=torch.float32))
        self.register_buffer("start_zero_point", torch.empty(channels, dtype=torch.int32))

    @property
    def _who(self) -> str:
        return f"FakeQuantize({self.method})"

    def _check_grid(self) -> None:
        observer, who = self.observer, self._who
        if observer.quant_max < 1:
            raise ValueError(
                f"{who}: expected quant_max to be at least 1, got {observer.quant_max}"
            )
        if observer.power_of_two:
            raise ValueError(f"{who}: expected power_of_two to be False, got True: it is learned")
        if self.learn_zero_point and (observer.symmetric or not self._per_channel):
            raise ValueError(
                f"{who}: expected learn_zero_point to be False, got True: only lsq learns one, on "
                "an affine qscheme"
            )
        if self._per_channel:
            return
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
        if alpha is None:
            return self._start_value
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"{self._who}: expected alpha to be a number, got {bounded(alpha)}")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"{self._who}: expected alpha to be finite and above 0, got {alpha}")
        return float(alpha)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The learned parameters by name."""
        return {name: p for name, p in self._parameters.items() if p is not None}

    @property
    def starts_from_data(self) -> bool:
        """Whether the first batch in QAT sets the parameter, unless a calibration has."""
        return not self._start_value

    # Read, the same names say for every method what it quantizes with.
    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        own = self._parameters.get("scale")
        return self.calculate_qparams()[0] if own is None else own

    @property
    def zero_point(self) -> Tensor:  # type: ignore[override]
        return self.calculate_qparams()[1]

    @property
    def range(self) -> Tensor:  # type: ignore[override]
        """float32 [C,2], of the grid's ends; symmetric grids reach equally far to both sides."""
        scale, zero_point = (t.double() for t in self.calculate_qparams())
        observer = self.observer
        low, high = observer.quant_min - zero_point, observer.quant_max - zero_point
        if observer.symmetric and observer.quant_min < 0:
            low, high = (low - high) / 2, (high - low) / 2
        found = torch.stack([low * scale, high * scale], 1)
        largest = torch.finfo(torch.float32).max
        return found.clamp_(-largest, largest).float()

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What it quantizes with: scale [C] float32, above 0, and zero point [C] int32.

        Raises ValueError where an optimizer made a parameter infinite or NaN.
        """
        self.check_finite()
        observer = self.observer
        parameter = _whole(self._parameters[self._parameter])
        grid = (observer.quant_min, observer.quant_max)
        scales = _C.learned_scales(self.method, parameter.tolist(), *grid)
        zero_point = self.start_zero_point
        if self.learn_zero_point:
            # As the op does it.
            learned = zero_point + _whole(self.offset)
            zero_point = learned.round().clamp(*grid).to(torch.int32)
        scale = torch.tensor(scales, dtype=torch.float32, device=parameter.device)
        return scale, zero_point

    def check_finite(self) -> None:
        """Raises ValueError where an optimizer made a parameter infinite or NaN."""
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
        """Whether FSDP2 left this rank a part of the parameter that the next batch would set."""
        sharded = hasattr(self._parameters[self._parameter], "full_tensor")
        return self.starts_from_data and sharded and not bool(self.solved)

    def enter(self, state: FakeQuantState, *, pass_through: bool = False) -> None:
        super().enter(state, pass_through=pass_through)
        if state.value in FOLLOW:
            if not self.starts_from_data:
                self.solved.fill_(1)  # it has had a range all along
            self._starting = self.solved.is_meta or not bool(self.solved)

    def _fixed(self, action: str) -> str:
        return action  # the range is learned from every value that is quantized

    def _quantize(self, x: Tensor, action: str) -> Tensor:
        observer = self.observer
        parameter: Tensor | None = self._parameters[self._parameter]
        assert parameter is not None
        learns = action in DIFFERENTIATE
        if self._starting and action in FOLLOW:
            # It works while `solved` is 0, and moves nothing later: no look at the device.
            ops.follow_(
                x,
                self.start_range,
                parameter.detach(),
                self.start_zero_point,
                self.solved,
                0.0,
                _START,
                observer.quant_min,
                observer.quant_max,
                observer.symmetric,
                ch_axis=observer.ch_axis,
                options=(),
                mantissa_bits=observer.mantissa_bits,
                octaves=observer.octaves,
            )
            # What is kept for the backward pass must not be what was written to.
            parameter = parameter.clone()
        zero_point = self.start_zero_point if self._per_channel else None
        if self.learn_zero_point:
            zero_point = self.start_zero_point + (self.offset if learns else self.offset.detach())
        # The first axis of activations is the batch.
        batch_axis = -1 if observer.transient or observer.ch_axis == 0 else 0
        try:
            return ops.learned_fake_quant(
                x,
                cast("LearnedMethod", self.method),
                parameter if learns else parameter.detach(),
                zero_point,
                observer.quant_min,
                observer.quant_max,
                observer.ch_axis,
                self.use_grad_scaling,
                batch_axis,
            )
        except RuntimeError:
            self.check_finite()
            raise

    def _set(self, solution: Solution) -> None:
        self.start_range.copy_(solution.range)
        self.start_zero_point.copy_(solution.zero_point)
        value = solution.scale
        if not self._per_channel:
            # The largest magnitude; of the positive values alone on an unsigned grid.
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
    """All channels, also where FSDP2 left this rank a shard of them (a DTensor)."""
    value: Tensor = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _write(parameter: Any, value: Tensor) -> None:
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # slow to import

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.detach().copy_(value)


def quantization_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the model's quantizers learn, each parameter once: scales, offsets, clipping levels.

    Scales want another learning rate than weights, and no weight decay, which would shrink the
    range of what is quantized::

        torch.optim.SGD([
            {"params": quantization_parameters(model), "lr": 1e-3, "weight_decay": 0.0},
            {"params": float_parameters(model)},
        ], lr=1e-2, weight_decay=1e-4)

    With methods that learn nothing (``fake_quant``) the list is empty.

    Raises TypeError for what is no module, ValueError where the model has no quantizers.
    """
    return _learned_parameters("quantization_parameters", model)


def float_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters but those of :func:`quantization_parameters`, each once.

    Raises TypeError for what is no module, ValueError where the model has no quantizers.
    """
    learned = {id(parameter) for parameter in _learned_parameters("float_parameters", model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in learned]


def _learned_parameters(who: str, model: nn.Module) -> list[nn.Parameter]:
    quantizers = PreparedModel(who, model).quantizers.values()
    learned = (q for q in quantizers if isinstance(q, LearnedFakeQuantize))
    return [parameter for quantizer in learned for parameter in quantizer.parameters()]
