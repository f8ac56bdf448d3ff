from typing import Literal, TypedDict

from torch_ext.ops.registry_names import Method, Rule

class OptionInfo(TypedDict):
    name: str
    default: float | str
    choices: tuple[str, ...]
    minimum: float
    maximum: float

class ObserverInfo(TypedDict):
    kind: Literal["closed", "search"]
    statistic: Literal["none", "extrema", "histogram"]
    max_bits: int
    only_integers: bool
    options: list[OptionInfo]

class FakeQuantInfo(TypedDict):
    learned: bool
    parameter: str
    per_channel: bool
    start: float

class FloatFormatInfo(TypedDict):
    bits: int
    largest: float
    last_step: float

class StateFlags(TypedDict):
    accumulate: bool
    follow: bool
    quantize: bool
    differentiate: bool

class BuildInfo(TypedDict):
    version: str
    torch: str
    cuda: bool
    cpu_capability: str

def observers() -> tuple[Rule, ...]: ...
def fake_quants() -> tuple[Method, ...]: ...
def observer_info(name: str) -> ObserverInfo: ...
def fake_quant_info(name: str) -> FakeQuantInfo: ...
def float_formats() -> dict[str, FloatFormatInfo]: ...
def learned_scales(
    name: str, parameter: list[float], quant_min: int, quant_max: int, format: str = ""
) -> list[float]: ...
def state_table() -> dict[str, StateFlags]: ...
def build_info() -> BuildInfo: ...
