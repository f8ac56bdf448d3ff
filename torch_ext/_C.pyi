from typing import Literal, TypedDict

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
    options: list[OptionInfo]

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

def observers() -> tuple[str, ...]: ...
def fake_quants() -> tuple[str, ...]: ...
def observer_info(name: str) -> ObserverInfo: ...
def state_table() -> dict[str, StateFlags]: ...
def build_info() -> BuildInfo: ...
