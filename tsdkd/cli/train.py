"""`tsdkd train`: a YAML recipe and flags to a trained student."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tsdkd.cli.parsing import DataArguments, parse
from tsdkd.data.commits import MANIFEST, REPLACED, locked
from tsdkd.data.runs import BENCHMARKS, CURVE, METRICS, REPORT, RUN, SAMPLES


def inputs(
    data: DataArguments, config: Any, model: Any, needs_prompts: bool = True, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """What the options name, for a trainer's constructor: the student's name, the data sets, quantization and adapter.

    Raises:
        ValueError: no student, no teacher for a method that reads one, or no prompts.
    """
    for role, name in (("student", model.model_name_or_path), ("teacher", config.teacher_model_name_or_path)):
        if name and name[0] in "./~" and not Path(name).expanduser().is_dir():
            raise ValueError(f"there is no folder {name} for the {role}: pass a folder with a model, or a model's name.")
    if model.model_name_or_path is None:
        raise ValueError("no student was given: pass --student NAME_OR_PATH (model_name_or_path in YAML).")
    recorded = config.recording is not None
    named = config.teacher_model_name_or_path or config.teachers
    if not named and not recorded and config.build_method().reads_teacher:
        raise ValueError("no teacher was given: pass --teacher NAME_OR_PATH (teacher_model_name_or_path in YAML).")
    if needs_prompts and data.dataset_name is None and not recorded:
        raise ValueError("no prompts were given: pass --dataset_name NAME_OR_FILE (a data set or a JSONL file).")

    if model.use_peft and find_spec("peft") is None:
        raise ValueError("--use_peft needs peft, which is not installed: pip install 'tsdkd[peft]'.")

    if data.eval_tasks and find_spec("lm_eval") is None:
        raise ValueError("--eval_tasks needs lm-evaluation-harness, which is not installed: pip install 'tsdkd[eval]'.")

    from trl import get_peft_config, get_quantization_config

    from tsdkd.data.files import load_rows

    def load(name: str | None, split: str):
        if name is None:
            return None
        rows = prompts_of(data, name, split, config.teacher_prompt_template)
        if config.process_index == 0:
            say(f"{len(rows)} prompts from {name}{' after dropping duplicates' if data.drop_duplicate_prompts else ''}")
        return rows

    options = {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    if "torch_dtype" not in (config.model_init_kwargs or {}):
        options["dtype"] = model.dtype
    config.model_init_kwargs = {**{k: v for k, v in options.items() if v is not None}, **(config.model_init_kwargs or {})}
    return {
        "model": model.model_name_or_path,
        "train_dataset": load(data.dataset_name, data.dataset_train_split),
        "eval_dataset": load(data.eval_dataset_name, data.eval_dataset_split),
        "pretraining_dataset": load_rows(data.pretraining_dataset_name) if data.pretraining_dataset_name else None,
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }


def prompts_of(data: DataArguments, name: str, split: str, template: str | None = None) -> Any:
    """A data set's prompts, with the columns that the options and a template of the teacher's prompts name."""
    from tsdkd.data.prompts import load_prompts
    from tsdkd.data.teacher_prompts import columns_named

    return load_prompts(
        name,
        config=data.dataset_config,
        split=split,
        prompt_column=data.prompt_column,
        completion_column=data.completion_column,
        drop_duplicates=data.drop_duplicate_prompts,
        as_chat=data.prompt_as_chat,
        keep=[] if template is None else [column for column in columns_named(template) if column != "prompt"],
    )


def build(data: DataArguments, config: Any, model: Any, loaded: dict[str, Any] | None = None) -> Any:
    """The trainer that the options describe; `loaded` is what `inputs` gave.

    Raises:
        ValueError: what `inputs` and the trainer refuse.
    """
    from tsdkd.trainers import TokenDistillTrainer, TSDKDConfig, TSDKDTrainer
    from tsdkd.trainers.run_record import changed

    loaded = inputs(data, config, model) if loaded is None else loaded
    trainer_class = TSDKDTrainer if isinstance(config, TSDKDConfig) else TokenDistillTrainer
    trainer = trainer_class(args=config, **loaded)
    config_of_run = {**changed(data), **changed(model)}
    trainer.run_record.options = {name: value for name, value in config_of_run.items() if name not in ("dry_run",)}
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
    with no_empty_folder(Path(config.output_dir)):
        return _run(data, config, model)


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Take a folder away that was made meanwhile and holds nothing."""
    was_there = folder.exists()
    try:
        yield
    finally:
        if not was_there and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _run(data: DataArguments, config: Any, model: Any) -> int:
    prepare_folder(config, data.overwrite_output_dir, dry=data.dry_run is not None or data.record is not None)
    if data.dry_run is not None:
        config.save_strategy = "no"
    trainer = build(data, config, model)
    if data.record is not None:
        made = trainer.record(data.record)
        told = f"{made['steps']} steps, {made['rollouts']:,} rollouts, {made['tokens']:,} tokens, {made['bytes'] / 1e6:,.1f} MB"
        trainer.accelerator.print(f"The recording is in {data.record}: {told}; train on it with --recording {data.record}")
        return 0
    if data.dry_run is not None:
        return _dry_run(trainer, data.dry_run)
    from tsdkd.trainers.stopping import refuse_stopped

    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    refuse_stopped(trainer)
    trainer.save_model(config.output_dir)
    report = Path(config.output_dir) / REPORT
    trainer.accelerator.print(f"The student is in {config.output_dir}; what the run did is shown by {report}")
    return 0


def prepare_folder(config: Any, overwrite: bool, dry: bool = False) -> None:
    """Refuse a folder of another run, unless this one goes on with it or writes over it.

    Raises:
        ValueError: what lies there, and what to do.
    """
    from tsdkd.trainers.run_record import is_of_another_run

    folder = Path(config.output_dir)
    found = is_of_another_run(folder)
    if found is None or config.resume_from_checkpoint or dry:
        return
    if not overwrite:
        raise ValueError(
            f"{folder} holds another run ({found}): name another --output_dir, go on with it (--resume_from_checkpoint true), "
            "or take its place (--overwrite_output_dir)."
        )
    if config.process_index != 0:
        return
    with locked(folder, "a run trains into it"):
        for checkpoint in (*folder.glob("checkpoint-*"), *folder.glob(".torn-*"), *folder.glob(f"{REPLACED}*")):
            shutil.rmtree(checkpoint)
        of_run = (RUN, METRICS, SAMPLES, CURVE, REPORT, BENCHMARKS, MANIFEST, "config.json", "adapter_config.json")
        for path in (*(folder / name for name in of_run), *folder.glob("*.safetensors*"), *folder.glob("*.bin")):
            path.unlink(missing_ok=True)


def _dry_run(trainer: Any, how: str) -> int:
    """The run's table, and with `step` one step on one batch; nothing is kept."""
    from tsdkd.trainers.run_record import as_text, summary

    trainer.remove_callback(trainer.run_record)
    trainer.accelerator.print(as_text(summary(trainer)))
    if how == "step":
        trainer.args.max_steps = 1
        result = trainer.train()
        seconds = result.metrics["train_runtime"]
        trainer.accelerator.print(f"One step was made: loss {result.training_loss:.4g}, {seconds:.1f} s.")
    trainer.accelerator.print("This was a dry run: nothing was written.")
    return 0
