"""The trainer of every token-level method, blind to which one runs, and its named form for TSD-KD."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.data.prompts import check_prompts, fitting_rows
from tsdkd.methods import Method, resolve_method
from tsdkd.teachers import LocalTeacher
from tsdkd.teachers.heads import check_head, head_of, last_hidden_state, text_config
from tsdkd.trainers.config import TokenDistillConfig, TSDKDConfig
from tsdkd.trainers.guard import Guard, NonFiniteError
from tsdkd.trainers.recorder import Recorder, Stopwatch, peak_memory_gib
from tsdkd.trainers.trl_seams import SeamTrainer
from tsdkd.types import Counts, Head, Rollouts, TokenBatch

logger = logging.getLogger(__name__)


def load_teacher(name: str, args: TokenDistillConfig) -> Any:
    """A teacher in the dtype of its checkpoint, unless `teacher_model_init_kwargs` says otherwise."""
    kwargs = dict(args.teacher_model_init_kwargs or {})
    kwargs.setdefault("dtype", "auto")
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        kwargs.setdefault("revision", args.teacher_model_revision)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def name_of(model: Any) -> str:
    """A model's name for messages."""
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def check_same_tokens(student: Any, teacher: Any, vocab_size: int) -> None:
    """Refuse two tokenizers that give one id to different tokens, or one token different ids, among the shared ids.

    Raises:
        ValueError: showing such a token.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    our_ids = {i: token for token, i in ours.items() if i < vocab_size}
    for token, i in sorted(theirs.items(), key=lambda item: item[1]):
        if i < vocab_size and our_ids.get(i, token) != token:
            raise ValueError(
                f"the tokenizers disagree: id {i} is {our_ids[i]!r} for the student but {token!r} for the teacher. "
                "Distillation compares next-token distributions id by id, so both models must share one tokenizer: pick a "
                "teacher of the student's family."
            )
        if token in ours and ours[token] != i and min(i, ours[token]) < vocab_size:
            raise ValueError(
                f"the tokenizers disagree: {token!r} is id {ours[token]} for the student but {i} for the teacher. Pick a "
                "teacher of the student's family."
            )


class TokenDistillTrainer(SeamTrainer):
    """Trains a student on its own answers with any token-level method; a drop-in for TRL's `DistillationTrainer`.

    Args:
        model: the student, a name, a path or a causal language model (or PEFT model).
        teacher_model: the teacher, likewise; default `args.teacher_model_name_or_path`.
        args: a `TokenDistillConfig`.
        train_dataset: rows with a `prompt`, text or chat messages.
        method: a method's object, in place of `args.method`.
        others: as TRL's trainer takes them (`eval_dataset`, `processing_class`, `callbacks`, `optimizers`,
            `quantization_config`, `peft_config`, `tools`).

    Raises:
        ValueError: whatever cannot be trained on, before any training, with what to do.
        NonFiniteError: in `train()`, before the step that a NaN or Inf would have spoilt.
    """

    config_class = TokenDistillConfig

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: TokenDistillConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        method: str | Method | None = None,
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
        self.method = args.build_method() if method is None else resolve_method(method)
        if teacher_model is None:
            teacher_model = args.teacher_model_name_or_path
        if teacher_model is None:
            raise ValueError(
                "no teacher was given: pass teacher_model=... (a name, a path or a model), or set teacher_model_name_or_path."
            )
        if teacher_model is model and not isinstance(model, str):
            raise ValueError(
                "the same object was passed as model and as teacher_model: its loss is always zero and training it would move "
                "the teacher too. Load the teacher separately."
            )
        chats = self._check_datasets(args, train_dataset, eval_dataset)

        # transformers' filter replaces a NaN loss by an average and trains on; the guard stops instead.
        args.logging_nan_inf_filter = False
        self._name = getattr(self.method, "title", self.method.name)
        self._paper = self.method.paper
        self._tag_names = ["trl", "tsdkd", self.method.name]
        super().__init__(model, None, args, train_dataset, eval_dataset, **kwargs)

        if chats and self._tokenizer.chat_template is None:
            raise ValueError(
                f"the prompts are chats but the tokenizer of {name_of(self.model)} has no chat template: set "
                "tokenizer.chat_template, use an instruct model's tokenizer (processing_class=...), or pass the "
                "prompts as text."
            )
        if isinstance(teacher_model, str):
            teacher_model = load_teacher(teacher_model, args)
        self.vocab_size = self._shared_vocabulary(teacher_model)
        if getattr(teacher_model, "hf_device_map", None) is None:
            teacher_model = teacher_model.to(self.accelerator.device)
        self.teacher_model = teacher_model
        self.teacher = LocalTeacher(
            teacher_model,
            pad_id=0,
            batch_size=args.teacher_batch_size or args.per_device_train_batch_size,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
        )
        check_head(self.model, "student", self.vocab_size)
        check_head(teacher_model, "teacher", self.vocab_size)
        self.forbid_ids_from(self.vocab_size)

        self._recorders = {"train": Recorder(), "eval": Recorder()}
        self._engine = {"impl": args.fused_impl, "gradient_filter": args.gradient_filter}
        self._watches = {mode: Stopwatch(self.accelerator.device) for mode in ("train", "eval")}
        self._guard = Guard()
        self._trained_tokens = 0
        self._steps_in_window = 0
        self._prompt_limit, self._limit_reason = self._prompt_limits()
        self._dropped = 0
        if train_dataset is not None:
            self.train_dataset = self._fit_prompts(self.train_dataset, "train_dataset")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {k: self._fit_prompts(v, f"eval_dataset[{k!r}]") for k, v in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._fit_prompts(self.eval_dataset, "eval_dataset")

    # ------------------------------------------------------------------ before training

    def _check_datasets(self, args: TokenDistillConfig, train_dataset: Any, eval_dataset: Any) -> bool:
        chats = False
        if train_dataset is not None:
            parts = (args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps)
            batch = " ({} per device × {} processes × {} accumulation steps)".format(*parts)
            chats |= check_prompts(train_dataset, "train_dataset", parts[0] * parts[1] * parts[2], batch)
        for name, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
            if dataset is not None:
                chats |= check_prompts(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset")
        return chats

    def _shared_vocabulary(self, teacher_model: Any) -> int:
        """How many ids both models have; refuse tokenizers that disagree on them."""
        size = min(self.model.get_output_embeddings().weight.shape[0], teacher_model.get_output_embeddings().weight.shape[0])
        candidates = getattr(self.method, "num_candidates", None)
        if candidates is not None and candidates > size:
            raise ValueError(f"num_candidates={candidates} but the two models share {size} tokens: pass {size} or fewer.")
        source = getattr(teacher_model.config, "_name_or_path", "")
        try:
            theirs = AutoTokenizer.from_pretrained(source, trust_remote_code=self.args.trust_remote_code) if source else None
        except (OSError, ValueError) as error:
            logger.warning("no tokenizer could be read from %r: %s", source, str(error).splitlines()[0])
            theirs = None
        if theirs is None:
            logger.warning("the teacher comes without a tokenizer: whether it agrees with the student's is not checked.")
        else:
            check_same_tokens(self._tokenizer, theirs, size)
        return size

    def _prompt_limits(self) -> tuple[int, str]:
        """The longest prompt allowed, and why."""
        limits = {} if self.args.max_length is None else {f"max_length={self.args.max_length}": self.args.max_length}
        for role, model in (("student", self.model), ("teacher", self.teacher_model)):
            context = getattr(text_config(model), "max_position_embeddings", None)
            if context is not None:
                limits[f"the {role}'s context of {context} tokens"] = context
        if not limits:
            raise ValueError("neither model states its context and max_length is None: set max_length.")
        reason, total = min(limits.items(), key=lambda item: item[1])
        room = self.args.max_completion_length
        if room is None:
            room = min(512, total // 2)
            self.set_max_completion_length(room)
        elif room >= total:
            raise ValueError(
                f"max_completion_length={room} leaves no room for a prompt: {reason} holds prompt and response together. Lower "
                f"max_completion_length below {total}."
            )
        return total - room, f"{reason} less max_completion_length={room}"

    def _fit_prompts(self, dataset: Any, role: str) -> Any:
        if not hasattr(dataset, "__len__"):
            return dataset
        lengths: list[int] = []
        for start in range(0, len(dataset), 1000):
            for row, ids in enumerate(self.tokenize(dataset[start : start + 1000]["prompt"]), start):
                if max(ids, default=0) >= self.vocab_size:
                    raise ValueError(
                        f"the prompt of row {row} of {role} holds id {max(ids)}, {self._tokenizer.decode([max(ids)])!r}, "
                        f"beyond the {self.vocab_size} ids that both models have: one of them cannot read it. Remove that "
                        "token."
                    )
                lengths.append(len(ids))
        rows = fitting_rows(lengths, self._prompt_limit, self._limit_reason, role, self.args.drop_long_prompts)
        dropped = len(lengths) - len(rows)
        if dropped:
            self._dropped += dropped
            logger.warning(
                "%d of %d prompts of %s are longer than %d tokens and were dropped.",
                dropped,
                len(lengths),
                role,
                self._prompt_limit,
            )
            dataset = dataset.select(rows)
            if role == "train_dataset":
                self._check_datasets(self.args, dataset, None)
        return dataset

    # ------------------------------------------------------------------ the step

    @property
    def _watch(self) -> Stopwatch:
        return self._watches[self.mode]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `Trainer.train`."""
        if self.train_dataset is None:
            raise ValueError("no train_dataset was given: pass rows with a 'prompt' column to the trainer before train().")
        return super().train(*args, **kwargs)

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
        flag = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if self.accelerator.reduce(flag, reduction="sum").item():
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: NaN or Inf in the student's logits while it wrote its answers (student: "
                f"{name_of(self.model)}). The last step made its weights diverge, nothing was saved since: lower the learning "
                "rate, or go back to a checkpoint."
            ) from failure

    def prepare_step(self, rollouts: Rollouts) -> dict[str, Any]:
        """The step's counts over all processes, and the teacher's hidden states, once for all micro-batches."""
        mode = self.mode
        recorder = self._recorders[mode]
        lengths = rollouts.lengths
        recorder.add_host(
            "completions/empty", float(sum(length == 0 for length in lengths)), 1 / self.accelerator.num_processes
        )
        own = self.method.counts(lengths)
        local = torch.tensor([own.tokens, own.selected, own.responses], dtype=torch.float32, device=self.accelerator.device)
        total = self.accelerator.reduce(local, reduction="sum") if mode == "train" else local
        if mode == "train":
            self._trained_tokens += sum(lengths)
        with self._watch.section("teacher"):
            hidden = self.teacher.score(rollouts)
        return {
            "teacher_hidden": hidden,
            "count_tokens": total[0],
            "count_selected": total[1],
            "count_responses": total[2],
        }

    def token_loss(self, student: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        rollouts = self.rollouts_of(inputs)
        device = self.accelerator.device
        ids, mask, where = rollouts.padded(self._tokenizer.pad_token_id, device)
        counts = Counts(inputs["count_tokens"], inputs["count_selected"], inputs["count_responses"])
        # TRL's own forward runs outside the autocast that accelerate put on `model.forward`.
        with self.accelerator.autocast():
            hidden = last_hidden_state(student, ids, mask).flatten(0, 1)[where]
            batch = TokenBatch(hidden, torch.cat(inputs["teacher_hidden"]), tuple(rollouts.lengths))
            with self._watch.section("loss"), self.gathered_heads(student, self.teacher_model):
                head, teacher_head = head_of(student), self.teacher.head
                terms = self.method.loss(batch, head, teacher_head, counts=counts, **self._engine)
            every = self.args.term_grad_norm_steps
            first = self._step % self.args.gradient_accumulation_steps == 0
            if every and first and self.mode == "train" and self.state.global_step % every == 0:
                with self.gathered_heads(student, self.teacher_model):
                    self._record_term_gradients(batch, head_of(student), self.teacher.head, counts)
        self._recorders[self.mode].add(terms.sums)
        if self.mode == "eval":
            return terms.loss
        self._guard.watch_tokens("the student's hidden states", hidden, rollouts)
        self._guard.watch_tokens("the teacher's hidden states", batch.teacher_hidden, rollouts)
        for term in self.method.terms():
            self._guard.watch(f"the {term} term", terms.sums[f"loss/{term}"][0])
        self._guard.watch("the loss", terms.loss)
        # Counts are the whole step's, while DDP averages gradients over processes.
        return terms.loss * self.accelerator.num_processes

    def _record_term_gradients(self, batch: TokenBatch, head: Head, teacher_head: Head, counts: Counts) -> None:
        """The norm of each weighted term's gradient with respect to the student's last hidden states."""
        frozen = Head(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.logit_scale, head.softcap)
        for term, weight in self.method.terms().items():
            if weight == 0:
                continue
            hidden = batch.student_hidden.detach().requires_grad_()
            alone = TokenBatch(hidden, batch.teacher_hidden, batch.lengths)
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
        names = {"student": name_of(self.model), "teacher": name_of(self.teacher_model)}
        # A loss scaler skips steps with infinite gradients by itself.
        norm = None if self.accelerator.scaler is not None else grad_norm
        self._guard.check(self.accelerator, self.state.global_step + 1, names, norm)

    # ------------------------------------------------------------------ what is logged

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
