"""How many tokens' logits stand in memory at a time."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)
_announced: set[tuple] = set()


def reads_are_free(device: torch.device) -> bool:
    """Whether looking at a tensor's values costs nothing: on a CPU, where no queue of kernels has to end first."""
    return device.type == "cpu"


def free_bytes(device: torch.device) -> int:
    """Memory that a new buffer may take, bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_chunk(chunk_tokens: int | str, tokens: int, vocab: int, item: int, device: torch.device, buffers: int = 2) -> int:
    """Tokens per chunk: as asked, or what a tenth of the free memory holds of so many `buffers` of logits, within bounds."""
    if chunk_tokens != "auto":
        if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={chunk_tokens!r}: a chunk holds one token or more; pass a whole number or 'auto'.")
        return chunk_tokens
    # Larger chunks read the heads less often; beyond these the gain is below a tenth.
    most = 512 if device.type == "cpu" else 2048
    affordable = free_bytes(device) // 10 // max(1, buffers * vocab * item)
    chunk = int(max(16, min(most, affordable)))
    announcement = (chunk, vocab, device.type)
    if announcement not in _announced:
        _announced.add(announcement)
        size = 2 * chunk * vocab * item / 2**20
        logger.info("chunk_tokens='auto': %d tokens a chunk, %.0f MiB for both models' logits of %d ids.", chunk, size, vocab)
    return chunk
