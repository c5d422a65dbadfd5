"""An extension of griffe: what the docstrings here write in another way than griffe reads it."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n     +.*)*)", re.MULTILINE)
"""Several names that share one description, in a section: `model, dls, lr: as given.`"""


class Sections(Extension):
    """Rewrites a docstring before it is read.

    "Example:" becomes "Examples:", so that its doctests are shown as code. Names that share one
    description, of attributes or errors, get an entry each.
    """

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = SEVERAL.sub(_an_entry_each, text)


def _an_entry_each(match: re.Match[str]) -> str:
    names, description = match.groups()
    return "\n".join(f"    {name}: {description}" for name in names.split(", "))
