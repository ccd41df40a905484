"""The trainer of every token-level method, blind to which one runs, and its named form for TSD-KD."""

from __future__ import annotations

import dataclasses
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from tsdkd.fused import token_statistics
from tsdkd.methods import Method
from tsdkd.provenance import provenance
from tsdkd.teachers import RecordedTeacher, Recording, Teacher, gathered, hidden_of
from tsdkd.teachers.heads import check_head, head_of, last_hidden_state
from tsdkd.teachers.server import ServerTeacher, TeacherUnavailable
from tsdkd.trainers.config import TokenDistillConfig, TSDKDConfig
from tsdkd.trainers.corpus import Corpus
from tsdkd.trainers.guard import Guard, NonFiniteError
from tsdkd.trainers.models import fingerprint_of, name_of, restore_buffers
from tsdkd.trainers.preparing import PreparingTrainer
from tsdkd.trainers.recorder import Recorder, Stopwatch, peak_memory_gib
from tsdkd.trainers.recording import check_recordable, write_recording
from tsdkd.types import Answers, Counts, Head, LossTerms, Objective, Rollouts, TokenBatch

logger = logging.getLogger(__name__)


class _Budget(TrainerCallback):
    """Ends a run that has spent its tokens."""

    def __init__(self, trainer: TokenDistillTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.trained_tokens >= args.token_budget:
            control.should_training_stop = True


class TokenDistillTrainer(PreparingTrainer):
    """Trains a student on its own answers with any token-level method; a drop-in for TRL's `DistillationTrainer`.

    Args:
        model: the student, a name, a path or a causal language model (or PEFT model).
        teacher_model: the teacher, likewise; default `args.teacher_model_name_or_path`.
        args: a `TokenDistillConfig`.
        train_dataset: rows with a `prompt`, text or chat messages.
        method: a method's object, in place of `args.method`.
        pretraining_dataset: rows with a `text`, for a method with a loss on a corpus beside the answers (MiniLLM).
        others: as TRL's trainer takes them (`eval_dataset`, `processing_class`, `callbacks`, `optimizers`,
            `quantization_config`, `peft_config`, `tools`).

    Raises:
        ValueError: whatever cannot be trained on, before any training, with what to do.
        NonFiniteError: in `train()`, before the step that a NaN or Inf would have spoilt.
    """

    config_class: type[TokenDistillConfig] = TokenDistillConfig
    teacher: Teacher | None
    _recording = False

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
        self.method = self._chosen_method(args, method)
        self.answers = getattr(self.method, "answers", None) or Answers()
        self.reads_teacher = getattr(self.method, "reads_teacher", True)
        if teacher_model is None:
            teacher_model = args.teacher_model_name_or_path
        self._uses_vllm = args.use_vllm or args.teacher_answers_engine == "vllm"
        recording = Recording.open(args.recording) if args.recording is not None else None
        self._refuse(args, model, teacher_model, recording, train_dataset, eval_dataset)
        self.corpus = Corpus.of(pretraining_dataset, self.method, args.seed)
        if recording is not None and train_dataset is None:
            train_dataset = Dataset.from_list(recording.rows)
        if recording is not None:
            self.answers = dataclasses.replace(self.answers, writer="student", share=0.0, replay=None)
        chats = self._check_datasets(args, train_dataset, eval_dataset)
        self.check_answers(train_dataset, eval_dataset, bool(kwargs.get("tools")), self._writes(args, teacher_model))

        # transformers' filter replaces a NaN loss by an average and trains on; the guard stops instead.
        args.logging_nan_inf_filter = False
        self._name = getattr(self.method, "title", self.method.name)
        self._paper = self.method.paper
        self._tag_names = ["trl", "tsdkd", self.method.name]
        super().__init__(model, None, args, train_dataset, eval_dataset, **kwargs)
        restore_buffers(self.model, torch.float32)
        self.reload_vllm_whole()
        if args.token_budget is not None:
            self.add_callback(_Budget(self))

        if chats and self._tokenizer.chat_template is None:
            raise ValueError(
                f"the prompts are chats but the tokenizer of {name_of(self.model)} has no chat template: set "
                "tokenizer.chat_template, use an instruct model's tokenizer (processing_class=...), or pass the "
                "prompts as text."
            )
        self._place_teacher(teacher_model, recording)
        with gathered(*self.model.parameters()):  # under ZeRO-3 it is loaded in shares
            check_head(self.model, "student", self.vocab_size)
        self.forbid_ids_from(self.vocab_size)

        self._recorders = {"train": Recorder(), "eval": Recorder()}
        self._engine = {"impl": args.fused_impl, "gradient_filter": args.gradient_filter}
        self._watches = {mode: Stopwatch(self.accelerator.device) for mode in ("train", "eval")}
        self._guard = Guard()
        self._trained_tokens = 0
        self._steps_in_window = 0
        self._spent: torch.Tensor | None = None
        self._observed: list[tuple[list[int], torch.Tensor]] = []
        self._prompt_limit, self._limit_reason = self._prompt_limits()
        self._dropped = 0
        if recording is not None:
            recording.check_student(None if args.any_recording else fingerprint_of(self.model), self.max_completion_length)
        self.prepare_answers()
        if train_dataset is not None:
            self.train_dataset = self._fit_prompts(self.train_dataset, "train_dataset")
            self.tell_dropped_rows()
        self.change_eval_sets(self._fit_prompts)
        if self.answers.replay is not None and self.eval_dataset is None:
            logger.warning(
                "%s without an eval_dataset: the share of the student's answers stays at %s.", self._name, self.source.share
            )

    # ------------------------------------------------------------------ the step

    @property
    def _watch(self) -> Stopwatch:
        return self._watches[self.mode]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `Trainer.train`."""
        if self.train_dataset is None:
            raise ValueError("no train_dataset was given: pass rows with a 'prompt' column to the trainer before train().")
        self.let_teacher_write()
        return super().train(*args, **kwargs)

    def record(self, folder: str | Path) -> None:
        """Write prompts, rollouts and the teacher's hidden states of a run's steps, without training: `max_steps` of them, or
        those of an epoch. Any method trains on it later with `recording=folder`.

        Raises:
            ValueError: a folder that holds a recording, no data set or teacher, or answers that cannot be recorded.
        """
        check_recordable(self, Path(folder))
        self.let_teacher_write()
        self._recording = True  # whole answers, for methods that read more than this one
        about = {"method": self.method.name, "models": self._model_names(), **provenance(self.args.seed)}
        about["student_fingerprint"] = fingerprint_of(self.model)
        write_recording(self, Path(folder), about)

    def _model_names(self) -> dict[str, str]:
        return {"student": name_of(self.model), "teacher": self.teacher_name}

    def _generate(self, prompts: list):
        with self._watch.section("rollout"):
            result = super()._generate(prompts)
        too_long = max(map(len, result[0]))
        if too_long > self._prompt_limit:  # only a stream gets here, other data sets were measured at construction
            raise ValueError(
                f"a prompt of {too_long} tokens arrived but at most {self._prompt_limit} fit: {self._limit_reason}. "
                "Filter the stream."
            )
        return result

    def after_writing(self, failure: RuntimeError | None) -> None:
        if self.on_any_process(failure is not None):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: NaN or Inf in the student's logits while it wrote its answers (student: "
                f"{name_of(self.model)}). The last step made its weights diverge, nothing was saved since: lower the learning "
                "rate, or go back to a checkpoint."
            ) from failure

    def note_source(self, drawn: str) -> None:
        if not self.answers.need_dataset:
            return
        for source in ("fresh", "dataset", "buffer"):
            self._recorders["train"].add_host(f"answers/{source}", float(drawn == source))
        if self.answers.replay is not None:
            self._recorders["train"].add_host("answers/share", self.source.share)

    def _read_part(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts without what no term reads: a prefix rule spares both models the rest, and the saving is logged."""
        reads = None if self._recording else getattr(self.method, "reads", None)
        lengths = rollouts.lengths
        if reads is None or (kept := [reads(length) for length in lengths]) == lengths:
            return rollouts
        return self._spared(rollouts, rollouts.first(kept))

    def _spared(self, rollouts: Rollouts, short: Rollouts) -> Rollouts:
        before, after = (sum(map(len, r.prompt_ids)) + sum(map(len, r.completion_ids)) for r in (rollouts, short))
        self._recorders[self.mode].add_host("teacher/tokens_spared", before - after, before)
        return short

    def _read_by_teacher(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts up to the prefix outside of which no term reads the teacher; the student reads them first."""
        rule = None if self._recording else getattr(self.method, "teacher_prefix", None)
        if rule is None:
            return rollouts
        size = self.args.teacher_batch_size or self.args.per_device_train_batch_size
        with self._watch.section("teacher"), self.model_for_writing() as student:
            hidden = hidden_of(student, rollouts, 0, size, self.accelerator.device, self.accelerator.autocast)
            batch = TokenBatch(torch.cat(hidden), None, tuple(rollouts.lengths))
            student_alone = Objective(direct_weight=0.0, temperature=getattr(self.method, "kd_temperature", 1.0))
            head = head_of(student).cut(self.vocab_size)
            statistics = token_statistics(batch, head, None, objective=student_alone, impl=self.args.fused_impl)
        return self._spared(rollouts, rollouts.first(rule(statistics).sum(-1).tolist()))

    def prepare_step(self, rollouts: Rollouts) -> dict[str, Any]:
        """The step's counts over all processes, and the teacher's hidden states, once for all micro-batches."""
        mode = self.mode
        recorder = self._recorders[mode]
        lengths = rollouts.lengths
        recorder.add_host(
            "completions/empty", float(sum(length == 0 for length in lengths)), 1 / self.accelerator.num_processes
        )
        if "accepted" in rollouts.recorded:
            accepted = rollouts.trained(rollouts.recorded["accepted"])
            recorder.add_host("speculative/acceptance", sum(accepted), len(accepted))
        own = self.method.counts(lengths)
        local = torch.tensor(
            [own.tokens, own.selected, own.responses, own.of_direct], dtype=torch.float32, device=self.accelerator.device
        )
        total = self.accelerator.reduce(local, reduction="sum") if mode == "train" else local
        if mode == "train":
            self._trained_tokens += sum(lengths)
            spent = total[0].double()  # float32 stops counting by ones at 16.7 million
            self._spent = spent if self._spent is None else self._spent + spent
        read = self._read_part(rollouts)
        first = (self.state.global_step * self.accelerator.num_processes + self.accelerator.process_index) * len(lengths)
        step: dict[str, Any] = {
            "row_numbers": [first + row for row in range(len(lengths))],
            "read_lengths": read.lengths,
            "count_tokens": total[0],
            "count_selected": total[1],
            "count_responses": total[2],
            "count_direct": total[3],
        }
        if self.corpus is not None and mode == "train":
            step.update(self._corpus_step(len(lengths)))
        if self.reads_teacher and self.teacher is not None:
            step["teacher_hidden"] = self._scored(rollouts, self._read_by_teacher(read))
        return step

    def _scored(self, rollouts: Rollouts, read: Rollouts) -> list[torch.Tensor]:
        """The teacher's hidden states of what is read; a teacher that is gone ends the run on every process, after saving."""
        assert self.teacher is not None
        hidden, failure = [], None
        try:
            with self._watch.section("teacher"):
                hidden = self.teacher.score(rollouts if isinstance(self.teacher, RecordedTeacher) else read)
        except TeacherUnavailable as error:
            failure = error
        if isinstance(self.teacher, ServerTeacher) and self.on_any_process(failure is not None):
            if self.is_in_train and self.state.global_step:
                self.save_checkpoint_now()
            raise failure or TeacherUnavailable("the teacher of another process did not answer; see its message.")
        return [states[:length] for states, length in zip(hidden, read.lengths, strict=True)]

    def _corpus_ids(self, texts: list[str]) -> list[list[int]]:
        """Texts of the corpus, cut to the context; a text of one token predicts nothing and is left empty."""
        longest = self._prompt_limit + self.max_completion_length
        cut = [row[:longest] for row in self.processing_class(text=texts)["input_ids"]]
        return [row if len(row) > 1 else [] for row in cut]

    def _corpus_step(self, rows: int) -> dict[str, Any]:
        """This step's texts, and how many tokens all processes predict."""
        assert self.corpus is not None
        ids = self._corpus_ids(self.corpus.draw(rows, self.state.global_step, self.accelerator.process_index))
        tokens = torch.tensor(float(sum(len(row) - 1 for row in ids if row)), device=self.accelerator.device)
        return {"corpus": ids, "count_corpus": self.accelerator.reduce(tokens, reduction="sum")}

    def _corpus_loss(self, student: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The weighted loss of a micro-batch's texts, every token but the first predicted."""
        assert self.corpus is not None
        texts = [row for row in inputs["corpus"] if row]
        if not texts:
            return torch.zeros((), device=self.accelerator.device)
        rows = Rollouts([row[:1] for row in texts], [row[1:] for row in texts], [[1] * (len(row) - 1) for row in texts])
        ids, mask, where = rows.padded(self._tokenizer.pad_token_id, self.accelerator.device)
        hidden = last_hidden_state(student, ids, mask).flatten(0, 1)[where]
        targets = torch.tensor(rows.trained(rows.completion_ids), device=hidden.device)
        batch = TokenBatch(hidden, None, tuple(rows.lengths), token_ids=targets)
        with self._watch.section("loss"), self._gathered(student):
            counts = Counts(inputs["count_corpus"], 0, 1)
            terms = self.corpus.loss(batch, head_of(student), counts=counts, **self._engine)
        self._recorders["train"].add({"loss/pretraining": terms.sums["loss/sampled"]})
        self._guard.watch("the pretraining term", terms.loss)
        return self.corpus.weight * terms.loss

    def token_loss(self, student: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        rollouts = self.rollouts_of(inputs)
        cut = rollouts.lengths != inputs["read_lengths"]
        if cut:
            rollouts = rollouts.first(inputs["read_lengths"])
        device = self.accelerator.device
        ids, mask, where = rollouts.padded(self._tokenizer.pad_token_id, device)
        counts = Counts(*(inputs[f"count_{name}"] for name in ("tokens", "selected", "responses", "direct")))
        # TRL's own forward runs outside the autocast that accelerate put on `model.forward`.
        with self.accelerator.autocast():
            hidden = last_hidden_state(student, ids, mask).flatten(0, 1)[where]
            teacher_hidden, read_lengths = None, None
            if "teacher_hidden" in inputs:
                states, lengths = inputs["teacher_hidden"], rollouts.lengths
                if [len(part) for part in states] != lengths:  # zeros stand where the teacher did not read
                    read_lengths = tuple(len(part) for part in states)
                    states = [nn.functional.pad(s, (0, 0, 0, n - len(s))) for s, n in zip(states, lengths, strict=True)]
                teacher_hidden = torch.cat(states)
            batch = TokenBatch(
                hidden,
                teacher_hidden,
                tuple(rollouts.lengths),
                token_ids=torch.tensor(rollouts.trained(rollouts.completion_ids), dtype=torch.long, device=device),
                rows=tuple(inputs["row_numbers"]),
                recorded={
                    name: torch.tensor(rollouts.trained(column), device=device) for name, column in rollouts.recorded.items()
                },
                teacher_lengths=read_lengths,
                cut=cut,
            )
            with self._watch.section("loss"), self._gathered(student):
                terms = self.method.loss(batch, head_of(student), self._teacher_head(), counts=counts, **self._engine)
            every = self.args.term_grad_norm_steps
            first = self._step % self.args.gradient_accumulation_steps == 0
            if every and first and self.mode == "train" and self.state.global_step % every == 0:
                with self._gathered(student):
                    self._record_term_gradients(batch, head_of(student), self._teacher_head(), counts)
        self._recorders[self.mode].add(terms.sums)
        if self.mode == "eval":
            return terms.loss
        loss = terms.loss
        if "corpus" in inputs:
            with self.accelerator.autocast():
                loss = loss + self._corpus_loss(student, inputs)
        self._observe(terms, inputs["row_numbers"], rollouts.lengths)
        self._guard.watch_tokens("the student's hidden states", hidden, rollouts)
        if teacher_hidden is not None:
            self._guard.watch_tokens("the teacher's hidden states", teacher_hidden, rollouts)
        for term in self.method.terms():
            if f"loss/{term}" in terms.sums:
                self._guard.watch(f"the {term} term", terms.sums[f"loss/{term}"][0])
        self._guard.watch("the loss", loss)
        # Counts are the whole step's, while DDP averages gradients over processes.
        return loss * self.accelerator.num_processes

    def _gathered(self, student: nn.Module) -> AbstractContextManager:
        return self.gathered_heads(*(model for model in (student, self.teacher_model) if model is not None))

    def _teacher_head(self) -> Head | None:
        return self.teacher.head if self.reads_teacher and self.teacher is not None else None

    # ------------------------------------------------------------------ what changes from step to step

    def _observe(self, terms: LossTerms, rows: list[int], lengths: list[int]) -> None:
        """Keep the difficulties of a micro-batch's responses for a method whose state follows them."""
        state = getattr(self.method, "state", None)
        if state is not None:
            kept = [row if length else -1 for row, length in zip(rows, lengths, strict=True)]
            self._observed.append((kept, state.difficulty(terms.statistics)))

    def _append_observed(self) -> None:
        """Extend the method's state by the whole step, of all processes, in the order of the rollouts."""
        if not self._observed:
            return
        device = self.accelerator.device
        rows = torch.tensor([row for part, _ in self._observed for row in part], dtype=torch.float64, device=device)
        values = torch.cat([values for _, values in self._observed])
        self._observed.clear()
        pairs = self.accelerator.gather(torch.stack([rows, values.double()], 1)).tolist()
        self.method.state.append([value for row, value in sorted(pairs) if row >= 0])  # type: ignore[attr-defined]

    def after_evaluation(self, metrics: dict[str, float], prefix: str) -> None:
        if "loss" in metrics and self.is_in_train:
            self.source.evaluated(metrics["loss"], prefix)

    def checkpoint_state(self) -> dict[str, Any] | None:
        state, kept = getattr(self.method, "state", None), {}
        if state is not None:
            kept["state"] = state.state_dict()
        if self.answers.replay is not None:
            kept["answers"] = self.source.state_dict()
        if self.args.token_budget is not None:
            kept["trained_tokens"] = self.trained_tokens
        return {"method": self.method.name, "processes": self.accelerator.num_processes, **kept} if kept else None

    def restore_state(self, state: dict[str, Any]) -> None:
        now = {"method": self.method.name, "processes": self.accelerator.num_processes}
        for what, value in now.items():
            if state[what] != value:
                raise ValueError(
                    f"the checkpoint keeps a state of {what} {state[what]!r}, and this run has {value!r}: it would be lost or "
                    f"torn. Resume with {what} {state[what]!r}."
                )
        if "state" in state:
            self.method.state.load_state_dict(state["state"])  # type: ignore[attr-defined]
        if "answers" in state:
            self.source.load_state_dict(state["answers"])
        if "trained_tokens" in state:
            self._spent = torch.tensor(float(state["trained_tokens"]), dtype=torch.float64, device=self.accelerator.device)

    def _record_term_gradients(self, batch: TokenBatch, head: Head, teacher_head: Head | None, counts: Counts) -> None:
        """The norm of each weighted term's gradient with respect to the student's last hidden states."""
        frozen = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.logit_scale, head.softcap)
        for term, weight in self.method.terms().items():
            if weight == 0:
                continue
            hidden = batch.student_hidden.detach().requires_grad_()
            alone = dataclasses.replace(batch, student_hidden=hidden)
            with torch.enable_grad():
                loss = self.method.only(term).loss(alone, frozen, teacher_head, counts=counts, **self._engine).loss
                (gradient,) = torch.autograd.grad(loss, hidden)
            norm = gradient.norm()
            self._recorders["train"].add({f"grad_norm/{term}": (norm, torch.ones_like(norm))})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._watches["train"].section("step"):  # after an evaluation the model is not yet in training mode here
            return super().training_step(*args, **kwargs)

    def before_optimizer_step(self, grad_norm: torch.Tensor | float | None) -> None:
        self._steps_in_window += 1
        self.check_gradient_norm(grad_norm)
        self._append_observed()

    def check_gradient_norm(self, grad_norm: torch.Tensor | float | None) -> None:
        """What the guard has seen since its last check, and the norm."""
        # A loss scaler skips steps with infinite gradients by itself.
        norm = None if self.accelerator.scaler is not None else grad_norm
        self._guard.check(self.accelerator, self.state.global_step + 1, self._model_names(), norm)

    # ------------------------------------------------------------------ what is logged

    @property
    def trained_tokens(self) -> int:
        """Tokens of answers trained on since construction, over all processes."""
        return 0 if self._spent is None else int(self._spent.item())

    def window_metrics(self, mode: str) -> dict[str, float]:
        recorder = self._recorders[mode]
        seconds = self._watches[mode].read()
        if mode == "train" and self._steps_in_window:
            steps, whole = self._steps_in_window, seconds.get("step", 0.0)
            parts = {name: seconds.get(name, 0.0) for name in ("rollout", "teacher", "loss")}
            parts["student"] = whole - sum(parts.values())  # forward, backward and the gradients' exchange
            for name, value in parts.items():
                recorder.add_host(f"time/{name}", value, steps)
            recorder.add_host("tokens_per_second", self._trained_tokens, whole / self.accelerator.num_processes)
            recorder.add_host("prompts/dropped", self._dropped)
            if self.rows_dropped:
                recorder.add_host("prompts/left_out_of_epoch", self.rows_dropped)
            self._steps_in_window = self._trained_tokens = 0
        metrics = recorder.flush(self.accelerator)
        if not metrics:
            return {}
        if mode == "eval":
            metrics["loss"] = sum(w * metrics.get(f"loss/{term}", 0.0) for term, w in self.method.terms().items() if w)
        else:
            peak = torch.tensor(peak_memory_gib(self.accelerator.device), device=self.accelerator.device)
            metrics["memory/peak_gib"] = self.accelerator.gather(peak).max().item()
        return metrics


class TSDKDTrainer(TokenDistillTrainer):
    """`TokenDistillTrainer` with TSD-KD and the paper's defaults: `from tsdkd import TSDKDConfig, TSDKDTrainer`."""

    config_class = TSDKDConfig
