"""Docstrings as the pages show them: `name: what it is` becomes an item of a list."""

import re

import griffe

# A name or several, a colon, the text, and its continued lines, which stand further in.
_ITEM = re.compile(r"^([a-z]\w*(?:, [a-z]\w*)*): (.+(?:\n[ \t]+\S.*)*)\n?", re.M)
_LARGER = re.compile(r"\n[ \t]+")


class Items(griffe.Extension):
    """Makes lists of the items at the left edge; what stands further in is left alone."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ITEM.sub(self._item, obj.docstring.value)

    @staticmethod
    def _item(match: re.Match[str]) -> str:
        return f"\n* **{match[1]}**: {_LARGER.sub(' ', match[2])}\n\n"
