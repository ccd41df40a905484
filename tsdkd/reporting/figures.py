"""Figures as papers print them: matplotlib, a palette that colour-blind readers tell apart, units on the axes, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsdkd.data.runs import Run
from tsdkd.reporting.panels import Panel, panels, rest

# Okabe and Ito (2008), black last; beyond them the line's style changes.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
MARKS = "os^Dv"
DPI = 200


def pyplot(what: str = "a picture") -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"{what} needs matplotlib, which is not installed: pip install 'tsdkd[report]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def look(number: int) -> dict[str, Any]:
    """Colour and line style of the so-manyth curve."""
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": STYLES[number // len(PALETTE) % len(STYLES)]}


def save(figure: Any, path: Path) -> Path:
    """Write a figure, PNG or PDF by its name, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)
    return path


def plot(axis: Any, panel: Panel) -> None:
    """A panel's curves; scores with their intervals, curves that stay above 0 from there."""
    for line in panel.lines:
        own = look(line.look)
        steps, values = [point[0] for point in line.points], [point[1] for point in line.points]
        if any(len(point) == 4 for point in line.points):
            lows = [max(0.0, point[1] - point[2]) if len(point) == 4 else 0.0 for point in line.points]
            highs = [max(0.0, point[3] - point[1]) if len(point) == 4 else 0.0 for point in line.points]
            axis.errorbar(
                steps, values, yerr=[lows, highs], capsize=3, marker="o", markersize=4, label=plain(line.label), **own
            )
        else:
            axis.plot(steps, values, label=plain(line.label), marker="o" if len(steps) == 1 else None, markersize=4, **own)
    scored = panel.title.startswith("Score")
    axis.set(title=plain(panel.title), xlabel="optimizer step", ylabel=f"{panel.unit} (bars: 95 %)" if scored else panel.unit)
    if min((point[1] for line in panel.lines for point in line.points), default=0) >= 0:
        axis.set_ylim(bottom=0)
    axis.grid(linewidth=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=min(3, len(panel.lines)), frameon=False, fontsize=8)


def plain(text: str) -> str:
    """A text that matplotlib takes as it is: no formula, and no name that its legends leave out."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def file_name(title: str) -> str:
    """A panel's title as a file's name."""
    words = "".join(c if c.isalnum() else " " for c in title.casefold()).split()
    return "-".join(words)[:120] or "panel"


def draw_runs(runs: Sequence[Run], folder: Path, suffix: str) -> list[Path]:
    """A figure of each panel in a folder.

    Args:
        suffix: `.png` or `.pdf`.

    Raises:
        ValueError: matplotlib is not installed, or nothing was logged.
    """
    made = [*panels(runs), *rest(runs)]
    if not made:
        raise ValueError("there is nothing to draw: no numbers were logged.")
    plt = pyplot()
    paths: list[Path] = []
    for panel in made:
        figure, axis = plt.subplots(figsize=(5.2, 3.9), constrained_layout=True)
        plot(axis, panel)
        path, number = folder / f"{file_name(panel.title)}{suffix}", 2
        while path in paths:
            path, number = folder / f"{file_name(panel.title)}-{number}{suffix}", number + 1
        paths.append(save(figure, path))
    return paths


def draw_curve(run: Run, path: Path) -> bool:
    """A run's curves in one picture: weighted terms, entropies, lengths, scores; whether there was anything to draw."""
    wanted = ("Terms of the loss", "Entropy per token", "Length of completions")
    made = [panel for panel in panels([run]) if panel.title in wanted or panel.title.startswith("Score")]
    made = [panel for panel in made if max(len(line.points) for line in panel.lines) > 1]
    if not any(panel.title == wanted[0] for panel in made):
        return False
    figure, axes = pyplot().subplots(1, len(made), figsize=(4.4 * len(made), 3.9), constrained_layout=True, squeeze=False)
    for axis, panel in zip(axes[0], made, strict=True):
        plot(axis, panel)
    save(figure, path)
    return True
