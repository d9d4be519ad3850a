"""A frozen model: for inference, without what training needs.

- ``freeze.py`` makes one of a compiled model, ``install.py`` puts its weights into the layers.
- ``weight.py`` defines :class:`FrozenWeight`, ``calls.py`` the call of the model.
"""

from slope_fx.frozen.weight import FrozenWeight

__all__ = ["FrozenWeight"]
