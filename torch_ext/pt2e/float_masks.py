"""A PT2E quantizer that leaves attention masks float, around any other."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer, SharedQuantizationSpec

from torch_ext.utils.attention_scores import AttentionScores

_ANNOTATION = "quantization_annotation"
# A node's output, or an edge: the node that is read, and its reader.
_Place = fx.Node | tuple[fx.Node, fx.Node]


class FloatMasks(Quantizer):  # type: ignore[misc]
    """Annotates as another quantizer does, without attention masks and the scores that hold them.

    A quantizer that annotates sums, such as XNNPACK's, quantizes a mask as it does data: on a grid
    ``-inf`` is the end of the range, and -1e4 leaves no levels for the scores. Left float are masks
    on their way to a softmax or to ``scaled_dot_product_attention``, their sums with scores, and
    what the softmax reads. All else is as the other quantizer annotates it::

        quantizer = pt2e.FloatMasks(XNNPACKQuantizer().set_global(config))
        prepared = prepare_pt2e(exported, quantizer)

    Args:
        quantizer: a PT2E quantizer.

    Raises:
        TypeError: ``quantizer`` is none.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        if not isinstance(quantizer, Quantizer):
            raise TypeError(
                "FloatMasks: expected quantizer to be a PT2E Quantizer, got "
                f"{type(quantizer).__name__}; set it up and pass it"
            )
        self.quantizer = quantizer

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        return self.quantizer.transform_for_annotation(model)  # type: ignore[no-any-return]

    def annotate(self, model: GraphModule) -> GraphModule:
        annotated: GraphModule = self.quantizer.annotate(model)
        _leave_masks_float(annotated)
        return annotated

    def validate(self, model: GraphModule) -> None:
        self.quantizer.validate(model)

    def prepare_obs_or_fq_callback(self, model: GraphModule, made: dict[Any, Any]) -> None:
        self.quantizer.prepare_obs_or_fq_callback(model, made)


def _leave_masks_float(model: GraphModule) -> None:
    def value_of(node: fx.Node) -> Any:
        if node.op == "get_attr":
            holder, _, name = str(node.target).rpartition(".")
            return getattr(model.get_submodule(holder), name)
        return node.meta.get("val")

    scores = AttentionScores(model.graph, _name_of, value_of)
    removed: dict[_Place, Any] = {}
    for node in model.graph.nodes:
        annotation = node.meta.get(_ANNOTATION)
        if annotation is None:
            continue
        if scores.holds_mask(node) and annotation.output_qspec is not None:
            removed[node] = annotation.output_qspec
            annotation.output_qspec = None
        for operand in list(annotation.input_qspec_map):
            if scores.stays_float(node) or scores.reads_mask(node, operand):
                removed[operand, node] = annotation.input_qspec_map.pop(operand)
    for node in model.graph.nodes:
        if (annotation := node.meta.get(_ANNOTATION)) is not None:
            _keep_shared(node, annotation, removed)


def _keep_shared(node: fx.Node, annotation: Any, removed: dict[_Place, Any]) -> None:
    """What shared a removed spec gets it; what else shared it shares it with the first."""

    def kept(place: _Place, spec: Any) -> Any:
        if not isinstance(spec, SharedQuantizationSpec) or spec.edge_or_node not in removed:
            return spec
        made = kept(place, removed[spec.edge_or_node])
        if not isinstance(made, SharedQuantizationSpec):
            removed[spec.edge_or_node] = SharedQuantizationSpec(place)
        return made

    for operand, spec in annotation.input_qspec_map.items():
        annotation.input_qspec_map[operand] = kept((operand, node), spec)
    annotation.output_qspec = kept(node, annotation.output_qspec)


def _name_of(node: fx.Node) -> str:
    """Torch's name of an operator: that of ``aten.add_.Tensor`` is "add"."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", "").strip("_")
