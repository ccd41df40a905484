"""Recipes: YAML files of options. Several become one, in which a later file's word stands."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    import yaml

    merged: dict[str, Any] = {}
    for file in files:
        try:
            options = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"the recipe {file} cannot be read: {error}.") from error
        if not isinstance(options, dict):
            raise ValueError(f"the recipe {file} holds {type(options).__name__}; a recipe is a mapping, OPTION: VALUE a line.")
        merged.update(options)
    return merged


@contextmanager
def one_file(recipe: dict[str, Any]) -> Iterator[str]:
    """A file with this recipe, for parsers that read one."""
    import yaml

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(recipe, file)
        file.flush()
        yield file.name
