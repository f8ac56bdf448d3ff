"""torch_ext's recipes: from a float net and inputs to the net in VALIDATION."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import torch_ext
from agreement.grids import BITS, Bits
from agreement.nets import BATCH
from agreement.scores import logits

RULES = ("min_max", "percentile", "clip_std", "kl", "mse", "aciq", "mix")
# What corrections start from.
START = "mse"


@dataclass(frozen=True)
class Task:
    """What a recipe is given: the float net, which it leaves as it is, bits, and inputs."""

    net: nn.Module
    bits: Bits
    calibration: Tensor

    # What walks from layer to layer gets one batch, as one run then serves all layers.
    @property
    def batches(self) -> list[Tensor]:
        return list(self.calibration.split(BATCH))


@dataclass(frozen=True)
class Recipe:
    """A way to quantize.

    Attributes:
        make: gives the net to call.
        what: one line about it.
        needs: names of torch_ext's functions.
        cost: of one recipe relative to calibrating, for the order of work.
        bits: those with which it says something new.
    """

    make: Callable[[Task], nn.Module]
    what: str
    needs: tuple[str, ...] = ()
    cost: float = 1.0
    bits: tuple[str, ...] = tuple(BITS)

    def why_not(self) -> str:
        """Which function this version of torch_ext lacks; empty if none."""
        missing = [name for name in self.needs if not hasattr(torch_ext, name)]
        return f"torch_ext has no {', '.join(missing)}" if missing else ""


def weight_rule(bits: Bits) -> str:
    """With few bits, clipping a weight loses less than rounding it coarsely."""
    return "min_max" if bits.weight == 8 else "mse"


def calibrated(
    task: Task, rule: str = START, weights: str | None = None, net: nn.Module | None = None
) -> nn.Module:
    """A prepared copy, calibrated: activations by a rule, weights by one that suits their bits."""
    model = copy.deepcopy(task.net if net is None else net)
    keys = {"histogram": True} if rule == "min_max" else {}
    model.qconfig = torch_ext.get_default_qconfig(  # type: ignore[assignment]
        activation_observer=rule,  # type: ignore[arg-type]
        weight_observer=weights or weight_rule(task.bits),  # type: ignore[arg-type]
        activation_qkwargs=task.bits.activation_keys | keys,
        weight_qkwargs=task.bits.weight_keys,
    )
    model = torch_ext.prepare_qat(model, inplace=True, example_inputs=task.calibration[:1])
    torch_ext.calibrate(model, task.batches, progress=False)
    return model


def by_rule(rule: str, weights: str | None = None) -> Callable[[Task], nn.Module]:
    return lambda task: calibrated(task, rule, weights)


def swept(task: Task) -> nn.Module:
    """The rules with the least error of the logits on the inputs of the calibration."""
    model = calibrated(task)
    want = logits(task.net, task.calibration, BATCH)
    found = torch_ext.sweep(
        model,
        lambda quantized: float((logits(quantized, task.calibration, BATCH) - want).norm()),
        activation_observers=["min_max", "percentile", "mse"],
        weight_observers=["min_max", "mse"],
        higher_is_better=False,
        progress=False,
    )
    found.apply(model)
    return model


def corrected(task: Task) -> nn.Module:
    model = calibrated(task)
    torch_ext.correct_bias(model, [task.calibration], progress=False)
    return model


def equalized_net(task: Task) -> nn.Module:
    """The float net with its layers' channels equalized; ReLU6 gets a limit for each channel."""
    net = copy.deepcopy(task.net)
    torch_ext.equalize(net, task.calibration[:1], clipped="scale", progress=False)
    return net


def equalized(task: Task) -> nn.Module:
    return calibrated(task, net=equalized_net(task))


def equalized_corrected(task: Task) -> nn.Module:
    model = equalized(task)
    torch_ext.correct_bias(model, [task.calibration], progress=False)
    return model


def rounded(method: str, *, equalize: bool = False) -> Callable[[Task], nn.Module]:
    def make(task: Task) -> nn.Module:
        model = equalized(task) if equalize else calibrated(task)
        torch_ext.reconstruct(model, [task.calibration], method, progress=False)
        return model

    return make


# With 6 and 4 bits for weights alone, activations are as with W8A8.
ACTIVATIONS = ("W8A8", "W4A4")
FEW = ("W6A8", "W4A8", "W4A4")

RECIPES: dict[str, Recipe] = {
    **{
        rule: Recipe(
            by_rule(rule),
            f"activations by `{rule}`; weights by `min_max` with 8 bits, else by `mse`",
            bits=tuple(BITS) if rule == START else ACTIVATIONS,
        )
        for rule in RULES
    },
    "min_max, weights min_max": Recipe(
        by_rule("min_max", "min_max"), "activations and weights by `min_max`", bits=FEW
    ),
    "sweep": Recipe(
        swept, "the rules that `sweep` finds best on the calibration", cost=6, bits=ACTIVATIONS
    ),
    "correct_bias": Recipe(corrected, "`mse`, then `correct_bias`", ("correct_bias",), 3),
    "equalize": Recipe(
        equalized, "`equalize` with a ReLU6 for each channel, then `mse`", ("equalize",), 2
    ),
    "equalize, correct_bias": Recipe(
        equalized_corrected, "`equalize`, `mse`, `correct_bias`", ("equalize", "correct_bias"), 4
    ),
    **{
        ", ".join(filter(None, (equal, method))): Recipe(
            rounded(method, equalize=bool(equal)),
            ", ".join(
                f"`{step}`" for step in (equal, "mse", f'reconstruct(method="{method}")') if step
            ),
            ("reconstruct", *filter(None, (equal,))),
            cost,
            bits,
        )
        for method, cost, bits in (("gptq", 8, tuple(BITS)), ("adaround", 20, FEW))
        for equal in ("", "equalize")
    },
}
