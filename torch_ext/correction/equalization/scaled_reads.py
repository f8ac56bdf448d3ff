"""Which layers read a value whose channels are scaled, and whether anything else does.

The value's channels are numbered, and the numbers follow it through what moves, picks, joins or
averages values and through activations that scale with their input, f(s x) = s f(x) for s > 0. At
a layer they tell which channel each of its inputs is. The number 0 stands for a value of no
channel, such as the zeros of a padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from torch_ext.correction.equalization.layer_weight import LayerWeight
from torch_ext.prepare.insertion.operations import DROPOUTS, JOINS, Kind, kind_of, operation
from torch_ext.prepare.insertion.recording import Recording
from torch_ext.prepare.insertion.run_graph import run_node

# Torch's names of functions that scale with their input, value by value.
_ACTIVATIONS = ("relu", "leaky_relu", "prelu")
_CASTS = ("to", "float", "double", "half", "bfloat16", "type_as", "detach", "clone", "contiguous")
_SAME = (*_ACTIVATIONS, *_CASTS, *DROPOUTS, "neg")
_AVERAGES = ("mean", "sum")
_PRODUCTS = ("mul", "multiply", "div", "true_divide", "divide")
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "batch_norm"),
    nn.SyncBatchNorm: "batch_norm",
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "instance_norm"),
    nn.RMSNorm: "rms_norm",
}
_CLIPS = ("relu6", "hardtanh")


class LeftError(Exception):
    """Why the channels of a value cannot be scaled."""


class Clip(NamedTuple):
    """A module that clips at 0 and at a limit, one for all channels."""

    limit: float
    channels: Tensor  # the numbers of its channels
    axis: int  # that of the channels, from the back


class LayerRead(NamedTuple):
    """A layer that reads a scaled value."""

    layer: LayerWeight
    node: fx.Node
    channels: Tensor  # int64 [in], the number of each of its inputs
    adds: bool  # whether it reads a constant more where the value is a constant more


class ScaledReads(NamedTuple):
    """All that reads a scaled value."""

    layers: list[LayerRead]
    clips: dict[str, Clip]  # by module
    rectified: bool  # whether an activation is on the way


class _Numbered(NamedTuple):
    numbers: object  # Tensor, or several of them where the node's value is
    adds: bool


def function_name(recording: Recording, node: fx.Node) -> str:
    """Torch's name of the function that a node computes, also of one that a module stands for."""
    if node.op == "call_module":
        module = recording.model.get_submodule(str(node.target))
        if type(module) in _MODULES:
            return _MODULES[type(module)]
    return operation(recording, node)


def scaled_reads(
    recording: Recording, start: fx.Node, axis: int, layers: Mapping[fx.Node, LayerWeight | str]
) -> ScaledReads:
    """What reads a node's value, if its channels on ``axis`` (from the back) may be scaled.

    ``layers``: of the recording, by node. Raises LeftError with the reason if they may not.
    """
    value = recording.values[start]
    if not isinstance(value, Tensor) or value.dim() < -axis:
        raise LeftError("its value has no channels")
    count = value.shape[axis]
    numbers = torch.arange(1, count + 1, dtype=torch.float64, device=value.device)
    shape = [-1 if i == value.dim() + axis else 1 for i in range(value.dim())]
    walk = _NumberWalk(recording, layers)
    walk.steps[start] = _Numbered(numbers.view(shape).expand(value.shape), True)
    walk.check_alone(start)
    nodes = list(recording.graph.nodes)
    for node in nodes[nodes.index(start) + 1 :]:
        if any(source in walk.steps for source in node.all_input_nodes):
            walk.take(node)
    if not walk.reads:
        raise LeftError("no layer reads it")
    return ScaledReads(walk.reads, walk.clips, walk.rectified)


class _NumberWalk:
    """The numbers of the channels in all that is made of one value."""

    def __init__(self, recording: Recording, layers: Mapping[fx.Node, LayerWeight | str]) -> None:
        self.recording, self.layers = recording, layers
        self.steps: dict[fx.Node, _Numbered] = {}
        self.reads: list[LayerRead] = []
        self.clips: dict[str, Clip] = {}
        self.rectified = False

    def check_alone(self, node: fx.Node) -> None:
        if node in self.recording.kept:
            raise LeftError("it is an output of the model, or looked at by its code")

    def take(self, node: fx.Node) -> None:
        """Notes what a node makes of scaled values; raises LeftError if it may not be scaled."""
        scaled = [source for source in node.all_input_nodes if source in self.steps]
        if node in self.layers:
            self._read(node, self.layers[node], scaled)
            return
        name = function_name(self.recording, node)
        adds = all(self.steps[source].adds for source in scaled)
        numbers: object = None
        if getattr(node.target, "__name__", "") == "_part":
            numbers = tree_leaves(self.steps[scaled[0]].numbers)[node.args[1]]  # type: ignore[index]
        elif name in _SAME or (name in _CLIPS and node.op == "call_module") or _is_relu(node, name):
            numbers, adds = self._same(node, name, scaled, adds)
        elif name in _PRODUCTS:
            numbers, adds = self._product(node, name, scaled), False
        elif name in ("add", "sub"):
            numbers, adds = self._sum(scaled, node), False
        elif name in JOINS:
            numbers = self._run(node, scaled)
        elif name in _AVERAGES:
            numbers, adds = self._averaged(node, scaled), adds and self._keeps_ones(node, scaled)
        elif name.endswith(("pool1d", "pool2d", "pool3d")) or name in ("interpolate", "upsample"):
            numbers, adds = self._pooled(node, scaled), adds and self._keeps_ones(node, scaled)
        elif kind_of(self.recording, node) is Kind.CARRY and scaled == list(node.args[:1]):
            numbers = self._run(node, scaled)
        if numbers is None:
            raise LeftError(f"{self._shown(node, name)} reads it, and does not scale with it")
        self.check_alone(node)
        self.steps[node] = _Numbered(numbers, adds)

    def _read(self, node: fx.Node, layer: LayerWeight | str, scaled: list[fx.Node]) -> None:
        if isinstance(layer, str):
            raise LeftError(f"a layer reads it of which {layer}")
        place = 1 if operation(self.recording, node) == "addmm" else 0
        if scaled != (list(node.args[place : place + 1]) or [node.kwargs.get("input")]):
            raise LeftError(f"{layer.name} reads it as its weight or bias")
        step = self.steps[scaled[0]]
        assert isinstance(step.numbers, Tensor)
        channels = along(step.numbers, layer.axis)
        if channels is None:
            raise LeftError(f"{layer.name} reads several of its channels as one")
        spread = channels.view(-1, *[1] * (-layer.axis - 1))
        whole = bool(((step.numbers > 0) == (spread > 0)).all())  # no zeros of a padding
        adds = step.adds and whole and not (layer.bordered or layer.taps_vary)
        self.reads.append(LayerRead(layer, node, channels, adds))

    def _same(
        self, node: fx.Node, name: str, scaled: list[fx.Node], adds: bool
    ) -> tuple[object, bool]:
        numbers = self.steps[scaled[0]].numbers
        if scaled != list(node.args[:1]) or not isinstance(numbers, Tensor):
            return None, False
        if name in _CLIPS:
            self._clip(node, numbers)
        self.rectified = self.rectified or name in (*_ACTIVATIONS, *_CLIPS) or _is_relu(node, name)
        if name == "prelu" and node.op == "call_function" and len(node.all_input_nodes) < 2:
            return None, False
        return numbers, adds and name != "neg"

    def _clip(self, node: fx.Node, numbers: Tensor) -> None:
        name = str(node.target)
        module = self.recording.model.get_submodule(name)
        calls = [
            n for n in self.recording.graph.nodes if n.op == "call_module" and n.target == name
        ]
        if getattr(module, "min_val", 0.0) != 0 or not math.isfinite(float(module.max_val)):  # type: ignore[arg-type]
            raise LeftError(f"{name} clips below another value than 0")
        if len(calls) > 1:
            raise LeftError(f"{name} clips several values")
        for axis in range(-1, -numbers.dim() - 1, -1):
            channels = along(numbers, axis)
            if channels is not None and numbers.shape[axis] > 1:
                self.clips[name] = Clip(float(module.max_val), channels, axis)  # type: ignore[arg-type]
                return
        raise LeftError(f"{name} clips several of its channels as one")

    def _product(self, node: fx.Node, name: str, scaled: list[fx.Node]) -> object:
        operands = [*node.args, *node.kwargs.values()]
        if len(scaled) != 1 or operands.count(scaled[0]) != 1 or node.kwargs:
            return None
        if name not in ("mul", "multiply") and operands[0] is not scaled[0]:
            return None  # a number divided by it
        numbers = self.steps[scaled[0]].numbers
        shape = getattr(self.recording.values[node], "shape", None)
        if not isinstance(numbers, Tensor) or shape is None:
            return None
        return numbers.expand(shape)

    def _sum(self, scaled: list[fx.Node], node: fx.Node) -> object:
        """Of values that are scaled alike, such as the two halves of a hand-written activation."""
        if scaled != [arg for arg in node.args if arg is not None] or node.kwargs:
            raise LeftError(f"{self._shown(node, '')} adds another value to it")
        numbers = [self.steps[source].numbers for source in scaled]
        tensors = [one for one in numbers if isinstance(one, Tensor)]
        alike = [one.shape == tensors[0].shape and one.equal(tensors[0]) for one in tensors]
        if len(tensors) != len(numbers) or not all(alike):
            raise LeftError(f"{self._shown(node, '')} adds different channels of it")
        return tensors[0]

    def _run(self, node: fx.Node, scaled: list[fx.Node]) -> object:
        """The numbers that a node moves; other tensors that it joins with them hold none."""
        given = {
            source: self.steps[source].numbers if source in scaled else self._none(source, node)
            for source in node.all_input_nodes
        }
        made = run_node(self.recording, node, given)
        want = self.recording.values[node]
        shapes = [[t.shape for t in tree_leaves(v) if isinstance(t, Tensor)] for v in (made, want)]
        return made if shapes[0] and shapes[0] == shapes[1] else None

    def _none(self, source: fx.Node, node: fx.Node) -> object:
        value = self.recording.values[source]
        joined = isinstance(value, Tensor) and value.is_floating_point()
        return torch.zeros_like(value, dtype=torch.float64) if joined else value

    def _averaged(self, node: fx.Node, scaled: list[fx.Node]) -> object:
        """The numbers of sums and means; None where these are over different channels."""
        numbers = self.steps[scaled[0]].numbers
        if scaled != node.all_input_nodes or not isinstance(numbers, Tensor):
            return None
        made = self._of(node, scaled[0], numbers)
        squares, ones = (
            self._of(node, scaled[0], t) for t in (numbers**2, torch.ones_like(numbers))
        )
        if made is None or squares is None or ones is None:
            return None
        # By Cauchy and Schwarz equal only where all numbers are the same.
        if not torch.allclose(squares * ones, made**2, rtol=1e-12, atol=0.0):
            return None
        return (made / ones).round()

    def _pooled(self, node: fx.Node, scaled: list[fx.Node]) -> object:
        """The numbers behind a pooling or resizing, which is over the places of each channel."""
        numbers, value = self.steps[scaled[0]].numbers, self.recording.values[node]
        if scaled != node.all_input_nodes or not isinstance(numbers, Tensor):
            return None
        if not isinstance(value, Tensor):
            return None
        name = function_name(self.recording, node)
        places = int(name[-2]) if name.endswith("d") else numbers.dim() - 2
        flat = numbers.flatten(numbers.dim() - places)
        largest = flat.amax(-1, keepdim=True)
        if name.startswith("lp_") or not bool(((flat == largest) | (flat == 0)).all()):
            return None
        return largest.view(*largest.shape[:-1], *[1] * places).expand(value.shape)

    def _keeps_ones(self, node: fx.Node, scaled: list[fx.Node]) -> bool:
        numbers = self.steps[scaled[0]].numbers
        if not isinstance(numbers, Tensor):
            return False
        made = self._of(node, scaled[0], torch.ones_like(numbers))
        return made is not None and torch.allclose(made, torch.ones_like(made))

    def _of(self, node: fx.Node, source: fx.Node, value: Tensor) -> Tensor | None:
        made = run_node(self.recording, node, {source: value})
        return made if isinstance(made, Tensor) else None

    def _shown(self, node: fx.Node, name: str) -> str:
        if node.op == "call_module":
            return str(node.target)
        name = name or self.recording.functions.get(node, "") or "a function"
        owner = self.recording.owners[node]
        return f"{name} in {owner}" if owner else name


def along(numbers: Tensor, axis: int) -> Tensor | None:
    """The number of each place of an axis; None where one holds several. 0 is any number."""
    if numbers.dim() < -axis:
        return None
    flat = numbers.movedim(axis, 0).flatten(1)
    largest = flat.amax(1, keepdim=True)
    return largest.flatten().long() if bool(((flat == largest) | (flat == 0)).all()) else None


def _is_relu(node: fx.Node, name: str) -> bool:
    """Whether a clamp is from 0 to infinity."""
    if name not in ("clamp", "clamp_min", "clip"):
        return False
    low, high = (*node.args[1:3], *[None] * (3 - len(node.args)))[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    return isinstance(low, (int, float)) and low == 0 and high is None
