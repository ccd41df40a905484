"""A teacher of another tokenizer: each pair's loss by hand, and equal to the ordinary objective where only the ids differ."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from oracles_vocabularies import by_matching, by_sorting
from running import Gradients, by_prompt, general, rows
from tiny import QUESTIONS, config, prompts, save_tiny, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tongues import byte_level, prepending, save_renumbered, save_stranger, sentence_piece
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tsdkd import TokenDistillTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD, GOLD, TSDKD, ULD
from tsdkd.trainers.crossing import Crossing, end_of
from tsdkd.types import Rollouts

BIG = {"max_length": None, "teacher_batch_size": 3}


def ended(ids):
    """Completions of which some have an end."""
    made = [token for token in by_prompt(ids) if token > 3]
    return [*made, make_tokenizer().eos_token_id] if sum(ids) % 2 else made or [5]


def test_where_only_the_ids_differ_it_is_gkd(tmp_path):
    """A teacher whose every id is another, and the same with the student's: losses, gradient, evaluation."""
    same, renumbered, _ = save_renumbered(tmp_path)
    found = []
    for number, (teacher, method) in enumerate(((same, GKD(beta=0.5)), (same, GOLD()), (renumbered, GOLD()))):
        gradients = Gradients()
        options = {"max_steps": 2, "gradient_accumulation_steps": 2, "eval_dataset": prompts(5), "callbacks": [gradients]}
        student = tiny_model(seed=1, vocab_size=60)  # no rows that pad it: they are no tokens, and GOLD leaves them out
        trainer = general(tmp_path / str(number), method, student=student, teacher=teacher, rollouts=ended, **options)
        assert (trainer.loop.scorer.crossing is not None) == (teacher == renumbered)
        trainer.train()
        logged = [[row[name] for name in ("loss", "loss/direct", "teacher/entropy", "grad_norm")] for row in rows(trainer)]
        found.append((logged, trainer.evaluate()["eval_loss"], gradients.flat))
        if teacher == renumbered:
            assert rows(trainer)[0]["teacher/paired"] == 1.0
    for logged, loss, gradient in found[1:]:
        assert logged == [pytest.approx(row, rel=1e-4) for row in found[0][0]]
        assert loss == pytest.approx(found[0][1], rel=1e-4)
        torch.testing.assert_close(gradient, found[0][2], rtol=1e-3, atol=1e-6)


def expected_of(student, folder, method, questions, teacher_prompts=None):
    """The mean over pairs by hand: prefixes decoded one by one, row by row, no padding."""
    tokenizer, theirs = make_tokenizer(), AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    ours_at = {text: i for text, i in tokenizer.get_vocab().items()}
    total, count, tokens = 0.0, 0, 0
    for question, asked in zip(questions, teacher_prompts or questions, strict=True):
        prompt = tokenizer(question)["input_ids"]
        completion = ended(prompt)
        tokens += len(completion)
        is_ended = completion[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(completion[: len(completion) - is_ended])
        before = theirs(asked)["input_ids"]
        own = theirs(theirs.decode(before) + text, add_special_tokens=False)["input_ids"]
        assert own[: len(before)] == before
        own = own[len(before) :] + [theirs.eos_token_id] * is_ended
        with torch.no_grad():
            ours_l = student(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
            their_l = teacher(torch.tensor([before + own])).logits[0, len(before) - 1 : -1].double()
        starts, their_starts = prefixes(tokenizer, prompt, completion), prefixes(theirs, before, own)
        pairs = [(n, their_starts[text]) for text, n in starts.items() if text in their_starts]
        if method.alignment == "position":
            pairs = [(n, n) for n in range(min(len(completion), len(own)))]
        same = [(i, j) for word, i in ours_at.items() for w, j in theirs.get_vocab().items() if surface(w, theirs) == word]
        same = [pair for pair in same if pair[0] > 3] + [(tokenizer.eos_token_id, theirs.eos_token_id)]
        for n, m in pairs:
            s, t = ours_l[n].tolist(), their_l[m].tolist()
            share = len(same) / len(theirs)
            total += by_sorting(s, t) if isinstance(method, ULD) else by_matching(s, t, same, method.beta, share, 1 - share)
            count += 1
    return total / count, count / tokens


def prefixes(tokenizer, prompt, ids):
    """The text before each token of a completion, and the first token that it is before."""
    already, found = len(tokenizer.decode(prompt)), {}
    for n in range(len(ids)):
        found.setdefault(tokenizer.decode(prompt + ids[:n])[already:], n)
    return found


def surface(word, tokenizer):
    """The text of a token of either kind, where it is ASCII; a byte that a letter of the vocabulary is, too, is nothing."""
    if word.startswith("<0x"):
        letter = chr(int(word[3:5], 16))
        return None if letter in tokenizer.get_vocab() or letter == " " else letter
    return word.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")


@pytest.mark.parametrize("method", [ULD(), GOLD(), GOLD(beta=0.0), ULD(alignment="text")])
@pytest.mark.parametrize("tokenizer", [byte_level, sentence_piece])
def test_a_step_by_hand(tmp_path, method, tokenizer):
    folder, student = save_stranger(tmp_path / "teacher", tokenizer()), tiny_model(seed=1)
    wanted, share = expected_of(student, folder, method, QUESTIONS[:8])
    trainer = general(
        tmp_path / "out", method, student=student, teacher=folder, rollouts=ended, max_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, **BIG,
    )  # fmt: skip
    trainer.train()
    row = rows(trainer)[0]
    assert row["loss"] == pytest.approx(wanted, rel=1e-4) and row["teacher/paired"] == pytest.approx(share)
    assert trainer.vocab_size == 64 and "candidates/top1_agreement" not in row


def test_micro_batches_do_not_change_a_step(tmp_path):
    folder, flat = save_stranger(tmp_path / "teacher", byte_level()), []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        gradients = Gradients()
        general(
            tmp_path / str(size), GOLD(cross_entropy_weight=0.3), teacher=folder, rollouts=ended, callbacks=[gradients],
            max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **BIG,
        ).train()  # fmt: skip
        flat.append(gradients.flat)
    for other in flat[1:]:
        torch.testing.assert_close(other, flat[0], rtol=1e-4, atol=1e-6)


def test_its_own_prompts_a_swap_and_an_evaluation(tmp_path):
    folder, student = save_stranger(tmp_path / "teacher", byte_level()), tiny_model(seed=1)
    theirs = [f"{q} It is {n}." for n, q in enumerate(QUESTIONS[:6])]
    data = Dataset.from_dict({"prompt": QUESTIONS[:6], "teacher_prompt": theirs})
    wanted, _ = expected_of(student, folder, GOLD(), QUESTIONS[:6], theirs)
    trainer = general(
        tmp_path / "out", GOLD(), student=student, teacher=folder, data=data, eval_dataset=data, rollouts=ended,
        teacher_placement="swap", per_device_eval_batch_size=4, **BIG,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)


def test_a_teacher_of_little_context_reads_as_far_as_it_goes(tmp_path):
    """Completions that are longer in its tokens than the room left: what it does not read is paired with nothing."""
    letters = byte_level(258, ["a"])  # a token a byte
    folder = save_stranger(tmp_path / "teacher", letters, positions=128)
    student = tiny_model(seed=1)
    options = {"data": short(), "rollouts": lambda ids: [24] * 12, "max_steps": 1}
    trainer = general(tmp_path / "out", GOLD(), student=student, teacher=folder, **options)
    trainer.train()
    whole = len(make_tokenizer().decode([24]))
    room = 128 - len(QUESTIONS[0][:100])
    assert rows(trainer)[0]["teacher/paired"] == pytest.approx(min(12, -(-room // whole)) / 12)


def short():
    return Dataset.from_dict({"prompt": [q[:60] for q in QUESTIONS[:8]]})


def pairs_of(student, teacher, prompt, completion, alignment="text"):
    """What a teacher reads of a completion of the student's, and which of its tokens are paired."""
    asked = [tokenizer(prompt)["input_ids"] for tokenizer in (student, teacher)]
    crossing = Crossing(student, teacher, [student.eos_token_id], None, alignment, teacher.eos_token_id, (10**6, 10**6))
    rollouts = Rollouts([asked[0]], [completion], [[1] * len(completion)], teacher_prompt_ids=[asked[1]])
    read, plan = crossing.pair(rollouts)
    return teacher.decode(read.completion_ids[0]), plan.pairs[0]


@pytest.mark.parametrize("prompt", ["How many apples now?", "How many apples now? ", "How many app", "now?\n"])
@pytest.mark.parametrize("kind", [prepending, sentence_piece])
def test_a_family_that_begins_texts_with_a_space_reads_what_was_written(kind, prompt):
    """A completion alone would begin with a space that is not there, and nothing behind its first token would be paired."""
    student, teacher = byte_level(), kind()
    text = "Tom has 12 apples now. Tom buys 4 more."
    ids = [*student(text)["input_ids"], student.eos_token_id]
    read, pairs = pairs_of(student, teacher, prompt, ids)
    assert read.removesuffix("</s>").strip() == text
    assert len(pairs) >= len(ids) - 1 and pairs[-1] == len(ids) - 1  # "▁T" may reach across the first


def test_bytes_that_are_no_character_cost_their_own_tokens_alone():
    student, teacher = byte_level(), sentence_piece()
    rest = student(" 12 apples now. Tom buys 4 more.")["input_ids"]
    stray = student.convert_tokens_to_ids("ð")  # the first byte of four
    for middle in ([stray], [stray] * 3, student("\ufffd")["input_ids"]):
        ids = [*student("Tom has")["input_ids"], *middle, *rest, student.eos_token_id]
        read, pairs = pairs_of(student, teacher, "How many?", ids)
        assert "12 apples now. Tom buys 4 more." in read and len(pairs) >= len(rest)


def test_what_a_student_spells_is_text():
    student, teacher = byte_level(300, ["a"]), byte_level()
    ids = [i for letter in "a<end>b" for i in student(letter)["input_ids"]]
    asked = pairs_of(student, teacher, "Q", ids)[0]
    assert asked == "a<end>b" and teacher("a<end>b", split_special_tokens=True)["input_ids"].count(1) == 0


def test_the_end_is_what_the_teachers_turns_end_with():
    tokenizer, named = byte_level(), GenerationConfig(eos_token_id=[1, 70])
    letter = tokenizer.convert_ids_to_tokens(70)
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m['content'] }}}}{letter}{{% endfor %}}"
    assert end_of(tokenizer, named, chats=True) == 70 and end_of(tokenizer, named, chats=False) == 1
    assert end_of(tokenizer, GenerationConfig(eos_token_id=5), chats=True) == 5 and end_of(tokenizer, None, chats=True) == 1
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        end_of(tokenizer, None, chats=False)


def test_tokenizers_that_put_spaces_themselves_are_refused():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(QUESTIONS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"]))
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="[SEP]")
    with pytest.raises(ValueError, match="puts spaces between tokens by itself"):
        pairs_of(byte_level(), wordpiece, "Q", [70, 71])


def test_what_it_learns_is_the_strangers_text(tmp_path):
    """Twenty steps towards a teacher of other tokens bring the student nearer to it, as its loss on rows kept apart says."""
    folder = save_stranger(tmp_path / "teacher", byte_level())
    trainer = general(
        tmp_path / "out", GOLD(), teacher=folder, rollouts=ended, max_steps=20, learning_rate=1e-2,
        eval_dataset=prompts(12).select([8, 9, 10, 11]), **BIG,
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


def test_what_cannot_be_is_refused(tmp_path):
    folder = save_stranger(tmp_path / "teacher", byte_level())
    for method, told in (
        (TSDKD(), "the tokenizers disagree"),
        (ULD(selection="random"), "has a selection"),
    ):
        with pytest.raises(ValueError, match=told):
            general(tmp_path / "out", method, teacher=folder, rollouts=ended, **BIG).train()
    with pytest.raises(ValueError, match="what it writes are ids of its own"):
        general(tmp_path / "out", ULD(), teacher=folder, teacher_writes_missing=True, **BIG)
    both = {"a": folder, "b": save_tiny(tmp_path / "b", hidden=48)}
    data = prompts(8).add_column("teacher", ["a", "b"] * 4)
    with pytest.raises(ValueError, match="the teacher a is of another tokenizer, and there are several"):
        general(tmp_path / "out", ULD(), teacher=both, data=data, **BIG)
    trainer = general(tmp_path / "out", ULD(), teacher=folder, rollouts=ended, **BIG)
    with pytest.raises(ValueError, match="another tokenizer"):
        trainer.record(tmp_path / "recording")
    chats = prompts(8, chat=True)
    with pytest.raises(ValueError, match="no chat template"):
        TokenDistillTrainer(
            tiny_model(seed=1), folder, config(tmp_path / "o", cls=type(trainer.args), method="uld", max_length=None), chats,
            processing_class=make_tokenizer(),
        )  # fmt: skip
