"""Sparse weights, and their installation in a model.

- ``weight.py`` defines :class:`SparseWeight`.
- ``install.py`` installs sparse weights in a model and removes them.
- ``reading.py`` defines the tensor that ``layer.weight`` returns in eager code.
- ``mask.py`` defines the parameter of a packed mask.
- ``steps.py`` lets the method of a weight change it around the steps of an optimizer.
- ``phase.py`` stores whether the adapters are active.
- ``parallel.py`` splits layers for tensor parallelism.
- ``fallback.py`` reports layers that run with their dense weight rebuilt.
- ``optimizers.py`` checks the steps of optimizers, and ``averaging.py`` excludes masks from
  averages of weights.
"""

from slope_fx.sparse.weight import SparseWeight

__all__ = ["SparseWeight"]
