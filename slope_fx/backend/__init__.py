"""From decisions to compiled code: the torch.compile backend, how it is set, what it compiles.

``settings.py`` is how a model is run, ``rewriting.py`` the backend that runs the passes,
``regions.py`` compiles the modules that :mod:`slope_fx.planning.regions` chose.
"""

from slope_fx.backend.rewriting import RewritingBackend, rewriting_backend
from slope_fx.backend.settings import Settings

__all__ = ["RewritingBackend", "Settings", "rewriting_backend"]
