"""Measuring: how true mechanisms are to their kernels and exports to their weights, and how fast models run."""

from visionattn.profiling.compare import Comparison, compare_reports
from visionattn.profiling.exports import EngineReport, ParityReport, measure_engines, measure_parity
from visionattn.profiling.fidelity import FidelityReport, measure_fidelity
from visionattn.profiling.latency import LatencyReport, Sweep, measure_latency
from visionattn.profiling.memory import MemoryPlan, MemoryReport, measure_memory
from visionattn.profiling.operations import OperationsReport, Plan, measure_operations
from visionattn.profiling.runtimes import RUNTIMES, Conditions

__all__ = [
    "RUNTIMES",
    "Comparison",
    "Conditions",
    "EngineReport",
    "FidelityReport",
    "LatencyReport",
    "MemoryPlan",
    "MemoryReport",
    "OperationsReport",
    "ParityReport",
    "Plan",
    "Sweep",
    "compare_reports",
    "measure_engines",
    "measure_fidelity",
    "measure_latency",
    "measure_memory",
    "measure_operations",
    "measure_parity",
]
