"""Tables on the terminal (rich where it is installed) and the picture of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints one table; the first column is text, the others are aligned to the right."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(title, columns, rows), flush=True)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # a file or a pipe has no width of its own
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n{title}", highlight=False)
    console.print(table)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in spaces and dashes."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, line(columns), rule, *(line(row) for row in rows)])


def draw_losses(losses: Mapping[str, Sequence[Sequence[float]]], path: Path, title: str) -> bool:
    """Draws loss against step for each start; False where matplotlib is not installed.

    The losses of one start are one list for each seed. A line is their mean over the seeds and
    the last 10 steps; the band is from the least to the most seed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")  # writes files, needs no screen
    matplotlib.rcParams["svg.hashsalt"] = "torch_ext"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=120)
    for index, (name, seeds) in enumerate(losses.items()):
        smooth = [running_mean(values, 10) for values in seeds]
        steps = range(1, len(smooth[0]) + 1)
        by_step = list(zip(*smooth, strict=True))
        low, high = [min(values) for values in by_step], [max(values) for values in by_step]
        axes.fill_between(steps, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        middle = [sum(values) / len(values) for values in by_step]
        axes.plot(steps, middle, color=f"C{index}", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, mean of the last 10 steps")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    # The same losses give the same file.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return True


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each step, of fewer at the start."""
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - window) : end]
        means.append(sum(last) / len(last))
    return means
