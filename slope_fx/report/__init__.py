"""What became of a model, and what would: tables for people, data for programs."""

from slope_fx.report.explain import explain
from slope_fx.report.preview import preview
from slope_fx.report.tables import Explanation, LinearReport, ProductReport

__all__ = ["Explanation", "LinearReport", "ProductReport", "explain", "preview"]
