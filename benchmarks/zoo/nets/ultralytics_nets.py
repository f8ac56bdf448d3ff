"""ultralytics: YOLO of five generations and some others, with each head."""

from __future__ import annotations

import functools
import importlib
import os
import tempfile

from torch import nn

from zoo import operators
from zoo.entry import Entry, image

# A description of ultralytics -> the class that reads it.
_MODELS = {
    "yolov3-tiny": "DetectionModel",
    "yolov5n": "DetectionModel",
    "yolov8n": "DetectionModel",
    "yolov8n-seg": "SegmentationModel",
    "yolov8n-pose": "PoseModel",
    "yolov8n-cls": "ClassificationModel",
    "yolov8n-obb": "OBBModel",
    "yolov9t": "DetectionModel",
    "yolov10n": "DetectionModel",
    "yolo11n": "DetectionModel",
    "yolo11n-seg": "SegmentationModel",
    "yolo11n-pose": "PoseModel",
    "yolo11n-cls": "ClassificationModel",
    "yolo11n-obb": "OBBModel",
    "yolo12n": "DetectionModel",
    "yolo12n-seg": "SegmentationModel",
    "yolo12n-pose": "PoseModel",
    "yolo12n-cls": "ClassificationModel",
    "yolo26n": "DetectionModel",
    "yolo26n-seg": "SegmentationModel",
    "yolo26n-pose": "PoseModel",
    "yolo26n-cls": "ClassificationModel",
}


def _make(name: str, kind: str) -> nn.Module:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    made: nn.Module = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    return made


def entries() -> list[Entry]:
    operators.declare()  # and imports, once for all processes
    # Its settings go here, not into the home folder.
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    os.environ.setdefault("YOLO_OFFLINE", "true")
    importlib.import_module("ultralytics.nn.tasks")
    return [
        Entry(f"ultralytics/{name}", functools.partial(_make, name, kind), image(64))
        for name, kind in _MODELS.items()
    ]
