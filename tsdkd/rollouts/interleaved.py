"""Completions that student and teacher write together, token by token, a whole batch at a time on the caches of both models."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tsdkd.rollouts.as_asked import as_asked

# From both models' logits [rows, vocab] to the next ids [rows] and what is recorded of them, [rows] each.
Rule = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]

_TRIES = 8  # draws before a rule is shown the allowed ids alone


def _draw(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(probabilities, 1)[:, 0]


def mixed(alpha: float, temperature: float, kd_temperature: float = 1.0) -> Rule:
    """MiniLLM's teacher-mixed sampling: `y ~ α p_T + (1 − α) p_S`.

    Records the log-probabilities of the token: `student` and `teacher` at the loss's temperature, `mixture` as sampled.

    References:
        Gu et al. 2024, section 2.2.
    """

    def rule(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mixture = alpha * (teacher / temperature).softmax(-1) + (1.0 - alpha) * (student / temperature).softmax(-1)
        ids = _draw(mixture)
        column = ids.unsqueeze(-1)
        recorded = {
            "student": (student / kd_temperature).log_softmax(-1).gather(1, column)[:, 0],
            "teacher": (teacher / kd_temperature).log_softmax(-1).gather(1, column)[:, 0],
            "mixture": mixture.gather(1, column)[:, 0].log(),
        }
        return ids, recorded

    return rule


def speculative(top_k: int, temperature: float) -> Rule:
    """Speculative KD: the student's token if it is among the teacher's K best, else one drawn from the teacher.

    Of equal logits the lower id is the better. The replacement is drawn from the whole of p_T, as in the paper's
    Algorithm 1. Records `accepted`, 1 or 0.

    References:
        Xu et al. 2025, Algorithm 1.
    """

    def rule(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        proposed = _draw((student / temperature).softmax(-1))
        score = teacher.gather(1, proposed.unsqueeze(-1))
        earlier = torch.arange(teacher.shape[1], device=teacher.device) < proposed.unsqueeze(-1)
        rank = ((teacher > score) | ((teacher == score) & earlier)).sum(-1)
        accepted = rank < top_k
        replacement = _draw((teacher / temperature).softmax(-1))
        return torch.where(accepted, proposed, replacement), {"accepted": accepted.float()}

    return rule


class InterleavedWriter:
    """Writes a batch of completions with both models: each step reads one token through each model's cache.

    Args:
        teacher: a causal language model of this process; None leaves the model that `write` is given to write alone.
        rule: who decides the next token.
        vocab_size: the shared ids; none beyond is written.
        without: ids among them that are not written either. A rule draws from all, and again where it drew one of these: what
            it records of a token does not depend on them.
        max_new_tokens: ids of a completion at most.
        ends: the ids that end one.
        pad_id: any id, for padding that no result depends on.
        autocast: the mixed-precision context of both models' forward passes.
    """

    def __init__(
        self,
        teacher: Any,
        rule: Rule,
        *,
        vocab_size: int,
        max_new_tokens: int,
        ends: Collection[int],
        pad_id: int,
        without: Collection[int] = (),
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.teacher, self.rule, self.without = teacher, rule, list(without)
        self.vocab_size, self.max_new_tokens = vocab_size, max_new_tokens
        self.ends, self.pad_id, self.autocast = list(ends), pad_id, autocast

    @torch.no_grad()
    def write(self, student: Any, prompt_ids: list[list[int]]) -> tuple[list[list[int]], dict[str, list[list[float]]]]:
        """Completions of at least one id each, their end included, and what the rule recorded of every id."""
        models = [student] if self.teacher is None else [student, self.teacher]
        with as_asked(*models):
            return self._write(models, prompt_ids)

    def _write(self, models: list[Any], prompt_ids: list[list[int]]) -> tuple[list[list[int]], dict[str, list[list[float]]]]:
        readers = [_Reader(model, prompt_ids, self.pad_id, self.autocast) for model in models]
        ends, without = (torch.tensor(ids, dtype=torch.long, device=readers[0].device) for ids in (self.ends, self.without))
        done = torch.zeros(len(prompt_ids), dtype=torch.bool, device=readers[0].device)
        ids: list[torch.Tensor] = []
        records: dict[str, list[torch.Tensor]] = {}
        lengths = torch.zeros(len(prompt_ids), dtype=torch.long, device=done.device)
        while True:
            logits = [reader.logits[:, : self.vocab_size].float().to(done.device) for reader in readers]
            chosen, recorded = self._next(logits[0], logits[-1], without)
            ids.append(chosen)
            for name, values in recorded.items():
                records.setdefault(name, []).append(values)
            lengths += ~done
            done |= torch.isin(chosen, ends)
            if len(ids) == self.max_new_tokens or bool(done.all()):
                break
            for reader in readers:
                reader.read(chosen)
        sizes = lengths.tolist()

        def by_row(columns: list[torch.Tensor]) -> list[list]:
            return [row[:size] for row, size in zip(torch.stack(columns, 1).tolist(), sizes, strict=True)]

        return by_row(ids), {name: by_row(columns) for name, columns in records.items()}

    def _next(
        self, student: torch.Tensor, teacher: torch.Tensor, without: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the rule takes, drawn again where that is not to be written; a rule that insists is shown the others alone."""
        chosen, recorded = self.rule(student, teacher)
        if not self.without:
            return chosen, recorded
        for tries in range(_TRIES + 1):
            wrong = torch.isin(chosen, without)
            if not bool(wrong.any()):
                break
            if tries == _TRIES:
                student, teacher = (logits.index_fill(-1, without, float("-inf")) for logits in (student, teacher))
            again, others = self.rule(student, teacher)
            chosen = torch.where(wrong, again, chosen)
            recorded = {name: torch.where(wrong, others[name], values) for name, values in recorded.items()}
        return chosen, recorded


class _Reader:
    """One model reading a left-padded batch: the logits of the next token, and the cache of what was read."""

    def __init__(self, model: Any, prompt_ids: list[list[int]], pad_id: int, autocast: Callable) -> None:
        self.model, self.autocast = model, autocast
        self.device = model.get_input_embeddings().weight.device
        longest = max(map(len, prompt_ids))
        padded = [[pad_id] * (longest - len(ids)) + ids for ids in prompt_ids]
        shown = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids]
        self.mask = torch.tensor(shown, device=self.device)
        self.position = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.cache = None
        self._forward(torch.tensor(padded, device=self.device), self.position)

    def _forward(self, ids: torch.Tensor, position: torch.Tensor) -> None:
        with self.autocast():
            output = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=position,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def read(self, ids: torch.Tensor) -> None:
        """Read one more token of each row, `[rows]`."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.position = self.position[:, -1:] + 1
        self._forward(ids.to(self.device).unsqueeze(-1), self.position)
