"""Tokenizers that cut texts differently, and models of them."""

from __future__ import annotations

import json
import random

import torch
from tiny import QUESTIONS, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tsdkd.demo.recreate import make_tokenizer

MANY = [*QUESTIONS, "Größe, naïve façade; 東京 and Москва 🙂 cost 12€."]


def byte_level(size: int = 400, texts=MANY) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2's and Qwen's are."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<end>"]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def sentence_piece(size: int = 300, texts=MANY) -> PreTrainedTokenizerFast:
    """A BPE with spaces as their own sign and bytes for what it does not know, as Llama 2's and Gemma's are."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        [text.encode("ascii", "ignore").decode() for text in texts],
        trainers.BpeTrainer(vocab_size=size + 256, special_tokens=special, show_progress=False),
    )
    data = json.loads(made.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), pad_token="<unk>", eos_token="</s>")


def prepending(size: int = 300) -> PreTrainedTokenizerFast:
    """Llama 2's layout: a sign of a space before every text, by a normalizer, and a beginning of text of its own."""
    made = sentence_piece(size)
    data = json.loads(made.backend_tokenizer.to_str())
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    data["pre_tokenizer"] = None
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [made.convert_tokens_to_ids("<s>")], "tokens": ["<s>"]}},
    }
    names = {"pad_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **names)


def save_stranger(folder, tokenizer, seed=2, hidden=48, **options):
    """A teacher of a tokenizer's own, in a folder."""
    ends = {"eos_token_id": tokenizer.eos_token_id}
    tiny_model("llama", vocab_size=len(tokenizer), hidden=hidden, seed=seed, **ends, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_renumbered(folder, seed=0):
    """The demo's tokenizer and a teacher twice: as they are, and with every id another; the two folders and the ids."""
    tokenizer, model = make_tokenizer(), tiny_model("llama", hidden=48, seed=2, vocab_size=60)
    order = list(range(60))
    random.Random(seed).shuffle(order)
    new = dict(enumerate(order))  # the old id to the new
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"] = {token: new[i] for token, i in data["model"]["vocab"].items()}
    data["added_tokens"] = [{**token, "id": new[token["id"]]} for token in data["added_tokens"]]
    names = {"pad_token": tokenizer.pad_token, "eos_token": tokenizer.eos_token, "unk_token": tokenizer.unk_token}
    renumbered = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **names)
    renumbered.chat_template = tokenizer.chat_template
    model.save_pretrained(folder / "same")
    tokenizer.save_pretrained(folder / "same")
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(layer.weight[torch.tensor(order).argsort()])
    model.config.eos_token_id = model.generation_config.eos_token_id = new[tokenizer.eos_token_id]
    model.save_pretrained(folder / "renumbered")
    renumbered.save_pretrained(folder / "renumbered")
    return str(folder / "same"), str(folder / "renumbered"), new
