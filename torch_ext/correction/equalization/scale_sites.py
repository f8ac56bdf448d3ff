"""Finds the values of a model whose channels can be scaled: what makes them, and which layers read
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from torch_ext.correction.equalization.layer_weight import LayerWeight, layer_weight
from torch_ext.correction.equalization.scaled_reads import (
    Clip,
    LayerRead,
    LeftError,
    function_name,
    scaled_reads,
)
from torch_ext.prepare.batch_norms.observed import observed_norms
from torch_ext.prepare.batch_norms.pair import Pair, parameter
from torch_ext.prepare.insertion.recording import Recording

# Norms with a weight for each channel: the axis of their channels, from the back or from the front.
_NORMS = {
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm"), 1),
    **dict.fromkeys(("layer_norm", "rms_norm"), -1),
    "mul": -1,  # by a parameter, as at the end of a norm that is written by hand
}
# Where their functions take the weight and the bias.
_PLACES = {
    "batch_norm": (3, 4),
    "group_norm": (2, 3),
    "instance_norm": (3, 4),
    "layer_norm": (2, 3),
    "rms_norm": (2, None),
    "mul": (None, None),
}


@dataclass
class ScaleSite:
    """A value whose channels can be divided by factors, which the layers that read it undo.

    Dividing it is dividing ``vectors`` and, of a layer without a norm of its own, the rows of its
    weight.
    """

    name: str  # of the layer or norm that makes it
    channels: int
    #: The layer whose weight makes the value; None for a norm that follows no layer.
    layer: LayerWeight | None
    #: The batch norm between the layer and the value.
    norm: str
    #: Parameters with a value a channel: the norm's weight and bias, or the layer's bias.
    vectors: tuple[str, ...]
    #: The one of ``vectors`` that is added; it may have to be created.
    bias: str
    reads: list[LayerRead]
    clips: dict[str, Clip]
    rectified: bool
    #: The module whose output the value is, and the axis of its channels; "" for a function.
    module: str
    axis: int
    #: By layer that reads it: the batch norm behind it, and the module whose input the value is.
    norms_behind: dict[str, str] = field(default_factory=dict)

    @property
    def absorbs(self) -> bool:
        """Whether a constant of each channel can be moved behind the layers that read it."""
        return self.rectified and all(read.adds for read in self.reads)

    def same_as(self, other: ScaleSite) -> bool:
        mine, theirs = self.reads, other.reads
        return (self.vectors, self.clips.keys()) == (other.vectors, other.clips.keys()) and [
            (r.layer, r.channels.tolist()) for r in mine
        ] == [(r.layer, r.channels.tolist()) for r in theirs]


@dataclass(frozen=True)
class ScaleSites:
    """The sites of a model by name, in the order of execution, and the reason for others."""

    sites: dict[str, ScaleSite]
    left: dict[str, str]


def scale_sites(recordings: list[Recording]) -> ScaleSites:
    """The sites that every run allows, and by the name of a layer or norm why it starts none."""
    evaluated = [recording for recording in recordings if not recording.training]
    pairs = {pair.weight: pair for pair in observed_norms(evaluated).pairs}
    runs = [_SitesOfRun(recording, pairs) for recording in recordings]
    sites, left = dict(runs[0].sites), dict(runs[0].left)
    for run in runs[1:]:
        for name in run.sites.keys() | run.left.keys():
            if name not in sites and name not in left:
                sites.update({name: run.sites[name]} if name in run.sites else {})
                left.update({name: run.left[name]} if name in run.left else {})
    for name, site in list(sites.items()):
        for run in runs:
            if (why := run.against(site)) and name in sites:
                left[name] = why
                del sites[name]
    return ScaleSites(sites, left)


class _SitesOfRun:
    """The sites of one run."""

    def __init__(self, recording: Recording, pairs: Mapping[str, Pair]) -> None:
        self.recording, self.pairs = recording, pairs
        self.sites: dict[str, ScaleSite] = {}
        self.left: dict[str, str] = {}
        nodes = recording.graph.nodes
        self.layers = {n: found for n in nodes if (found := layer_weight(recording, n)) is not None}
        self.calls = Counter(
            layer.weight for layer in self.layers.values() if isinstance(layer, LayerWeight)
        )
        self.names = Counter(
            id(p)
            for m in recording.model.modules()
            for p in m._parameters.values()
            if p is not None
        )
        norms = {norm: node for node in nodes if (norm := self._norm(node))}
        paired = {pair.norm for pair in pairs.values()}
        for node in nodes:
            layer = self.layers.get(node)
            norm = self._norm(node)
            try:
                if isinstance(layer, LayerWeight):
                    name = layer.name
                    pair = pairs.get(layer.weight)
                    start = node if pair is None else norms.get(pair.norm)
                    if start is None:
                        raise LeftError(f"{pair.norm if pair else ''} is a norm computed by hand")
                    site = self._of_layer(layer, start, pair)
                elif norm and norm not in paired:
                    name, site = norm, self._of_norm(norm, node)
                else:
                    continue
                self.sites[name] = site
            except LeftError as why:
                self.left[name if isinstance(layer, LayerWeight) else norm] = str(why)

    def against(self, site: ScaleSite) -> str:
        """Why a site of one run is none in this one; empty if it may be."""
        touched = {read.layer.weight for read in site.reads}
        touched |= set() if site.layer is None else {site.layer.weight}
        own = self.sites.get(site.name)
        if own is None and site.name in self.left:
            return self.left[site.name]
        if own is None and not any(self.calls[weight] for weight in touched):
            return ""
        if own is None or not own.same_as(site):
            return "other layers read it in another run of the model"
        return ""

    def _norm(self, node: fx.Node) -> str:
        """The module of a norm that has a value a channel; empty for other nodes."""
        name = function_name(self.recording, node)
        if name not in _NORMS:
            return ""
        if node.op == "call_module":
            return str(node.target)
        weight = self._argument(node, name, 0)
        if weight is not None:
            return str(weight.target).rpartition(".")[0]
        return "" if name == "mul" else self.recording.owners[node]

    def _argument(self, node: fx.Node, kind: str, which: int) -> fx.Node | None:
        place, name = _PLACES[kind][which], ("weight", "bias")[which]
        if kind == "mul" and which == 0:
            return self._gain(node)
        if place is None:
            return None
        given = node.args[place] if len(node.args) > place else node.kwargs.get(name)
        return given if isinstance(given, fx.Node) else None

    def _gain(self, node: fx.Node) -> fx.Node | None:
        """The parameter that a product multiplies the channels of a computed value by."""
        sides = node.all_input_nodes
        gains = [n for n in sides if isinstance(self.recording.values[n], nn.Parameter)]
        size = getattr(self.recording.values[node], "shape", ())[-1:]
        if len(sides) != 2 or len(gains) != 1 or self.recording.values[gains[0]].shape != size:
            return None
        return gains[0]

    def _of_layer(self, layer: LayerWeight, start: fx.Node, pair: Pair | None) -> ScaleSite:
        self._check(layer)
        if pair is None:
            return self._site(layer.name, layer, "", start, [layer.bias], layer.bias, layer.axis)
        return self._site(layer.name, layer, pair.norm, *self._vectors(start, pair.norm))

    def _of_norm(self, name: str, node: fx.Node) -> ScaleSite:
        return self._site(name, None, "", *self._vectors(node, name))

    def _vectors(self, node: fx.Node, norm: str) -> tuple[fx.Node, list[str], str, int]:
        """A norm's node, its weight and bias, the bias alone, and its channels' axis."""
        kind, model = function_name(self.recording, node), self.recording.model
        if node.op == "call_module":
            names = [f"{norm}.weight", f"{norm}.bias"]
        else:
            given = [self._argument(node, kind, which) for which in (0, 1)]
            names = ["" if tensor is None else str(tensor.target) for tensor in given]
        weight = parameter(model, names[0]) if names[0] else None
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            raise LeftError(f"{norm} has no weight with a value a channel; fuse folds it")
        vectors = [name for name in names if name and parameter(model, name) is not None]
        for name in vectors:
            self._check_parameter(name, {node})
        axis = _NORMS[kind]
        return (
            node,
            vectors,
            names[1],
            axis if axis < 0 else axis - self.recording.values[node].dim(),
        )

    def _site(
        self,
        name: str,
        layer: LayerWeight | None,
        norm: str,
        start: fx.Node,
        vectors: list[str],
        bias: str,
        axis: int,
    ) -> ScaleSite:
        found = scaled_reads(self.recording, start, axis, self.layers)
        for read in found.layers:
            self._check(read.layer)
        model = self.recording.model
        return ScaleSite(
            name,
            self.recording.values[start].shape[axis],
            layer,
            norm,
            tuple(v for v in vectors if v and parameter(model, v) is not None),
            bias,
            found.layers,
            found.clips,
            found.rectified,
            str(start.target) if start.op == "call_module" else "",
            axis,
            {
                read.layer.weight: self.pairs[read.layer.weight].norm
                for read in found.layers
                if read.layer.weight in self.pairs
            },
        )

    def _check(self, layer: LayerWeight) -> None:
        """Raises LeftError where a layer's weight or bias is not its own."""
        if self.calls[layer.weight] > 1:
            raise LeftError(f"{layer.name} is called {self.calls[layer.weight]} times")
        readers = {node for node, known in self.layers.items() if known == layer}
        self._check_parameter(layer.weight, readers)
        if layer.bias and parameter(self.recording.model, layer.bias) is not None:
            self._check_parameter(layer.bias, readers)

    def _check_parameter(self, name: str, readers: set[fx.Node]) -> None:
        tensor = parameter(self.recording.model, name)
        if not isinstance(tensor, nn.Parameter):
            raise LeftError(f"{name} is no parameter, but a buffer or what something computes")
        if is_lazy(tensor):
            raise LeftError(f"{name} is lazy; run a forward first")
        if self.names[id(tensor)] > 1:
            raise LeftError(f"{name} is shared")
        for node in self.recording.graph.nodes:
            if node.op == "get_attr" and node.target == name and not set(node.users) <= readers:
                raise LeftError(f"something else reads {name}")


def by_channel(values: Tensor, channels: Tensor, rest: float = 1.0) -> Tensor:
    """A value a channel, as the places with these numbers have it; those of none have ``rest``."""
    padded = torch.cat([values.new_full((1,), rest), values])
    return padded[channels]


def largest_by_channel(places: Tensor, channels: Tensor, count: int) -> Tensor:
    """The largest value among the places of each channel, 0 where there is none."""
    made = places.new_zeros(count + 1)
    return made.scatter_reduce(0, channels, places, "amax")[1:]
