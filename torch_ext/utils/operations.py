"""Torch's operations that keep values, for placing quantizers and for finding them in a graph."""

#: An operation keeps values if every value of its result is a value of its first argument: it only
#: moves them, repeats them, or picks some. Values on a quantizer's grid are on it afterwards, so
#: the result needs no quantizer of its own. That holds for dropout in eval mode, and for padding
#: unless by a constant that is not on the grid.
#:
#: The names are torch's: modules by their functions' names (``MaxPool2d`` is ``max_pool2d``),
#: in-place variants and Python's operators by the plain name (``x[0]`` is ``getitem``).
KEEP_VALUES = (
    "max_pool1d", "max_pool2d", "max_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "reshape", "view", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "t",
    "squeeze", "unsqueeze", "expand", "repeat", "getitem", "select", "narrow", "chunk", "split",
    "unbind", "roll", "flip", "pad", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "contiguous", "clone", "identity", "dropout", "dropout1d", "dropout2d", "dropout3d",
)  # fmt: skip
