"""Reads the library's `Example:` as the section that griffe calls `Examples:`, a doctest."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section in every docstring, before griffe parses it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with every module, class, function and attribute that griffe has read."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )
