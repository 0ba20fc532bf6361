"""How figures look: colors and type, and a drawing as SVG that takes both from the page it stands in, or as files."""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by every common kind of color vision; the page swaps in its variables.
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
AMBER, SKY = "#b58900", "#3d8fd1"
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
    "savefig.transparent": True,
    "lines.solid_capstyle": "butt",  # an interval's bar ends where the interval does
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


def legend_below(figure: Figure, axis: Axes) -> None:
    """The legend of a panel under the whole figure."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        ncols = min(len(labels), 4 if figure.get_figwidth() > HALF_WIDTH_IN + 1 else 3)
        figure.legend(handles, labels, loc="outside lower center", ncols=ncols, columnspacing=1.2)
