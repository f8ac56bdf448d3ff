"""Writes SVG pictures, as text that an HTML page can include."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# Six colours that are told apart with any colour vision (Okabe and Ito 2008), and two more.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#5e4fa2",
)  # fmt: skip
GREY = "#767676"

Point = tuple[float, float]


class Svg:
    """One picture: shapes are drawn in the order of the calls; pixels count from top left."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._size = (width, height)
        self._title = title
        self._parts: list[str] = []

    def rectangle(self, at: Point, width: float, height: float, fill: str, hint: str = "") -> None:
        """A filled rectangle with its upper left corner at `at`; `hint` is its tooltip."""
        inside = f"<title>{html.escape(hint)}</title>" if hint else ""
        self._parts.append(
            f'<rect x="{_number(at[0])}" y="{_number(at[1])}" width="{_number(width)}" '
            f'height="{_number(height)}" fill="{fill}">{inside}</rect>'
        )

    def line(
        self,
        points: Iterable[Point],
        stroke: str,
        width: float = 1,
        dashes: str = "",
        fill: str = "none",
    ) -> None:
        """A line through the points; `fill` colours the area that it encloses, half transparent."""
        coordinates = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        style = f' stroke-dasharray="{dashes}"' if dashes else ""
        style += ' fill-opacity=".45"' if fill != "none" else ""
        self._parts.append(
            f'<polyline points="{coordinates}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{_number(width)}"{style}/>'
        )

    def text(
        self, at: Point, text: str, anchor: str = "start", fill: str = "#222", size: float = 11
    ) -> None:
        """Text on the baseline at `at`; `anchor` says which end of it is there, as in SVG."""
        self._parts.append(
            f'<text x="{_number(at[0])}" y="{_number(at[1])}" text-anchor="{anchor}" '
            f'fill="{fill}" font-size="{_number(size)}">{html.escape(text)}</text>'
        )

    def render(self) -> str:
        """The picture as an ``<svg>`` element."""
        width, height = (_number(size) for size in self._size)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                f'viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">',
                f"<title>{html.escape(self._title)}</title>",
                *self._parts,
                "</svg>",
            ]
        )


def _number(value: float) -> str:
    """A length with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def bar_picture(
    title: str, series: Sequence[str], rows: Sequence[tuple[str, Sequence[float], str]]
) -> str:
    """A chart of horizontal bars around 0, as an ``<svg>`` element.

    Args:
        title: above the chart.
        series: names for the legend; each row has one bar per series.
        rows: label, lengths (one per series, negative to the left; none is drawn if not finite),
            and a note right of the bars.
    """
    labels, width, bar = 10 + 6.4 * max((len(label) for label, _, _ in rows), default=0), 420, 9
    step = bar * len(series) + 7
    top = 44
    picture = Svg(labels + width + 150, top + step * len(rows) + 12, title)
    picture.text((10, 18), title, size=13)
    x = 10.0
    for index, name in enumerate(series):
        picture.rectangle((x, 26), 9, 9, COLOURS[index % len(COLOURS)])
        picture.text((x + 13, 35), name)
        x += 30 + 6.4 * len(name)
    finite = [v for _, values, _ in rows for v in values if abs(v) < float("inf")]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    unit = width / (high - low) if high > low else 0.0
    zero = labels + 8 - low * unit
    for index, (label, values, note) in enumerate(rows):
        y = top + step * index
        middle = y + (step - 7) / 2 + 4
        picture.text((labels, middle), label, "end")
        for place, value in enumerate(values):
            if abs(value) < float("inf"):
                start = zero + min(value, 0.0) * unit
                corner = (start, y + bar * place)
                picture.rectangle(
                    corner, abs(value) * unit, bar - 1, COLOURS[place % len(COLOURS)], f"{value:g}"
                )
        picture.text((labels + width + 16, middle), note)
    picture.line([(zero, top - 4), (zero, top + step * len(rows))], GREY)
    return picture.render()
