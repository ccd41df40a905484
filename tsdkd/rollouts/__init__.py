"""Who writes the answers that a step trains on: which source is drawn, and the writers beside the student itself."""

from tsdkd.rollouts.by_vllm import VLLMWriter
from tsdkd.rollouts.interleaved import InterleavedWriter, mixed, speculative
from tsdkd.rollouts.sources import AnswerSource
from tsdkd.rollouts.written_once import write_once

__all__ = ["AnswerSource", "InterleavedWriter", "VLLMWriter", "mixed", "speculative", "write_once"]
