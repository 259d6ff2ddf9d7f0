"""Tables of what was measured, for a terminal and for a file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from visionattn.export.info import size_text
from visionattn.profiling.exports import EngineReport, EngineRow, ParityReport
from visionattn.profiling.fidelity import FidelityReport, Precision, Table, describe
from visionattn.profiling.figures import Figure
from visionattn.profiling.latency import LatencyReport, Milliseconds
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


def parity_grids(report: ParityReport) -> list[Grid]:
    """Return the tables of exported graphs, a row a mechanism."""
    grids = []
    for subject in dict.fromkeys(row.subject for row in report.graphs):
        rows = [row for row in report.graphs if row.subject == subject]
        columns = list(dict.fromkeys(f"{row.precision} {size_text(row.size)}" for row in rows))
        cells = []
        for mechanism in dict.fromkeys(row.mechanism for row in rows):
            own = [row for row in rows if row.mechanism == mechanism]
            half = own[-1]
            cells.append((mechanism, *(f"{row.error:.1e}" for row in own), f"{half.rounding:.1e}", f"{half.peak:.4g}"))
        grids.append(Grid(f"ONNX: {subject}", ("mechanism", *columns, "of it rounding q, k, v", "peak in fp16"), cells))
    if report.devices:
        cells = [(row.subject, row.mechanism, f"{row.error:.1e}") for row in report.devices]
        grids.append(Grid("float16 on the GPU", ("network", "mechanism", "error"), cells))
    return grids


def engine_grid(report: EngineReport) -> Grid:
    """Lay out engines."""
    rows = [(r.subject, r.mechanism, r.precision, str(r.nodes), *_built(r)) for r in report.engines]
    columns = ("network", "mechanism", "precision", "ONNX nodes", "layers", "build s", "MB", "")
    return Grid("Engines of TensorRT-RTX, built without a GPU, not run", columns, rows)


def _built(row: EngineRow) -> tuple[str, ...]:
    if row.refused:
        return "-", "-", "-", f"refused: {row.refused}"
    return str(row.layers), f"{row.seconds:.2f}", f"{row.megabytes:.1f}", "built"


def latency_grids(report: LatencyReport) -> list[Grid]:
    """Return a table a size."""
    grids = []
    for size, batch in dict.fromkeys((row.size, row.batch) for row in report.rows):
        rows = [
            (r.model, f"{r.parameters / 1e6:.2f} M", r.runtime, _spread(r.forward), _spread(r.end_to_end), str(r.found))
            for r in report.rows
            if (r.size, r.batch) == (size, batch)
        ]
        columns = ("model", "parameters", "runtime", "forward ms (p5 to p95)", "end to end ms", "boxes found")
        title = f"{size_text(size)} px, batch {batch}, {report.threads} threads, {report.rounds} rounds"
        grids.append(Grid(title, columns, rows))
    return grids


def _spread(time: Milliseconds) -> str:
    return f"{time.median:.1f} ({time.p5:.1f} to {time.p95:.1f})"


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
