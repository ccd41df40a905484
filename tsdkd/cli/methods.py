"""`tsdkd methods`: the methods, their options and where they come from."""

from __future__ import annotations

import argparse
import inspect
import re


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd methods",
        allow_abbrev=False,
        description="List the methods of tsdkd train and compare with their options, defaults and papers. An option is a flag, "
        "--NAME or --METHOD.NAME, or an entry of method_options in a recipe.",
    )
    parser.add_argument("name", nargs="?", help="one method, with what each option means")
    own = parser.parse_args(arguments)

    from tsdkd.cli.options import closest, fields_of
    from tsdkd.methods import METHODS

    if own.name is not None and own.name not in METHODS:
        raise ValueError(f"there is no method {own.name!r}; there are: {', '.join(METHODS)}.{closest(own.name, METHODS)}")
    for name in [own.name] if own.name else METHODS:
        cls = METHODS[name]
        arxiv = cls.paper.get("id", "") if isinstance(cls.paper, dict) else ""
        about = (inspect.getdoc(cls) or "").split("\n")[0]
        print(f"{name} ({cls.title}{f', arXiv {arxiv}' if arxiv else ''}): {about}")
        said = meanings(cls) if own.name else {}
        for option, field in fields_of(cls).items():
            print(f"    {option:<24}{field.default!s:<18}{said.get(option, '')}".rstrip())
    if own.name is None:
        print("\ntsdkd methods NAME says what each option means.")
    return 0


def meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a method and of its bases say of each option."""
    found: dict[str, str] = {}
    for part in cls.__mro__:
        text = inspect.cleandoc(part.__doc__ or "")
        section = re.search(r"^(?:Attributes|Args):\n((?:[ ]+.*\n?|\n)+)", text, re.MULTILINE)
        for names, meaning in re.findall(
            r"^    ([\w, ]+): ((?:.+)(?:\n {8,}.+)*)", section.group(1) if section else "", re.MULTILINE
        ):
            for name in names.split(", "):
                found.setdefault(name.strip(), " ".join(meaning.split()))
    return found
