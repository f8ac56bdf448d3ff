"""What scaling and absorbing change in a model, computed from the model's own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_ext.correction.equalization.channel_limits import ChannelLimits
from torch_ext.correction.equalization.channel_scales import ChannelScales
from torch_ext.correction.equalization.layer_weight import LayerWeight, tensor_of
from torch_ext.correction.equalization.scale_sites import ScaleSite, by_channel
from torch_ext.prepare.batch_norms.pair import has_bias_place


class Before(NamedTuple):
    """What :meth:`ChannelChanges.apply` replaced."""

    tensors: list[tuple[Tensor, Tensor]]  # with their values
    entries: list[tuple[nn.Module, str, nn.Module | None]]  # children, and parameters (None)

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, value in self.tensors:
            tensor.copy_(value)
        for holder, name, child in self.entries:
            if child is None:
                holder._parameters[name] = None
            else:
                holder._modules[name] = child


class ChannelChanges:
    """The same changes for a model and its copies.

    Args:
        scales: what to divide channels by.
        constants: by site, what is taken from each channel, of the value that is divided already,
            and added behind the layers that read it.
    """

    def __init__(self, scales: ChannelScales, constants: Mapping[str, Tensor]) -> None:
        self._scales, self._constants = scales, constants
        self._layers: dict[str, LayerWeight] = {}
        self._rows: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        for name, site in scales.sites.items():
            factor = scales.by_site[name]
            self._vectors.update(dict.fromkeys(site.vectors, factor))
            self._layers.update({read.layer.weight: read.layer for read in site.reads})
            if site.layer is not None and not site.norm:
                self._layers[site.layer.weight] = site.layer
                self._rows[site.layer.weight] = factor

    @torch.no_grad()
    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """The new values by name, float64; of tensors that the model lacks too."""
        made = {name: self._of(model, name) / factor for name, factor in self._vectors.items()}
        for name, layer in self._layers.items():
            rows = layer.as_rows(self._of(model, name))
            rows = rows * layer.spread(self._scales.columns[name], rows)
            if name in self._rows:
                rows = rows / self._rows[name].view(-1, *[1] * (rows.dim() - 1))
            made[name] = layer.from_rows(rows)
        for name, constant in self._constants.items():
            self._absorb(model, made, self._scales.sites[name], constant)
        return made

    def _absorb(
        self, model: nn.Module, made: dict[str, Tensor], site: ScaleSite, constant: Tensor
    ) -> None:
        self._add(model, made, site.bias, -constant)
        for read in site.reads:
            layer = read.layer
            given = by_channel(constant, read.channels, 0.0)
            moved = layer.of_constant(layer.as_rows(made[layer.weight]), given)
            norm = site.norms_behind.get(layer.weight, "")
            if norm:  # which takes away the mean
                self._add(model, made, f"{norm}.running_mean", -moved)
            else:
                self._add(model, made, layer.bias, moved)

    def _add(self, model: nn.Module, made: dict[str, Tensor], name: str, values: Tensor) -> None:
        if name not in made and tensor_of(model, name) is None:
            made[name] = torch.zeros_like(values)
        made[name] = (made[name] if name in made else self._of(model, name)) + values

    @staticmethod
    def _of(model: nn.Module, name: str) -> Tensor:
        found = tensor_of(model, name)
        assert found is not None
        return found.detach().double()

    def limits(self) -> dict[str, Tensor]:
        """The limits of each channel, in a shape that fits the value, by the module that clips."""
        made = {}
        for name, site in self._scales.sites.items():
            for module, clip in site.clips.items():
                limits = clip.limit / self._scales.by_site[name]
                if name in self._constants:
                    limits = limits - self._constants[name]
                limits = by_channel(limits, clip.channels, clip.limit)
                made[module] = limits.view(-1, *[1] * (-clip.axis - 1))
        return made

    @torch.no_grad()
    def apply(self, model: nn.Module, values: Mapping[str, Tensor] | None = None) -> Before:
        """Changes the model in place; if it raises, the model is as before."""
        before = Before([], [])
        try:
            for name, value in (self.values(model) if values is None else values).items():
                self._write(model, name, value, before)
            for name, limits in self.limits().items():
                self._put(model, name, limits, before)
        except BaseException:
            before.restore()
            raise
        return before

    def _write(self, model: nn.Module, name: str, value: Tensor, before: Before) -> None:
        tensor = tensor_of(model, name)
        if tensor is not None:
            before.tensors.append((tensor, tensor.detach().clone()))
            tensor.copy_(value)
            return
        holder_name, _, own = name.rpartition(".")
        holder = model.get_submodule(holder_name)
        like = next(holder.parameters())
        before.entries.append((holder, own, None))
        holder._parameters[own] = nn.Parameter(value.to(like), like.requires_grad)

    @staticmethod
    def _put(model: nn.Module, name: str, limits: Tensor, before: Before) -> None:
        parent_name, _, own = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        clip = parent._modules[own]
        assert clip is not None
        before.entries.append((parent, own, clip))
        weights = next(p for p in model.parameters() if p.is_floating_point())
        made = ChannelLimits(limits.to(weights))
        made.training = clip.training
        # It takes over the hooks and the QConfig of what it replaces.
        kept = {key: v for key, v in vars(clip).items() if "hook" in key or key == "qconfig"}
        vars(made).update(kept)
        parent._modules[own] = made


def may_absorb(model: nn.Module, site: ScaleSite) -> bool:
    """Whether there is a place for what absorbing adds, on both sides."""
    names = [site.bias]
    names += [r.layer.bias for r in site.reads if r.layer.weight not in site.norms_behind]
    return site.absorbs and all(name and has_bias_place(model, name) for name in names)
