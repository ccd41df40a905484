"""A student of another width with another tokenizer than the demo's, for systems that teach two: made in a minute or two."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tsdkd.demo.problems import make_problems
from tsdkd.demo.recreate import drawn, fit

SPECIAL = ("<pad>", "</s>")
VOCAB_SIZE = 320
MAX_POSITIONS = 256


def byte_level_bpe(texts: Iterable[str], vocab_size: int, positions: int = MAX_POSITIONS) -> PreTrainedTokenizerFast:
    """Byte-level BPE of texts, digits apart, without a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )


def make_second_tokenizer() -> PreTrainedTokenizerFast:
    """That of the demo's problems."""
    return byte_level_bpe((f"{p.question}\n{p.solution}" for p in make_problems(500, seed=12)), VOCAB_SIZE)


def make_blank(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 96,
    seed: int = 3,
    *,
    layers: int = 2,
    key_value_heads: int = 1,
    vocab_size: int | None = None,
) -> LlamaForCausalLM:
    """An untrained model for a tokenizer, of as many rows as it has tokens where `vocab_size` is not given."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_second_student(folder: Path, steps: int = 1200, habit: int = 60, hidden: int = 96, seed: int = 3) -> Path:
    """Train one on worked solutions, then give it the demo's habit of miscounting, and write it into a folder.

    Of equal arguments the same on one machine.
    """
    tokenizer = make_second_tokenizer()
    model = make_blank(tokenizer, hidden, seed)
    fit(model, tokenizer, drawn((1, 2)), steps=steps, lr=3e-3, batch=64, seed=seed, warmup=50, report=steps)
    fit(model, tokenizer, drawn((1, 2), 0.5), steps=habit, lr=5e-4, batch=64, seed=seed + 1, warmup=10, report=habit)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
