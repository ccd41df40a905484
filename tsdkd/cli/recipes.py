"""Recipes: YAML files of options. Several become one, in which a later file's word stands."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsdkd.data.rows import text_of

_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")


def named_recipes(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The files behind `--config`, and the arguments without them.

    Raises:
        ValueError: `--config` at the end, without a file.
    """
    files, rest, words = [], [], iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
        if not value:
            raise ValueError("--config was given without a file: --config RECIPE.yaml.")
        files.append(Path(value))
    return files, rest


def read_recipes(files: list[Path]) -> dict[str, Any]:
    """The options of these files, one after another.

    Raises:
        ValueError: a file that is not there or holds no YAML mapping.
    """
    return with_origins(files)[0]


def with_origins(files: list[Path]) -> tuple[dict[str, Any], dict[str, Path]]:
    """`read_recipes`, and the file that each option stands in."""
    import yaml

    merged: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for file in files:
        try:
            options = parsed(text_of(file.expanduser()))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"the recipe {file} cannot be read: {error}.") from error
        if not isinstance(options, dict):
            raise ValueError(f"the recipe {file} holds {type(options).__name__}; a recipe is a mapping, OPTION: VALUE a line.")
        merged.update(options)
        origin.update(dict.fromkeys(options, file))
    return merged, origin


def parsed(text: str) -> Any:
    """YAML as its writers mean it: `1e-7` in a mapping is a number, and `no` or `yes` as an option's value is that word, which
    the option's parser reads (`save_strategy: no`); in a mapping they are false and true.

    Raises:
        yaml.YAMLError: no YAML.
    """
    import yaml

    class Numbers(yaml.SafeLoader):
        """With the floats of YAML 1.2."""

    class Words(yaml.SafeLoader):
        """With no more booleans than true and false."""

    Numbers.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    Words.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Words.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    options, plain = yaml.load(text, Numbers), yaml.load(text, Words)
    if not isinstance(options, dict):
        return options
    nested = {key: value for key, value in options.items() if isinstance(value, (dict, list))}
    return {key: nested.get(key, value if value not in ("on", "off") else value == "on") for key, value in plain.items()}


@contextmanager
def one_file(recipe: dict[str, Any]) -> Iterator[str]:
    """A file with this recipe, for parsers that read one."""
    import yaml

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(recipe, file)
        file.flush()
        yield file.name
