"""Pages of one file: a template, its style, its script and its data, with nothing to fetch."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.PackageLoader("tsdkd.reporting"), autoescape=True, undefined=jinja2.StrictUndefined)


def _file(name: str) -> str:
    return files("tsdkd.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def in_script(value: Any) -> Markup:
    """A value as JSON that may stand in a `<script>`, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text.encode("utf-8", "backslashreplace").decode("utf-8"))  # a lone surrogate is no UTF-8


def as_bytes(text: str) -> bytes:
    """A page as a file holds it, whatever is in its texts."""
    return text.encode("utf-8", "backslashreplace")


def page(template: str, **values: Any) -> str:
    """A template's page; texts in `values` are escaped.

    Args:
        template: the name of a page's HTML, style and script in `templates/`; `page.css` and `page.js` precede the last two.
    """
    css, script = (Markup("\n".join(_file(f"{name}.{kind}") for name in ("page", template))) for kind in ("css", "js"))
    return _environment().get_template(f"{template}.html").render(css=css, script=script, **values)
