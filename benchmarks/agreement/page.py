"""Tables in Markdown, and the record, of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agreement import scores
from agreement.scores import Outcome

# (net, bits, recipe) -> a result for each draw
Found = Mapping[tuple[str, str, str], Sequence[Outcome]]


def table(found: Found, net: str, rivals: Iterable[str]) -> str:
    """The recipes of a net: for each of the bits, same class and error of the logits."""
    others = set(rivals)
    columns = list(dict.fromkeys(bits for name, bits, _ in found if name == net))
    recipes = list(dict.fromkeys(recipe for name, _, recipe in found if name == net))
    recipes.sort(key=lambda recipe: recipe in others)
    lines = ["| recipe | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for recipe in recipes:
        cells = [_cell(found.get((net, bits, recipe))) for bits in columns]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(draws: Sequence[Outcome] | None) -> str:
    if not draws:
        return ""
    share, error = scores.same_class(draws), scores.logit_error(draws)
    seconds = sum(draw.seconds for draw in draws) / len(draws)
    cells = [f"{share.value:.3f} ({share.low:.3f}-{share.high:.3f})", f"{error.value:.3f}"]
    if draws[0].right:
        cells.append(f"{100 * scores.right_class(draws).value:.1f} %")
    return ", ".join([*cells, f"{seconds:.0f} s"])


def against(found: Found, net: str, bits: str, ours: str, rivals: Iterable[str]) -> list[str]:
    """One line for each rival: how far one of our recipes is ahead on the same inputs."""
    mine = found.get((net, bits, ours))
    lines = []
    for rival in rivals:
        other = found.get((net, bits, rival))
        if not mine or not other:
            continue
        ahead, ratio = scores.same_class_ahead(mine, other), scores.error_ratio(mine, other)
        lines.append(
            f"| {net} | {bits} | {ours} | {rival} | {ahead.value:+.3f} ({ahead.low:+.3f} to "
            f"{ahead.high:+.3f}) | {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |"
        )
    return lines


AGAINST_HEAD = (
    "| net | bits | ours | rival | same class, difference | error of the logits, ours / rival's |\n"
    "|---|---|---|---|---|---|"
)


def record(found: Found) -> list[dict[str, Any]]:
    """A row for each net, bits and recipe."""
    rows = []
    for (net, bits, recipe), draws in found.items():
        row: dict[str, Any] = {
            "net": net,
            "bits": bits,
            "recipe": recipe,
            "draws": len(draws),
            "inputs": sum(len(draw.same) for draw in draws),
            "same_class": asdict(scores.same_class(draws)),
            "same_class_of_draws": [sum(draw.same) / len(draw.same) for draw in draws],
            "logit_error": asdict(scores.logit_error(draws)),
            "seconds": [draw.seconds for draw in draws],
        }
        if draws[0].right:
            row["right_class"] = asdict(scores.right_class(draws))
        rows.append(row)
    return rows
