"""Files for inference engines, and their readers.

Each writer takes a calibrated model in VALIDATION. It raises before anything is written if a
quantizer does not suit the format, and names those quantizers with the reason. A file appears
complete or not at all. The writers return an :class:`ExportReport`: which quantizers are in the
file, and which were left out and why.
"""

from torch_ext.export.common.entries import ExportReport
from torch_ext.export.common.onnx_metadata import read_onnx_metadata
from torch_ext.export.engines.check import EngineCheck, ExportCheck, check
from torch_ext.export.engines.comparison import (
    EngineComparison,
    OutputDifference,
    TensorDifference,
    compare_with_engine,
)
from torch_ext.export.engines.integer_layers import EngineLayer, onnxruntime_layers
from torch_ext.export.json_file import Calibration, QuantizerRecord, json, read_json
from torch_ext.export.ncnn import NcnnTable, ncnn_table, ncnn_table_of, read_ncnn_table
from torch_ext.export.onnx_file import onnx
from torch_ext.export.programs.program import pt2e
from torch_ext.export.tensorrt.cache import TensorrtCache, read_tensorrt_cache, tensorrt_cache
from torch_ext.export.tensorrt.calibrator import TensorrtCalibrator, tensorrt_calibrator
from torch_ext.export.tensorrt.onnx_rules import tensorrt_violations
from torch_ext.export.tvm import TvmScale, TvmScales, read_tvm_scales, tvm_scales

__all__ = [
    "Calibration",
    "EngineCheck",
    "EngineComparison",
    "EngineLayer",
    "ExportCheck",
    "ExportReport",
    "NcnnTable",
    "OutputDifference",
    "QuantizerRecord",
    "TensorDifference",
    "TensorrtCache",
    "TensorrtCalibrator",
    "TvmScale",
    "TvmScales",
    "check",
    "compare_with_engine",
    "json",
    "ncnn_table",
    "ncnn_table_of",
    "onnx",
    "onnxruntime_layers",
    "pt2e",
    "read_json",
    "read_ncnn_table",
    "read_onnx_metadata",
    "read_tensorrt_cache",
    "read_tvm_scales",
    "tensorrt_cache",
    "tensorrt_calibrator",
    "tensorrt_violations",
    "tvm_scales",
]
