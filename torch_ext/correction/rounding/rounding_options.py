"""The checked arguments of reconstruct that say how it rounds."""

from __future__ import annotations

from typing import Literal, get_args

from torch_ext.utils.arguments import bounded, parse_flag, parse_integer

ReconstructionMethod = Literal["gptq", "adaround"]
Target = Literal["float", "quantized"]


class RoundingOptions:
    """The checked arguments; ``vars`` gives them as values that JSON holds."""

    def __init__(
        self,
        who: str,
        method: ReconstructionMethod,
        target: Target,
        bias: bool,
        damping: float,
        activation_order: bool,
        iterations: int,
        positions: int,
        seed: int,
    ) -> None:
        for name, given, kind in (
            ("method", method, ReconstructionMethod),
            ("target", target, Target),
        ):
            if given not in get_args(kind):
                known = " or ".join(f'"{one}"' for one in get_args(kind))
                raise ValueError(f"{who}: expected {name} to be {known}, got {bounded(given)}")
        if isinstance(damping, bool) or not isinstance(damping, (int, float)):
            raise TypeError(f"{who}: expected damping to be a number, got {bounded(damping)}")
        if not 0 < damping <= 1000:
            raise ValueError(f"{who}: expected damping to be above 0, got {damping}")
        self.method: ReconstructionMethod = method
        self.target: Target = target
        self.bias = parse_flag(who, "bias", bias)
        self.damping = float(damping)
        self.activation_order = parse_flag(who, "activation_order", activation_order)
        self.iterations = parse_integer(who, "iterations", iterations, 1, 10**7)
        self.positions = parse_integer(who, "positions", positions, 1, 2**31 - 1)
        self.seed = parse_integer(who, "seed", seed, 0, 2**63 - 1)
