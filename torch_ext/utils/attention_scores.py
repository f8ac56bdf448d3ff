"""Finds attention scores and masks in a graph of torch's operations, by how they are used.

A mask that is added to scores is no data: on a grid, ``-inf`` becomes the grid's end, and a mask
of -1e4 takes a range in which the scores are all one level. Values do not tell: an example may mask
nothing. What the graph does with them does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, fx, nn

from torch_ext.utils.operations import KEEP_VALUES

# The names are torch's, as in `utils.operations`.
_PAIRS = ("add", "mul")
_JOINS = ("cat", "concat", "concatenate", "stack", "hstack", "vstack")
_SOFTMAX = (
    "softmax", "softmin", "log_softmax", "gumbel_softmax", "softmax2d", "safe_softmax", "logsumexp",
)  # fmt: skip
# Where they stand for a softmax: between two products, as in sigmoid attention.
_ACTIVATIONS = ("sigmoid", "hardsigmoid", "exp", "exp2", "relu", "tanh", "softplus", "elu")
_CASTS = ("float", "half", "bfloat16", "double", "to", "to_copy", "type", "type_as")
_FILLS = ("where", "masked_fill", "masked_scatter", "index_fill", "fill", "written")
# One value of the result for each of the operands: scores that go in come out as scores.
_STEPS = frozenset((
    *KEEP_VALUES, *_PAIRS, *_JOINS, *_CASTS, *_FILLS,
    "sub", "rsub", "div", "true_divide", "neg", "max", "maximum", "min", "minimum",
    "clamp", "clamp_min", "clamp_max", "clip", "tril", "triu", "nan_to_num", "tanh",
    "view_as", "reshape_as", "expand_as", "broadcast_to", "repeat_interleave", "ravel",
    "index_select", "gather", "take_along_dim", "slice", "slice_scatter", "unsafe_view",
    "detach", "alias", "lift_fresh_copy", "positive", "mT", "T",
))  # fmt: skip
# What else is done to flags to make a mask of them.
_OF_FLAGS = _STEPS | {"log", "cumsum", "cumprod", "any", "all", "pow", "abs", "sign", "matmul"}
_PRODUCTS = (
    "matmul", "mm", "bmm", "mv", "inner", "tensordot", "baddbmm", "addbmm", "addmm", "einsum",
    "scaled_dot_product_attention",
)  # fmt: skip
# A sum and a product in one; the summand is the first argument.
_SUM_AND_PRODUCT = ("baddbmm", "addbmm", "addmm")
_LAYERS = ("linear", "interpolate", "upsample", "conv")
# Between a residual sum and the layer that reads it.
_BEFORE_LAYERS = ("relu", "leaky_relu", "gelu", "silu", "hardswish")
_NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")


class AttentionScores:
    """``scores`` and ``masks`` of a graph.

    ``scores``: what a softmax reads, through operations that keep scores scores; also masks on
    their way to them, and scores that another activation takes between two products. A value that a
    layer reads too is not among them. ``masked``: scores with a mask added or filled in. ``masks``:
    values made of booleans, integers and constants alone, and of arguments what is multiplied by
    -1e4 or the like, as in ``(1 - m) * -1e4``.
    """

    def __init__(
        self,
        graph: fx.Graph,
        name_of: Callable[[fx.Node], str],
        value_of: Callable[[fx.Node], Any],
        masks: Collection[fx.Node] = (),
        kept: Collection[fx.Node] = (),
    ) -> None:
        """
        Args:
            graph: nodes in the order in which they run.
            name_of: torch's name of what a node does, "" if it has none.
            value_of: a node's value, or a tensor of the same dtype.
            masks: floating nodes that are known to be masks.
            kept: nodes that are used outside of the graph.
        """
        self._name_of, self._value_of, self._kept = name_of, value_of, kept
        self._constant: set[fx.Node] = set()
        self._fixed: set[fx.Node] = set()  # parameters and buffers, also moved or cast
        self._learned: set[fx.Node] = set()  # what has a parameter behind it
        self._of_product: set[fx.Node] = set()
        self.masks = set(masks)
        for node in graph.nodes:
            self._look_back(node)
        self.scores: set[fx.Node] = set()
        self._layer_read: set[fx.Node] = set()
        self._factors: set[fx.Node] = set()  # first factors of products
        self._weights: set[fx.Node] = set()  # behind an activation they are such factors
        self._addends: set[fx.Node] = set()  # on the way to scores of a product
        self._flags: set[fx.Node] = set()  # what is multiplied by -1e4 or the like
        for node in reversed(graph.nodes):
            self._look_ahead(node)
        self.masks |= self._flags - self._learned
        for node in graph.nodes:
            if self._is_mask(node):
                self.masks.add(node)
        self.masked: set[fx.Node] = set()
        for node in graph.nodes:
            may_mask = name_of(node) in ("add", *_FILLS, *_SUM_AND_PRODUCT)
            holds_masked = not self.masked.isdisjoint(node.all_input_nodes)
            if node in self.scores and (may_mask or holds_masked):
                self.masked.add(node)

    def stays_float(self, node: fx.Node) -> bool:
        """Whether a sum, product or concatenation reads nothing quantized."""
        if node not in self.scores:
            return False
        if self._name_of(node) == "add":
            return True
        return any(n in self.masked or n in self._of_product for n in node.all_input_nodes)

    def holds_mask(self, node: fx.Node) -> bool:
        """Whether a value is a mask on its way to scores, a bias, or scores with one."""
        return node in self.scores and (node in self.masked or node in self._addends)

    def reads_mask(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether a node takes such a value as scores or as what is added to them."""
        as_scores = self._read_as_scores(operand, node, self._name_of(node))
        return as_scores and self.holds_mask(operand)

    def is_of_masks(self, operands: Collection[fx.Node]) -> bool:
        """Whether operands are masks, or masks and constants."""
        known = all(node in self.masks or node in self._constant for node in operands)
        return known and not self.masks.isdisjoint(operands)

    def _look_back(self, node: fx.Node) -> None:
        """What a node is made of."""
        name, inputs, value = self._name_of(node), node.all_input_nodes, self._value_of(node)
        moved = name in _STEPS and bool(inputs) and self._fixed.issuperset(inputs)
        if node.op == "get_attr" or moved:
            self._fixed.add(node)
        is_buffer = node.op == "get_attr" and not isinstance(value, nn.Parameter)
        if is_buffer or (node.op == "call_function" and self._constant.issuperset(inputs)):
            self._constant.add(node)
        learned = node.op == "call_module" or isinstance(value, nn.Parameter)
        if learned or not self._learned.isdisjoint(inputs):
            self._learned.add(node)
        factors = self._factors_of(node)
        scores = len(factors) > 1 and self._fixed.isdisjoint(factors)
        if scores or (name in _STEPS and not self._of_product.isdisjoint(inputs)):
            self._of_product.add(node)

    def _is_mask(self, node: fx.Node) -> bool:
        """Whether a floating value is made of booleans, integers and masks, beside constants."""
        inputs = node.all_input_nodes
        if self._name_of(node) not in _OF_FLAGS or not _is_floating(self._value_of(node)):
            return False
        flags = {n for n in inputs if n in self.masks or _is_whole(self._value_of(n))}
        known = all(n in flags or n in self._constant for n in inputs)
        return known and bool(flags) and node not in self._constant

    def _look_ahead(self, node: fx.Node) -> None:
        """What a node is used for."""
        for user in node.users:
            name = self._name_of(user)
            factors = self._factors_of(user)
            moves = name in (*KEEP_VALUES, *_BEFORE_LAYERS) or name.startswith(_NORMS)
            if name.startswith(_LAYERS) or (moves and user in self._layer_read):
                self._layer_read.add(node)
            steps = name in _STEPS
            if factors[:1] == [node] and self._fixed.isdisjoint(factors):
                self._factors.add(node)
            if (steps or name in _ACTIVATIONS) and user in self._factors:
                self._factors.add(node)
            if name in _ACTIVATIONS and user in self._factors:
                self._weights.add(node)
            if steps and user in self._weights:
                self._weights.add(node)
            scaled = name == "mul" and any(map(_is_very_negative, user.args))
            if scaled or (user in self._flags and name in _OF_FLAGS):
                self._flags.add(node)
            if scaled:
                self._flags.add(user)
            if self._read_as_scores(node, user, name):
                self.scores.add(node)
                if node not in self._of_product and self._adds(user, name):
                    self._addends.add(node)
        unseen = self._name_of(node) in _PAIRS and not node.users and node not in self._kept
        if node in self._of_product and (node in self._weights or unseen):
            self.scores.add(node)  # unseen: read in compiled code, say
        if node in self._layer_read:
            self.scores.discard(node)

    def _read_as_scores(self, node: fx.Node, user: fx.Node, name: str) -> bool:
        if name in _SOFTMAX:
            return True
        if name == "scaled_dot_product_attention":
            return node is _argument(user, 3, "attn_mask")
        if name in _SUM_AND_PRODUCT:
            return user in self.scores and node is _argument(user, 0, "input")
        return name in _STEPS and user in self.scores

    def _adds(self, user: fx.Node, name: str) -> bool:
        """Whether what is read as scores is added to a product, at once or later."""
        sums = name in ("scaled_dot_product_attention", *_SUM_AND_PRODUCT)
        return sums or user in self._addends or (name == "add" and user in self._of_product)

    def _factors_of(self, node: fx.Node) -> list[fx.Node]:
        """The factors of a product; nothing for other operations."""
        name = self._name_of(node)
        if name not in _PRODUCTS:
            return []
        summand = _argument(node, 0, "input") if name in _SUM_AND_PRODUCT else None
        mask = _argument(node, 3, "attn_mask") if name.startswith("scaled") else None
        return [n for n in node.all_input_nodes if n is not summand and n is not mask]


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _is_very_negative(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= -1000


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_whole(value: Any) -> bool:
    """A tensor of booleans or integers."""
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
