"""From models and a method to the table of a completion: what a trainer would see, without training."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from tsdkd.data.completions import has_text
from tsdkd.data.pieces import joined_text, token_texts
from tsdkd.inspection.table import Candidates, TokenTable
from tsdkd.losses.ranking import student_candidates, teacher_order
from tsdkd.teachers.heads import head_of
from tsdkd.trainers import TokenDistillConfig, TokenDistillTrainer
from tsdkd.trainers.completions import Batch
from tsdkd.trainers.random_state import random_state_kept
from tsdkd.trainers.step import Step
from tsdkd.types import DivergenceTerm, EntropyTerm, Head, RankingTerm, ReadPlan, Rollouts, SampledTerm, TermResult

_KINDS = {RankingTerm: "ranking", DivergenceTerm: "divergence", EntropyTerm: "entropy", SampledTerm: "sampled"}
_CHUNK = 64  # tokens whose logits stand in memory at a time
CANDIDATES = 10  # shown where the method ranks none
logger = logging.getLogger(__name__)


def _short(name: str) -> str:
    """A model's name as people say it: of a folder its own."""
    return Path(name).name if Path(name).is_dir() else name


class Reader:
    """A trainer that does not train: it writes completions and reads them.

    Args:
        trainer: whose models, method, rendering and shared vocabulary are used.
        label: what its tables are called; default the student's and the method's names.

    Raises:
        ValueError: a recording in place of models, or several processes.
    """

    def __init__(self, trainer: TokenDistillTrainer, label: str | None = None) -> None:
        if trainer.setup.recording is not None:
            raise ValueError("a recording holds no student to read with: pass the models, --student and --teacher.")
        if trainer.setup.several:
            raise ValueError(
                f"completions are looked at with one teacher, and there are {', '.join(trainer.setup.several)}: pass the one "
                "of these rows."
            )
        if trainer.loop.scorer.crossing is not None:
            raise ValueError(
                "completions are looked at token by token, and the teacher is of another tokenizer: it has no probability of "
                "the student's ids. Look at them without it, or with a teacher of the student's family."
            )
        if trainer.accelerator.num_processes > 1:
            raise ValueError("completions are looked at by one process: start it without a launcher.")
        self.trainer = trainer
        names = {role: _short(name) for role, name in trainer.loop.names.items()}
        self.names = names
        self.label = label or f"{names['student']}, {trainer.method.title or trainer.method.name}"

    # ------------------------------------------------------------------ rollouts

    def rollouts(self, rows: Sequence[dict[str, Any]], *, seed: int = 0, given: bool | None = None) -> Rollouts:
        """The rows' completions: their own, or written now as the method has them written.

        Args:
            rows: `prompt`, and `completion` or `completion_ids` where they are given.
            seed: of what is written.
            given: read the rows' own; None: where the method trains on those, or nobody else may write.

        Raises:
            ValueError: a row that cannot be read, or too long a prompt.
        """
        trainer, rows = self.trainer, list(rows)
        loop = trainer.loop
        loop.prompts.check_rows(rows)
        has_own = [has_text(row.get("completion")) or bool(row.get("completion_ids")) for row in rows]
        spec = trainer.setup.rollouts
        own = (spec.need_dataset and not spec.share and all(has_own)) if given is None else given
        if own and not all(has_own):
            raise ValueError(
                f"prompt {has_own.index(False)} has no completion to be read: give one with a text, or let the student write."
            )
        prompt_ids = trainer.tokenize(rows)
        if [] in prompt_ids:
            raise ValueError(f"prompt {prompt_ids.index([])} is empty: nothing would predict the completion's first token.")
        loop.prompts.refuse_unfit(prompt_ids)
        recorded: dict[str, list[list[float]]] = {}
        if own:
            ids = loop.supply.given(rows)
            for number, (given_ids, was_cut) in enumerate(loop.supply.given_and_cut(rows)):
                if min(given_ids, default=0) < 0:
                    raise ValueError(f"the completion of prompt {number} holds {min(given_ids)}, which is no id.")
                if was_cut:
                    told = "the completion of prompt %d is cut to its first %d tokens (max_completion_length)."
                    logger.warning(told, number, len(given_ids))
        else:
            was_training = trainer.model.training
            trainer.model.train()  # in evaluations the student writes alone, whoever writes in training
            try:
                with random_state_kept():
                    set_seed(seed)
                    ids, recorded = self._written(rows, prompt_ids)
            finally:
                trainer.model.train(was_training)
        return Rollouts(
            prompt_ids, ids, [[1] * len(row) for row in ids], recorded, *loop.teacher_prompts.both(rows), trainer.vision(rows)
        )

    def _written(self, rows: list[dict[str, Any]], prompt_ids: list[list[int]]) -> Any:
        trainer = self.trainer
        written = trainer.loop.write(Batch(rows), prompt_ids, lambda ids: trainer.write(ids, *trainer.drawn(rows)))
        return written.ids, written.token_values

    # ------------------------------------------------------------------ tables

    def tables(self, rollouts: Rollouts) -> list[TokenTable]:
        """A table for each completion."""
        return [self.table(rollouts.rows([row])) for row in range(len(rollouts))]

    def table(self, rollout: Rollouts) -> TokenTable:
        """The table of one completion, taken as a step of its own.

        Raises:
            ValueError: a completion without trained tokens.
        """
        trainer = self.trainer
        loop, method = trainer.loop, trainer.method
        if rollout.lengths == [0]:
            raise ValueError("the completion has no tokens that are trained on: there is nothing to look at.")
        objective = method.objective()
        with trainer.student() as student, trainer.gathered_heads(student, *self._models()):
            step = step_of(trainer, rollout)
            with loop.loss.autocast():
                batch = loop.loss.batch_of(student, step)
                terms = method.loss(batch, head_of(student), self._teacher_head(), counts=step.counts, **loop.loss.engine)
            ids = rollout.trained(rollout.completion_ids)
            k = next((term.num_candidates for term in objective.terms if isinstance(term, RankingTerm)), CANDIDATES)
            read = self._read(batch, head_of(student), torch.tensor(ids), min(k, trainer.vocab_size), objective.temperature)
        of_written = {name: read.pop(name) for name in list(read) if name.endswith("_log_prob") or name == "overlap"}
        stats = terms.statistics
        made: dict[str, np.ndarray | None] = {"student_entropy": _column(stats.student_entropy)}
        if "teacher_entropy" in read:
            made["teacher_entropy"] = _filled(stats.teacher_entropy, stats.scored, read.pop("teacher_entropy"))
        made["divergence"] = _column(stats.divergence, stats.scored)
        columns = {**{name: value for name, value in made.items() if value is not None}, **of_written}
        if "teacher_log_prob" in columns:
            columns["log_ratio"] = columns["teacher_log_prob"] - columns["student_log_prob"]
        for name, result in terms.terms.items():
            own = _of_term(name, result, objective)
            columns.update({f"tau/{name}" if column in columns else column: values for column, values in own.items()})
        kinds = {name: next(kind for cls, kind in _KINDS.items() if issubclass(r.kind, cls)) for name, r in terms.terms.items()}
        texts = token_texts(trainer.tokenizer, ids)
        read["texts"] = self._texts(read)
        left = sorted({name for name, weight in method.terms().items() if weight} - terms.terms.keys())
        return TokenTable(
            token_ids=list(ids),
            tokens=texts,
            columns=columns,
            candidates=Candidates(**read),
            terms={
                name: {"kind": kinds[name], "weight": float(result.weight), "value": float(result.value)}
                for name, result in terms.terms.items()
            },
            loss=float(terms.loss),
            text=joined_text(trainer.tokenizer, ids),
            prompt=joined_text(trainer.tokenizer, rollout.prompt_ids[0]),
            method=method.title or method.name,
            student=self.names["student"],
            teacher=self.names["teacher"] if trainer.teacher is not None else "",
            temperature=float(objective.temperature),
            note=f"The {', '.join(left)} term needs what its own writer records, and is left out." if left else "",
            label=self.label,
        )

    def _models(self) -> tuple[Any, ...]:
        return () if self.trainer.teacher_model is None else (self.trainer.teacher_model,)

    def _teacher_head(self) -> Head | None:
        teacher = self.trainer.teacher
        return None if teacher is None or not self.trainer.method.reads_teacher else teacher.head

    def _read(self, batch: Any, head: Head, ids: torch.Tensor, k: int, temperature: float) -> dict[str, Any]:
        """Probabilities of the written tokens and of the student's k best, of both models, chunk by chunk."""
        trainer = self.trainer
        teacher, device = trainer.teacher, batch.student_hidden.device
        heads = [(batch.student_hidden, head.cut(trainer.vocab_size))]
        if teacher is not None:
            heads.append((batch.teacher_hidden, teacher.head.cut(trainer.vocab_size)))
        parts: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(ids), _CHUNK):
            rows = slice(start, start + _CHUNK)
            written = ids[rows].to(device).unsqueeze(-1)
            logits = [h.logits(hidden[rows].to(h.weight.dtype)).float() for hidden, h in heads]
            logs = [(values / temperature).log_softmax(-1) for values in logits]
            best = student_candidates(logits[0], k)
            found = {
                "ids": best,
                "student": logs[0].gather(-1, best).exp(),
                "student_log_prob": logs[0].gather(-1, written)[:, 0],
            }
            if teacher is not None:
                order = teacher_order(logits[1].gather(-1, best))
                top = logs[1].max(-1)
                theirs = student_candidates(logits[1], k)
                shared = (best.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)
                found |= {
                    "teacher": logs[1].gather(-1, best).exp(),
                    "teacher_ranks": order.argsort(-1),
                    "teacher_best": top.indices,
                    "teacher_best_prob": top.values.exp(),
                    "overlap": shared,
                    "teacher_log_prob": logs[1].gather(-1, written)[:, 0],
                    "teacher_entropy": -(logs[1].exp() * logs[1].clamp_min(torch.finfo(torch.float32).min)).sum(-1),
                }
            for name, value in found.items():
                parts.setdefault(name, []).append(value.cpu().numpy())
        return {name: np.concatenate(values) for name, values in parts.items()}

    def _texts(self, read: dict[str, Any]) -> dict[int, str]:
        shown = [read["ids"].ravel(), *([read["teacher_best"]] if "teacher_best" in read else [])]
        ids = sorted({int(i) for column in shown for i in column})
        return dict(zip(ids, token_texts(self.trainer.tokenizer, ids), strict=True))


def step_of(trainer: Any, rollout: Rollouts) -> Step:
    """A step that holds one completion alone, as the teacher reads it."""
    plan = ReadPlan.whole(rollout.lengths)
    hidden = None if trainer.teacher is None else trainer.teacher.hidden(rollout.for_teacher, plan.teacher)
    return Step(rollout, trainer.method.counts(rollout.lengths), [0], plan, hidden)


def _column(value: torch.Tensor | None, scored: torch.Tensor | None = None) -> np.ndarray | None:
    """A completion's row of numbers, NaN where it was not read."""
    if value is None:
        return None
    row = value[0].double().cpu().numpy()
    return row if scored is None else np.where(scored[0].cpu().numpy(), row, np.nan)


def _filled(value: torch.Tensor | None, scored: torch.Tensor | None, read: np.ndarray) -> np.ndarray:
    """The loss's own numbers, and where it read none those that were read here."""
    column = _column(value, scored)
    return read.astype(float) if column is None else np.where(np.isnan(column), read, column)


def _of_term(name: str, result: TermResult, objective: Any) -> dict[str, np.ndarray]:
    """A term's columns."""
    term = next(term for term in objective.terms if term.name == name)
    made = {f"contribution/{name}": result.contribution[0].double().cpu().numpy()}
    if term.gate is not None:
        made[f"gate/{name}"] = result.weights[0].double().cpu().numpy()
    if term.selection is not None:
        made[f"takes/{name}"] = result.tokens[0].cpu().numpy().astype(int)
    if result.tau is not None:
        taken = result.tokens[0].cpu().numpy()
        made["tau"] = np.where(taken, result.tau[0].double().cpu().numpy(), np.nan)
    return made


def reader_of(
    student: Any, teacher: Any, method: Any, *, tokenizer: Any = None, label: str | None = None, **options: Any
) -> Reader:
    """A reader of models by name or as objects; `options` are `TokenDistillConfig`'s.

    Raises:
        ValueError: what the trainer refuses.
    """
    folder = str(Path(tempfile.gettempdir(), "tsdkd-inspect"))  # a trainer wants one; it is not made
    stated = {"report_to": "none", "save_strategy": "no", "use_cpu": not torch.cuda.is_available(), "disable_tqdm": True}
    config = TokenDistillConfig(output_dir=folder, **{**stated, **options})
    kwargs = {} if tokenizer is None else {"processing_class": tokenizer}
    with random_state_kept():  # a trainer seeds everything
        return Reader(TokenDistillTrainer(student, teacher, config, method=method, **kwargs), label)


@contextmanager
def _as_they_were(*models: Any) -> Iterator[None]:
    """Model objects with the modes, caches and gradients that they had."""
    kept = [model for model in models if isinstance(model, torch.nn.Module)]
    modes = [(module, module.training) for model in kept for module in model.modules()]
    grads = [(p, p.requires_grad) for model in kept for p in model.parameters()]
    configs: list[Any] = [getattr(model, "config", None) for model in kept]
    caches = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted in grads:
            parameter.requires_grad_(wanted)
        for config, use_cache in caches:
            config.use_cache = use_cache


def inspect_completion(
    student: Any,
    teacher: Any,
    prompt: Any,
    completion: Any = None,
    *,
    method: Any = "tsd_kd",
    tokenizer: Any = None,
    seed: int = 0,
    teacher_prompt: Any = None,
    **options: Any,
) -> TokenTable:
    """What a method decides of every token of a completion, and what both models hold of it.

    Args:
        student, teacher: names, folders or causal language models; the teacher may be None for a method that reads none.
        prompt: a text, or a chat's messages.
        completion: a text, a chat's last turn, or ids; None has the student write one, as training would.
        method: a name, or a method's object, also of your own.
        tokenizer: where the student is an object without one.
        seed: of what the student writes.
        teacher_prompt: what the teacher reads in place of `prompt`.
        options: of `TokenDistillConfig` (`max_completion_length`, `temperature`, …) and, by their names, of the method.

    Returns:
        a `TokenTable`: `.arrays` is a dict of arrays `[tokens]`, `.frame()` a pandas frame, and in a notebook it shows itself.

    Raises:
        ValueError: what a trainer would refuse, saying what to do.

    References:
        TSD-KD Eq. 3-5, 10-13 and Figure 1; arXiv 2603.13260.
    """
    row: dict[str, Any] = {"prompt": prompt} | ({} if teacher_prompt is None else {"teacher_prompt": teacher_prompt})
    if options.get("teacher_prompt_template") is not None:
        raise ValueError("a template takes a row's columns: pass teacher_prompt as it is to be read.")
    if completion is not None:
        completion = completion.tolist() if hasattr(completion, "tolist") else completion
        is_ids = not isinstance(completion, str) and all(isinstance(part, (int, np.integer)) for part in completion)
        row["completion_ids" if is_ids else "completion"] = [int(i) for i in completion] if is_ids else completion
    known = {field.name for field in dataclasses.fields(TokenDistillConfig)}
    if own := {name: options.pop(name) for name in [*options] if name not in known}:  # others are refused
        options["method_options"] = {**(options.get("method_options") or {}), **own}
    with _as_they_were(student, teacher):
        reader = reader_of(student, teacher, method, tokenizer=tokenizer, **options)
        return reader.table(reader.rollouts([row], seed=seed, given=completion is not None))
