"""Part of the seam: what generates in TRL's trainer, transformers or vLLM, and what is asked of it."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from trl.import_utils import is_vllm_available
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from tsdkd.rollouts.by_vllm import forbidden
from tsdkd.trainers.completions import Batch
from tsdkd.trainers.request_seeds import RequestSeeds
from tsdkd.trainers.step import Step
from tsdkd.types import Rollouts


def vllm_problem() -> str | None:
    """Why TRL cannot use the vLLM of this environment, or None."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if not is_vllm_available():
            return "vLLM is not installed"
    return next((str(w.message).split(". We")[0] for w in told if "supports vLLM versions" in str(w.message)), None)


@dataclasses.dataclass
class InHand:
    """What of a generation batch is there while TRL generates it."""

    batch: Batch
    empty: set[int] | None = None  # rows without a token; None while the first turn is still to come
    token_values: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    rollouts: Rollouts | None = None


class Generation:
    """Both of TRL's ways to generate, told the same.

    Args:
        trainer: TRL's trainer, constructed.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.vllm: Any = trainer.vllm_generation if trainer.use_vllm else None
        self.seeds: RequestSeeds | None = None
        if self.vllm is not None:
            args, process = trainer.args, trainer.accelerator.process_index
            self.seeds = RequestSeeds(self.vllm, args.seed, process, args.vllm_request_seeds)

    def seeded(self, mode: str, step: int) -> AbstractContextManager[None]:
        """A context in which what vLLM writes has seeds; transformers draws from the run's own random state."""
        return nullcontext() if self.seeds is None else self.seeds.during(mode, step)

    def constants(self) -> dict[str, Callable[[], float]]:
        """What is logged of it: the seed of the last call to a server that is given one."""
        seeds = self.seeds
        return {"rollout/seed": lambda: seeds.last} if seeds is not None and seeds.served and seeds.asked else {}

    def set_max_completion_length(self, tokens: int) -> None:
        """The longest completion."""
        trainer = self.trainer
        trainer.max_completion_length = tokens
        trainer.generation_kwargs["max_new_tokens"] = tokens
        trainer.generation_config.max_new_tokens = tokens
        if self.vllm is not None:
            self.vllm.max_completion_length = tokens

    @contextmanager
    def cut(self, tokens: int | None) -> Iterator[None]:
        """Shorter completions for a while; None: as long as ever."""
        longest = self.trainer.max_completion_length
        if tokens is not None:
            self.set_max_completion_length(min(tokens, longest))
        try:
            yield
        finally:
            if tokens is not None:
                self.set_max_completion_length(longest)

    def forbid_ids(self, vocab_size: int, unknown: list[int]) -> None:
        """Never sample an id from `vocab_size` on, for which the other model has no embedding, nor one that is no token."""
        trainer = self.trainer
        beyond = list(range(vocab_size, trainer.model.config.get_text_config().vocab_size))
        if self.vllm is not None:
            kwargs = dict(self.vllm.generation_kwargs or {})
            kwargs.setdefault("stop_token_ids", trainer.eos_ids)
            served = self.vllm.mode == "server"  # its requests are JSON, which has no numbers as keys
            if beyond or (unknown and served):
                lost = set(unknown) if served else set()
                allowed = kwargs.get("allowed_token_ids", range(vocab_size))
                kwargs["allowed_token_ids"] = [i for i in allowed if i < vocab_size and i not in lost]
            if unknown and not served:
                kwargs["logit_bias"] = {**forbidden(unknown), **(kwargs.get("logit_bias") or {})}
            self.vllm.generation_kwargs = kwargs
            return
        if not beyond and not unknown:
            return
        suppressed = sorted({*(trainer.generation_kwargs.get("suppress_tokens") or []), *beyond, *unknown})
        trainer.generation_kwargs["suppress_tokens"] = suppressed
        trainer.generation_config.suppress_tokens = suppressed

    def reload_whole(self) -> None:
        """On a CPU vLLM repacks its layers once they are loaded, and TRL's load of one parameter after another fails: there
        the weights go through vLLM's own reload. Elsewhere TRL's way stays."""
        generation = self.vllm
        if generation is None or generation.mode != "colocate" or self.trainer.accelerator.device.type != "cpu":
            return

        def sync_weights() -> None:
            # Copies, since vLLM may take them after a merged adapter has been taken out again.
            weights = ((name, parameter.detach().clone()) for name, parameter in generation._iter_named_params())
            generation.llm.llm_engine.model_executor.driver_worker.model_runner.reload_weights(weights_iterator=weights)
            generation.llm.reset_prefix_cache()

        generation.sync_weights = sync_weights

    @contextmanager
    def student(self) -> Iterator[Any]:
        """The student, whole, in evaluation mode and without gradient, for a writer or a reader of our own."""
        trainer = self.trainer
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
            ) as student,
            torch.no_grad(),
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            was_training = student.training
            student.eval()
            try:
                yield student
            finally:
                student.train(was_training)

    @property
    def has_engine(self) -> bool:
        """Whether each process has a vLLM of its own."""
        return self.vllm is not None and self.vllm.mode == "colocate" and self.trainer.args.vllm_tensor_parallel_size == 1

    @contextmanager
    def engine(self) -> Iterator[Any]:
        """The vLLM of this process with the student's weights of now; None where it has none. Every process must enter."""
        if not self.has_engine:
            yield None
            return
        generation = self.vllm
        generation.sync_weights()
        if generation.enable_sleep_mode:
            generation.llm.wake_up(tags=["kv_cache"])
        try:
            yield generation.llm
        finally:
            if generation.enable_sleep_mode:
                generation.llm.sleep(level=2)
                generation._llm_weights_sleeping = True


class EpochSampler(RepeatSampler):
    """TRL's sampler, its order of an epoch drawn from the seed and the epoch's number alone, so that a run that goes on in a
    later epoch finds it again. The first epoch's is TRL's.

    Args:
        epoch: gives the epoch in hand, from 0.
    """

    epoch: Callable[[], int]

    @classmethod
    def like(cls, other: Any, epoch: Callable[[], int]) -> EpochSampler:
        """The same rows and repeats; another kind of sampler stays."""
        if type(other) is not RepeatSampler:
            return other
        made = cls(
            other.data_source, other.mini_repeat_count, other.batch_size, other.repeat_count, other.shuffle, seed=other.seed
        )
        made.epoch = epoch
        return made

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + 1_000_003 * self.epoch())
        return super().__iter__()


# accelerate names a CPU of several processes cpu:0, onto which torch cannot load an optimizer.
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


_ASKED = ("weight_decay", "betas", "eps")


@contextmanager
def asked_of_optimizer(optimizer: Any, scheduler: Any, args: Any, checkpoint: Any) -> Iterator[None]:
    """Have a run that goes on keep what it asks of its optimizer: learning rate, schedule, weight decay, betas. A checkpoint
    brings back those that it was saved with; where they are the same, nothing changes by a bit."""
    groups = [] if checkpoint is None else getattr(optimizer, "param_groups", [])
    kept = [{name: group[name] for name in _ASKED if name in group} for group in groups]
    yield
    inner = getattr(scheduler, "scheduler", scheduler)
    if checkpoint is None or not isinstance(inner, torch.optim.lr_scheduler.LambdaLR):
        return
    for group, asked in zip(inner.optimizer.param_groups, kept, strict=False):
        group.update(asked)
    if len(set(inner.base_lrs)) == 1:  # several rates are groups of a user's own
        inner.base_lrs = [args.learning_rate] * len(inner.base_lrs)
    for group, rate, factor in zip(inner.optimizer.param_groups, inner.base_lrs, inner.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor(inner.last_epoch)
    inner._last_lr = [group["lr"] for group in inner.optimizer.param_groups]


def generation_batches(trainer: Any, first: int, begin: Callable[[], None]) -> Iterator[tuple[list[dict[str, Any]], Step]]:
    """The rows and the step of each of a run's generation batches, epoch after epoch, without training on them; from the step
    `first` on, before which `begin` is called."""
    loader, accumulated, number = trainer.get_train_dataloader(), trainer.args.gradient_accumulation_steps, 0
    for epoch in itertools.count():
        trainer.epoch_in_hand = epoch
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for rows in loader:
            step, number = number // accumulated, number + 1
            if (number - 1) % accumulated or step < first:
                continue
            if step == first:
                begin()
            trainer.state.global_step = step  # draws depend on it
            made = Step.of(trainer._generate_and_score_completions(rows))
            yield trainer._in_hand.batch.rows, made


def without_repeats(rollouts: Rollouts, accelerator: Any) -> Rollouts:
    """Untrain the rows that accelerate repeats to fill the last evaluation batch of all processes."""
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rollouts
    first = accelerator.process_index * len(rollouts)
    masks = [m if first + row < state.remainder else [0] * len(m) for row, m in enumerate(rollouts.completion_mask)]
    return dataclasses.replace(rollouts, completion_mask=masks)
