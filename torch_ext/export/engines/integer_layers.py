"""Which layers of an ONNX file onnxruntime computes in integers, which in float, and why."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch_ext.export.common.packages import load_onnx
from torch_ext.export.common.sessions import onnxruntime_session
from torch_ext.export.engines.file_tensors import CARRIERS
from torch_ext.export.engines.named_file import named_file
from torch_ext.files.storage import PathLike

# Operators that multiply and add up, by what they are called in an optimised graph.
_INTEGER = (
    "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention", "DynamicQuantizeLSTM",
)  # fmt: skip
# Those in float that have an integer kernel, if their surroundings allow it; and the others.
_FUSABLE = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_FLOAT = (
    *_FUSABLE, "ConvTranspose", "ConvTransposeWithDynamicPads", "TransposeMatMul", "GemmFloat8",
    "MatMulNBits", "Einsum", "Attention", "MultiHeadAttention", "LSTM", "GRU", "RNN",
)  # fmt: skip
_ACTIVATIONS = ("Relu", "Clip")
_BYTES = ("int8", "uint8")

# Ways out.
_FOLD = "fuse(model, example_inputs=...) folds norms, before prepare_qat"
_GRIDS = 'take the grids of backend="onnxruntime": get_default_qconfig or resolve gives them'
FLOAT_LAYER = 'leave the layer in float: set_fake_quantize(model, "float", pattern=[...])'
_PRODUCER = f"give what makes it a qconfig; or {FLOAT_LAYER}"
_ENGINE = f"export.check says whether OpenVINO, where installed, has one; or {FLOAT_LAYER}"
_OUTPUT = f"output_qconfig of prepare_qat quantizes it; or {FLOAT_LAYER}"
_BETWEEN = (
    'get_default_qconfig(backend="onnxruntime") lets prepare_qat, given example_inputs, put a '
    f"quantizer between the two; OpenVINO needs none; or {FLOAT_LAYER}"
)


class Problem(NamedTuple):
    """Why a layer is in float, and the way out."""

    reason: str
    advice: str


class FileLayer(NamedTuple):
    """A layer of a file, before an engine has seen it."""

    name: str
    op: str
    problem: Problem | None
    quantized: bool = True  # as in EngineLayer


@dataclass(frozen=True)
class EngineLayer:
    """A layer that multiplies and adds up, and how an engine computes it."""

    #: The module that has its weight, such as ``layer1.0.conv1``; without a weight, its node.
    name: str
    #: The name of its node in the file; where that is empty or not its alone, of its result.
    node: str
    #: The operator of the engine, such as ``QLinearConv``.
    op: str
    #: Whether the engine computes it in integers.
    integer: bool
    #: Why it does not; empty if it does.
    reason: str = ""
    #: The way out; empty if it does.
    advice: str = ""
    #: Whether the file has its weight quantized (without a weight, all that it reads).
    quantized: bool = True

    def __str__(self) -> str:
        if self.integer:
            return f"{self.name}: integer ({self.op})"
        return f"{self.name}: float ({self.op}), as {self.reason}"


def onnxruntime_layers(path: PathLike) -> list[EngineLayer]:
    """The layers of an ONNX file, as onnxruntime computes them on the CPU.

    Loads the file in onnxruntime and reads the graph that its optimiser (level "extended") makes.
    Layers are convolutions, matrix products, attention and recurrent layers. What lies between
    them, such as a mean, may be computed in float without being listed.

    Returns:
        The layers in the engine's order; for each in float the reason.

    Raises:
        FileError: a ValueError, for a file that is not ONNX.
        FileNotFoundError: if there is no such file.
        ImportError: if the packages onnx, onnxscript or onnxruntime are missing.
        ValueError: onnxruntime cannot load the file; with its reason.
    """
    who = "export.onnxruntime_layers"
    packages, proto = load_onnx(who, path)
    with named_file(packages, proto, Path(path)) as file:
        return layers_in_onnxruntime(who, packages, proto, file, path)


def layers_in_onnxruntime(
    who: str, packages: Any, proto: Any, file: Path, label: object
) -> list[EngineLayer]:
    """The same of a ModelProto whose nodes have names, and that is in a file.

    `who` is the function that errors name, `label` what they call the file.
    """
    given = _Graph(packages, proto)
    weights, quantized = dict(_weights(given)), set(_quantized(given))
    graph = _Graph(packages, _optimised(who, packages, file, label))
    found = []
    for node in graph.nodes:
        name = weights.get(node.name, node.name)
        if node.op_type in _INTEGER:
            found.append(EngineLayer(name, node.name, node.op_type, True))
        elif node.op_type in _FLOAT:
            problem = graph.problem(node)
            meant = node.name in quantized
            found.append(EngineLayer(name, node.name, node.op_type, False, *problem, meant))
    return found


def _optimised(who: str, packages: Any, file: Path, label: object) -> Any:
    """The ModelProto that onnxruntime's optimiser makes of a file, without large tensors."""
    # Large tensors go to another file, so that one message of protobuf holds the graph.
    prefix = "session.optimized_model_external_initializers"
    entries = {f"{prefix}_file_name": "weights.bin", f"{prefix}_min_size_in_bytes": "1024"}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        onnxruntime_session(
            who, file, label, level="ORT_ENABLE_EXTENDED", save=target, entries=entries
        )
        return packages.load(str(target), load_external_data=False)


def _weights(graph: _Graph) -> Iterator[tuple[str, str]]:
    """Yields the name of each node that reads a weight, with the module that has the weight."""
    for node in graph.nodes:
        if node.op_type in _FLOAT + _INTEGER:
            for name in node.input:
                owner, dot, _ = graph.constant_behind(name).rpartition(".weight")
                if dot:
                    yield node.name, owner


def _quantized(graph: _Graph) -> Iterator[str]:
    """Yields the names of nodes with a quantized weight, or without a weight, all quantized."""
    for node in graph.nodes:
        if node.op_type in _FLOAT:
            operands = list(node.input[:2])
            constant = [name for name in operands if graph.constant_behind(name)]
            if all(graph.dequantizer(name) is not None for name in constant or operands):
                yield node.name


class _Graph:
    """A graph with its bodies of loops and branches: who makes and who reads each tensor."""

    def __init__(self, packages: Any, proto: Any) -> None:
        self.onnx = packages
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.producers: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        self.outputs: set[str] = set()
        self._read(proto.graph)

    def _read(self, graph: Any) -> None:
        self.constants.update((tensor.name, tensor) for tensor in graph.initializer)
        self.outputs.update(output.name for output in graph.output)
        for node in graph.node:
            self.nodes.append(node)
            self.producers.update(dict.fromkeys(node.output, node))
            for name in set(node.input):
                self.readers.setdefault(name, []).append(node)
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    self._read(body)

    def constant_behind(self, name: str) -> str:
        """The constant that a tensor is made of, by quantizing, casting and moving; or empty."""
        moves = {"QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity"}
        while name not in self.constants:
            node = self.producers.get(name)
            if node is None or node.op_type not in moves:
                return ""
            name = node.input[0]
        return name

    def problem(self, node: Any) -> Problem:
        """Why onnxruntime's optimiser left a layer in float."""
        if node.op_type not in _FUSABLE:
            return Problem(f"onnxruntime has no integer kernel for {node.op_type}", _ENGINE)
        if problem := self.operand_problem(node):
            return problem
        if node.op_type.endswith("Conv"):
            if problem := self._output_problem(node):
                return problem
        elif len(node.input) > 2 and node.input[2] and self.dequantizer(node.input[2]) is None:
            return Problem(
                f"its bias {node.input[2]} is in float",
                'profile="onnxruntime" of export.onnx stores it as int32',
            )
        return Problem(
            f"none of onnxruntime's kernels takes its grids: {self._grids(node)}", _GRIDS
        )

    def operand_problem(self, node: Any) -> Problem | None:
        """What keeps a layer's operands from being integers of 8 bits."""
        for i, name in enumerate(node.input[:2]):
            if problem := self._input_problem(name, "input" if i == 0 else "second input"):
                return problem
        return None

    def dequantizer(self, name: str) -> Any:
        """The DequantizeLinear that a tensor is the result of; None if it is of another."""
        node = self.producers.get(name)
        while node is not None and node.op_type in CARRIERS:
            node = self.producers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _input_problem(self, name: str, which: str) -> Problem | None:
        """What keeps an operand from being integers of 8 bits."""
        pair = self.dequantizer(name)
        if pair is None:
            if name in self.constants or self.constant_behind(name):
                return Problem(f"its weight {name} is not quantized", _PRODUCER)
            source = self.producers.get(name)
            if source is None:
                return Problem(f"its {which} {name} is not quantized", _PRODUCER)
            if source.op_type == "BatchNormalization":
                return Problem(f"it reads {_title(source)}, a norm that is not folded", _FOLD)
            reason = f"its {which} is not quantized: it is the result of {_title(source)}"
            return Problem(reason, _PRODUCER)
        kind = self._type(pair)
        if kind not in _BYTES:
            reason = f"{_quantizer(pair)} has {kind}, and integer kernels take 8 bits"
            return Problem(reason, _GRIDS)
        if any(entry.name == "block_size" and entry.i for entry in pair.attribute):
            return Problem(f"{_quantizer(pair)} has a scale for each group of its {which}", _GRIDS)
        scale = self.constants.get(pair.input[1])
        if scale is not None and math.prod(scale.dims) > 1 and not self.constant_behind(name):
            return Problem(f"{_quantizer(pair)} quantizes its {which} per channel", _GRIDS)
        return None

    def _output_problem(self, node: Any) -> Problem | None:
        """What stands between a convolution and the quantizer of its result."""
        name = node.output[0]
        activation = _activation(node)
        if activation and activation not in _ACTIVATIONS:
            return Problem(f"a {activation} reads its result in float", _BETWEEN)
        while True:
            readers = self.readers.get(name, [])
            if name in self.outputs:
                return Problem("its result is an output of the model, in float", _OUTPUT)
            if len(readers) != 1:
                others = [r for r in readers if r.op_type != "QuantizeLinear"]
                titles = ", ".join(_title(reader) for reader in (others or readers)[:3])
                return Problem(f"its result is read in float, by {titles or 'nothing'}", _BETWEEN)
            reader = readers[0]
            if reader.op_type == "QuantizeLinear":
                return self._grid_problem(node, reader, activation)
            if reader.op_type == "BatchNormalization":
                reason = f"{_title(reader)} reads its result, a norm that is not folded"
                return Problem(reason, _FOLD)
            if reader.op_type in _ACTIVATIONS and not activation:
                activation = reader.op_type
            elif reader.op_type not in CARRIERS:
                return Problem(f"its result is read in float, by {_title(reader)}", _BETWEEN)
            name = reader.output[0]

    def _grid_problem(self, node: Any, quantizer: Any, activation: str) -> Problem | None:
        """What keeps a convolution apart from QuantizeLinear of its result."""
        kind, least, zero_point = self._levels(quantizer)
        name = _quantizer(quantizer)
        reason = ""
        if kind not in _BYTES:
            reason = f"{name} has {kind}, and integer kernels take 8 bits"
        elif activation and zero_point != least:
            reason = (
                f"a {activation} stands before {name}, whose grid has negative values: only a grid "
                "that begins at 0, as uint8 affine does, takes its place"
            )
        elif activation:
            reason = f"a {activation} stands before {name}, whose grid reaches past its limit"
        elif (given := self._type(self.dequantizer(node.input[0]))) != kind:
            reason = (
                f"onnxruntime makes its input {given} and its result ({name}) {kind}, and no "
                "kernel takes both; uint8 it keeps as it is"
            )
        return Problem(reason, _GRIDS) if reason else None

    def _type(self, pair: Any) -> str:
        """The type of the integers of QuantizeLinear or DequantizeLinear, such as ``int8``."""
        if len(pair.input) < 3 or pair.input[2] not in self.constants:
            return "uint8"
        code = self.constants[pair.input[2]].data_type
        return str(self.onnx.TensorProto.DataType.Name(code)).lower()

    def _levels(self, pair: Any) -> tuple[str, int, int]:
        """The type of QuantizeLinear's integers, its least value, and the zero point."""
        kind = self._type(pair)
        bits = int(kind.partition("int")[2] or 8)
        least = 0 if kind.startswith("u") else -(2 ** (bits - 1))
        zero_point = 0
        if len(pair.input) > 2 and pair.input[2] in self.constants:
            with contextlib.suppress(ValueError):  # a tensor in another file
                values = self.onnx.numpy_helper.to_array(self.constants[pair.input[2]])
                zero_point = int(values.reshape(-1)[0])
        return kind, least, zero_point

    def _grids(self, node: Any) -> str:
        pairs = [(f"input {i}", self.dequantizer(name)) for i, name in enumerate(node.input)]
        pairs += [
            ("result", reader)
            for reader in self.readers.get(node.output[0], [])
            if reader.op_type == "QuantizeLinear"
        ]
        return ", ".join(
            f"{what} {self._type(pair)} with zero point {self._levels(pair)[2]}"
            for what, pair in pairs
            if pair is not None
        )


def _quantizer(pair: Any) -> str:
    """The name of the quantizer of a QuantizeLinear; in another file, that of its scale."""
    return str(pair.input[1]).removesuffix("/scale")


def _activation(node: Any) -> str:
    """The activation that the optimiser has made part of a layer; empty without one."""
    return next((str(a.s.decode()) for a in node.attribute if a.name == "activation"), "")


def is_quantized(node: Any) -> bool:
    """Whether a node quantizes or dequantizes, or computes in integers itself."""
    kind = node.op_type
    return kind in _INTEGER or kind.startswith("QLinear") or kind.lower().endswith("quantizelinear")


def _title(node: Any) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def file_layers(packages: Any, proto: Any) -> dict[str, FileLayer]:
    """The layers of a ModelProto that was not optimised.

    Returns:
        By the node's name, in order: the module whose weight it reads, or the node's name; its
        operator; and what keeps its operands from being integers.
    """
    graph = _Graph(packages, proto)
    owners, quantized = dict(_weights(graph)), set(_quantized(graph))
    return {
        node.name: FileLayer(
            owners.get(node.name, node.name),
            node.op_type,
            graph.operand_problem(node) if node.op_type in _FLOAT else None,
            node.op_type in _INTEGER or node.name in quantized,
        )
        for node in graph.nodes
        if node.op_type in _FLOAT + _INTEGER
    }
