"""Line charts as SVG, below each other. Plain text: no library draws here, and any browser shows it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

Point = tuple[float, float]

WIDTH, PANEL_HEIGHT, TITLE_HEIGHT = 860, 260, 46
LEFT, RIGHT, TOP, BOTTOM = 74, 130, 34, 44
COLORS = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706")
MOST_TICKS = 6
STYLE = ("text{font:12px sans-serif;fill:#333}.title{font-size:15px;font-weight:600}.head{font-weight:600}"
         ".grid{stroke:#e5e7eb}.frame{fill:none;stroke:#9ca3af}.line{fill:none;stroke-width:1.8}")


@dataclass(frozen=True, slots=True)
class Series:
    """Points in the order of x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart. x_most: where the x axis may end first. is_log: of the y axis, which then shows nothing under 0."""

    title: str
    x_label: str
    series: Sequence[Series]
    x_most: float = 0.0
    is_log: bool = False

    def shown(self) -> list[Series]:
        """Without what the axes cannot show."""
        return [Series(one.name, [point for point in one.points if not self.is_log or point[1] > 0])
                for one in self.series]


def chart(title: str, panels: Sequence[Panel]) -> str:
    """A whole file."""
    height = TITLE_HEIGHT + PANEL_HEIGHT * len(panels)
    body = "\n".join(text for number, panel in enumerate(panels)
                     for text in _panel(panel, TITLE_HEIGHT + PANEL_HEIGHT * number))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}">\n<style>{STYLE}</style>\n'
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n'
            f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>\n{body}\n</svg>\n')


@dataclass(frozen=True, slots=True)
class Scale:
    """Values to pixels."""

    ticks: Sequence[float]
    begin: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(one) if self.is_log else one for one in (self.ticks[0], self.ticks[-1], value))
        return self.begin + (self.end - self.begin) * (at - low) / (high - low)


def linear_ticks(most: float) -> list[float]:
    """From 0 to at least `most`, in steps of 1, 2 or 5 times a power of ten; at most MOST_TICKS + 1."""
    rough = max(most, 1e-9) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.ceil(most / step - 1e-9) + 1)] if most > 0 else [0.0, 1.0]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around both."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0 ** power for power in range(first, max(last, first + 1) + 1)]


def _panel(panel: Panel, top: int) -> Iterator[str]:
    shown = panel.shown()
    points = [point for one in shown for point in one.points]
    x_ticks = linear_ticks(max([panel.x_most, *(x for x, _ in points)]))
    heights = [y for _, y in points] or [1.0]
    y_ticks = log_ticks(min(heights), max(heights)) if panel.is_log else linear_ticks(max(heights))
    x_of = Scale(x_ticks, LEFT, WIDTH - RIGHT)
    y_of = Scale(y_ticks, top + PANEL_HEIGHT - BOTTOM, top + TOP, panel.is_log)
    yield f'<text class="head" x="{LEFT}" y="{top + TOP - 10}">{escape(panel.title)}</text>'
    yield from _grid(panel, top, x_of, y_of)
    for number, one in enumerate(shown):
        color = COLORS[number % len(COLORS)]
        if one.points:
            places = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in one.points)
            yield f'<polyline class="line" stroke="{color}" points="{places}"/>'
        y = top + TOP + 14 + 18 * number
        yield f'<rect x="{WIDTH - RIGHT + 12}" y="{y - 9}" width="12" height="4" fill="{color}"/>'
        yield f'<text x="{WIDTH - RIGHT + 30}" y="{y - 3}">{escape(one.name)}</text>'


def _grid(panel: Panel, top: int, x_of: Scale, y_of: Scale) -> Iterator[str]:
    bottom = top + PANEL_HEIGHT - BOTTOM
    for tick in y_of.ticks:
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:,.6g}</text>'
    for tick in x_of.ticks:
        yield f'<text x="{x_of(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:,.6g}</text>'
    yield (f'<rect class="frame" x="{LEFT}" y="{top + TOP}" width="{WIDTH - RIGHT - LEFT}" '
           f'height="{bottom - top - TOP}"/>')
    yield (f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{bottom + 34}" text-anchor="middle">'
           f'{escape(panel.x_label)}</text>')
