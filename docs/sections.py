"""An extension of griffe: "Example:" in a docstring is the section that Google calls "Examples:"."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Example(Extension):
    """Renames the section before it is read, so that its doctests are shown as code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
