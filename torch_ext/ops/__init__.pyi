# tools/typing_stubs.py writes this file from the registry.

from torch import Tensor

from torch_ext.ops.quantizing import dynamic_fake_quant as dynamic_fake_quant
from torch_ext.ops.quantizing import fake_quant as fake_quant
from torch_ext.ops.quantizing import follow_ as follow_
from torch_ext.ops.quantizing import follow_fake_quant as follow_fake_quant
from torch_ext.ops.quantizing import gptq as gptq
from torch_ext.ops.quantizing import learned_fake_quant as learned_fake_quant
from torch_ext.ops.quantizing import lsq as lsq
from torch_ext.ops.quantizing import pact as pact
from torch_ext.ops.registry_names import KlVariant
from torch_ext.ops.statistics import kl_threshold as kl_threshold
from torch_ext.ops.statistics import merge_ as merge_
from torch_ext.ops.statistics import observe_ as observe_
from torch_ext.ops.statistics import qparams as qparams
from torch_ext.ops.statistics import solve as solve
from torch_ext.ops.statistics import solve_many as solve_many

def min_max(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
) -> Tensor: ...
def fixed_scale(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
    *,
    scale: float = ...,
    zero_point: float = ...,
) -> Tensor: ...
def clip(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
    *,
    xmin: float = ...,
    xmax: float = ...,
) -> Tensor: ...
def percentile(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
    *,
    percentile: float = ...,
) -> Tensor: ...
def clip_std(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
    *,
    std_scale: float = ...,
) -> Tensor: ...
def kl(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
    *,
    variant: KlVariant = ...,
) -> Tensor: ...
def mse(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
) -> Tensor: ...
def mix(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
) -> Tensor: ...
def aciq(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
) -> Tensor: ...
def mean_abs(
    x: Tensor,
    quant_min: int = ...,
    quant_max: int = ...,
    symmetric: bool = ...,
    ch_axis: int = ...,
    grid: str | None = ...,
) -> Tensor: ...
