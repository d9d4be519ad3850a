"""For mkdocstrings: what docstrings have that it doesn't know.

Roles such as ``:class:`Schedule``` become plain code, and the names of several arguments that share
a description stand on one line.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?([\w.]+)`")
WRAPPED_NAMES = re.compile(r"^(\s+(?:\w+, )+\w+),\n\s+(?=\w+(?:, \w+)*: )", re.MULTILINE)


class PlainRoles(griffe.Extension):
    """Rewrites each docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = WRAPPED_NAMES.sub(r"\1, ", text)
