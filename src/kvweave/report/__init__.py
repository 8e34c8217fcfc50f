"""Pictures and pages: pure functions from collected data."""

from kvweave.report.data import Answer, Fate, Layer, Run, Speed, Token
from kvweave.report.grids import Grid, grids

__all__ = ["Answer", "Fate", "Grid", "Layer", "Run", "Speed", "Token", "grids"]
