"""Prompts with images: what both models read of them, each row by hand, without padding and by its own processor's call."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from oracles import generalized_jsd
from running import Gradients, by_prompt, general, make, rows
from seeing import picture, processor, seen_rows, tiny_llava
from tiny import QUESTIONS, config, prompts, tiny_model

from tsdkd import TokenDistillConfig, TokenDistillTrainer
from tsdkd.inspection.reader import Reader
from tsdkd.teachers.several import _with_empty
from tsdkd.trainers.vision import refuse_images_of_tools
from tsdkd.types import Rollouts

MODELS = {"processing_class": processor(), "max_length": None}


def written(ids):
    """Completions without the places of images, which by_prompt may hold."""
    return [token if token < 60 else 5 for token in by_prompt(ids)]


def by_hand(student, teacher, pictures):
    """The mean JSD over all completion tokens; the pictures' pixels by the image processor alone."""
    asked, total, count = processor(), 0.0, 0
    for question, images in zip(QUESTIONS, pictures, strict=False):
        ids = asked.tokenizer("<image>" * (4 * len(images)) + question)["input_ids"]
        completion = written(ids)
        pixels = {"pixel_values": asked.image_processor(images=images, return_tensors="pt")["pixel_values"]} if images else {}
        whole = torch.tensor([ids + completion])
        with torch.no_grad():
            ours, theirs = (m(whole, **pixels).logits[0, len(ids) - 1 : -1].double() for m in (student, teacher))
        for a, b in zip(ours, theirs, strict=True):
            total, count = total + float(generalized_jsd(a.tolist(), b.tolist(), 0.5)), count + 1
    return total / count


def seeing(folder, data, student=None, teacher=None, **options):
    models = {"student": student or tiny_llava(1), "teacher": teacher or tiny_llava(2, hidden=48)}
    return make(folder, **models, data=data, **MODELS, **options)


@pytest.mark.parametrize("kind", ["one each", "none, one or two", "in the chat"])
def test_a_step_reads_each_rows_images_by_both_models(tmp_path, kind):
    pictures = [[picture(n)] for n in range(8)]
    data = seen_rows()
    if kind == "none, one or two":
        pictures = [[picture(n + k) for k in range(n % 3)] for n in range(8)]
        data = seen_rows(column="images", every=3)
    elif kind == "in the chat":
        parts = [[{"type": "image"}, {"type": "text", "text": q}] for q in QUESTIONS[:8]]
        chats = [[{"role": "user", "content": content}] for content in parts]
        data = data.remove_columns("prompt").add_column("prompt", chats)
    student, teacher = tiny_llava(1), tiny_llava(2, hidden=48)
    wanted, blind = by_hand(student, teacher, pictures), by_hand(student, teacher, [[picture(3)]] * 8)
    assert abs(wanted - blind) > 1e-3

    options = config(
        tmp_path, TokenDistillConfig, method="gkd", method_options={"beta": 0.5}, max_steps=1, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_length=None,
    )  # fmt: skip
    trainer = TokenDistillTrainer(student, teacher, options, data, data, processing_class=processor())
    trainer.write = lambda prompt_ids, *args, **kwargs: [written(ids) for ids in prompt_ids]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    trainer.train()
    assert rows(trainer)[0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_micro_batches_a_swap_and_an_adapter_do_not_change_a_step(tmp_path):
    from peft import LoraConfig

    flat, data = [], seen_rows(column="images", every=3)
    for size, accumulation, where in ((8, 1, "local"), (2, 4, "local"), (1, 8, "swap")):
        gradients = Gradients()
        adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
        torch.manual_seed(3)
        trainer = seeing(
            tmp_path / str(size), data, rollouts=written, callbacks=[gradients], max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, teacher_batch_size=3, teacher_placement=where, peft_config=adapter,
        )  # fmt: skip
        with torch.no_grad():
            for number, parameter in enumerate(p for p in trainer.model.parameters() if p.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
        trainer.train()
        flat.append(gradients.flat)
    for other in flat[1:]:
        torch.testing.assert_close(other, flat[0], rtol=1e-4, atol=1e-6)
    assert flat[0].abs().max() > 1e-5


def test_it_writes_with_them_and_never_a_place_of_one(tmp_path):
    trainer = seeing(tmp_path, seen_rows(), max_steps=2, max_completion_length=40)
    assert 60 in trainer.unknown_ids
    found = []
    prepare = trainer.loop.prepare
    trainer.loop.prepare = lambda rollouts: found.append(rollouts) or prepare(rollouts)
    trainer.train()
    assert all(60 not in ids for rollouts in found for ids in rollouts.completion_ids)
    assert all(ids[:4] == [60] * 4 for rollouts in found for ids in rollouts.prompt_ids)
    reader = Reader(trainer)
    looked = reader.rollouts([dict(row) for row in seen_rows(2)])
    assert looked.vision is not None and looked.vision[0]["pixel_values"].shape == (1, 3, 8, 8)
    assert len(reader.table(looked.rows([0])).tokens) == len(looked.completion_ids[0])


def test_a_run_goes_on_bit_for_bit_and_a_finished_one_has_what_it_learnt(tmp_path):
    """transformers writes this family's weights under other names than the model has, and passes them over when it loads."""

    def run(checkpoint=None):
        trainer = seeing(
            tmp_path, seen_rows(), rollouts=written, max_steps=3, save_strategy="steps", save_steps=1, learning_rate=1e-2
        )  # fmt: skip
        trainer.train(checkpoint and str(tmp_path / checkpoint))
        return [row["loss"] for row in rows(trainer)], torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    losses, weights = run()
    for checkpoint in ("checkpoint-1", "checkpoint-3"):
        again, others = run(checkpoint)
        assert torch.equal(others, weights) and again == losses


def test_rows_in_a_list_hold_pictures_as_people_put_them(tmp_path):
    """In a column or in the chat, some rows without: the same as a data set's."""
    questions = QUESTIONS[:8]
    turns = [[{"role": "user", "content": q}] for q in questions]
    parts = [[{"type": "image", "image": picture(n)}, {"type": "text", "text": q}] for n, q in enumerate(questions)]
    given = [
        seen_rows(),
        [{"prompt": turn, "image": picture(n)} for n, turn in enumerate(turns)],
        [{"prompt": [{"role": "user", "content": content}]} for content in parts],
    ]
    losses = []
    for number, data in enumerate(given):
        trainer = seeing(tmp_path / str(number), data, rollouts=written, max_steps=1, per_device_train_batch_size=8)
        trainer.train()
        losses.append(rows(trainer)[0]["loss"])
    assert losses == [losses[0]] * 3
    both = [{**given[2][0], "image": picture(0)}] * 8
    with pytest.raises(ValueError, match="row 0 of train_dataset has images in its prompt and in a column"):
        seeing(tmp_path / "both", both)


def test_rows_with_images_in_chats_and_without_go_together(tmp_path):
    """The first row has none, too; and rows that are read so that processes read as many have none to lose."""
    shown = [[{"type": "image", "image": picture(n)}, {"type": "text", "text": q}] for n, q in enumerate(QUESTIONS[:8])]
    mixed = [{"prompt": [{"role": "user", "content": shown[n] if n % 2 else QUESTIONS[n]}]} for n in range(8)]
    student, teacher = tiny_llava(1), tiny_llava(2, hidden=48)
    trainer = seeing(tmp_path, mixed, student=student, teacher=teacher, rollouts=written, eval_dataset=mixed)
    found = []
    prepare = trainer.loop.prepare
    trainer.loop.prepare = lambda rollouts: found.append(rollouts) or prepare(rollouts)
    trainer.evaluate()
    kinds = sorted("pixel_values" in row for rollouts in found for row in rollouts.vision)
    assert kinds == [False] * 4 + [True] * 4
    rollouts = found[0]
    more = _with_empty(rollouts, 2)
    assert len(more.vision) == len(more) == len(rollouts) + 2 and more.beside("cpu").keys() == rollouts.beside("cpu").keys()


def test_text_alone_is_as_before(tmp_path):
    trainer = seeing(tmp_path, prompts(8, chat=True), rollouts=written, max_steps=1)
    trainer.train()
    assert rows(trainer)[0]["loss"] > 0


def test_rows_of_unlike_shapes_are_filled_and_token_types_follow_the_ids():
    vision = [
        {"pixel_values": torch.ones(1, 2, 3), "mm_token_type_ids": torch.tensor([[1, 1, 0]])},
        {},
        {"pixel_values": torch.full((2, 1, 4), 2.0), "mm_token_type_ids": torch.tensor([[0, 1]])},
    ]
    rollouts = Rollouts([[7, 8, 9], [5], [6, 6]], [[1], [2, 2, 2, 2, 2], [3]], [[1], [1] * 5, [1]], vision=vision)
    beside = rollouts.beside("cpu")
    assert beside["pixel_values"].shape == (3, 2, 4)
    assert beside["pixel_values"][0, :, :3].eq(1).all() and beside["pixel_values"][0, :, 3].eq(0).all()
    assert beside["pixel_values"][1, 0].eq(2).all() and beside["pixel_values"][1, 1].eq(0).all()
    assert beside["mm_token_type_ids"].tolist() == [[1, 1, 0, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
    some = rollouts.rows([2]).first([1])
    assert some.beside("cpu")["pixel_values"].shape == (2, 1, 4) and rollouts.for_teacher.vision is vision
    assert Rollouts([[1]], [[2]], [[1]]).beside("cpu") == {}


def test_what_cannot_see_is_refused(tmp_path):
    data = seen_rows()
    for options, told in (
        ({"student": tiny_model(seed=1)}, "has images: the student reads text alone"),
        ({"teacher": tiny_model(seed=2)}, "has images, and the teacher reads text alone"),
        ({"data": data.add_column("teacher_prompt", QUESTIONS[:8])}, "has images, and a teacher_prompt"),
    ):
        with pytest.raises(ValueError, match=told):
            seeing(tmp_path, **{"data": data, **options})
    with pytest.raises(ValueError, match="has images, and seq_kd trains on given completions"):
        general(tmp_path, "seq_kd", student=tiny_llava(1), teacher=tiny_llava(2), data=data.add_column("completion", ["1"] * 8))
    with pytest.raises(ValueError, match="a recording holds texts, and these prompts have images"):
        seeing(tmp_path / "out", data, rollouts=written).record(tmp_path / "recording")
    texts = data.remove_columns("prompt").add_column("prompt", QUESTIONS[:8])
    with pytest.raises(ValueError, match="has images, and its prompts are texts"):
        seeing(tmp_path, texts)
    other = tiny_llava(2)
    other.config.image_token_id = 59
    with pytest.raises(ValueError, match="other ids for the place of one"):
        seeing(tmp_path, data, teacher=other)
    sounds = [[{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "?"}]}]] * 8
    with pytest.raises(ValueError, match="parts that are neither texts nor images"):
        seeing(tmp_path, Dataset.from_dict({"prompt": sounds}))
    with pytest.raises(ValueError, match="a tool answered with an image"):
        refuse_images_of_tools([[], [picture(1)]])
