"""Names on the command line and in recipes: which there are, whose they are, and what a misspelt one may have meant."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

ALIASES = {"student": "model_name_or_path", "teacher": "teacher_model_name_or_path"}
_WORDS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


def closest(name: str, known: Iterable[str]) -> str:
    """What a misspelt name may have meant, as a sentence; empty where nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def split(argument: str) -> tuple[str | None, str | None]:
    """A flag's name, with underscores, and the value behind its =, if it has one; None of a word that is no flag."""
    if not argument.startswith("--") or len(argument) < 3:
        return None, None
    name, equals, value = argument[2:].partition("=")
    return name.replace("-", "_"), value if equals else None


def methods_with(option: str) -> list[str]:
    """The methods that have an option of this name."""
    from tsdkd.methods import METHODS

    return [name for name, cls in METHODS.items() if option in fields_of(cls)]


def fields_of(cls: Any) -> dict[str, dataclasses.Field]:
    """A dataclass's fields by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def kind_of(field: dataclasses.Field) -> str:
    """A field's type as text, also where a parser has put the type itself in the place of its name."""
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


def value_of(method: str, option: str, text: str, flag: str) -> Any:
    """A method's option from its text.

    Raises:
        ValueError: a text that is no such value.
    """
    from tsdkd.methods import METHODS

    kind = kind_of(fields_of(METHODS[method])[option])
    try:
        if kind.startswith("bool"):
            return _WORDS[text.lower()]
        return {"float": float, "int": int}.get(kind, str)(text)
    except (KeyError, ValueError):
        raise ValueError(f"--{flag} {text}: {option} of {method} is {'yes or no' if kind[:4] == 'bool' else kind}.") from None


def option_from(method: str, option: str, flag: str, value: str | None, words: Iterator[str]) -> Any:
    """A method's option from its flag: the value behind its =, or the next of `words`.

    Raises:
        ValueError: an option that there is not, or no value.
    """
    from tsdkd.methods import METHODS

    own = fields_of(METHODS[method])
    if option not in own:
        raise ValueError(f"--{flag}: {method} has no option {option!r}; it has: {', '.join(own)}.{closest(option, own)}")
    value = next(words, None) if value is None else value
    if value is None or (value.startswith("--") and len(value) > 2):
        raise ValueError(f"--{flag} was given without a value: --{flag} {own[option].default}.")
    return value_of(method, option, value, flag)


def named_flags(flags: Iterable[str]) -> dict[str, str]:
    """Flags by their names, aliases spelled out, with what stands behind them."""
    words, found = list(flags), {}
    for number, word in enumerate(words):
        name, value = split(word)
        if name is not None:
            behind = words[number + 1] if number + 1 < len(words) else ""
            found[ALIASES.get(name, name)] = behind if value is None else value
    return found


def method_flags(flags: Sequence[str], method: str, base: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The chosen method's options among the flags, `--NAME` or `--METHOD.NAME`, and the flags without them.

    Args:
        flags: of the command line.
        method: whose options count.
        base: names that are options of the run; those keep their meaning, and the method's is `--METHOD.NAME`.

    Raises:
        ValueError: an option of another method, one without a value, or one that there is not.
    """
    from tsdkd.methods import METHODS

    own = fields_of(METHODS[method])
    options: dict[str, Any] = {}
    rest, words = [], iter(flags)
    for word in words:
        name, value = split(word)
        prefix, dot, option = (name or "").partition(".")
        if not dot:
            prefix, option = method, prefix
        if name == "beta" and method != "tsd_kd":
            own_beta = f": pass --{method}.beta" if "beta" in own else f", and {method} has none"
            raise ValueError(f"--beta is TRL's field, which no method here reads{own_beta}.")
        if name is None or (not dot and (name in base or not methods_with(name))):
            rest.append(word)
            continue
        if prefix not in METHODS:
            raise ValueError(f"--{name}: there is no method {prefix!r}.{closest(prefix, METHODS)}")
        if prefix != method:
            raise ValueError(
                f"--{name} is an option of {prefix}, and the method is {method}: leave it out, or --method {prefix}."
            )
        if option not in own and not dot:
            others = ", ".join(methods_with(name))
            raise ValueError(f"--{name} is an option of {others}, and the method is {method}, which has: {', '.join(own)}.")
        options[option] = option_from(method, option, name, value, words)
    return options, rest


def check_names(flags: Sequence[str], recipe: Mapping[str, Any], origin: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse flags and a recipe's keys that nothing knows, with the closest known ones and the file they stand in.

    Raises:
        ValueError: naming the first.
    """
    from tsdkd.methods import METHODS

    everything = {*known, *ALIASES, *(option for method in METHODS.values() for option in fields_of(method))}
    for word in flags:
        name, _ = split(word)
        if name is not None and name not in {*known, *(f"no_{key}" for key in known)}:
            raise ValueError(f"there is no option --{name}.{closest(name, everything)} tsdkd train --help_all lists them.")
    for key in recipe:
        if key not in known:
            where = f"{origin.get(key, 'the recipe')}: "
            if methods_with(key):
                raise ValueError(
                    f"{where}{key} is an option of {', '.join(methods_with(key))}: write it under method_options, {{{key}: …}}."
                )
            raise ValueError(f"{where}there is no option {key!r}.{closest(key, everything)}")


def typed(recipe: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], origin: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values as its options take them: a text where YAML read a number or a date, a whole number where it says 2.0,
    a list of tasks as one text; an option without a value is left out.

    Raises:
        ValueError: a value of another kind, with the option and the file.
    """
    made = {}
    for name, value in recipe.items():
        kind = kind_of(fields[name]) if name in fields else ""
        where = f"{origin.get(name, 'the recipe')}: {name}"
        if value is None and name in fields:
            continue
        is_text = kind.startswith("str") and "dict" not in kind
        if is_text and isinstance(value, (list, tuple)):
            if name not in ("eval_tasks",):
                raise ValueError(f"{where} is a list: it takes one text.")
            value = ",".join(map(str, value))
        elif is_text and not isinstance(value, (str, bool, dict)):
            value = str(value)
        elif kind.startswith(("int", "float")) and isinstance(value, (list, tuple, dict, bool)):
            raise ValueError(f"{where} is {value!r}: it takes a number.")
        elif kind.startswith("int") and isinstance(value, float):
            if not value.is_integer():
                raise ValueError(f"{where} is {value}: it takes a whole number.")
            value = int(value)
        made[name] = value
    return made
