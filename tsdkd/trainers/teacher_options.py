"""The options of a run's teacher: where it is, what it reads, what it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from trl import DistillationConfig

from tsdkd.checks import check_choice, check_share, check_weight
from tsdkd.data.teacher_prompts import columns_named
from tsdkd.teachers.itself import SELVES
from tsdkd.teachers.placing import PLACEMENTS
from tsdkd.teachers.sources import loading_options
from tsdkd.teachers.zero3 import zero3_config


@dataclass
class TeacherOptions(DistillationConfig):
    """What is said of the teacher beside its name.

    Args:
        teacher_answers: the JSONL file of the completions that the teacher writes, once, for a method that trains on given ones
            and a data set without; None: `teacher_answers.jsonl` in `output_dir`. It holds rows of prompt, completion and ids;
            beside it each process keeps a file with its number, which an interrupted writing goes on with.
        teacher_writes_missing: let the teacher write the completions of rows that have none, for any method that trains on
            given ones.
        teacher_answers_temperature: the temperature of that writing; 0 is greedy.
        teacher_answers_engine: `transformers`, or `vllm`: an engine of its own on the first process, with
            `vllm_gpu_memory_utilization` of the memory, as long as the writing lasts.
        teacher_placement: `local`, whole in each process; `swap`, likewise, but in CPU memory, and on the device only while it
            reads, when the student leaves it; `zero3`, sharded over all processes by DeepSpeed, whatever the student runs
            under; or `server`: vLLM servers at `teacher_urls` give the teacher's hidden states, and only its head is held here.
        swap_optimizer: with `swap` the optimizer's state leaves the device with the student.
        teachers: several teachers by name, each a model's name, or `{model: …, placement: …, urls: […]}`; a row's column
            `teacher` names its own.
        default_teacher: of rows that name none.
        teacher_weights: of several teachers each one's weight in a mean of their logits; then every teacher reads every row.
        teacher_prompt_template: what the teacher reads in place of each prompt: a text with columns in braces, `{prompt}` among
            them; of a chat it is put into the last turn. None: the column `teacher_prompt` where there is one, else the prompt.
        teacher_chat_template_kwargs: of the teacher's own chat template, beside a row's.
        self_teacher: of a teacher `self`, the student as it reads the teacher's prompts: as it was at the `start`, as it is
            (`live`), or a moving average of its weights (`ema`).
        ema_decay: of that average, a step.
        teacher_deepspeed: of a `zero3` teacher, DeepSpeed's options as a dict or a JSON file, beside those that are set here.
        teacher_cpu_offload: keep a `zero3` teacher's shares in CPU memory.
        teacher_urls: the servers' addresses.
        recording: a folder that `record` wrote: its rollouts and its teacher's hidden states are trained on, and no
            teacher is loaded.
        any_recording: take a recording that another student, or other weights of this one, wrote.
        token_aliases: tokens that the two models' tokenizers give different names and mean the same, the student's to the
            teacher's.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DistillationConfig._VALID_DICT_FIELDS,
        "teacher_deepspeed",
        "teachers",
        "teacher_weights",
        "token_aliases",
        "teacher_chat_template_kwargs",
    ]

    teacher_answers: str | None = field(
        default=None, metadata={"help": "JSONL file of the completions that the teacher writes."}
    )
    teacher_writes_missing: bool = field(
        default=False, metadata={"help": "The teacher writes the completions of rows without one, for any method."}
    )
    teacher_answers_temperature: float = field(
        default=0.0, metadata={"help": "Temperature of the completions that the teacher writes; 0 is greedy."}
    )
    teacher_answers_engine: str = field(
        default="transformers", metadata={"help": "What writes them: 'transformers' or 'vllm'."}
    )
    teacher_placement: str = field(
        default="local", metadata={"help": "Where the teacher is: 'local', 'swap', 'zero3' or 'server'."}
    )
    swap_optimizer: bool = field(
        default=False, metadata={"help": "With a 'swap' teacher the optimizer's state leaves the device with the student."}
    )
    teachers: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Several teachers by name, which rows name in their column 'teacher', JSON."}
    )
    default_teacher: str | None = field(default=None, metadata={"help": "Of several teachers the one of rows that name none."})
    teacher_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Several teachers' weights in a mean of their logits, of every row, JSON."}
    )
    teacher_prompt_template: str | None = field(
        default=None, metadata={"help": "What the teacher reads in place of a prompt: a text with columns in braces."}
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the teacher's chat template, JSON."}
    )
    self_teacher: str = field(
        default="start", metadata={"help": "Of a teacher 'self': the student at the start, live, or ema (a moving average)."}
    )
    ema_decay: float = field(default=0.999, metadata={"help": "Of self_teacher=ema: what stays of the average a step."})
    teacher_deepspeed: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "DeepSpeed options of a 'zero3' teacher, JSON or a JSON file; none are needed."}
    )
    teacher_cpu_offload: bool = field(default=False, metadata={"help": "Keep a 'zero3' teacher's shares in CPU memory."})
    teacher_urls: list[str] | None = field(
        default=None, metadata={"help": "vLLM servers that give the teacher's hidden states, http://HOST:PORT."}
    )
    recording: str | None = field(default=None, metadata={"help": "Train on this recording, without a teacher."})
    any_recording: bool = field(
        default=False, metadata={"help": "Train on a recording that another student, or other weights of this one, wrote."}
    )
    token_aliases: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Tokens that both mean the same, the student's name to the teacher's, JSON."}
    )

    def check_teacher(self) -> None:
        """Refuse what cannot work together.

        Raises:
            ValueError: saying what to pass.
        """
        loading_options(self.teacher_model_init_kwargs, "teacher_model_init_kwargs", None)  # refuses an unknown dtype
        check_choice("teacher_answers_engine", self.teacher_answers_engine, ("transformers", "vllm"))
        check_weight("teacher_answers_temperature", self.teacher_answers_temperature)
        check_choice("teacher_placement", self.teacher_placement, PLACEMENTS)
        if self.teacher_placement != "zero3" and (self.teacher_deepspeed or self.teacher_cpu_offload):
            raise ValueError(
                f"teacher_deepspeed and teacher_cpu_offload are options of a sharded teacher, and teacher_placement is "
                f"{self.teacher_placement!r}: pass teacher_placement=zero3."
            )
        zero3_config(self.teacher_deepspeed, torch.float32, self.teacher_cpu_offload)  # refuses what is none
        if self.teacher_urls and self.teacher_placement != "server":
            raise ValueError(
                f"teacher_urls were given but teacher_placement is {self.teacher_placement!r}: pass teacher_placement=server."
            )
        if self.teacher_prompt_template is not None:
            columns_named(self.teacher_prompt_template)
        if not isinstance(self.teacher_chat_template_kwargs or {}, dict):
            raise ValueError(
                f"teacher_chat_template_kwargs={self.teacher_chat_template_kwargs!r} must be a mapping, e.g. "
                "{'enable_thinking': false}."
            )
        if self.teachers and self.teacher_model_name_or_path is not None:
            raise ValueError(
                f"teacher_model_name_or_path={self.teacher_model_name_or_path!r} and teachers were both given: name that one "
                "among teachers, or leave one out."
            )
        if self.teachers and not isinstance(self.teachers, dict):
            raise ValueError(f"teachers={self.teachers!r} must be a mapping of names to models, e.g. {{'math': 'MODEL'}}.")
        check_choice("self_teacher", self.self_teacher, SELVES)
        check_share("ema_decay", self.ema_decay)
