"""The options of a run: TRL's, and those of token-level distillation beside them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from tsdkd.checks import check_choice, check_count, check_weight
from tsdkd.fused import ENGINES
from tsdkd.methods import Method, resolve_method
from tsdkd.provenance import BLANK, redacted
from tsdkd.teachers.sources import loading_options
from tsdkd.trainers.health import ACTIONS
from tsdkd.trainers.prefix import PrefixRollouts
from tsdkd.trainers.samples import trace_steps
from tsdkd.trainers.teacher_options import TeacherOptions


def bf16_works_here() -> bool:
    """Whether this machine has an accelerator that trains in bf16; a CPU does not count."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass
class TokenDistillConfig(TeacherOptions):
    """Options of `TokenDistillTrainer`: TRL's `DistillationConfig`, with these and `TeacherOptions` beside them.

    `temperature` is the sampling temperature only; the loss has its own. `bf16` defaults to what the machine has. Learning
    rate, schedule, warm-up and epochs default to the paper's, for every method alike.

    Args:
        method: the method's name; its own options are `method_options`.
        method_options: the method's options by name, a dict or JSON.
        max_length: prompt plus completion, tokens; never above the smaller context of the two models. None: that context.
        max_completion_length: tokens of a completion; None is 512, TRL's default, or half of what a smaller context holds.
        padding_free: put the rows of a forward pass one behind the other, each seen by itself alone, in place of padding them:
            the student's, and a teacher's in this process. For attention that keeps them apart by their positions
            (`flash_attention_2`; `sdpa` by a mask as large as the square of their tokens), which is tried on both models.
        drop_long_prompts: drop prompts that leave no room for `max_completion_length`, and log how many, instead of
            refusing them.
        teacher_batch_size: rows per forward pass of the teacher; None: `per_device_train_batch_size`.
        teacher_batch_tokens: in place of rows, the most tokens of such a pass, padding counted; a longer text is read alone.
        ignore_tokens: tokens of completions that no term is trained on, by name (`<think>`); `special` is every special one but
            that which ends. Both models read them, and lengths, openers and shares are of the others.
        prefix_rollouts: a mapping, `{"tokens": 64, "until": 0.5, "whole": 0.1}`: for that share of the training's steps
            completions are cut to their first tokens while they are written, but for a share of steps that write whole ones
            (`trainers.prefix.PrefixRollouts`).
        rollouts_ahead: 1 has a vLLM server write the next step's completions while a step trains: with weights one step old,
            on which nothing but the draws depends (`rollout/staleness`, `rollout/kl`). 0 waits for them.
        fused_impl: the loss engine, see `tsdkd.fused`.
        gradient_filter: see `tsdkd.fused.evaluate`; 0 is exact.
        token_budget: stop after the step that brings the tokens of completions trained on, over all processes, to this many.
        router_loss_weight: of a mixture-of-experts student's load-balancing loss, beside the method's; 0 leaves it out. It is
            the mean over a step's micro-batches, not exactly the step's own, and not in `eval_loss`.
        term_grad_norm_steps: every that many steps, log the norm of each term's gradient with respect to the student's
            last hidden states, on one micro-batch; 0 is never.
        sample_completions: completions that are kept with their tokens' numbers, of steps 1, 2, 4, 8, … and the last, in
            `samples.jsonl`, which the run's page shows; 0 keeps none.
        on_trouble: what the signs of a run that goes wrong do (`trainers/health.py`): `warn`; `stop`, end it with a checkpoint;
            `back`, end it with the student of the best checkpoint, or of the last one before the sign.
        stop_on_signals: end the run after the step in hand, with a checkpoint, when SIGINT or SIGTERM comes to any process;
            `trainer.stopped_by` says so. `tsdkd train` does by itself.
        vllm_request_seeds: with a colocated vLLM, give each request a seed of its own (see docs/trust.md).
        trace_steps: steps, comma-separated, of which a Chrome trace is written (`trace-STEP.json`, which Perfetto reads).
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TeacherOptions._VALID_DICT_FIELDS,
        "prefix_rollouts",
        "method_options",
    ]

    learning_rate: float = field(
        default=5e-6, metadata={"help": "AdamW (paper, A.9: 'Learning rate 5e-6 (Qwen2.5), 1e-7 (Gemma2)')."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Paper, A.9: 'Learning rate scheduler Cosine'."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Below 1 a share of the steps (paper, A.9: 'Warmup ratio 0.1')."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Paper, A.9: 'Epochs 3'."})

    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling; the loss has kd_temperature."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision in bfloat16; default: on an accelerator that has it."}
    )
    method: str = field(
        default="tsd_kd", metadata={"help": "The distillation method, a name of tsdkd methods (tsd_kd, gkd, distillm, …)."}
    )
    method_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "The method's options, by name."})
    beta: float | None = field(  # TRL's field, which no method here reads
        default=None, metadata={"help": "Not read: an option of the method, --method_options '{\"beta\": 0.5}'."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Prompt plus completion, tokens (paper, A.9: 'Max Sequence Length 1024')."},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a completion; default 512 as in TRL, or half of what a smaller context holds."},
    )
    drop_long_prompts: bool = field(
        default=False, metadata={"help": "Drop prompts that leave no room for a completion instead of refusing them."}
    )
    teacher_batch_size: int | None = field(default=None, metadata={"help": "Rows per forward pass of the teacher."})
    teacher_batch_tokens: int | None = field(
        default=None, metadata={"help": "In place of rows, tokens per forward pass of the teacher, padding counted."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Forward passes without padding: rows one behind the other, each seen by itself."},
    )
    ignore_tokens: list[str] | None = field(
        default=None,
        metadata={"help": "Tokens of completions that no term is trained on, by name; 'special' is all but the end."},
    )
    rollouts_ahead: int = field(
        default=0, metadata={"help": "1: a vLLM server writes the next step's completions while a step trains."}
    )
    prefix_rollouts: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Cut completions to a prefix: {"tokens": 64, "until": 0.5, "whole": 0.1}.'}
    )
    fused_impl: str = field(default="auto", metadata={"help": f"The loss engine: one of {', '.join(ENGINES)}."})
    gradient_filter: float = field(
        default=0.0, metadata={"help": "Skip vocabulary blocks whose gradient is nowhere this large; 0 is exact."}
    )
    token_budget: int | None = field(
        default=None, metadata={"help": "Stop after the step that brings the tokens trained on to this many; all processes'."}
    )
    router_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of a mixture-of-experts student's load-balancing loss; 0 leaves it out."}
    )
    term_grad_norm_steps: int = field(
        default=0, metadata={"help": "Log each term's gradient norm every that many steps; 0 is never."}
    )
    sample_completions: int = field(
        default=2, metadata={"help": "Completions that are kept, early and late, for the run's page; 0 keeps none."}
    )
    on_trouble: str = field(
        default="warn", metadata={"help": "What signs of a run going wrong do: warn, stop, or back (to the best checkpoint)."}
    )
    stop_on_signals: bool = field(
        default=False,
        metadata={"help": "On SIGINT and SIGTERM stop after the step in hand, with a checkpoint; on here by default."},
    )
    vllm_request_seeds: bool = field(default=True, metadata={"help": "Colocated vLLM: a seed for each request, from `seed`."})
    trace_steps: str | None = field(
        default=None, metadata={"help": "Steps, comma-separated, of which a Chrome trace is written, e.g. 10,20."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16 and not self.use_cpu:
            self.bf16 = bf16_works_here()
        elif self.bf16 is None:
            self.bf16 = False
        given, self.beta = self.beta, 1.0 if self.beta is None else self.beta  # TRL checks it as a number
        super().__post_init__()
        self.beta = given
        self.check_teacher()
        if self.max_length is not None:
            check_count("max_length", self.max_length, smallest=2)
        if self.max_completion_length is not None:
            check_count("max_completion_length", self.max_completion_length)
        if self.teacher_batch_size is not None:
            check_count("teacher_batch_size", self.teacher_batch_size)
        if self.teacher_batch_tokens is not None:
            check_count("teacher_batch_tokens", self.teacher_batch_tokens)
            if self.teacher_batch_size is not None:
                raise ValueError(
                    f"teacher_batch_tokens={self.teacher_batch_tokens} and teacher_batch_size={self.teacher_batch_size} both "
                    "say how much of a step a teacher reads at a time: pass one of them."
                )
        check_choice("rollouts_ahead", str(int(self.rollouts_ahead)), ("0", "1"))
        PrefixRollouts.of(self.prefix_rollouts)
        check_choice("fused_impl", self.fused_impl, ENGINES)
        check_weight("gradient_filter", self.gradient_filter)
        check_weight("router_loss_weight", self.router_loss_weight)
        loading_options(self.model_init_kwargs, "model_init_kwargs", None)  # refuses an unknown dtype
        if self.token_budget is not None:
            check_count("token_budget", self.token_budget)
        check_count("term_grad_norm_steps", self.term_grad_norm_steps, smallest=0)
        check_choice("on_trouble", self.on_trouble, ACTIONS)
        check_count("sample_completions", self.sample_completions, smallest=0)
        trace_steps(self.trace_steps)  # refuses what are no steps
        self.build_method()  # refuses unknown options before any model is loaded

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled of the options, by transformers beside every model: no secrets."""
        blank = {name: redacted(value, name) for name, value in self.__dict__.items() if isinstance(value, (str, dict, list))}
        return {**self.__dict__, **{name: None if value == BLANK else value for name, value in blank.items()}}

    def __copy__(self) -> Any:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def build_method(self) -> Method:
        """The method that these options name."""
        if self.beta is not None:
            raise ValueError(f"beta={self.beta} is an option of the method: pass method_options={{'beta': {self.beta}}}.")
        return resolve_method(self.method, self.options_by_name())

    def options_by_name(self) -> dict[str, Any]:
        """`method_options` as a dict.

        Raises:
            ValueError: something else was given.
        """
        options = self.method_options or {}
        if not isinstance(options, dict):
            raise ValueError(
                f"method_options={options!r}: pass the method's options by name, a dict in Python and YAML or JSON on "
                "the command line, e.g. '{\"lmbda\": 0.5}'."
            )
        return options
