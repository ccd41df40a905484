"""A model's completions by vLLM, in this process, for as long as they are written."""

from __future__ import annotations

import gc
from collections.abc import Collection
from typing import Any

import torch


def forbidden(ids: Collection[int]) -> dict[int, float]:
    """A bias that vLLM adds to the logits of some ids: with it none is ever sampled."""
    return dict.fromkeys(ids, -100.0)


class VLLMWriter:
    """Writes completions to batches of prompts with a vLLM engine of its own; `close` gives its memory back.

    Args:
        model: the name or folder of a checkpoint.
        temperature: 0 is greedy.
        max_new_tokens: ids of a completion at most.
        ends: the ids that end one.
        vocab_size: no id from here on is written.
        without: further ids that are not.
        engine: further arguments of `vllm.LLM`.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        temperature: float,
        max_new_tokens: int,
        ends: Collection[int],
        vocab_size: int,
        without: Collection[int] = (),
        **engine: Any,
    ) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ValueError(
                f"completions by vLLM need the package vllm, which cannot be imported here ({error}): pip install "
                "'tsdkd[vllm]', or let transformers write them (teacher_answers_engine=transformers)."
            ) from error
        self._engine = LLM(model=model, **engine)
        size = self._engine.llm_engine.model_config.get_vocab_size()
        self._sampling = SamplingParams(
            temperature=temperature,
            max_tokens=max_new_tokens,
            stop_token_ids=list(ends),
            allowed_token_ids=list(range(vocab_size)) if size > vocab_size else None,
            logit_bias=forbidden(without) or None,
            detokenize=False,
        )

    def __call__(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        prompts: Any = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = self._engine.generate(prompts, self._sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Give the engine's memory back."""
        del self._engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
