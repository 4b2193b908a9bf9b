"""Docstrings as the pages show them.

`name: what it is` becomes an item of a list, and `<name>` stays what it is, no HTML.
"""

import re

import griffe

# A name or several, a colon, the text, and its continued lines, which stand further in.
_ITEM = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*): (.+(?:\n[ \t]+\S.*)*)\n?", re.M)
_LARGER = re.compile(r"\n[ \t]+")


class Items(griffe.Extension):
    """Makes lists of the items at the left edge; what stands further in is left alone."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            text = _ITEM.sub(self._item, obj.docstring.value)
            obj.docstring.value = "\n".join(map(self._escaped, text.split("\n")))

    @staticmethod
    def _item(match: re.Match[str]) -> str:
        return f"\n* **{match[1]}**: {_LARGER.sub(' ', match[2])}\n\n"

    @staticmethod
    def _escaped(line: str) -> str:
        if line.startswith("    "):
            return line  # a block of code
        parts = line.split("`")  # every second one is code
        return "`".join(x if n % 2 else x.replace("<", "&lt;") for n, x in enumerate(parts))
