"""Runs of tiny models: a trainer, its rows, and what its collaborators are asked."""

from __future__ import annotations

import torch
from datasets import Dataset
from tiny import QUESTIONS, config, prompts, tiny_model
from transformers import TrainerCallback

from tsdkd import TokenDistillConfig, TokenDistillTrainer, TSDKDTrainer
from tsdkd.demo.recreate import make_tokenizer


def make(folder, *, student=None, teacher=None, data=None, rollouts=None, cls=TSDKDTrainer, method=None, **kwargs):
    """A trainer of tiny models; `rollouts` maps a prompt's ids to the completion written for it."""
    extra = {key: kwargs.pop(key) for key in ("eval_dataset", "callbacks", "peft_config", "processing_class") if key in kwargs}
    extra.setdefault("processing_class", make_tokenizer())
    if method is not None:
        extra["method"] = method
    trainer = cls(
        model=student if student is not None else tiny_model(seed=1),
        teacher_model=teacher if teacher is not None else tiny_model(seed=2, hidden=48),
        args=kwargs.pop("args", None) or config(folder, **kwargs),
        train_dataset=prompts(8) if data is None else data,
        **extra,
    )
    if rollouts is not None:
        trainer.write = lambda prompt_ids, *args, **kwargs: [list(rollouts(ids)) for ids in prompt_ids]
    return trainer


def by_prompt(ids):
    """A completion that depends on the prompt alone, of 1 to 12 tokens."""
    length = 1 + sum(ids) % 12
    return [(5 + 3 * sum(ids) + 7 * t) % 60 for t in range(length)]


class Gradients(TrainerCallback):
    """The gradient that reaches the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not hasattr(self, "flat"):
            self.flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def rows(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def general(folder, method, /, **kwargs):
    """A run of any method; what `make` does not know is an option of the config."""
    known = ("student", "teacher", "data", "rollouts", "callbacks", "eval_dataset")
    models = {key: kwargs.pop(key) for key in known if key in kwargs}
    return make(folder, cls=TokenDistillTrainer, args=config(folder, TokenDistillConfig, **kwargs), method=method, **models)


def alone(folder, data):
    """SeqKD without any teacher."""
    options = config(folder, TokenDistillConfig, method="seq_kd")
    return TokenDistillTrainer(tiny_model(seed=1), args=options, train_dataset=data, processing_class=make_tokenizer())


def watch(obj, name, before):
    """Call `before` with the first argument of each call of a method."""
    method = getattr(obj, name)

    def watched(first, *args, **kwargs):
        before(first)
        return method(first, *args, **kwargs)

    object.__setattr__(obj, name, watched)


def watch_lengths(teacher, read):
    """Note how many trained tokens a teacher is asked for at each call."""
    hidden = teacher.hidden

    def watched(rollouts, lengths):
        read.append(sum(lengths))
        return hidden(rollouts, lengths)

    teacher.hidden = watched


def answered(count=8, chat=False):
    texts = [f"{QUESTIONS[i]}" for i in range(count)]
    answers = [f"{i}+{i}={2 * i}\n#### {2 * i}" for i in range(10, 10 + count)]
    if chat:
        texts = [[{"role": "user", "content": t}] for t in texts]
        answers = [[{"role": "assistant", "content": a}] for a in answers]
    return Dataset.from_dict({"prompt": texts, "completion": answers})


def student(seed=1):
    return tiny_model(seed=seed, closes_soon=True)


def tiny_head(model):
    return model.get_output_embeddings().weight.detach().T


def gradients_by_batching(folder, batchings, **kwargs):
    """The first step's gradient for each (rows of a micro-batch, how many accumulate)."""
    flat = []
    for size, accumulation in batchings:
        gradients = Gradients()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        make(folder / str(size), rollouts=by_prompt, callbacks=[gradients], **options, **kwargs).train()
        flat.append(gradients.flat)
    return flat
