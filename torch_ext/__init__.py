"""Native observers and fake-quantization for PyTorch, and the workflow around them."""

from torch_ext.ops import loader  # isort: skip # First: explains a broken build.
from torch_ext import export, ops
from torch_ext._C import build_info, fake_quants, observers
from torch_ext.analysis.report.report import ReportSummary, report
from torch_ext.analysis.rule_choices import Choice
from torch_ext.analysis.sensitivity import Sensitivity, SensitivityRow, sensitivity
from torch_ext.analysis.sweep import Sweep, SweepRow, sweep
from torch_ext.calibration.calibrate import CalibrationSummary, QuantizerSummary, calibrate
from torch_ext.calibration.distributed import keep_statistics_local, sync_observers
from torch_ext.calibration.resolve import resolve
from torch_ext.correction.choose_bits import choose_bits
from torch_ext.correction.correct_bias import BiasCorrection, BiasRow, correct_bias
from torch_ext.correction.equalization.channel_limits import ChannelLimits
from torch_ext.correction.equalize import Equalization, EqualizationRow, equalize
from torch_ext.correction.recalibrate_norms import (
    NormRecalibration,
    NormRow,
    recalibrate_norms,
)
from torch_ext.correction.reconstruct import (
    ReconstructedLayer,
    Reconstruction,
    reconstruct,
)
from torch_ext.correction.widths.bit_choice import BitChoice, BitChoiceRow
from torch_ext.correction.widths.bit_search import BitPoint
from torch_ext.files.float_state_dict import float_state_dict, load_float_state_dict
from torch_ext.files.load_observer_params import LoadReport, load_observer_params
from torch_ext.files.merge import MergeReport, merge_observer_params
from torch_ext.files.observer_params import save_observer_params
from torch_ext.files.saved_quantizers import SavedQuantizers, read_quantizers
from torch_ext.files.storage import FileError
from torch_ext.modules import Add, Cat, MatMul, Mul, QuantStub
from torch_ext.prepare.batch_norms.fuse import fuse
from torch_ext.prepare.blocks.block_qconfig import get_block_qconfig
from torch_ext.prepare.describe import Description, QuantizerRow, describe
from torch_ext.prepare.prepare_qat import prepare_qat
from torch_ext.prepare.qconfig import QConfig, get_default_calib_qconfig, get_default_qconfig
from torch_ext.prepare.remove_quantizers import remove_quantizers
from torch_ext.quantizers.dynamic import DynamicFakeQuantize
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import named_quantizers
from torch_ext.quantizers.learned import (
    LearnedFakeQuantize,
    float_parameters,
    quantization_parameters,
)
from torch_ext.quantizers.observer import Observer
from torch_ext.quantizers.set_state import (
    fake_quantize_states,
    reset_statistics,
    set_fake_quantize,
)
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.quantizers.transition import QuantizationWarning

__version__ = build_info()["version"]
# For CMAKE_PREFIX_PATH, so that find_package(torch_ext) finds the package; see examples/cpp.
cmake_prefix_path = str(loader.FOLDER / "share" / "cmake")

__all__ = [
    "Add",
    "BiasCorrection",
    "BiasRow",
    "BitChoice",
    "BitChoiceRow",
    "BitPoint",
    "CalibrationSummary",
    "Cat",
    "ChannelLimits",
    "Choice",
    "Description",
    "DynamicFakeQuantize",
    "Equalization",
    "EqualizationRow",
    "FakeQuantState",
    "FakeQuantize",
    "FileError",
    "LearnedFakeQuantize",
    "LoadReport",
    "MatMul",
    "MergeReport",
    "Mul",
    "NormRecalibration",
    "NormRow",
    "Observer",
    "QConfig",
    "QuantStub",
    "QuantizationWarning",
    "QuantizerRow",
    "QuantizerSummary",
    "ReconstructedLayer",
    "Reconstruction",
    "ReportSummary",
    "SavedQuantizers",
    "Sensitivity",
    "SensitivityRow",
    "Sweep",
    "SweepRow",
    "build_info",
    "calibrate",
    "choose_bits",
    "cmake_prefix_path",
    "correct_bias",
    "describe",
    "equalize",
    "export",
    "fake_quantize_states",
    "fake_quants",
    "float_parameters",
    "float_state_dict",
    "fuse",
    "get_block_qconfig",
    "get_default_calib_qconfig",
    "get_default_qconfig",
    "keep_statistics_local",
    "load_float_state_dict",
    "load_observer_params",
    "merge_observer_params",
    "named_quantizers",
    "observers",
    "ops",
    "prepare_qat",
    "quantization_parameters",
    "read_quantizers",
    "recalibrate_norms",
    "reconstruct",
    "remove_quantizers",
    "report",
    "reset_statistics",
    "resolve",
    "save_observer_params",
    "sensitivity",
    "set_fake_quantize",
    "sweep",
    "sync_observers",
]
