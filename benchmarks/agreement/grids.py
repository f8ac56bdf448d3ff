"""The bits of weights and activations that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bits:
    """Weights are symmetric per output channel, activations affine per tensor."""

    weight: int
    activation: int

    @property
    def weight_range(self) -> tuple[int, int]:
        """8 bits are [-127, 127], which engines take; fewer bits use the whole range."""
        half = 2 ** (self.weight - 1)
        return (1 - half if self.weight == 8 else -half), half - 1

    @property
    def weight_keys(self) -> dict[str, Any]:
        """The grid as keys of a quantizer."""
        low, high = self.weight_range
        return {
            "dtype": "int4" if self.weight == 4 else "int8",
            "quant_min": low,
            "quant_max": high,
        }

    @property
    def activation_keys(self) -> dict[str, Any]:
        dtype = "uint4" if self.activation == 4 else "uint8"
        return {"dtype": dtype, "qscheme": "per_tensor_affine"}


BITS = {
    "W8A8": Bits(8, 8),
    "W6A8": Bits(6, 8),
    "W4A8": Bits(4, 8),
    "W4A4": Bits(4, 4),
}
