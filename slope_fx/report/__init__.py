"""Reports on compiled models (``explain``) and on configurations (``preview``)."""

from slope_fx.report.explain import explain
from slope_fx.report.preview import preview
from slope_fx.report.tables import (
    Explanation,
    LinearReport,
    ProductReport,
    RankBytes,
    Sharding,
)

__all__ = [
    "Explanation",
    "LinearReport",
    "ProductReport",
    "RankBytes",
    "Sharding",
    "explain",
    "preview",
]
