"""What writes completions beside the training: the protocol, and TRL's connection to a vLLM server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list

logger = logging.getLogger(__name__)
# Of a request what leaves the distribution alone, or is said by `allowed`.
_NO_SAMPLING = {"stop_token_ids", "allowed_token_ids", "seed", "ignore_eos", "detokenize"}


@dataclass(frozen=True)
class Drawn:
    """Completions, and each token's log-probability as it was drawn, where the engine says it."""

    ids: list[list[int]]
    log_probs: list[list[float]] | None = None


class Engine(Protocol):
    """Writes beside the training, with the weights that it was given last.

    Attributes:
        temperature: at which its log-probabilities are taken; None where they are not those that tokens are drawn by.
        allowed: the ids that it draws from; None: all.
    """

    temperature: float | None
    allowed: Sequence[int] | None

    def sync(self) -> None:
        """Take the student's weights of now. Every process calls it, and only while nothing is being written."""
        ...

    def request(self, prompt_ids: list[list[int]], step: int) -> Callable[[], Drawn]:
        """What writes the completions of all processes' prompts, for a step; the first process calls it, in a thread."""
        ...


class ServerEngine:
    """TRL's connection to a vLLM server.

    Args:
        vllm: TRL's `vllm_generation`.
        seeded: a context in which the requests of a step have their seeds.
    """

    def __init__(self, vllm: Any, seeded: Callable[[str, int], Any]) -> None:
        self.vllm, self.seeded = vllm, seeded
        found: list[Any] = [None]
        if vllm.accelerator.is_main_process:
            try:
                found = [self._temperature()]
            except Exception as error:  # the others wait; without it no divergence is logged
                logger.warning("rollout/kl is not logged: the server does not say what its log-probabilities are (%s).", error)
        self.temperature: float | None = broadcast_object_list(found)[0]
        self.allowed = (vllm.generation_kwargs or {}).get("allowed_token_ids")

    def _temperature(self) -> float | None:
        """The temperature of the server's log-probabilities, where they are those of the tokens that it draws."""
        vllm = self.vllm
        whole = vllm.top_p == 1.0 and vllm.top_k <= 0 and not vllm.min_p and vllm.repetition_penalty == 1.0
        whole = whole and not set(vllm.generation_kwargs or {}) - _NO_SAMPLING
        mode = vllm.vllm_client.get_server_info()["model_config"].get("logprobs_mode")
        return vllm.temperature if whole and mode == "processed_logprobs" else None

    def sync(self) -> None:
        self.vllm.sync_weights()

    def request(self, prompt_ids: list[list[int]], step: int) -> Callable[[], Drawn]:
        vllm = self.vllm
        with self.seeded("train", step):
            more = dict(vllm.generation_kwargs or {})
        asked = {
            "n": 1,
            "repetition_penalty": vllm.repetition_penalty,
            "temperature": vllm.temperature,
            "top_p": vllm.top_p,
            "top_k": vllm.top_k,
            "min_p": vllm.min_p or 0.0,
            "max_tokens": vllm.max_completion_length,
            "logprobs": 0,
            "structured_outputs_regex": vllm.structured_outputs_regex,
            "generation_kwargs": more,
        }

        def write() -> Drawn:
            found = vllm.vllm_client.generate(prompts=prompt_ids, **asked)
            told = [[token[0] for token in row] for row in found["logprobs"] or []]
            whole = [len(row) for row in told] == [len(row) for row in found["completion_ids"]]
            sound = whole and all(value is not None for row in told for value in row)
            return Drawn(found["completion_ids"], told if sound else None)

        return write
