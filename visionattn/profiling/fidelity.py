"""How true mechanisms are to the kernels that they have or estimate, and to softmax attention.

Every table has two controls. Uniform attention reads neither queries nor keys: an estimate that is further from its
kernel than the mean of the values is worth nothing there. ``x^2`` is SLAY's kernel without its denominator, exactly.
"""

import copy
from collections.abc import Sequence

import torch

from visionattn.attention import ATTENTION, LinearAttention
from visionattn.profiling.figures import Figure, recovered_figures
from visionattn.profiling.protocols import (
    Inputs,
    Options,
    Protocol,
    Result,
    Spread,
    ablation,
    build,
    clustered,
    deviation,
    given,
    output,
    plain,
    truth,
)
from visionattn.profiling.sweep import SETTINGS, Choice, best, sweep_slay

Entry = tuple[str, Options]

CONTROLS: tuple[Entry, ...] = (("uniform", {}), ("x^2", {}))
SOFTMAX: Entry = ("softmax", {})
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Agreement(Result):
    """Relative L2 error and cosine of an output to what is expected."""

    error: Spread
    cosine: Spread


class Row(Result):
    """A mechanism in a table.

    Attributes:
        mechanism: its name; ``x^2`` is attention by the squared cosine.
        options: of its constructor.
        features: F, features of a head; None where the kernel does not factor.
        agreement: with each target of the table.
    """

    mechanism: str
    options: Options
    features: int | None
    agreement: dict[str, Agreement]


class Table(Result):
    """Mechanisms under one protocol, the controls first."""

    protocol: str
    targets: list[str]
    rows: list[Row]


class Precision(Result):
    """Relative L2 error of a mechanism to its own explicit N x N form in float64, by type of computation."""

    protocol: str
    mechanism: str
    features: int | None
    error: dict[str, Spread]


class FidelityReport(Result):
    """All of it.

    Attributes:
        quick: whether sizes and seeds were cut down.
        seeds: of every mean.
        figures: known numbers, recovered.
        precision: of every mechanism in every type.
        tables: of approximation.
        sweep: the best settings of SLAY by budget, for each kind of polynomial map.
        settings: fixed settings of SLAY, everywhere.
    """

    quick: bool
    seeds: int
    figures: list[Figure]
    precision: list[Precision]
    tables: list[Table]
    sweep: list[Choice]
    settings: list[Choice]


def measure_fidelity(quick: bool = False) -> FidelityReport:
    """Measure everything; on two CPU cores a few minutes, or seconds if ``quick``."""
    seeds = 2 if quick else 4
    widths = (16,) if quick else (16, 64)
    lengths = ((False, 128),) if quick else ((bias, n) for bias in (True, False) for n in (128, 256, 512))
    ablations = [ablation(n, bias) for bias, n in lengths]
    epsilons = (0.5,) if quick else (1e-3, 0.1, 0.5, 1.0)
    swept = [plain(16)] if quick else [law(d) for law in (plain, _ablation, clustered) for d in (16, 32, 64)]
    tables = [table(protocol, [SOFTMAX], softmax_entries(), seeds) for protocol in [*map(plain, widths), *ablations]]
    for protocols, values in (([plain(d) for d in widths], (1e-3, 0.5)), (ablations, (1e-6,))):
        tables += [
            table(protocol, [("yat_spherical", {"epsilon": epsilon}), SOFTMAX], slay_entries(epsilon), seeds)
            for protocol in protocols
            for epsilon in values[: 1 if quick else None]
        ]
    sweep, settings = list[Choice](), list[Choice]()
    for protocol in swept:
        choices = sweep_slay(protocol, epsilons, seeds, most=256 if quick else 4096)
        sweep += best(choices)
        settings += [c for c in choices if (c.poly, c.nodes, c.features, c.anchors) in SETTINGS]
    return FidelityReport(
        quick=quick,
        seeds=seeds,
        figures=recovered_figures(quick),
        precision=[row for d in widths for row in precision(plain(d, 128), seeds)],
        tables=tables,
        sweep=sweep,
        settings=settings,
    )


def softmax_entries() -> list[Entry]:
    """Return what is compared with softmax attention: all exact mechanisms, and random features by number and draws."""
    exact: list[Entry] = [(name, {}) for name, cls in ATTENTION.items() if not cls.random]
    drawn: list[Entry] = [
        ("performer", {"features": features, "draws": draws})
        for draws in ("iid", "orthogonal")
        for features in (64, 256, 1024)
    ]
    relu: Entry = ("performer", {"feature_map": "relu"})
    others = [entry for entry in exact if entry not in (SOFTMAX, *CONTROLS)]
    return [*CONTROLS, *others, *drawn, ("dark", {}), relu]


def slay_entries(epsilon: float) -> list[Entry]:
    """Return what is compared with the spherical Yat kernel: SLAY by polynomial map and numbers of features."""
    sizes = {
        "anchor": ((1, 16), (1, 32), (2, 8), (2, 16), (2, 32), (3, 16)),
        "exact": ((1, 16), (2, 8), (2, 16), (2, 32)),
    }
    entries: list[Entry] = [*CONTROLS, ("slay_paper", {"epsilon": epsilon}), ("slay", {"epsilon": epsilon})]
    for poly in ("anchor", "exact", "nystrom", "maclaurin", "tensorsketch"):
        for nodes, size in sizes.get(poly, ((2, 8), (2, 16), (2, 32))):
            options: Options = {"poly": poly, "nodes": nodes, "features": size, "anchors": size, "epsilon": epsilon}
            entries.append(("slay", options))
    return entries


def table(protocol: Protocol, targets: Sequence[Entry], entries: Sequence[Entry], seeds: int) -> Table:
    """Compare mechanisms with targets, over seeds; under a causal protocol, those with a causal form."""
    first = protocol.sample(0)
    entries = [entry for entry in entries if not first.is_causal or build(*entry, first, 0).ordered]
    names = [describe(*target) for target in targets]
    found: list[dict[str, list[tuple[float, float]]]] = [{name: [] for name in names} for _ in entries]
    sizes: list[int | None] = [None] * len(entries)
    for seed in range(seeds):
        inputs = protocol.sample(seed)
        expected = [truth(build(*target, inputs, seed), inputs) for target in targets]
        for i, entry in enumerate(entries):
            layer = build(*entry, inputs, seed)
            own = given(layer, inputs)
            mixed = output(layer, own)
            sizes[i] = feature_size(layer)
            for name, target, answer in zip(names, targets, expected, strict=True):
                answer = answer if own is inputs else truth(build(*target, own, seed), own)
                found[i][name].append(deviation(mixed, answer))
    rows = [
        Row(mechanism=name, options=options, features=size, agreement={t: agreement(p) for t, p in pairs.items()})
        for (name, options), size, pairs in zip(entries, sizes, found, strict=True)
    ]
    return Table(protocol=protocol.name, targets=names, rows=rows)


def agreement(pairs: Sequence[tuple[float, float]]) -> Agreement:
    """Gather errors and cosines over seeds."""
    return Agreement(error=Spread.of(e for e, _ in pairs), cosine=Spread.of(c for _, c in pairs))


def describe(mechanism: str, options: Options) -> str:
    """Return a mechanism and its options in one line."""
    return " ".join([mechanism, *(f"{name}={value}" for name, value in options.items())])


def feature_size(layer: torch.nn.Module) -> int | None:
    """Return F, or None for a kernel that does not factor."""
    return layer.feature_size() if isinstance(layer, LinearAttention) else None


def precision(protocol: Protocol, seeds: int) -> list[Precision]:
    """Compute every mechanism in every type; inputs are rounded to it before, and so are not counted."""
    rows = []
    for mechanism in dict.fromkeys([*(name for name, _ in CONTROLS), *ATTENTION]):
        error = {}
        for dtype in TYPES:
            pairs = [_rounding(mechanism, protocol.sample(seed).to(dtype), seed) for seed in range(seeds)]
            error[str(dtype).removeprefix("torch.")] = Spread.of(pairs)
        size = feature_size(build(mechanism, {}, protocol.sample(0), 0))
        rows.append(Precision(protocol=protocol.name, mechanism=mechanism, features=size, error=error))
    return rows


@torch.no_grad()
def _rounding(mechanism: str, inputs: Inputs, seed: int) -> float:
    layer = build(mechanism, {}, inputs, seed)
    inputs = given(layer, inputs)
    wide = inputs.to(torch.float64)
    exact = copy.deepcopy(layer).double().reference(wide.q, wide.k, wide.v)
    return deviation(layer.attend(inputs.q, inputs.k, inputs.v, None, False), exact)[0]


def _ablation(dim: int) -> Protocol:
    return ablation(256, bias=False, dim=dim, heads=2)
