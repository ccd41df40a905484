"""Tiny models that read images, of two families, and rows with images."""

from __future__ import annotations

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from tiny import QUESTIONS
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tsdkd.demo.recreate import make_tokenizer

SIZE = 8  # pixels, four patches
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def processor() -> LlavaProcessor:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.image_token = "<image>"
    square = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square)
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def tiny_llava(seed: int, hidden: int = 32) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    image = make_tokenizer().vocab_size
    options = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, image_size=SIZE, patch_size=4, projection_dim=16, **options
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_key_value_heads=1, head_dim=16,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0, **options,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1, image_seq_length=4
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(20)  # images are to matter
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    return model


COLOURS = ["red", "green", "blue", "white", "black", "yellow", "grey", "orange"]


def picture(number: int):
    made = Pictures.new("RGB", (SIZE + number % 3, SIZE), COLOURS[number % len(COLOURS)])
    made.putpixel((number % SIZE, 2), (9, 99, 199))
    return made


def seen_rows(count: int = 8, column: str = "image", every: int = 1) -> Dataset:
    """Rows with one picture each, or, in a column `images`, with none, one or two."""
    prompts = [[{"role": "user", "content": q}] for q in QUESTIONS[:count]]
    if column == "image":
        return Dataset.from_dict({"prompt": prompts, "image": [picture(n) for n in range(count)]}).cast_column("image", Image())
    turn = [{"role": Value("string"), "content": Value("string")}]
    pictures = [[picture(n + k) for k in range(n % 3 if every > 1 else 1)] for n in range(count)]
    return Dataset.from_dict(
        {"prompt": prompts, "images": pictures}, features=Features({"prompt": turn, "images": List(Image())})
    )  # fmt: skip
