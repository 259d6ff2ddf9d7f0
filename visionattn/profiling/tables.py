"""Tables of what was measured, for a terminal and for a file."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from visionattn.deployment.info import size_text
from visionattn.profiling.clock import Milliseconds
from visionattn.profiling.compare import Comparison
from visionattn.profiling.exports import EngineReport, EngineRow, ParityReport
from visionattn.profiling.fidelity import FidelityReport, Precision, Table, describe
from visionattn.profiling.figures import Figure
from visionattn.profiling.latency import LatencyReport, LatencyRow
from visionattn.profiling.memory import MemoryReport, MemoryRow
from visionattn.profiling.operations import OperationRow, OperationsReport
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
    """Return a table a size and a batch, without columns in which nothing stands."""
    columns = (
        *("model", "parameters", "runtime", "precision", "forward ms (p5 to p95)", "end to end ms"),
        *("training step ms", "peak MiB", "error", "boxes found", ""),
    )
    grids = []
    for device, size, batch in dict.fromkeys((row.device, row.size, row.batch) for row in report.rows):
        rows = [_latency(row) for row in report.rows if (row.device, row.size, row.batch) == (device, size, batch)]
        title = f"{size_text(size)} px, batch {batch}, {device}, {report.threads} threads, {report.rounds} rounds"
        told = [index for index in range(len(columns)) if {row[index] for row in rows} - {"", "-"}]
        grids.append(Grid(title, [columns[i] for i in told], [[row[i] for i in told] for row in rows]))
    return grids


def _latency(row: LatencyRow) -> tuple[str, ...]:
    return (
        f"{row.model} {row.attention}".strip(),
        "-" if row.parameters is None else f"{row.parameters / 1e6:.2f} M",
        *(row.runtime, row.precision, _spread(row.forward), _spread(row.end_to_end), _spread(row.train)),
        *(_mebibytes(row.peak_memory), "-" if row.error is None else f"{row.error:.1e}"),
        *("-" if row.found is None else str(row.found), row.reason),
    )


def memory_grids(report: MemoryReport) -> list[Grid]:
    """Return a table of time and one of memory, a row a mechanism and a column a size; and one of what failed."""
    sizes = list(dict.fromkeys((row.size, row.tokens) for row in report.rows))
    columns = ("mechanism", "", *(f"{size_text(size)} px, {tokens:,} tokens" for size, tokens in sizes))
    times, memories = [], []
    for name in dict.fromkeys((row.mechanism, row.step) for row in report.rows):
        own = {row.size: row for row in report.rows if (row.mechanism, row.step) == name}
        times.append((*name, *(_spread(own[size].time) for size, _ in sizes)))
        memories.append((*name, *(_grown(own[size]) for size, _ in sizes)))
    what = f"{report.subject}, {report.dtype}, one image, {report.rows[0].device}"
    failed = [(r.mechanism, r.step, size_text(r.size), r.reason) for r in report.rows if r.reason]
    return [
        Grid(f"ms (p5 to p95): {what}, {report.rounds} rounds", columns, times),
        Grid(f"Peak MiB above weights and input (power of tokens it grew by): {what}", columns, memories),
        *([Grid("Not measured", ("mechanism", "", "px", "reason"), failed)] if failed else []),
    ]


def _grown(row: MemoryRow) -> str:
    return _mebibytes(row.peak_memory) + (f" ({row.growth:.2f})" if row.growth is not None else "")


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def _spread(time: Milliseconds | None) -> str:
    return f"{time.median:.3g} ({time.p5:.3g} to {time.p95:.3g})" if time else "-"


def operation_grids(report: OperationsReport) -> list[Grid]:
    """Return tables of times and of errors, with a column a number of tokens; and one of what has no time."""
    what = f"{report.heads} heads x {report.head_dim}, {report.dtype}, {report.rounds} rounds"
    what = f"causal, {what}" if report.causal else what
    grids = []
    for direction in dict.fromkeys(row.direction for row in report.rows):
        rows = [row for row in report.rows if row.direction == direction]
        grids.append(_by_tokens(f"{direction}, µs (times the floor): {what}", rows, lambda row: _micro(row, row.time)))
        if any(row.graph for row in rows):
            title = f"{direction}, µs (times the floor), called from Python, not by CUDA graph: {what}"
            grids.append(_by_tokens(title, rows, lambda row: _micro(row, row.call)))
        if any(row.host for row in rows):
            title = f"{direction}, µs of Python's thread a call, in a row: {what}"
            grids.append(_by_tokens(title, rows, lambda row: f"{row.host.median * 1e3:.4g}" if row.host else "-"))
        if direction != "backward":
            name = "output" if direction == "forward" else "gradient"
            title = f"{direction}, relative L2 error of the {name} to float64 (times that of eager)"
            grids.append(_by_tokens(title, rows, _erring))
    failed = [(r.mechanism, r.form, str(r.tokens), r.direction, r.reason) for r in report.rows if r.reason]
    columns = ("mechanism", "form", "tokens", "direction", "reason")
    return [*grids, *([Grid("Without time or graph", columns, failed)] if failed else [])]


def _by_tokens(title: str, rows: Sequence[OperationRow], cell: Callable[[OperationRow], str]) -> Grid:
    floors = {(row.tokens, row.batch): row.floor * 1e3 for row in rows if row.mechanism == "softmax"}
    columns = [f"N {tokens}, B {batch}, floor {floor:.3g}" for (tokens, batch), floor in floors.items()]
    cells = []
    for name in dict.fromkeys((row.mechanism, row.form) for row in rows):
        cells.append((*name, *(cell(row) for row in rows if (row.mechanism, row.form) == name)))
    return Grid(title, ("mechanism", "form", *columns), cells)


def _micro(row: OperationRow, time: Milliseconds | None) -> str:
    return f"{time.median * 1e3:.4g} ({time.median / row.floor:.2f})" if time else "-"


def _erring(row: OperationRow) -> str:
    if row.error is None:
        return "-"
    return f"{row.error:.1e}" + (f" ({row.ratio:.2f})" if row.ratio is not None else "")


def ratio_grids(comparison: Comparison) -> list[Grid]:
    """Return a table a measurement, of rows that only one report has, and of what differs around them."""
    grids = []
    for field, pairs in comparison.pairs.items():
        rows = [(*pair.row, *(_digits(number) for number in (pair.a, pair.b, pair.ratio))) for pair in pairs]
        grids.append(Grid(field, (*comparison.names, "A", "B", "B/A"), rows))
    for name, keys in (("A", comparison.only_a), ("B", comparison.only_b)):
        if keys:
            grids.append(Grid(f"Only in {name}", comparison.names, keys))
    if comparison.differences:
        grids.append(Grid("What differs", ("what", "A", "B"), comparison.differences))
    return grids


def _digits(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


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
