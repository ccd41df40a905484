"""What vLLM says of the tokens that it writes with the student's weights of now, to compare with the trainer's own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

BEST = 20  # tokens whose probabilities are asked for; vLLM gives no more unless it is started so
_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": BEST}


def written_and_scored(
    vllm: Any, prompt_ids: Sequence[list[int]], tokens: int
) -> tuple[list[list[int]], list[list[dict[int, float]]]]:
    """Completions drawn at temperature 1 from all that may be sampled, and at each of their tokens log p of the likeliest.

    Args:
        vllm: TRL's `vllm_generation`, colocated or a server's.
        prompt_ids: the prompts.
        tokens: of a completion at most.

    Returns:
        the completions' ids, and for each of their tokens `{id: log p}` of the `BEST` likeliest and the one drawn.
    """
    vllm.sync_weights()
    with _set(vllm, {**_PLAIN, "max_completion_length": tokens}):
        _, completions, values, ids = vllm.generate(prompts=list(prompt_ids), images=None, num_generations=1)
    found = []
    for row_values, row_ids in zip(values, ids, strict=True):
        pairs = [zip(at, best, strict=True) for at, best in zip(row_ids, row_values, strict=True)]
        found.append([{token: value for token, value in pair if value is not None} for pair in pairs])
    return [list(row) for row in completions], found


@contextmanager
def _set(thing: Any, values: dict[str, Any]) -> Iterator[None]:
    kept = {name: getattr(thing, name) for name in values}
    vars(thing).update(values)
    try:
        yield
    finally:
        vars(thing).update(kept)
