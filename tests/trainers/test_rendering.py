"""Rows to ids: what a template renders is what is trained, and a text begins and ends once."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset
from running import general, make
from tiny import config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tsdkd import TokenDistillConfig, TokenDistillTrainer
from tsdkd.data.completions import completion_turn
from tsdkd.data.rendering import Rendering, continued
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import SupervisedKD

USER = {"role": "user", "content": "Tom has 12 apples."}
# Of Qwen3's shape: reasoning stands in its own field, tools in front, tool calls behind.
QWEN = (
    "{% if tools %}[{% for t in tools %}{{ t.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content is defined and m.reasoning_content is not none %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}"
    "{{ m.content or '' }}{% if m.tool_calls %}{% for c in m.tool_calls %}({{ c.function.name }}){% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)
# Of DeepSeek-R1's: the generation prompt opens <think>, past turns lose their reasoning.
R1 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def tokenizer(template):
    made = make_tokenizer()
    made.add_tokens(["<think>", "</think>", "\n", "[", "]", "(", ")", "_"])
    made.chat_template = template
    return made


def framed(begin=True, end=True):
    """A tokenizer of words that puts <s> before a text and </s> behind it."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<s>", "a", "b", "c", "d", "<unk>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = f"{'<s> ' if begin else ''}$A{' </s>' if end else ''}"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 2), ("</s>", 1)])
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def trained(template, row, limit=60):
    """Prompt and completion of a row as one text."""
    made = tokenizer(template)
    rendering = Rendering(made, made)
    (prompt,), ((ids, _),) = rendering.prompts([row]), rendering.completions([row], [row["completion"]], limit)
    return made.decode(prompt), made.decode(ids)


# ---------------------------------------------------------------------- beginnings and ends


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_a_text_begins_once_and_a_prompt_does_not_end(begin, end):
    made = framed(begin, end)
    rendering = Rendering(made, made)
    first = [2] if begin else []
    assert rendering.frame == (first, [1] if end else [])
    assert rendering.prompts(["a b"]) == [[*first, 3, 4]]
    assert rendering.prompts(["<s> a b"]) == [[2, 3, 4]]  # rendered already
    assert rendering.texts(["a b"]) == [[*first, 3, 4, *([1] if end else [])]]
    for text in (" c d", " c d </s>", " c d </s> a"):
        assert rendering.completions(["a b"], [text], 9) == [([5, 6, 1], False)]
    assert rendering.completions(["<s> a b"], [" c d"], 2) == [([5, 6], True)]


def test_the_student_does_not_write_behind_an_end_that_its_tokenizer_appends(tmp_path):
    trainer = make(tmp_path, student=tiny_model(seed=1, vocab_size=8), teacher=tiny_model(seed=2, vocab_size=8, hidden=48),
                   data=Dataset.from_dict({"prompt": ["a b c", "d c"] * 4}), processing_class=framed(), num_candidates=4,
                   opener_entropy_share=0.5)  # fmt: skip
    seen = []
    trainer.write = lambda ids, *args, **kwargs: seen.extend(ids) or [[3, 1]] * len(ids)
    trainer.train()
    assert {tuple(ids) for ids in seen} == {(2, 3, 4, 5), (2, 6, 5)}


# ---------------------------------------------------------------------- think tags


@pytest.mark.parametrize("text", ["<think>\n1+2</think>3", "1+2</think>3", "<think>1+2</think>3"])
def test_reasoning_that_the_prompt_opens_is_trained_once(text):
    row = {"prompt": [USER], "completion": [{"role": "assistant", "content": text}]}
    prompt, completion = trained(R1, row)
    assert prompt.endswith("<|assistant|><think>\n") and completion == "1+2</think>3<|end|>"


def test_a_completion_without_the_reasoning_that_the_prompt_opens_is_refused_with_its_row(tmp_path):
    rows = [{"prompt": [USER], "completion": [{"role": "assistant", "content": t}]} for t in ("1</think>2", "2")] * 2
    learner, teacher = (tiny_model(seed=s, vocab_size=80, hidden=h) for s, h in ((1, 32), (2, 48)))
    with pytest.raises(ValueError, match=r"completion of row 1 of train_dataset .*opens <think> .* has no </think>"):
        TokenDistillTrainer(learner, teacher, config(tmp_path, TokenDistillConfig), Dataset.from_list(rows),
                            method=SupervisedKD(), processing_class=tokenizer(R1))  # fmt: skip


def test_a_rendered_text_prompt_opens_reasoning_once_too():
    made = tokenizer(R1)
    rendering = Rendering(made, made)
    ((ids, _),) = rendering.completions(["Tom<|assistant|><think>"], ["<think>1</think>2"], 20)
    assert made.decode(ids) == "1</think>2<|end|>"
    assert continued("a [THINK]", "[THINK]b[/THINK]c") == "b[/THINK]c" and continued("a", "<think>b") == "<think>b"


# ---------------------------------------------------------------------- what a chat's row holds


def test_every_field_that_the_template_renders_is_trained():
    turn = {"role": "assistant", "content": "3", "reasoning_content": "1+2", "tool_calls": None}
    assert trained(QWEN, {"prompt": [USER], "completion": [turn]})[1] == "<think>1+2</think>3<|end|>"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "Tom", "arguments": {"a": 1}}}]}
    assert trained(QWEN, {"prompt": [USER], "completion": [call]})[1] == "(Tom)<|end|>"
    row = {"prompt": [USER], "completion": "3", "chat_template_kwargs": {"enable_thinking": False}}
    assert trained(QWEN, row)[0].endswith("<|assistant|><think></think>")
    parts = {"role": "user", "content": [{"type": "text", "text": "Tom "}, {"type": "text", "text": "has 1."}]}
    assert trained(QWEN, {"prompt": [parts], "completion": "3"})[0] == "<|user|>Tom has 1.<|end|><|assistant|>"


def test_keys_that_arrow_fills_with_none_are_not_there():
    chats = [
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "Tom"}}]}, USER],
        [USER],
    ]
    data = Dataset.from_list([{"prompt": chat} for chat in chats])
    assert data[1]["prompt"][0]["tool_calls"] is None
    template = "{% for m in messages %}{% if 'tool_calls' in m %}={% endif %}{{ m.content }}{% endfor %}"
    made = tokenizer(template)
    with_call, without = (made.decode(ids) for ids in Rendering(made, made).prompts(list(data)))
    assert with_call.count("=") == 1 and "=" not in without


def test_each_row_has_its_own_tools():
    made = tokenizer(QWEN)
    rendering = Rendering(made, made)
    rows = [
        {"prompt": [USER], "tools": [{"name": "Tom"}]},
        {"prompt": [USER], "tools": None},
        {"prompt": [USER], "tools": json.dumps([{"name": "Ann"}, {"name": " Ben"}])},
        {"prompt": [USER], "tools": [{"name": "Tom"}]},
    ]
    shown = [made.decode(ids).split("<|user|>")[0] for ids in rendering.prompts(rows)]
    assert shown == ["[Tom]", "", "[Ann Ben]", "[Tom]"]
    for tools, message in (("{", "no JSON"), ([3], "list of JSON schemas"), ({"a": 1}, "dict")):
        with pytest.raises(ValueError, match=message):
            rendering.prompts([{"prompt": [USER], "tools": tools}])


def test_tools_that_no_template_renders_are_refused_and_fields_are_named(tmp_path, caplog):
    rows = [{"prompt": [USER]}] * 3 + [{"prompt": [USER], "tools": [{"name": "Tom"}]}]
    with pytest.raises(ValueError, match=r"row 3 of train_dataset has tools, and the chat template renders none of them"):
        make(tmp_path, data=rows)
    named = {"prompt": [{**USER, "name": "Tom"}]}
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        make(tmp_path, data=[named] * 4)
    assert caplog.text.count("row 0 of train_dataset has name, of which the chat template renders nothing") == 1


def test_tools_of_rows_reach_the_rollouts(tmp_path):
    made = tokenizer(QWEN)
    rows = [{"prompt": [USER], "tools": [{"name": name}]} for name in ("Tom", "Ann", "Ben", "Eva")]
    models = {"student": tiny_model(seed=1, vocab_size=80), "teacher": tiny_model(seed=2, vocab_size=80, hidden=48)}
    trainer = make(tmp_path, data=rows, processing_class=made, max_steps=1, **models)
    seen = []
    trainer.write = lambda ids, *args, **kwargs: seen.extend(made.decode(i)[:5] for i in ids) or [[5, 1]] * len(ids)
    trainer.train()
    assert sorted(seen) == ["[Ann]", "[Ben]", "[Eva]", "[Tom]"]


@pytest.mark.parametrize(
    "prompt,message",
    [
        (
            [USER, {"role": "assistant", "content": "3"}],
            r"chats that end in an assistant's turn .*\(row 0\)|\(rows 0, 1, 2, 3\)",
        ),
        ([{"role": "user"}], "a list that is not chat messages"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "has images: the student reads text alone"),
    ],
)
def test_chats_that_are_no_prompts_are_refused(tmp_path, prompt, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data=[{"prompt": prompt}] * 4)


def test_a_completion_of_several_turns_is_refused_with_whose_they_are(tmp_path):
    turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    data = Dataset.from_list([{"prompt": [USER], "completion": turns}] * 4)
    with pytest.raises(ValueError, match=r"4 completions without text, the first in row 0"):
        general(tmp_path, SupervisedKD(), data=data)


# ---------------------------------------------------------------------- what an outside tester broke


def test_a_tool_call_is_trained_as_it_was_given_whatever_other_rows_hold():
    """Arrow gives every row the keys, the types and the order of all."""
    from tsdkd.data.files import data_set

    calls = [{"city": "P"}, {"n": 1, "content": "x"}, {"n": 2.5}, {"b": 1, "a": 2}, {"a": None}]
    rows = [
        {
            "prompt": [USER],
            "completion": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": a}}]}],
            "tools": [{"name": "f", "minimum": 0, "properties": a}],
        }
        for a in calls
    ]
    made = make_tokenizer()
    made.chat_template = "{% for m in messages %}{{ m.tool_calls | tojson }}{% endfor %}{{ tools | tojson }}"
    rendering = Rendering(made, made)
    for row, given in zip(data_set(rows, "rows"), rows, strict=True):
        (text,) = rendering._chats([([completion_turn(row["completion"])], row)], tokenize=False)
        assert text == json.dumps(given["completion"][0]["tool_calls"]) + json.dumps(given["tools"])


@pytest.mark.parametrize("ending", ["#include <vector>", "Dear [name]", "start with <html>"])
def test_a_bracketed_word_at_a_texts_end_opens_nothing(ending):
    made = framed(False, False)
    rendering = Rendering(made, made)
    tag = ending.split()[-1]
    ((ids, _),) = rendering.completions([f"a {ending}"], [f" {tag} b"], 9)
    assert ids == [7, 4, 1]  # the tag's unknown word, b, the end


def test_a_turn_that_the_template_does_not_render_is_refused(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}<|assistant|>"
    rows = [{"prompt": [USER]}] * 3 + [{"prompt": [{"role": "developer", "content": "Tom"}, USER]}]
    with pytest.raises(ValueError, match=r"row 3 of train_dataset: .* renders nothing of the turns of 'developer'"):
        make(tmp_path, data=rows, processing_class=tokenizer(template), student=tiny_model(seed=1, vocab_size=80),
             teacher=tiny_model(seed=2, vocab_size=80, hidden=48))  # fmt: skip


def test_tool_calls_that_nothing_renders_are_refused(tmp_path):
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "Tom"}}]}]
    with pytest.raises(ValueError, match="renders nothing of tool_calls"):
        general(tmp_path / "a", SupervisedKD(), data=[{"prompt": [USER], "completion": call}] * 4)
    with pytest.raises(ValueError, match=r"row 0 .*it calls tools, which a chat template renders"):
        general(tmp_path / "b", SupervisedKD(), data=[{"prompt": "Tom has 1.", "completion": call}] * 4)
    with pytest.raises(ValueError, match="has tools, which a chat template reads, and its prompt is a text"):
        make(tmp_path / "c", data=[{"prompt": "Tom has 1.", "tools": [{"name": "Tom"}]}] * 4)


def test_options_of_a_row_may_be_json():
    row = {"prompt": [USER], "completion": "3", "chat_template_kwargs": '{"enable_thinking": false}'}
    assert trained(QWEN, row)[0].endswith("<think></think>")
