"""Quantization specs for torchao's PT2E that use the observers and fake-quants of this package.

This module has to be imported explicitly, and needs torchao (``pip install "torch_ext[pt2e]"``). A
PT2E quantizer annotates a graph with such specs, which say how each value is quantized::

    from torch_ext import pt2e

    activation = pt2e.observer_spec("kl", dtype="uint8", qscheme="per_tensor_affine")
    weight = pt2e.observer_spec("min_max", qscheme="per_channel_symmetric", ch_axis=0)

Use :func:`observer_spec` with ``prepare_pt2e`` and :func:`fake_quant_spec` with
``prepare_qat_pt2e``; ``convert_pt2e`` writes the resulting scales into the graph.
:class:`FloatMasks` keeps a quantizer from annotating attention masks.
"""

try:
    import torchao.quantization.pt2e  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_ext.pt2e: expected torchao 0.18 to be installed, but it cannot be imported "
        f'({error}); pip install "torch_ext[pt2e]"'
    ) from error

from torch_ext.pt2e.adapters import PT2EFakeQuantize, PT2EObserver
from torch_ext.pt2e.float_masks import FloatMasks
from torch_ext.pt2e.specs import fake_quant_spec, observer_spec

__all__ = ["FloatMasks", "PT2EFakeQuantize", "PT2EObserver", "fake_quant_spec", "observer_spec"]
