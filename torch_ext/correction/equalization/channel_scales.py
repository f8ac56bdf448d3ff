"""By how much channels are divided, so that the ranges on both sides of a value match.

Between two weights (Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias
Correction", section 4.1) channel i is divided by sqrt(r1 / r2), where r1 is the largest magnitude
in row i of the weight that makes it and r2 that in column i of the weights that read it; both are
then sqrt(r1 r2). A norm that follows no layer has no weight to quantize; there the activations'
largest magnitude a is moved into the weights that read them (Xiao et al. 2023, "SmoothQuant"):
channel i is divided by a^alpha / r2^(1 - alpha).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torch_ext.correction.equalization.layer_weight import LayerWeight, magnitudes, tensor_of
from torch_ext.correction.equalization.scale_sites import (
    ScaleSite,
    by_channel,
    largest_by_channel,
)
from torch_ext.quantizers.folded_weight import folding_factor

_CONVERGED = 1e-4  # of the logarithm of a factor


class ChannelScales:
    """``by_site``: what to divide the channels of each site by, float64; 1 at first.

    ``columns``: by weight, what its input channels are multiplied by.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, sites: Mapping[str, ScaleSite], activations: Mapping[str, Tensor]
    ) -> None:
        """``activations``: the largest magnitude of each channel, of sites without a layer."""
        self.sites, self.activations = sites, activations
        self.sweeps = 0
        self.by_site: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self._magnitudes: dict[str, Tensor] = {}
        # What multiplies the rows of a weight: the norm behind it, over the factors of its site.
        self._gains: dict[str, Tensor] = {}
        for name, site in sites.items():
            for read in site.reads:
                self._add(model, read.layer, site.norms_behind.get(read.layer.weight, ""))
            if site.layer is not None:
                self._add(model, site.layer, site.norm)
            device = self.columns[site.reads[0].layer.weight].device
            self.by_site[name] = torch.ones(site.channels, dtype=torch.float64, device=device)

    def _add(self, model: nn.Module, layer: LayerWeight, norm: str) -> None:
        if layer.weight in self.columns:
            return
        weight = tensor_of(model, layer.weight)
        assert weight is not None
        found = self._magnitudes[layer.weight] = magnitudes(weight, layer)
        gains = found.new_ones(found.shape[0], dtype=torch.float64)
        if norm:
            gains *= folding_factor(model.get_submodule(norm)).abs()
        self._gains[layer.weight] = gains
        inputs = found.shape[1] * layer.groups
        self.columns[layer.weight] = found.new_ones(inputs, dtype=torch.float64)

    @torch.no_grad()
    def solve(self, alpha: float, iterations: int) -> None:
        """Visits the sites in order, again and again, until no factor changes."""
        for self.sweeps in range(1, iterations + 1):
            changes = [self._visit(name, site, alpha) for name, site in self.sites.items()]
            if max(changes, default=0.0) < _CONVERGED:
                break

    def ranges(self, name: str) -> tuple[Tensor, Tensor]:
        """What the ranges of a site's channels are now: where it is made, and where it is read."""
        site = self.sites[name]
        if site.layer is None:
            made = self.activations[name].double() / self.by_site[name]
        else:
            made = self._made(site.layer)
        return made, self._read(site)

    def precision(self, name: str) -> float:
        """The mean over the channels of how much of both tensors' ranges they use, 0 to 1.

        Equation 9 of Nagel et al.; channels that are all zero on a side are left out.
        """
        made, read = self.ranges(name)
        used = (made > 0) & (read > 0)
        if not bool(used.any()):
            return 1.0
        return float((made / made.max() * read / read.max())[used].mean())

    def _visit(self, name: str, site: ScaleSite, alpha: float) -> float:
        made, read = self.ranges(name)
        if site.layer is None:
            own = self.by_site[name]
            factor = (made * own) ** alpha / (read / own) ** (1 - alpha) / own
        else:
            factor = (made / read).sqrt()
        # A channel that is zero on a side can be anything; it stays.
        factor = torch.where((made > 0) & (read > 0), factor, 1.0)
        self.by_site[name] *= factor
        if site.layer is not None:
            self._gains[site.layer.weight] /= factor
        for read_by in site.reads:
            self.columns[read_by.layer.weight] *= by_channel(factor, read_by.channels)
        return float(factor.log().abs().max())

    def _made(self, layer: LayerWeight) -> Tensor:
        known = self._magnitudes[layer.weight]
        spread = layer.spread(self.columns[layer.weight], known)
        return (known * spread).amax(1) * self._gains[layer.weight]

    def _read(self, site: ScaleSite) -> Tensor:
        found = torch.zeros_like(self.by_site[site.name])
        for read in site.reads:
            name = read.layer.weight
            rows = self._magnitudes[name] * self._gains[name][:, None]
            places = read.layer.by_input(rows) * self.columns[name]
            found = torch.maximum(found, largest_by_channel(places, read.channels, site.channels))
        return found
