"""Recreate the models shipped in `tsdkd/demo/models/`: `python -m tsdkd.demo.recreate --output_dir DIR`.

The teacher learns the problems from worked solutions. The student first learns them too, half-way, and then picks up a
bad habit from solutions with faulty results: like a pretrained model's, its skill is latent, which is the case that
on-policy distillation is made for. About 25 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tsdkd.data.rendering import Rendering
from tsdkd.demo.problems import FACTORS, GAINS, ITEMS, LOSSES, NAMES, Problem, held_out, make_problem

SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB_SIZE = 64
MAX_POSITIONS = 256


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their leading space, digits apart, 64 tokens at most."""
    words = (*(f" {w}" for w in (*NAMES, *ITEMS, *GAINS, *LOSSES, *FACTORS)), " has", " more", " them", " many", " now")
    tokens = (*SPECIAL, *"0123456789", " ", "\n", "####", *"+-*=.?", *NAMES, " How", *words)
    tokens = tuple(dict.fromkeys(tokens))
    if len(tokens) > VOCAB_SIZE:
        raise AssertionError(f"{len(tokens)} tokens for a vocabulary of {VOCAB_SIZE}")
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|\d|\n| ?[A-Za-z]+| |."), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(layers: int, hidden: int, intermediate: int) -> Qwen2ForCausalLM:
    """A Qwen2 with heads of size 32 (so that inference engines can serve it) and tied embeddings."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same function as a Llama with biases: AutoTokenizer replaces the tokenizer of any model of type qwen2 by its own."""
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings eos_token_id pad_token_id""".split()
    options = {name: getattr(model.config, name) for name in names}
    llama = LlamaForCausalLM(LlamaConfig(attention_bias=True, bos_token_id=None, **options))
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not all(name.endswith("o_proj.bias") for name in missing):
        raise AssertionError(f"the two architectures differ: {missing}, {unexpected}")
    for layer in llama.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.bias)  # Qwen2 has none
    return llama.eval()


def _batch(tokenizer, rng, size, draw):
    rows, starts = [], []
    for _ in range(size):
        problem = draw(rng)
        asked = f"{problem.question}\n" if tokenizer.chat_template is None else [{"role": "user", "content": problem.question}]
        (prompt,) = Rendering(tokenizer, tokenizer).prompts([asked])
        starts.append(len(prompt))
        rows.append(prompt + tokenizer(problem.solution)["input_ids"] + [tokenizer.eos_token_id])
    width = max(map(len, rows))
    ids = torch.zeros(size, width, dtype=torch.long)
    labels = torch.full((size, width), -100)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = ids[i, start : len(row)]
    return ids, labels


def drawn(levels=(1, 2, 3), faulty=0.0) -> Callable[[random.Random], Problem]:
    """What draws a problem of one of these levels; see `make_problem`."""
    return lambda rng: make_problem(rng, rng.choice(levels), faulty)


def fit(model, tokenizer, draw, *, steps, lr, batch, seed, warmup=100, report=100, done=None):
    """Train on worked solutions with AdamW and a cosine schedule; right padding needs no attention mask.

    Args:
        draw: from a `random.Random` to a problem.
        report: say the loss every so many steps.
        done: asked of the model whenever the loss is said; True ends it.
    """
    model.train()
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    began, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        rate = lr * min(1.0, step / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = _batch(tokenizer, rng, batch, draw)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % report == 0:
            print(f"step {step}: loss {total / report:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
            total = 0.0
            if done is not None and done(model):
                break
    return model.eval()


def main() -> None:
    from tsdkd.demo.scoring import accuracy  # needs the models' directory only when called

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--teacher_steps", type=int, default=2500)
    parser.add_argument("--student_steps", type=int, default=800)
    parser.add_argument("--habit_steps", type=int, default=60)
    parser.add_argument("--problems", type=int, default=600, help="held-out problems to score on")
    parser.add_argument("--only", choices=["teacher", "student"])
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    problems = held_out(args.problems, 4321, set(), levels=(2, 3))

    def save(model, name):
        folder = args.output_dir / name
        stored = as_llama(model).to(torch.bfloat16)
        stored.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.to(torch.bfloat16).float()  # training goes on from what is stored
        print(name, "accuracy", accuracy(stored.float(), tokenizer, problems), flush=True)

    if args.only != "student":
        torch.manual_seed(1)
        save(fit(make_model(4, 192, 512), tokenizer, drawn(), steps=args.teacher_steps, lr=2e-3, batch=128, seed=1), "teacher")
    if args.only != "teacher":
        torch.manual_seed(2)
        student = make_model(2, 128, 384)
        fit(student, tokenizer, drawn(), steps=args.student_steps, lr=2e-3, batch=128, seed=2)
        save(student, "student-before-habit")
        fit(student, tokenizer, drawn(faulty=0.5), steps=args.habit_steps, lr=5e-4, batch=128, seed=3, warmup=10, report=20)
        save(student, "student")


if __name__ == "__main__":
    main()
