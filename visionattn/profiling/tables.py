"""Tables of what was measured, for a terminal and for a file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from visionattn.profiling.fidelity import FidelityReport, Precision, Table, describe
from visionattn.profiling.figures import Figure
from visionattn.profiling.protocols import Spread
from visionattn.profiling.sweep import Choice


@dataclass(frozen=True)
class Grid:
    """A table of text: a title, columns, and rows as long as they are."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def rich(self) -> RichTable:
        """Lay it out for a terminal."""
        table = RichTable(*self.columns, title=self.title)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Write it as a section in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def fidelity_grids(report: FidelityReport) -> list[Grid]:
    """Return all tables of a fidelity report."""
    protocols = dict.fromkeys(row.protocol for row in report.precision)
    return [
        figure_grid(report.figures),
        *(precision_grid([row for row in report.precision if row.protocol == protocol]) for protocol in protocols),
        *(comparison_grid(table) for table in report.tables),
        choice_grid("SLAY: some settings everywhere", report.settings),
        choice_grid("SLAY: best setting for a number of features", report.sweep),
    ]


def figure_grid(figures: Iterable[Figure]) -> Grid:
    """Lay out known figures."""
    signs = {"equal": "", "at least": ">= ", "at most": "<= "}
    rows = [
        (f.name, f.source, f"{signs[f.relation]}{f.expected:.4g}", f"{f.measured:.4g}", "ok" if f.ok else "MISSED")
        for f in figures
    ]
    return Grid("Known figures, recovered", ("figure", "source", "expected", "measured", ""), rows)


def precision_grid(rows: Sequence[Precision]) -> Grid:
    """Lay out rounding errors under one protocol."""
    cells = [(row.mechanism, size(row.features), *(f"{e.mean:.1e}" for e in row.error.values())) for row in rows]
    title = f"Error to its own explicit form, by type: {rows[0].protocol}"
    return Grid(title, ("mechanism", "F", *rows[0].error), cells)


def comparison_grid(table: Table) -> Grid:
    """Lay out mechanisms beside targets."""
    columns = [f"{what} to {target}" for target in table.targets for what in ("error", "cosine")]
    rows = []
    for row in table.rows:
        cells = [describe(row.mechanism, row.options), size(row.features)]
        for target in table.targets:
            cells += [spread(row.agreement[target].error), f"{row.agreement[target].cosine.mean:.3f}"]
        rows.append(cells)
    return Grid(f"Approximation of {table.targets[0]}: {table.protocol}", ("mechanism", "F", *columns), rows)


def choice_grid(title: str, choices: Iterable[Choice]) -> Grid:
    """Lay out settings of SLAY beside the controls."""
    columns = ("inputs", "epsilon", "F <=", "poly", "R", "M", "P", "F", "error", "uniform", "x^2")
    rows = []
    for c in choices:
        numbers = (str(n) for n in (c.nodes, c.features, c.anchors, c.size))
        controls = f"{c.uniform:.3f}", f"{c.square:.3f}"
        row = (c.protocol, f"{c.epsilon:g}", str(c.budget or "any"), c.poly, *numbers, spread(c.error), *controls)
        rows.append(row)
    return Grid(f"{title}; error to spherical Yat attention", columns, rows)


def spread(value: Spread) -> str:
    """Format a mean and a standard deviation."""
    return f"{value.mean:.3g} ± {value.std:.1g}"


def size(features: int | None) -> str:
    """Format a number of features; a dash where the kernel does not factor."""
    return "-" if features is None else str(features)
