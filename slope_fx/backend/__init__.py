"""The torch.compile backend of slope_fx.

- ``settings.py`` defines the settings of a run.
- ``rewriting.py`` defines the backend, which runs the passes.
- ``regions.py`` compiles the regions that :mod:`slope_fx.planning.regions` chose.
"""

from slope_fx.backend.rewriting import RewritingBackend, rewriting_backend
from slope_fx.backend.settings import Settings

__all__ = ["RewritingBackend", "Settings", "rewriting_backend"]
