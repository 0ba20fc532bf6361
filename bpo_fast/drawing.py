"""How figures look: colors and type, and a drawing as SVG that takes both from the page it stands in, or as files."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from bpo_fast.files import errors_name

# Okabe and Ito's palette, told apart by every common kind of color vision; the page swaps in its variables.
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
AMBER, VIOLET = "#b58900", "#7b4fa3"
GRAY, INK, GRID = "#7a7f87", "#1b1f24", "#d5d9de"
PAGE_COLORS = {BLUE: "c0", ORANGE: "c1", GREEN: "c2", PINK: "c3", GRAY: "c4", INK: "ink", GRID: "grid"}
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRAY,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "lines.solid_capstyle": "butt",  # an interval's bar ends where the interval does
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRAY,
    "xtick.labelcolor": INK,
    "ytick.color": GRAY,
    "ytick.labelcolor": INK,
}
FULL_WIDTH_IN, HALF_WIDTH_IN = 9.0, 4.6
WIDE_FROM_IN = 5.0
MAX_ROWS = 40
MAX_BARS = 48
PNG_DPI = 160


@dataclass(frozen=True)
class Plot:
    """One figure of the report: its title, one sentence on how to read it, and the drawing."""

    title: str
    caption: str
    figure: Figure

    @property
    def is_wide(self) -> bool:
        """True if it needs more than a column."""
        return self.figure.get_figwidth() > WIDE_FROM_IN

    def save(self, stem: Path) -> list[Path]:
        """Writes STEM.png and STEM.svg on white, for use outside the page."""
        paths = [stem.with_suffix(ending) for ending in (".png", ".svg")]
        for path in paths:
            with matplotlib.rc_context({**STYLE, "savefig.transparent": False, "svg.hashsalt": stem.name}):
                metadata = {"Date": None} if path.suffix == ".svg" else None
                with errors_name(path):
                    self.figure.savefig(path, dpi=PNG_DPI, facecolor="white", metadata=metadata)
        return paths

    def svg(self, prefix: str) -> str:
        """The drawing as an `<svg>` element for a page; `prefix` keeps its ids apart from those of its neighbors."""
        buffer = io.StringIO()
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": prefix}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
        svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
        # The page's own font: every common one is narrower than the DejaVu Sans that the layout was made for.
        svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", svg)
        svg = re.sub(r"font-family: [^;\"]+; ?", "", svg)
        for color, variable in PAGE_COLORS.items():
            svg = svg.replace(color, f"var(--{variable})")
        return svg.replace("<svg ", f'<svg role="img" aria-label="{self.title}" ', 1)


def paler(color: str, share: float) -> str:
    """A color mixed with that share of white."""
    if not share:
        return color
    red, green, blue = ((1 - share) * x + share for x in to_rgb(color))
    return to_hex((red, green, blue))


def stack(axis: Axes, positions: np.ndarray, parts: Sequence[tuple[str, str, np.ndarray]], *, width: float) -> None:
    """Draws (label, color, [n] heights) on top of each other: bars, or an area where there are too many for bars."""
    below = np.zeros(len(positions))
    for label, color, values in parts:
        if len(positions) <= MAX_BARS:
            axis.bar(positions, values, bottom=below, color=color, label=label, width=width)
        else:
            axis.fill_between(positions, below, below + values, color=color, label=label, step="mid", linewidth=0)
        below = below + values
    axis.grid(axis="x", visible=False)


def rows_left_out(num_rows: int) -> str:
    """A sentence on the rows that a figure of one row a group has no room for, or ""."""
    return f"There is room for the first {MAX_ROWS} of {num_rows} rows." if num_rows > MAX_ROWS else ""


def legend_below(figure: Figure, *axes: Axes) -> None:
    """One legend of some panels under the whole figure; what several of them have is there once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels, handles = list(found), list(found.values())
    if handles:
        ncols = min(len(labels), 4 if figure.get_figwidth() > HALF_WIDTH_IN + 1 else 3)
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, columnspacing=1.2, handlelength=2)
