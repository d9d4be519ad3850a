"""``python -m slope_fx`` is the command ``slope-fx``."""

import sys

from slope_fx.cli import main

sys.exit(main())
