"""What number formats cost: weights alone, then weights and what layers read, on trained nets.

    make formats                installs the packages of the extra ``formats`` first
    make formats FORMATS="--nets example --formats 'MX*' 'int8*'"
    make formats FORMATS=--quick      a few inputs

Rounded to nearest, with no correction. There are no labels but the example's, so what counts is
the share of inputs for which the quantized net chooses the float net's class, and the norm of the
difference of the logits over that of the float net's; in three draws of inputs to calibrate with
and others to test on. Intervals hold 95 % of 2000 resamples of draws and inputs. Results are kept
in output/accuracy: a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_ext
from agreement import formats, scores, sentences
from agreement.formats import FORMATS
from agreement.nets import BATCH, DRAWS, NETS, Draw, Net, Sizes
from agreement.scores import Outcome
from agreement.store import Store
from engines import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CODE = (HERE / "agreement" / "formats.py", HERE / "agreement" / "sentences.py")
NETS_HERE: dict[str, Net] = {**NETS, "minilm": sentences.NET}
QUICK = Sizes(BATCH, BATCH)
# Fewer inputs than benchmarks/accuracy.py takes, as there are more formats than recipes.
SIZES = {
    "example": Sizes(128, 200),
    "crepe_tiny": Sizes(64, 104),
    "efficientnet_lite0": Sizes(32, 40),
    "efficientnet_lite1": Sizes(32, 40),
    "minilm": Sizes(64, 40),
}
WEIGHTS, BOTH = "weights", "weights and inputs"


@dataclass
class Row:
    """A format on a net."""

    net: str
    name: str
    noise: dict[str, float]  # of each layer's weight, in dB
    found: dict[str, list[Outcome]] = field(default_factory=lambda: {WEIGHTS: [], BOTH: []})

    @property
    def median(self) -> float:
        return statistics.median(self.noise.values())

    @property
    def worst(self) -> str:
        """The layer with the most noise."""
        return min(self.noise, key=lambda layer: self.noise[layer])


def measure(name: str, wanted: Sequence[str], sizes: Sizes) -> list[Row]:
    """All formats on a net."""
    store = Store(f"{sizes}, {DRAWS} draws, torch {torch.__version__}", CODE)
    net = NETS_HERE[name].load()
    rows = [Row(name, form, formats.noise(net, FORMATS[form])) for form in wanted]
    for number in range(DRAWS):
        data = NETS_HERE[name].draw(number, sizes)
        want = scores.logits(net, data.test, BATCH)
        seen = None
        for row in rows:
            begun, form = time.perf_counter(), FORMATS[row.name]
            for what in row.found:
                kept = f"{name}-{number}-{what}-{row.name}"
                outcome = store.read(kept, rival=False)
                if outcome is None:
                    if what == BOTH and seen is None:
                        seen = observed(net, data.calibration)
                    outcome = outcome_of(net, form, data, want, seen if what == BOTH else None)
                    store.write(kept, outcome, rival=False)
                row.found[what].append(outcome)
            shares = [scores.same_class(row.found[what][-1:]).value for what in row.found]
            print(
                f"  {name:20} {number} {row.name:32} same class {shares[0]:.3f}, {shares[1]:.3f} "
                f"({time.perf_counter() - begun:.0f} s)",
                flush=True,
            )
    return rows


def observed(net: nn.Module, inputs: Tensor) -> formats.Seen:
    return formats.observe(net, lambda model: scores.logits(model, inputs, BATCH))


def outcome_of(
    net: nn.Module, form: formats.Format, data: Draw, want: Tensor, seen: formats.Seen | None
) -> Outcome:
    begun = time.process_time()
    model = formats.with_weights(net, form)
    if seen is not None:
        formats.quantize_inputs(model, form, seen)
    seconds = time.process_time() - begun
    have = scores.logits(model, data.test, BATCH)
    return scores.outcome(have, want, data.labels, seconds)


def fits(name: str, form: formats.Format) -> bool:
    """A token is a position of a sentence: nets with convolutions have none."""
    return form.activations != "token" or name == "minilm"


def table(rows: Sequence[Row]) -> str:
    """In Markdown: the formats of a net."""
    head = "| format | bits | dB, median; worst | weights: same class; error | and inputs |"
    lines = [head, "|---" * 5 + "|"]
    for row in rows:
        cells = [row.name, f"{FORMATS[row.name].bits:g}"]
        cells.append(f"{row.median:.1f}; {row.noise[row.worst]:.1f}")
        for draws in row.found.values():
            error = scores.logit_error(draws)
            cells.append(f"{_share(scores.same_class(draws))}; {error.value:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(found: scores.Interval) -> str:
    return f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f})"


def record(rows: Sequence[Row]) -> list[dict[str, Any]]:
    made = []
    for row in rows:
        entry: dict[str, Any] = {
            "net": row.net,
            "format": row.name,
            "bits": FORMATS[row.name].bits,
            "sqnr_median": round(row.median, 2),
            "sqnr_worst": round(row.noise[row.worst], 2),
            "worst_layer": row.worst,
        }
        for what, draws in row.found.items():
            figures = {
                "inputs": sum(len(draw.same) for draw in draws),
                "same_class": asdict(scores.same_class(draws)),
                "same_class_of_draws": [sum(draw.same) / len(draw.same) for draw in draws],
                "logit_error": asdict(scores.logit_error(draws)),
            }
            if draws[0].right:
                figures["right_class"] = asdict(scores.right_class(draws))
            entry[what.replace(" ", "_")] = figures
        made.append(entry)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS_HERE), default=list(NETS_HERE))
    parser.add_argument("--formats", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--quick", action="store_true", help=f"{BATCH} inputs a draw")
    parser.add_argument("--list", action="store_true", help="name the formats, do nothing")
    parser.add_argument("--save", action="store_true", help="keep a record in results/")
    chosen = parser.parse_args()
    if chosen.list:
        for name, form in FORMATS.items():
            print(f"{name:32} {form}")
        return 0
    wanted = [n for n in FORMATS if any(fnmatch.fnmatchcase(n, p) for p in chosen.formats)]
    nets = []
    for name in chosen.nets:
        if reason := NETS_HERE[name].why_not():
            print(f"without {name}: {reason}")
        else:
            nets.append(name)
    if not wanted or not nets:
        print("formats.py: expected a net and a format that run here; see --list", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    about = machine() | {"torch_ext": torch_ext.build_info()["version"]}
    found = []
    for name in nets:
        sizes = QUICK if chosen.quick else SIZES[name]
        rows = measure(name, [n for n in wanted if fits(name, FORMATS[n])], sizes)
        print(f"\n{name}, {DRAWS} draws of {sizes}\n\n{table(rows)}\n", flush=True)
        about.setdefault("sizes", {})[name] = str(sizes)
        found += record(rows)
        if chosen.save:  # after each net, as a run takes long
            path = RESULTS / f"{about['date']}-formats.json"
            path.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
