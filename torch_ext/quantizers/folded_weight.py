"""Steps in pairs around a weight's quantizer: one before it, and the one that undoes it after it.

``FoldedWeight`` quantizes a weight as if the batch norm that follows were folded into it. The layer
and the batch norm stay separate modules and train as usual. The weight is multiplied by
``gamma / sqrt(running_var + eps)`` before its quantizer and divided by it after (Jacob et al. 2018,
section 3.2), so that in eval mode both modules together compute what the folded, quantized layer
computes.

``OutputChannels`` gives each output channel of a grouped transposed convolution an index of its own
on the quantizer's axis.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.utils.arguments import bounded
from torch_ext.utils.sharded import whole


def folding_factor(norm: nn.Module) -> Tensor:
    """``gamma / sqrt(running_var + eps)``, one value a channel, of a module with these."""
    factor: Tensor = (norm.running_var + norm.eps).rsqrt()  # type: ignore[operator]
    gamma: Tensor | None = getattr(norm, "weight", None)
    return factor if gamma is None else factor * whole(gamma)


def along_channels(values: Tensor, weight: Tensor, ch_axis: int) -> Tensor:
    """One value an output channel, in a shape that multiplies the weight.

    The weight of a transposed convolution is [in, out / groups, ...], with ``ch_axis`` 1: in each
    group of inputs its channels are others.
    """
    groups = values.numel() // weight.shape[ch_axis]
    if groups == 1:
        return values.view([-1 if axis == ch_axis else 1 for axis in range(weight.dim())])
    rows = values.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


class WeightStep(nn.Module):
    """A parametrization before a weight's quantizer; with ``inverse`` the one after it.

    Args:
        quantizer: the weight's quantizer.
        *links: modules that the step reads but that are no children of it.
        inverse: undo the step.
    """

    def __init__(self, quantizer: FakeQuantize, *links: nn.Module, inverse: bool) -> None:
        super().__init__()
        self.inverse = inverse
        # In a tuple, because assigning modules would register them as children a second time.
        self._links: tuple[nn.Module | None, ...] = (quantizer, *links)

    def forward(self, weight: Tensor) -> Tensor:
        # A weight that is not quantized in between would be rounded, or copied, for nothing.
        quantizer = self._links[0]
        assert isinstance(quantizer, FakeQuantize)
        return self.applied(weight) if quantizer.quantizes else weight

    def applied(self, weight: Tensor) -> Tensor:
        """What forward gives while the quantizer quantizes."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return "inverse" if self.inverse else ""


class FoldedWeight(WeightStep):
    """Multiplies by the factor of a batch norm; with ``inverse`` divides by it.

    The norm is looked up by its name in its parent at each use, so one that takes its place later,
    such as that of ``SyncBatchNorm.convert_sync_batchnorm``, is the one that counts.

    Args:
        quantizer: the weight's quantizer.
        parent: the module that has the batch norm as a child.
        norm: the batch norm's name in the model; its last part is its name in ``parent``.
        layer: the layer's name in the model, for messages.
        ch_axis: the axis of the weight's output channels.
        inverse: divide by the factor instead of multiplying.
    """

    def __init__(
        self,
        quantizer: FakeQuantize,
        parent: nn.Module,
        norm: str,
        layer: str,
        ch_axis: int,
        inverse: bool,
    ) -> None:
        super().__init__(quantizer, parent, inverse=inverse)
        self.norm_name, self.layer_name = norm, layer
        self.ch_axis = ch_axis
        self._child = norm.rpartition(".")[2]

    @property
    def norm(self) -> nn.Module:
        """The batch norm; raises RuntimeError, by name, if in its place is none with statistics."""
        norm = getattr(self._links[1], self._child, None)
        if not isinstance(getattr(norm, "running_var", None), Tensor):
            raise RuntimeError(
                f'fold_batch_norms: expected "{self.norm_name}" to be a batch norm with running '
                f'statistics, as "{self.layer_name}" is quantized with it folded, got '
                f"{bounded(norm)}; replace it by another batch norm, or prepare the float model "
                "as it is now"
            )
        assert isinstance(norm, nn.Module)
        return norm

    def applied(self, weight: Tensor) -> Tensor:
        """The weight times the factor, or with ``inverse`` divided by it.

        Raises RuntimeError as ``norm`` does.
        """
        factor = folding_factor(self.norm)
        # Where gamma is 0 (a common initialization) the factor is 1: it could not be undone.
        # The weight may be a copy that DataParallel has made on another device.
        factor = torch.where(factor == 0, 1, factor).to(weight)
        factor = along_channels(factor, weight, self.ch_axis)
        return weight / factor if self.inverse else weight * factor

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedWeight:
        made = memo[id(self)] = FoldedWeight.__new__(FoldedWeight)
        state = {key: value for key, value in vars(self).items() if key != "_links"}
        made.__dict__.update(copy.deepcopy(state, memo))
        quantizer, parent = self._links
        # A copy of a layer alone has no norm: it would copy the model around it.
        made._links = (copy.deepcopy(quantizer, memo), memo.get(id(parent)))
        return made

    def extra_repr(self) -> str:
        return f"{self.norm_name}, inverse" if self.inverse else self.norm_name


class OutputChannels(WeightStep):
    """Rearranges [in, out / groups, ...] to [in / groups, out, ...], and with ``inverse`` back.

    In the first layout, a transposed convolution's, channel j of every group has the index j.

    Args:
        quantizer: the weight's quantizer.
        groups: the number of groups of the convolution.
        inverse: rearrange to the layer's layout.
    """

    def __init__(self, quantizer: FakeQuantize, groups: int, inverse: bool) -> None:
        super().__init__(quantizer, inverse=inverse)
        self.groups = groups

    def applied(self, weight: Tensor) -> Tensor:
        sizes, groups = weight.shape, self.groups
        if self.inverse:
            grouped = weight.reshape(sizes[0], groups, sizes[1] // groups, *sizes[2:])
            return grouped.transpose(0, 1).flatten(0, 1)
        grouped = weight.reshape(groups, sizes[0] // groups, *sizes[1:])
        return grouped.transpose(0, 1).flatten(1, 2)
