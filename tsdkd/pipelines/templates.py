"""Templates with fields in braces; braces in what they are filled with stay."""

from __future__ import annotations

import re


def filled(template: str, /, **values: str) -> str:
    """A template with its fields."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def fields_of(template: str) -> set[str]:
    """The names of a template's fields."""
    return set(re.findall(r"\{(\w*)\}", template))
