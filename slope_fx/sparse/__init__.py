"""Sparse weights: what a layer holds in place of its dense weight, and how that is put there.

``weight.py`` is :class:`SparseWeight`, ``storage.py`` how its values are kept, ``install.py`` puts
weights into a model and takes them out. ``reading.py`` is what ``layer.weight`` reads as in eager
code, ``mask.py`` the parameter of a mask, ``phase.py`` whether adapters take part, ``fallback.py``
what a layer says when it runs dense, ``optimizers.py`` and ``averaging.py`` what happens at an
optimizer's step and in averages of weights.
"""

from slope_fx.sparse.storage import STORAGES, CompressedValues, Storage
from slope_fx.sparse.weight import SparseWeight

__all__ = ["STORAGES", "CompressedValues", "SparseWeight", "Storage"]
