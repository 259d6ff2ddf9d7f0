"""Measuring: how true mechanisms are to their kernels and exports to their weights, and how fast models run."""

from visionattn.profiling.exports import EngineReport, ParityReport, measure_engines, measure_parity
from visionattn.profiling.fidelity import FidelityReport, measure_fidelity
from visionattn.profiling.latency import RUNTIMES, LatencyReport, measure_latency

__all__ = [
    "RUNTIMES",
    "EngineReport",
    "FidelityReport",
    "LatencyReport",
    "ParityReport",
    "measure_engines",
    "measure_fidelity",
    "measure_latency",
    "measure_parity",
]
