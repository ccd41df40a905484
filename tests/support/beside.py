"""An engine that writes beside the training, as a vLLM server does, with a copy of the student's weights."""

from __future__ import annotations

import copy
import hashlib

import torch

from tsdkd.trainers.beside import Drawn


class Stub:
    """Draws with the weights that it was given last; the draws depend on prompt and step alone.

    Args:
        trainer: whose student writes.
        length: tokens of a completion.
        before: called in the thread before anything is written.
    """

    temperature: float | None = 1.0
    allowed = None

    def __init__(self, trainer, length=10, before=lambda step: None):
        self.trainer, self.length, self.before = trainer, length, before
        self.model, self.synced, self.asked = None, [], []

    def sync(self):
        self.model = copy.deepcopy(self.trainer.accelerator.unwrap_model(self.trainer.model)).eval()
        self.synced.append(self.trainer.step)

    def request(self, prompt_ids, step):
        model = self.model
        self.asked.append((step, self.synced[-1], prompt_ids))

        def write():
            self.before(step)
            rows = [drawn(model, ids, self.length, step) for ids in prompt_ids]
            return Drawn([ids for ids, _ in rows], [log_probs for _, log_probs in rows])

        return write


@torch.no_grad()
def drawn(model, prompt, length, step):
    """One completion and its tokens' log-probabilities."""
    digest = hashlib.sha256(repr((prompt, step)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    ids, log_probs = list(prompt), []
    for _ in range(length):
        log_p = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        token = int(torch.multinomial(log_p.exp(), 1, generator=generator))
        ids.append(token)
        log_probs.append(log_p[token].item())
        if token == 1:
            break
    return ids[len(prompt) :], log_probs
