"""The trainer of every token-level method, blind to which one runs, and its named form for TSD-KD."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tsdkd.checks import refuse
from tsdkd.data.files import as_data_set
from tsdkd.data.teacher_prompts import has_teacher_prompts, with_teacher_prompts
from tsdkd.methods import Method
from tsdkd.provenance import provenance
from tsdkd.teachers import Teacher, gathered, vocabulary_size
from tsdkd.teachers.heads import check_head
from tsdkd.trainers.beside import ServerEngine
from tsdkd.trainers.callbacks import callbacks_of
from tsdkd.trainers.card import card_of
from tsdkd.trainers.config import TokenDistillConfig
from tsdkd.trainers.engines import Generation
from tsdkd.trainers.host import change_data, once_a_run
from tsdkd.trainers.loading import restore_buffers
from tsdkd.trainers.loop import Loop
from tsdkd.trainers.models import (
    check_special_ids,
    check_template,
    check_terms,
    check_trainable,
    disable_dropout,
    fingerprint_of,
    give_end,
    name_of,
    names_of,
    tell_student,
    with_whole_path,
)
from tsdkd.trainers.packing import check_packing
from tsdkd.trainers.prompts import Limits
from tsdkd.trainers.recording import check_recordable, write_recording
from tsdkd.trainers.run_record import RunRecord
from tsdkd.trainers.saving import Saving
from tsdkd.trainers.setup import Setup, chosen_method
from tsdkd.trainers.setup_checks import OF_DATA, problems
from tsdkd.trainers.sizes import tell_if_too_large
from tsdkd.trainers.sources import student_of
from tsdkd.trainers.teacher_of import teacher_of
from tsdkd.trainers.trl_seams import TRLTrainer
from tsdkd.trainers.tsd_kd_config import TSDKDConfig

logger = once_a_run(__name__)


class TokenDistillTrainer(TRLTrainer):
    """Trains a student on its own completions with any token-level method; a drop-in for TRL's `DistillationTrainer`.

    Args:
        model: the student, a name, a path or a causal language model (or PEFT model).
        teacher_model: the teacher, likewise; `"self"`, the student with another prompt; or several, `{name: teacher}`, which
            rows name in a column `teacher`; default `args.teacher_model_name_or_path`, or `args.teachers`.
        args: a `TokenDistillConfig`.
        train_dataset: rows with a `prompt`, text or chat messages.
        method: a method's object, in place of `args.method`.
        pretraining_dataset: rows with a `text`, for a method with a loss on a corpus beside the completions (MiniLLM).
        others: as TRL's trainer takes them (`eval_dataset`, `processing_class`, `callbacks`, `optimizers`,
            `quantization_config`, `peft_config`, `tools`).

    Raises:
        ValueError: whatever cannot be trained on, before any training, with what to do.
        NonFiniteError: in `train()`, before the step that a NaN or Inf would have spoilt.
    """

    config_class: type[TokenDistillConfig] = TokenDistillConfig
    teacher: Teacher | None
    teacher_model: Any
    has_chats: bool

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: TokenDistillConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        method: str | Method | None = None,
        pretraining_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            base = model if isinstance(model, str) else name_of(model)
            args = self.config_class(output_dir=f"{Path(base).name}-{self.config_class.method}")
        if not isinstance(args, TokenDistillConfig):
            raise ValueError(
                f"args is a {type(args).__name__}; pass a {self.config_class.__name__}: it has every field of TRL's "
                "DistillationConfig and the method's beside them."
            )
        self.method = chosen_method(args, method)
        more: dict[str, Any] = {"has_tools": bool(kwargs.get("tools")), "quantization": kwargs.get("quantization_config")}
        data = train_dataset, eval_dataset, pretraining_dataset
        setup = Setup.of(args, self.method, model, teacher_model, *data, **more)
        refuse(problems(setup))
        tell_if_too_large(setup, adapter=kwargs.get("peft_config") is not None)
        self.setup, self.saving = setup, Saving(self)
        recording, train_dataset, eval_dataset = setup.recording, setup.train_dataset, setup.eval_dataset
        if recording is not None:
            train_dataset = Dataset.from_list(recording.rows)

        # transformers' filter replaces a NaN loss by an average and trains on; the guard stops instead.
        args.logging_nan_inf_filter = False
        self._name, self._paper = self.method.title or self.method.name, dict(self.method.paper)
        self._tag_names = ["trl", "tsdkd", self.method.name]
        student, given = student_of(setup.student, args, kwargs)
        give_end(kwargs.get("processing_class"), student)
        super().__init__(with_whole_path(student), None, args, train_dataset, eval_dataset, **kwargs)
        args.model_init_kwargs = given
        restore_buffers(self.model, torch.float32)
        tell_student(self.model, args)
        self.generation = Generation(self)
        self.generation.reload_whole()
        self.has_chats = setup.has_chats
        check_template(self.tokenizer, self.has_chats, name_of(self.model))
        here = teacher_of(self, setup)
        self.teacher, self.teacher_model, self.vocab_size = here.teacher, here.model, here.vocab_size
        if here.crossing is not None:
            self.method = self.method.across(here.crossing.vocabularies)
            self.setup = setup = dataclasses.replace(setup, method=self.method)
        check_terms(self.method, self.vocab_size, self.accelerator.device)
        check_special_ids(self.tokenizer, self.eos_token_ids, vocabulary_size(self.model), self.vocab_size)
        with gathered(*self.model.parameters()):  # under ZeRO-3 it is loaded in shares
            if args.disable_dropout:
                disable_dropout(self.model)
            check_head(self.model, "student", self.vocab_size)
            if args.padding_free:
                check_packing(self)
        check_trainable(self.model, *here.models.values())
        self.generation.forbid_ids(self.vocab_size, self.unknown_ids)
        own_prompts = setup.has_teacher_prompts or here.crossing is not None  # which its context limits
        theirs = () if own_prompts else here.models.values()
        limits = Limits.of(args.max_length, args.max_completion_length, self.model, *theirs)
        self.generation.set_max_completion_length(limits.completion)
        if recording is not None:
            recording.check_student(None if args.any_recording else fingerprint_of(self.model), limits.completion)
        self.loop = Loop(self, setup, here, names_of(setup), limits)
        if args.rollouts_ahead:
            self.loop.write_ahead(ServerEngine(self.generation.vllm, self.generation.seeded))
        self._fit_data()
        self.run_record = RunRecord(self)
        for callback in (self.loop.spent, self.run_record, *callbacks_of(self)):
            self.add_callback(callback)

    # ------------------------------------------------------------------ at construction

    def _fit_data(self) -> None:
        """Leave the rows that fit, and say what was left out."""
        prompts, supply = self.loop.prompts, self.loop.supply
        change_data(self, prompts.fit)
        constants = self.loop.metrics.constants
        constants["prompts/dropped"] = lambda: prompts.dropped  # a stream's are counted as they come
        if prompts.for_teacher.expected:
            constants["prompts/dropped_for_teacher"] = lambda: prompts.for_teacher.dropped
        constants.update(self.generation.constants())
        left_out = 0 if self.train_dataset is None else prompts.left_out_of_epoch(self.train_dataset)
        if left_out:
            constants["prompts/left_out_of_epoch"] = lambda: left_out
        if supply.spec.replay is not None and self.eval_dataset is None:
            logger.warning(
                "%s without an eval_dataset: the share of the student's completions stays at %s.",
                self._name,
                supply.source.share,
            )

    # ------------------------------------------------------------------ what it does

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; `resume_from_checkpoint` is a checkpoint of this run, True the newest, `"latest"` that or none."""
        if self.train_dataset is None:
            raise ValueError("no train_dataset was given: pass rows with a 'prompt' column to the trainer before train().")
        change_data(self, self.loop.supply.ahead.fill)
        with self.run_record.drawn(), self.saving.begun(resume_from_checkpoint) as (checkpoint, done):
            return done or super().train(checkpoint, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers' `Trainer.evaluate`; rows that are given here are checked as those of the constructor.

        Raises:
            ValueError: rows without a prompt, or without a completion for a method that scores given ones.
        """
        change_data(self, self.loop.supply.ahead.fill)
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = as_data_set(eval_dataset, "eval_dataset")
            eval_dataset = with_teacher_prompts(eval_dataset, self.args.teacher_prompt_template, "eval_dataset")
            alike = has_teacher_prompts(eval_dataset) == self.setup.has_teacher_prompts
            if not alike and self.train_dataset is not None:
                raise ValueError("eval_dataset and train_dataset differ in teacher_prompt: give it to both, or to none.")
            refuse(problems(dataclasses.replace(self.setup, train_dataset=None, eval_dataset=eval_dataset), OF_DATA))
            eval_dataset = self.loop.fitted(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def record(self, folder: str | Path) -> dict[str, int]:
        """Write prompts, rollouts and the teacher's hidden states of a run's steps without training, for any method to train on
        with `recording=folder`; interrupted, it goes on. Returns its `steps`, `rollouts`, `tokens` and `bytes`.

        Raises:
            ValueError: a folder that holds a recording, no data set or teacher, or completions that cannot be recorded.
        """
        check_recordable(self, Path(folder))
        change_data(self, self.loop.supply.ahead.fill)
        self.loop.scorer.whole = True  # for methods that read more than this one
        about = {"method": self.method.name, "models": self.loop.names, **provenance(self.args.seed)}
        about["student_fingerprint"] = fingerprint_of(self.model)
        about["completions"] = "student" if self.setup.rollouts.share else "given"
        return write_recording(self, Path(folder), about)

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None) -> None:
        """The card of the student as it is, in `args.output_dir`, in place of TRL's."""
        if self.is_world_process_zero():
            more = [tags] if isinstance(tags, str) else tags or []
            text = card_of(self, model_name, dataset_name, [*self._tag_names, *more])
            Path(self.args.output_dir, "README.md").write_text(text)

    @property
    def trained_tokens(self) -> int:
        """Tokens of completions trained on, over all processes."""
        return self.loop.metrics.trained_tokens

    @property
    def spent(self) -> dict[str, Any]:
        """What the student has taken, over all processes, with what its checkpoint had: `trained_tokens`, `flops` by part
        (`rollout`, `teacher`, `student`, `loss`; counted as `tsdkd plan` counts, empty where a model's sizes are not known)
        and `seconds` of steps."""
        return self.loop.spent.figures()


class TSDKDTrainer(TokenDistillTrainer):
    """`TokenDistillTrainer` with TSD-KD and the paper's defaults: `from tsdkd import TSDKDConfig, TSDKDTrainer`."""

    config_class = TSDKDConfig
