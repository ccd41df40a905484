"""What the tests share: tiny models of real families, a tokenizer, prompts, and no network."""

from __future__ import annotations

import logging
import os

# Before transformers is imported: nothing may be fetched, and TRL's constructor would otherwise send telemetry.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

settings.register_profile("tsdkd", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("tsdkd")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _warnings_are_said():
    """The demo silences our own, for its process."""
    logging.getLogger("tsdkd").setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)  # models this small are slower on two
