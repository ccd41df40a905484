"""Training prompts that stand in benchmarks."""

from __future__ import annotations

import json
import string

from hypothesis import given, settings
from hypothesis import strategies as st
from score_rows import row

from tsdkd.cli import main
from tsdkd.evaluation.overlap import SHORTEST, find_overlap, normalise

words = st.text(string.ascii_lowercase, min_size=1, max_size=2)


texts = st.lists(words, min_size=1, max_size=14)


@st.composite
def prompts_and_fields(draw):
    """Texts of which many are cut out of others, or wrapped around them."""
    long = st.lists(words, min_size=9, max_size=14)
    fields = draw(st.lists(st.lists(long | texts, min_size=1, max_size=2), min_size=1, max_size=4))
    prompts = []
    for _ in range(draw(st.integers(1, 4))):
        source = draw(st.sampled_from([text for parts in fields for text in parts]))
        start, end = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        cut = source[start : len(source) - end]
        altered = [*source[:-1], "other"]
        prompts.append(draw(st.sampled_from([cut, [*draw(texts), *source, *draw(texts)], altered, source, draw(texts)])))
    return [" ".join(prompt) for prompt in prompts], [[" ".join(text) for text in parts] for parts in fields]


@settings(max_examples=200, deadline=None)
@given(prompts_and_fields())
def test_overlap_is_found_wherever_a_search_of_all_pairs_finds_it(made):
    prompts, fields = made

    def stands(inner, outer):
        a, b = normalise(inner), normalise(outer)
        if a == b:
            return bool(a)
        return len(a) >= SHORTEST and any(b[i : i + len(a)] == a for i in range(len(b) - len(a) + 1))

    fields = [*fields, ["a b c d e f g h i j"]]
    prompts = [*prompts, "a b c d e f g h other", "b c d e f g h i j"]  # the same start, and the very end
    items = [("t", number, {str(k): text for k, text in enumerate(parts)}) for number, parts in enumerate(fields)]
    expected = {
        (row, number)
        for row, prompt in enumerate(prompts)
        for number, parts in enumerate(fields)
        if any(stands(prompt, text) or stands(text, prompt) for text in parts)
    }
    assert {(o.prompt_row, o.item) for o in find_overlap(prompts, items)} == expected


def test_normalisation_and_the_three_ways(tmp_path):
    question = "Tom has 12 apples, and he buys 7 more; how many now?"
    items = [
        ("t", 0, {"question": question}),
        ("t", 1, {"choices": ["yes", "no"], "n": 3}),
        ("t", 2, {"q": "Before. " + question}),
    ]
    prompts = ["tom HAS 12 apples and he\nbuys 7 more how many now", f"Solve this: {question} Think.", "yes", "maybe", ""]
    found = {(o.prompt_row, o.item): o.how for o in find_overlap(prompts, items)}
    assert found == {
        (0, 0): "is a text of the item",
        (1, 0): "holds a text of the item",
        (2, 1): "is a text of the item",
        (0, 2): "stands in the item",
    }


def test_the_command_reports_prompts_that_stand_in_a_task(tmp_path, capsys):
    from tsdkd.demo.problems import held_out
    from tsdkd.demo.run import HELD_OUT_SEED, LEVELS

    known = held_out(3, HELD_OUT_SEED, set(), LEVELS)
    rows = [
        {"prompt": [{"role": "user", "content": known[1].question.upper()}]},
        {"prompt": [{"role": "user", "content": "Hi"}]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = tmp_path / "o.jsonl"
    command = ["evaluate", "--check-overlap", str(tmp_path / "p.jsonl"), "--tasks", "tsdkd_word_problems", "--out", str(out)]
    assert main(command) == 0
    assert "1 of 1000 items share a text with 1 of 2 prompts" in capsys.readouterr().out
    (pair,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (pair["prompt_row"], pair["item"], pair["how"]) == (0, 1, "is a text of the item")
    out.write_text(json.dumps(row("a", "GSM8K", 0.5).to_json()) + "\n")
    assert main(command) == 2 and "holds scores, which an overlap report would replace" in capsys.readouterr().err
    assert json.loads(out.read_text())["score"] == 0.5
