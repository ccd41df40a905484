"""What a run says before its first step, and the record of itself that it leaves in its folder (`tsdkd.data.runs`)."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tsdkd.data.rows import append_rows, read_rows, replace_rows
from tsdkd.data.runs import CONFIG, METRICS, RUN, SAMPLES, SCHEMA
from tsdkd.provenance import BLANK, provenance, redacted
from tsdkd.reporting.run_page import write_report
from tsdkd.teachers import vocabulary_size
from tsdkd.trainers.console import stop_all
from tsdkd.trainers.host import batch_rows
from tsdkd.trainers.samples import Samples
from tsdkd.trainers.stopping import Stop

logger = logging.getLogger(__name__)

_WORKED_OUT = ("logging_nan_inf_filter", "disable_tqdm", "dataloader_pin_memory")
_PLAIN = (str, int, float, bool, type(None))


def plain(value: Any) -> Any:
    """A value as JSON and YAML hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(part) for part in value]
    if hasattr(value, "value") and isinstance(value.value, _PLAIN):  # an enumeration's member
        return value.value
    return value if isinstance(value, _PLAIN) else str(value)


def changed(options: Any) -> dict[str, Any]:
    """A dataclass's fields that differ from their defaults, but for those that are worked out from others."""
    made = {}
    for field in dataclasses.fields(options) if dataclasses.is_dataclass(options) else ():
        value = getattr(options, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if hasattr(value, "to_dict"):
            value, whole = value.to_dict(), type(value)().to_dict()
            default = {name: whole[name] for name in value}
        if field.init and field.name not in _WORKED_OUT and value not in (None, []) and plain(value) != plain(default):
            made[field.name] = plain(value)
    return made


def options_of(method: Any) -> dict[str, Any]:
    """All of a method's options, where it is a dataclass."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    return {field.name: plain(getattr(method, field.name)) for field in fields}


def is_of_another_run(folder: Path) -> str | None:
    """What of an earlier run lies in a folder, or None."""
    names = [name for name in (RUN, METRICS, "trainer_state.json") if (folder / name).is_file()]
    names += sorted(path.name for path in folder.glob("checkpoint-*"))[:1]
    names += [path.name for path in folder.glob("*.safetensors")][:1]
    return names[0] if names else None


def weights_of(model: Any) -> str:
    """How many parameters a model has, which of them are trained, and their dtypes."""
    sizes = [(p.ds_numel if hasattr(p, "ds_numel") else p.numel(), p.requires_grad, str(p.dtype)) for p in model.parameters()]
    whole, trained = sum(n for n, *_ in sizes), sum(n for n, grad, _ in sizes if grad)
    dtypes = ", ".join(sorted({dtype.removeprefix("torch.") for *_, dtype in sizes}))
    share = f", {_count(trained)} trained" if 0 < trained < whole else ""
    return f"{_count(whole)} parameters{share}, {dtypes}"


def _count(number: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def summary(trainer: Any) -> dict[str, str]:
    """What a `TokenDistillTrainer` will do, a line each."""
    args, method, state = trainer.args, trainer.method, trainer.state
    setup, names = trainer.setup, trainer.loop.names
    options = changed(method)
    table = {"method": f"{method.title or method.name}" + (f" with {_pairs(options)}" if options else ", its defaults")}
    table["student"] = f"{names['student']}: {weights_of(trainer.model)}"
    if trainer.teacher_model is not None:
        table["teacher"] = f"{names['teacher']}: {weights_of(trainer.teacher_model)}, {args.teacher_placement}"
    elif trainer.teacher is not None:
        table["teacher"] = f"{names['teacher']} ({'recording' if setup.recording is not None else args.teacher_placement})"
    rows, tokens = vocabulary_size(trainer.model), trainer.vocab_size
    lost = f", {rows - tokens} of the student's not" if rows > tokens else ""
    padded = len(trainer.unknown_ids)
    crossing = trainer.loop.scorer.crossing
    shared = f"{tokens} ids shared{lost}" if crossing is None else crossing.told
    table["vocabulary"] = shared + (f", {padded} without a token are never written" if padded else "")
    data, processes = trainer.train_dataset, trainer.accelerator.num_processes
    constants = {name: int(read()) for name, read in trainer.loop.metrics.constants.items()}
    out = [f"{count} {name.split('/')[1].replace('_', ' ')}" for name, count in constants.items() if count]
    found = f"{len(data)}" if hasattr(data, "__len__") else "a stream"
    table["prompts"] = ", ".join([f"{found}{', chats' if trainer.has_chats else ', text'}", *out])
    spec = setup.rollouts
    writer = spec.writer if isinstance(spec.writer, str) else type(spec.writer).__name__
    engine = "vLLM" if args.use_vllm else "transformers"
    given = " and given ones" if spec.need_dataset and (spec.share or spec.replay) else ""
    all_given = spec.need_dataset and not (spec.share or spec.replay)
    table["completions"] = "given" if all_given else f"by {writer} ({engine}){given}"
    size = batch_rows(args) * processes
    table["batch"] = (
        f"{size} prompts a step: {args.per_device_train_batch_size} × {args.gradient_accumulation_steps} accumulated × "
        f"{processes} process{'es' if processes > 1 else ''}"
    )
    steps = planned_steps(trainer)
    epochs = f", {steps * size / len(data):.3g} epochs" if hasattr(data, "__len__") and len(data) else ""
    begun = f", {state.global_step} of them made" if state.global_step else ""
    table["steps"] = f"{steps}{epochs}{begun}"
    rate = f"{args.learning_rate:g}, {plain(args.lr_scheduler_type)}, warm-up {args.warmup_steps:g}"
    table["learning rate"] = rate if args.learning_rate else "0: the weights will not change"
    limits = trainer.loop.prompts.limits
    table["lengths"] = f"prompts up to {limits.prompt} tokens, completions up to {limits.completion}"
    table["written to"] = f"{args.output_dir}" + ("" if plain(args.save_strategy) == "no" else f", checkpoints {_saving(args)}")
    return table


def planned_steps(trainer: Any, begun: bool = True) -> int:
    """The optimizer steps of a run, before it starts, too; of one that is to begin, whatever an earlier one planned."""
    args, data = trainer.args, trainer.train_dataset
    if begun and trainer.state.max_steps > 0:
        return trainer.state.max_steps
    if args.max_steps > 0:
        return args.max_steps
    batches = len(data) // (batch_rows(args) * trainer.accelerator.num_processes)
    return math.ceil(args.num_train_epochs * max(1, batches))


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _saving(args: Any) -> str:
    return f"every {args.save_steps:g} steps" if plain(args.save_strategy) == "steps" else f"by {plain(args.save_strategy)}"


def as_text(table: Mapping[str, str]) -> str:
    """A table's lines."""
    width = max(map(len, table))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in table.items())


class RunRecord(TrainerCallback):
    """Prints a run's table before its first step, and keeps its record, on the first process.

    Args:
        trainer: whose run it is.
        options: what beside the trainer's own options makes the run again (data, models), by name.
        say: what prints the table.
    """

    def __init__(self, trainer: Any, options: Mapping[str, Any] | None = None, say: Any = print) -> None:
        self.trainer, self.options, self.say = trainer, dict(options or {}), say
        self.samples: Samples | None = None

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.saving.resuming.find_best()
        if not state.is_world_process_zero:
            return
        table = summary(self.trainer)
        self.say(as_text(table))
        self.folder.mkdir(parents=True, exist_ok=True)
        before = is_of_another_run(self.folder)
        if before and not state.global_step:
            logger.warning("%s holds an earlier run (%s), which this one writes over.", self.folder, before)
        self._write(table)
        for name in (METRICS, SAMPLES):
            rows = read_rows(self.folder / name, "remove the line") if state.global_step else []
            replace_rows(self.folder / name, [row for row in rows if row["step"] <= state.global_step])
        trainer = self.trainer
        now = lambda: (trainer.state.global_step + 1, trainer.state.max_steps)  # noqa: E731
        every = int(state.logging_steps or 1) if args.log_completions else None
        self.samples = Samples(self.folder / SAMPLES, args.sample_completions, trainer.tokenizer, now, every)
        trainer.loop.loss.seen = self.samples

    def _write(self, table: Mapping[str, str]) -> None:
        import yaml

        trainer = self.trainer
        made = {name: value for name, value in redacted({**self.options, **changed(trainer.args)}).items() if value != BLANK}
        (self.folder / CONFIG).write_text(yaml.safe_dump(made, sort_keys=False, allow_unicode=True))
        origin = provenance(trainer.args.seed)
        record = {
            "schema": SCHEMA,
            **origin,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "processes": trainer.accelerator.num_processes,
            "method": trainer.method.name,
            "method_options": options_of(trainer.method),
            "terms": {name: weight for name, weight in trainer.method.terms(trainer.loop.state).items() if weight},
            "models": trainer.loop.names,
            "summary": dict(table),
            "config": redacted({**plain(self.options), **plain(trainer.args.to_dict())}),
        }
        (self.folder / RUN).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (self.folder / RUN).is_file():
            append_rows(self.folder / METRICS, [{"step": state.global_step, **plain(logs or {})}])

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw what the run did once it has ended, or was cut off, and every other callback has had its say."""
        loss = self.trainer.loop.loss
        unseen = loss.seen
        try:
            yield
        finally:
            stop_all()
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, Stop):
                    callback.release()
            loss.seen = unseen
            kept = self in self.trainer.callback_handler.callbacks and (self.folder / RUN).is_file()
            if kept and self.trainer.is_world_process_zero():
                try:
                    write_report(self.folder)
                except Exception as error:  # whatever it is, never in place of the run's own
                    logger.warning("no report was written: %s", error)
