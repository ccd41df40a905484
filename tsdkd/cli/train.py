"""`tsdkd train`: a YAML recipe and flags to a trained student."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tsdkd.cli.recipes import named_recipes, one_file, read_recipes

ALIASES = {"--student": "--model_name_or_path", "--teacher": "--teacher_model_name_or_path"}
# Words for the last checkpoint, and for none; anything else is a folder.
_RESUME = {"true": True, "yes": True, "latest": True, "last": True, "auto": True, "false": None, "no": None, "none": None}


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
    record: str | None = field(
        default=None,
        metadata={"help": "Write the rollouts and the teacher's hidden states of the run's steps into this folder, and stop."},
    )


def _config_class(arguments: list[str], recipe: dict) -> type:
    """TSD-KD's own configuration, or the general one where another method or its options are named."""
    from tsdkd.trainers import TokenDistillConfig, TSDKDConfig

    words = [word for argument in arguments for word in argument.split("=", 1)]
    named = {flag: words[i + 1] for i, flag in enumerate(words[:-1]) if flag.startswith("--")}
    method = named.get("--method", recipe.get("method", "tsd_kd"))
    options = named.get("--method_options", recipe.get("method_options"))
    return TSDKDConfig if method == "tsd_kd" and not options else TokenDistillConfig


def parse(arguments: list[str], config_class: type | None = None):
    """Data, training and model options from flags and `--config` files: a later file wins over an earlier, flags over all."""
    from trl import ModelConfig, TrlParser

    files, flags = named_recipes(arguments)
    recipe = read_recipes(files)
    about = (
        f"Aliases: {', '.join(f'{short} for {long}' for short, long in ALIASES.items())}. --config FILE reads a YAML recipe; "
        "of several a later one's options stand."
    )
    parser = TrlParser(
        (DataArguments, config_class or _config_class(flags, recipe), ModelConfig), prog="tsdkd train", description=about
    )
    spelled = []
    for argument in flags:
        flag, equals, value = argument.partition("=")
        spelled.append(ALIASES.get(flag, flag) + equals + value)
    with one_file(recipe) as file:
        data, config, model = parser.parse_args_and_config(["--config", file, *spelled])
    word = str(config.resume_from_checkpoint).lower()
    if word in _RESUME:
        config.resume_from_checkpoint = _RESUME[word]
    return data, config, model


def build(data: DataArguments, config, model):
    """The trainer that the options describe.

    Raises:
        ValueError: no student, no teacher for a method that reads one, or no prompts.
    """
    for role, name in (("student", model.model_name_or_path), ("teacher", config.teacher_model_name_or_path)):
        if name and name[0] in "./~" and not Path(name).expanduser().is_dir():
            raise ValueError(f"there is no folder {name} for the {role}: pass a folder with a model, or a model's name.")
    if model.model_name_or_path is None:
        raise ValueError("no student was given: pass --student NAME_OR_PATH (model_name_or_path in YAML).")
    recorded = config.recording is not None
    if config.teacher_model_name_or_path is None and not recorded and config.build_method().reads_teacher:
        raise ValueError("no teacher was given: pass --teacher NAME_OR_PATH (teacher_model_name_or_path in YAML).")
    if data.dataset_name is None and not recorded:
        raise ValueError("no prompts were given: pass --dataset_name NAME_OR_FILE (a data set or a JSONL file).")

    from trl import get_peft_config, get_quantization_config

    from tsdkd.data.files import load_rows
    from tsdkd.data.prompts import load_prompts
    from tsdkd.trainers import TokenDistillTrainer, TSDKDConfig, TSDKDTrainer

    def load(name: str | None, split: str):
        if name is None:
            return None
        rows = load_prompts(
            name,
            config=data.dataset_config,
            split=split,
            prompt_column=data.prompt_column,
            completion_column=data.completion_column,
            drop_duplicates=data.drop_duplicate_prompts,
            as_chat=data.prompt_as_chat,
        )
        if config.process_index == 0:
            print(f"{len(rows)} prompts from {name}{' after dropping duplicates' if data.drop_duplicate_prompts else ''}")
        return rows

    options = {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    if "torch_dtype" not in (config.model_init_kwargs or {}):
        options["dtype"] = model.dtype
    config.model_init_kwargs = {**{k: v for k, v in options.items() if v is not None}, **(config.model_init_kwargs or {})}
    trainer_class = TSDKDTrainer if isinstance(config, TSDKDConfig) else TokenDistillTrainer
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=config,
        train_dataset=load(data.dataset_name, data.dataset_train_split),
        eval_dataset=load(data.eval_dataset_name, data.eval_dataset_split),
        pretraining_dataset=load_rows(data.pretraining_dataset_name) if data.pretraining_dataset_name else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if data.eval_tasks:
        from tsdkd.cli.evaluate import bundled_tasks, names_in
        from tsdkd.evaluation.while_training import EvaluateWhileTraining

        scoring = EvaluateWhileTraining(
            trainer,
            names_in(data.eval_tasks),
            data.eval_every,
            best=data.eval_best,
            include_path=[bundled_tasks(), *([data.eval_include_path] if data.eval_include_path else [])],
            chat_template=data.eval_chat_template,
            limit=data.eval_limit,
        )
        trainer.add_callback(scoring)
    return trainer


def main(arguments: list[str]) -> int:
    data, config, model = parse(arguments)
    trainer = build(data, config, model)
    if data.record is not None:
        trainer.record(data.record)
        trainer.accelerator.print(f"The recording is in {data.record}; train on it with --recording {data.record}")
        return 0
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)
    trainer.accelerator.print(f"The student is in {config.output_dir}")
    return 0
