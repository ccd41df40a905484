"""From flags and recipes to the options of a run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tsdkd.cli.help import short_help
from tsdkd.cli.options import ALIASES, check_names, closest, fields_of, method_flags, named_flags, split, typed
from tsdkd.cli.recipes import named_recipes, one_file, with_origins

# Words for the last checkpoint, and for none; anything else is a folder.
_DRY = ("plan", "step")
_GO_ON = dict.fromkeys(("true", "yes", "latest", "last", "auto"), "latest")
_RESUME = {**_GO_ON, "false": None, "no": None, "none": None}


@dataclass
class DataArguments:
    """Where the prompts come from, and what the student is scored on while it trains."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A data set's name, or the path of a JSONL, CSV, TSV or Parquet file, or of a folder."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    dataset_train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "A second data set, for evaluation."})
    eval_dataset_split: str = field(default="test", metadata={"help": "The evaluation data set's split."})
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "The column that holds the prompts; default: prompt, or messages, conversations, instruction and output."
        },
    )
    prompt_as_chat: bool = field(
        default=False, metadata={"help": "Make each text prompt a chat of one user message, for models with a chat template."}
    )
    drop_duplicate_prompts: bool = field(default=False, metadata={"help": "Keep the first of equal prompts."})
    completion_column: str | None = field(
        default=None,
        metadata={"help": "The column of given completions, for methods that train on them; default: completion, if there."},
    )
    pretraining_dataset_name: str | None = field(
        default=None, metadata={"help": "A corpus with a 'text' column, for a method with a loss on one (minillm)."}
    )
    eval_tasks: str | None = field(
        default=None,
        metadata={"help": "Tasks, comma-separated, that the student is scored on while it trains; see tsdkd evaluate."},
    )
    eval_every: int = field(default=100, metadata={"help": "Optimizer steps between two scorings on eval_tasks."})
    eval_best: str | None = field(
        default=None, metadata={"help": "TASK/METRIC of the score by which the best student is kept, in OUTPUT_DIR/best."}
    )
    eval_include_path: str | None = field(default=None, metadata={"help": "A folder of task YAMLs of your own."})
    eval_chat_template: bool = field(default=False, metadata={"help": "Put the items of eval_tasks as chats."})
    eval_limit: int | None = field(default=None, metadata={"help": "The first items of each of eval_tasks only."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into a folder that holds another run, whose checkpoints and record go."}
    )
    dry_run: str | None = field(
        default=None, metadata={"help": "Say what the run would do and stop; with 'step' after one step on one batch."}
    )
    record: str | None = field(
        default=None,
        metadata={"help": "Write the rollouts and the teacher's hidden states of the run's steps into this folder, and stop."},
    )


def _method_of(flags: list[str], recipe: dict) -> str:
    """The method that is asked for: the flag's, or the recipe's.

    Raises:
        ValueError: one that there is not, or a recipe's options that belong to another.
    """
    from tsdkd.methods import METHODS

    named = named_flags(flags).get("method")
    method = named or recipe.get("method", "tsd_kd")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method {method!r} is unknown.{closest(str(method), METHODS)} There are: {', '.join(METHODS)}.")
    written_for = recipe.get("method", "tsd_kd")
    if named is not None and named != written_for and recipe.get("method_options"):
        raise ValueError(
            f"--method {named}: the recipe's method_options ({', '.join(recipe['method_options'])}) belong to {written_for}. "
            "Take them out of the recipe, or pass the options of this method as flags."
        )
    return method


def parse(arguments: list[str], config_class: type | None = None):
    """Data, training and model options from flags and `--config` files: a later file wins over an earlier, flags over all.

    Raises:
        ValueError: a name that there is not (with the closest ones), a value that is none, an option of another method.
    """
    from trl import ModelConfig, TrlParser

    from tsdkd.trainers import TokenDistillConfig, TSDKDConfig

    files, flags = named_recipes(arguments)
    recipe, origin = with_origins(files)
    for short, long in ALIASES.items():
        if short in recipe:
            recipe[long], origin[long] = recipe.pop(short), origin[short]
    method = _method_of(flags, recipe)
    config_class = config_class or (TSDKDConfig if method == "tsd_kd" else TokenDistillConfig)
    classes = (DataArguments, config_class, ModelConfig)
    known = {name for cls in classes for name in fields_of(cls)}
    flags = [_spelled(word) for word in _with_signs(flags)]
    flags = [
        "--dry_run=plan" if word == "--dry_run" and not (flags[i + 1 :] and flags[i + 1] in _DRY) else word
        for i, word in enumerate(flags)
    ]
    if {"-h", "--help"} & set(flags):
        print(short_help(classes, method), end="")
        raise SystemExit(0)
    options, flags = method_flags(flags, method, dict.fromkeys(known))
    given, flags = _method_options(flags, recipe)
    options = {**given, **options}
    if config_class is TSDKDConfig:
        recipe.update(options)
    elif options:
        recipe["method_options"] = options
    if "--help_all" in flags:
        flags, recipe = ["--help"], {}
    recipe = typed(recipe, {name: f for cls in classes for name, f in fields_of(cls).items()}, origin)
    check_names([word for word in flags if word != "--help"], recipe, origin, dict.fromkeys(known))
    given = {**recipe, **named_flags(flags)}
    if "output_dir" not in given and given.get("model_name_or_path"):
        recipe["output_dir"] = f"{Path(str(given['model_name_or_path'])).name}-{method}"
    if "stop_on_signals" not in given:
        recipe["stop_on_signals"] = True
    parser = TrlParser(classes, prog="tsdkd train")
    parser.error = _refuse
    with one_file(recipe) as file:
        data, config, model = parser.parse_args_and_config(["--config", file, *flags])
    word = str(config.resume_from_checkpoint).lower()
    if word in _RESUME:
        config.resume_from_checkpoint = _RESUME[word]
    check_values(data, config, model, set(given))
    return data, config, model


def _with_signs(flags: list[str]) -> list[str]:
    """Flags with a negative number behind them as one word, which argparse would take for a flag."""
    made: list[str] = []
    for word in flags:
        if made and re.match(r"-[.\d]", word) and made[-1].startswith("--") and "=" not in made[-1]:
            made[-1] += f"={word}"
        else:
            made.append(word)
    return made


def _spelled(word: str) -> str:
    name, value = split(word)
    if name is None:
        return word
    return f"--{ALIASES.get(name, name)}" + ("" if value is None else f"={value}")


def _method_options(flags: list[str], recipe: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The method's options in one mapping, the recipe's and over them the flag's, and the flags without it."""
    options, rest, words = as_mapping(recipe.pop("method_options", None), "method_options of the recipe"), [], iter(flags)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--method_options":
            options.update(as_mapping(value if equals else next(words, ""), flag))
        else:
            rest.append(word)
    return options, rest


def as_mapping(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'{what}: {value!r} is no JSON ({error}); write {{"beta": 0.5}} in quotes.') from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{what} is {type(value).__name__}: it is a mapping, OPTION to VALUE.")
    return dict(value or {})


def _refuse(message: str) -> NoReturn:
    """In place of argparse's page of usage."""
    raise ValueError(message)


def check_values(data: DataArguments, config: Any, model: Any, given: set[str]) -> None:
    """Refuse values that cannot train and options that would be left out.

    Raises:
        ValueError: naming the option.
    """
    if data.dry_run not in (None, *_DRY):
        raise ValueError(f"--dry_run {data.dry_run}: pass nothing behind it, or step.")
    if config.max_steps == 0 or config.max_steps < -1:
        raise ValueError(f"--max_steps {config.max_steps}: pass 1 or more, or leave it out for --num_train_epochs.")
    if config.learning_rate < 0:
        raise ValueError(f"--learning_rate {config.learning_rate:g}: a learning rate is 0 or more.")
    for name in (
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "per_device_eval_batch_size",
    ):
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name} {getattr(config, name):g}: pass more than 0.")
    if data.dataset_config is not None and data.dataset_name and Path(data.dataset_name).expanduser().exists():
        raise ValueError(f"--dataset_config {data.dataset_config} of {data.dataset_name}, which is local: leave it out.")
    if "eval_dataset_split" in given and data.eval_dataset_name is None:
        raise ValueError("--eval_dataset_split has no effect without --eval_dataset_name: pass it, or leave it out.")
    if not data.eval_tasks:
        lost = sorted(given & {"eval_every", "eval_best", "eval_include_path", "eval_chat_template", "eval_limit"})
        if lost:
            raise ValueError(f"--{lost[0]} has no effect without --eval_tasks: name the tasks, or leave it out.")
    lost = sorted(name for name in given if name.startswith("lora_") or name in ("use_dora", "use_rslora"))
    if lost and not model.use_peft:
        raise ValueError(f"--{lost[0]} has no effect without --use_peft: the whole model would be trained. Pass it, too.")
    for name, split_name in (("dataset_name", "dataset_train_split"), ("eval_dataset_name", "eval_dataset_split")):
        path, wanted = getattr(data, name), getattr(data, split_name)
        if split_name in given and path and Path(path).expanduser().is_file() and wanted.partition("[")[0] not in ("train", ""):
            raise ValueError(
                f"--{split_name} {wanted} of the file {path}, which is one split: leave it out, or take a slice of it, "
                "train[:100]."
            )
