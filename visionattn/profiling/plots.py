"""Pictures of reports."""

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visionattn.profiling.memory import MemoryReport
from visionattn.profiling.operations import OperationRow, OperationsReport

STYLES = {"eager": ":", "compiled": "--", "fused": "-"}
"""Of lines by form; softmax, whose forms are backends, has dash-dotted ones."""

MARKERS = {"cudnn": "s", "efficient": "^", "math": "x"}
"""Of points by backend; a dot elsewhere."""


def draw_operations(report: OperationsReport, path: Path) -> None:
    """Draw time over tokens, both logarithmic, as a PNG: a panel a direction, a line an entrant, and the floor."""
    directions = list(dict.fromkeys(row.direction for row in report.rows))
    figure = Figure(figsize=(6.5 * len(directions) + 2.5, 6), layout="constrained")
    panels = figure.subplots(1, len(directions), squeeze=False)[0]
    for axes, direction in zip(panels, directions, strict=True):
        _panel(axes, [row for row in report.rows if row.direction == direction])
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title=direction)
        axes.grid(alpha=0.3)
    what = f"{report.heads} heads x {report.head_dim}, {report.dtype}; by CUDA graph where there is one"
    figure.suptitle(f"Attention without projections, {what}")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", fontsize="small")
    save_figure(figure, path)


def draw_memory(report: MemoryReport, path: Path) -> None:
    """Draw time, and memory where it is known, over tokens as a PNG: a line a mechanism, dashed where it is trained."""
    known = any(row.peak_memory for row in report.rows)
    figure = Figure(figsize=(6.5 * (1 + known) + 2.5, 5), layout="constrained")
    panels = figure.subplots(1, 1 + known, squeeze=False)[0]
    mechanisms = list(dict.fromkeys(row.mechanism for row in report.rows))
    for mechanism, step in dict.fromkeys((row.mechanism, row.step) for row in report.rows):
        own = [row for row in report.rows if (row.mechanism, row.step) == (mechanism, step) and row.time]
        tokens, times = [row.tokens for row in own], [row.time.median for row in own if row.time]
        for axes, values in zip(panels, (times, [(row.peak_memory or 0) / 2**20 for row in own]), strict=False):
            style, colour = ("--" if step == "training" else "-"), colormaps["tab20"](mechanisms.index(mechanism))
            axes.plot(tokens, values, style, marker="o", markersize=4, color=colour, label=f"{mechanism}, {step}")
    for axes, unit in zip(panels, ("ms", "peak MiB above weights and input"), strict=False):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{report.subject}, {report.dtype}, one image, {report.rows[0].device}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)


def _panel(axes: Axes, rows: list[OperationRow]) -> None:
    """Draw the lines of one direction; colours stand for mechanisms, and are the same in all panels."""
    mechanisms = list(dict.fromkeys(row.mechanism for row in rows))
    floors = {row.tokens: row.floor * 1e3 for row in rows if row.mechanism == "softmax"}
    axes.plot(list(floors), list(floors.values()), color="black", linewidth=2, label="floor: bytes of q, k, v")
    for mechanism, form in dict.fromkeys((row.mechanism, row.form) for row in rows):
        own = [row for row in rows if (row.mechanism, row.form) == (mechanism, form)]
        points = [(row.tokens, row.time.median * 1e3) for row in own if row.time]
        axes.plot(
            [tokens for tokens, _ in points],
            [time for _, time in points],
            STYLES.get(form, "-."),
            marker=MARKERS.get(form, "o"),
            markersize=4,
            color=colormaps["tab20"](mechanisms.index(mechanism)),
            label=f"{mechanism}, {form}",
        )
