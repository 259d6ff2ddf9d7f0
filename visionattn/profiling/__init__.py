"""Measuring mechanisms: how true they are to the kernel that they stand for."""

from visionattn.profiling.fidelity import FidelityReport, measure_fidelity

__all__ = ["FidelityReport", "measure_fidelity"]
