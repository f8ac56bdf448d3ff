"""Lets torchvision be imported beside a CPU build of torch.

PyPI's torchvision is linked against torch's CUDA build, and cannot be imported without its own
library. The operators are declared here; of those, detectors run one, which is written in Python.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor

_declared: list[torch.library.Library] = []


def declare() -> None:
    with contextlib.suppress(ImportError, RuntimeError):
        importlib.import_module("torchvision")
        return
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _declared:
        return
    source = Path(found.origin).with_name("_meta_registrations.py").read_text()
    names = {*re.findall(r"torchvision::(\w+)", source), *re.findall(r'_meta\("(\w+)"', source)}
    library = torch.library.Library("torchvision", "DEF")
    schemas = {
        "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
        "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
        "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
        "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
        "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
    }
    for name in sorted(names):
        library.define(f"{name}{schemas.get(name, '(Tensor x) -> Tensor')}")
    library.impl("nms", _nms, "CPU")
    _declared.append(library)
    importlib.import_module("torchvision")
    vision = importlib.import_module("torchvision.extension")
    vision._has_ops = lambda: True  # type: ignore[attr-defined]
    vision._assert_has_ops = lambda: None  # type: ignore[attr-defined]
    for user in ("boxes", "roi_align", "deform_conv"):
        module = importlib.import_module(f"torchvision.ops.{user}")
        module._assert_has_ops = lambda: None  # type: ignore[attr-defined]
    align = importlib.import_module("torchvision.ops.roi_align")
    align._has_ops = lambda: False  # type: ignore[attr-defined]  # its own version in Python


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes [N, 4] that none of a higher score [N] overlaps by more."""
    order = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while order.numel():
        first, order = order[0], order[1:]
        kept.append(first)
        low = torch.maximum(boxes[first, :2], boxes[order, :2])
        high = torch.minimum(boxes[first, 2:], boxes[order, 2:])
        both = (high - low).clamp(min=0).prod(dim=1)
        order = order[both / (area[first] + area[order] - both) <= iou_threshold]
    return torch.stack(kept) if kept else scores.new_zeros(0, dtype=torch.int64)
