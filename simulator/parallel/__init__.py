"""How a model, its tokens and its cache are split: one file per scheme, composed by `Layout`."""

from simulator.parallel.layout import DEGREES, REGISTRY, Layout, RankClass
from simulator.parallel.scheme import Scheme

__all__ = ["DEGREES", "REGISTRY", "Layout", "RankClass", "Scheme"]
