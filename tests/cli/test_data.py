"""Files, folders, columns and recipes as people have them."""

from __future__ import annotations

import gzip
import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from running import by_prompt, general, make
from tiny import QUESTIONS

from tsdkd.cli.recipes import parsed, read_recipes
from tsdkd.cli.train import parse
from tsdkd.data.files import as_data_set, load_rows
from tsdkd.data.prompts import load_prompts, map_prompts
from tsdkd.methods import SupervisedKD

ROWS = [{"prompt": f"Tom has {n} app\u2028les.", "completion": str(n)} for n in range(4)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def as_csv(separator):
    return separator.join(["prompt", "completion"]) + "\n" + "".join(f"Tom has {n} apples.{separator}{n}\n" for n in range(4))


@pytest.mark.parametrize(
    "name,content",
    [
        ("p.jsonl", JSONL.encode()),
        ("P.JSONL", JSONL.encode()),
        ("p.ndjson", JSONL.encode()),
        ("p.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)),
        ("bom.jsonl", "\ufeff".encode() + JSONL.encode()),
        ("utf16.jsonl", JSONL.encode("utf-16")),
        ("crlf.jsonl", JSONL.replace("\n", "\r\n").encode()),
        ("blank.jsonl", ("\n" + JSONL + "\n \n").encode()),
        ("lines.json", JSONL.encode()),
        ("list.json", json.dumps(ROWS, indent=1).encode()),
        ("list.jsonl", json.dumps(ROWS).encode()),
        ("named.json", json.dumps({"version": 1, "data": ROWS}).encode()),
    ],
)
def test_every_json_is_read_alike(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_rows(str(tmp_path / name)).to_list() == ROWS
    assert load_rows(str(tmp_path / name), split="train[1:3]").to_list() == ROWS[1:3]


@pytest.mark.parametrize(
    "name,separator", [("p.csv", ","), ("p.tsv", "\t"), ("P.TSV", "\t"), ("P.Csv", ","), ("p.csv.gz", ",")]
)
def test_tables_are_read_by_their_ending(tmp_path, name, separator):
    text = as_csv(separator).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    rows = load_rows(str(tmp_path / name), split="train[50%:]")
    assert rows["prompt"] == ["Tom has 2 apples.", "Tom has 3 apples."]


def test_cells_of_a_table_are_texts(tmp_path):
    (tmp_path / "p.csv").write_bytes('\ufeffprompt,completion\n007,NA\n"a, b",\n'.encode())
    rows = [{"prompt": "007", "completion": "NA"}, {"prompt": "a, b", "completion": None}]
    assert load_rows(str(tmp_path / "p.csv")).to_list() == rows


def test_folders_and_saved_data_sets(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    for number in range(2):
        (tmp_path / "files" / f"{number}.jsonl").write_text(JSONL)
    assert len(load_rows(str(tmp_path / "files"))) == 8
    (tmp_path / "files" / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert len(load_rows(str(tmp_path / "files"), split="test")) == 1
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "splits")
    assert len(load_rows(str(tmp_path / "saved"), split="train[:2]")) == 2
    assert len(load_rows(str(tmp_path / "splits"), split="test")) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_rows("~/splits")) == 4
    with pytest.raises(ValueError, match=r"splits holds the splits train, test, not 'dev'"):
        load_rows(str(tmp_path / "splits"), split="dev")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_text("")
    with pytest.raises(ValueError, match=r"the folder .*model holds no file of rows \(\.jsonl"):
        load_rows(str(tmp_path / "model"))


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("p.jsonl", b'{"prompt": "a"}\n{broken\n{"prompt": "b"}\n', r"p\.jsonl, line 2 is no JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n3\n', r"p\.jsonl, line 2 is int: a row is an object"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"p\.jsonl, line 2 is not UTF-8"),
        ("p.jsonl", b"", r"p\.jsonl holds no rows"),
        ("p.json", b'[{"prompt": "a"},]', r"p\.json is no JSON"),
        ("p.json", b"[1, 2]", r"p\.json holds no list of rows"),
        ("p.jsonl.gz", b"\x1f\x8b broken", r"p\.jsonl\.gz cannot be unpacked"),
        ("p.txt", b"a\n", r"p\.txt is no file of rows: its name ends in none of \.jsonl"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n',
            r"'prompt' .* str \(row 0\), list \(row 1\)",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_rows_with_other_keys_and_types_are_kept(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "answer": 3, "meta": {"x": 1}}\n{"prompt": "c", "answer": "4"}\n')
    rows = load_rows(str(file))
    assert rows["answer"] == [None, "3", "4"] and rows["meta"] == [None, {"x": 1}, None]
    assert map_prompts(rows, completion_column="answer")["completion"] == [None, "3", "4"]
    with pytest.raises(ValueError, match=r"'train\[x\]' is no slice of 3 rows"):
        load_rows(str(file), split="train[x]")


# ---------------------------------------------------------------------- columns


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("column,chat", [("messages", CHAT), ("conversations", SHAREGPT), ("conversation", CHAT)])
def test_the_last_turn_of_a_chat_is_its_completion(caplog, column, chat):
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        rows = map_prompts(Dataset.from_list([{column: chat, "id": 1}, {column: chat[:2], "id": 2}]))
    assert rows.column_names == ["prompt", "completion"]
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["system", "user"]
    assert rows[0]["completion"] == [CHAT[-1]] and rows[1]["completion"] is None
    assert "the last turn of 1 of 2 chats in" in caplog.text
    named = map_prompts(Dataset.from_list([{column: chat}]), prompt_column=column)
    assert named[0]["completion"] == [CHAT[-1]]


def test_a_chat_with_its_answer_in_trains_on_the_question(tmp_path):
    chat = [{"role": "user", "content": "Tom has 12 apples."}, {"role": "assistant", "content": "#### 17"}]
    rows = map_prompts(Dataset.from_list([{"messages": chat}] * 4))
    trainer = general(tmp_path, SupervisedKD(), data=rows, max_completion_length=20)
    (prompt,), ((ids, _),) = trainer.tokenize([rows[0]]), trainer.rendering.completions([rows[0]], [rows[0]["completion"]], 20)
    assert trainer.tokenizer.decode(prompt) == "<|user|>Tom has 12 apples.<|end|><|assistant|>"
    assert trainer.tokenizer.decode(ids) == "#### 17<|end|>"
    with pytest.raises(ValueError, match=r"let tsdkd.data.prompts.map_prompts\(dataset\) make it"):
        make(tmp_path, data=Dataset.from_list([{"messages": chat}] * 4))


def test_other_layouts_are_served_or_told_what_to_pass():
    alpaca = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi.", "input": "", "output": "Hello."}]
    rows = map_prompts(Dataset.from_list(alpaca))
    assert rows.to_list() == [{"prompt": "Add.\n\n1 2", "completion": "3"}, {"prompt": "Hi.", "completion": "Hello."}]
    with pytest.raises(ValueError, match=r"it has: question, answer. Pass --prompt_column question --completion_column answer"):
        map_prompts(Dataset.from_dict({"question": ["a"], "answer": ["b"]}))
    with pytest.raises(ValueError, match=r"turn 0 of row 0 in 'conversations' is from 'alien'"):
        map_prompts(Dataset.from_list([{"conversations": [{"from": "alien", "value": "x"}]}]))
    both = Dataset.from_list([{"prompt": "a", "completion": "b", "messages": CHAT, "tools": [{"name": "t"}]}])
    assert map_prompts(both).to_list() == [{"prompt": "a", "completion": "b", "tools": [{"name": "t"}]}]


def test_equal_prompts_with_other_tools_are_no_duplicates():
    rows = Dataset.from_dict({"prompt": ["a", "a", "a"], "tools": ["[1]", "[2]", "[1]"]})
    assert len(map_prompts(rows, drop_duplicates=True)) == 2


# ---------------------------------------------------------------------- data sets that are none of `datasets`


class Torch(torch.utils.data.Dataset):
    def __len__(self):
        return len(QUESTIONS)

    def __getitem__(self, number):
        return {"prompt": QUESTIONS[number]}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([{"prompt": question} for question in QUESTIONS])


def test_lists_torch_data_sets_subsets_and_streams_train(tmp_path):
    subset = torch.utils.data.Subset(Torch(), [3, 1, 2, 0])
    assert as_data_set(subset, "x")["prompt"] == [QUESTIONS[i] for i in (3, 1, 2, 0)]
    rows = [{"prompt": question} for question in QUESTIONS[:4]]
    for number, data in enumerate(
        (rows, tuple(rows), Torch(), subset, Stream(), DatasetDict(train=Dataset.from_list(rows))["train"])
    ):
        trainer = make(tmp_path / str(number), data=data, rollouts=by_prompt, max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1
    evaluated = make(tmp_path / "e", eval_dataset={"a": rows, "b": Torch()}, rollouts=by_prompt).evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= evaluated.keys()


def test_a_streams_columns_are_its_owners():
    with pytest.raises(ValueError, match="a stream's columns are mapped by its owner"):
        map_prompts(IterableDataset.from_generator(lambda: iter([{"messages": CHAT}])))


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    "rows,message",
    [
        ([{"text": "a"}] * 8, "train_dataset has no 'prompt' column; it has: text"),
        ([{"prompt": 3}] * 8, "1 prompts that are int"),
        (
            [{"prompt": [{"role": "user", "content": "Tom"}]}] * 8,
            "the prompts are chats but the tokenizer of .* has no chat",
        ),
    ],
)
def test_the_first_row_of_a_stream_is_looked_at(tmp_path, rows, message):
    from tsdkd.demo.recreate import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data=stream(rows), processing_class=tokenizer)


def test_a_streams_completions_are_looked_at_when_they_come(tmp_path):
    good = [{"prompt": "Tom has 1 apples.", "completion": "#### 1"}] * 8
    assert general(tmp_path / "a", SupervisedKD(), data=stream(good), max_steps=1).train().global_step == 1
    bad = [good[0], {"prompt": "Tom has 1 apples.", "completion": None}] * 8
    with pytest.raises(ValueError, match="a row without a completion arrived"):
        general(tmp_path / "b", SupervisedKD(), data=stream(bad), max_steps=1).train()
    with pytest.raises(ValueError, match=r"has no 'completion' column|is a stream without a 'completion' column"):
        general(tmp_path / "c", SupervisedKD(), data=stream([{"prompt": "Tom has 1 apples."}] * 8), max_steps=1).train()


# ---------------------------------------------------------------------- recipes


def test_numbers_and_words_of_a_recipe_are_what_they_mean(tmp_path):
    recipe = parsed(
        "save_strategy: no\nlearning_rate: 1e-7\nrun_name: '1e-7'\nuse_cpu: yes\nmax_steps: 3\nlog_completions: off\n"
        "lr_scheduler_kwargs: {min_lr: 1e-7, power: 2E+3, name: 1e-7x}\nchat_template_kwargs: {enable_thinking: no}\n"
        "methods:\n  a: {beta: 5e-1, keep: off, list: [1e-2, yes]}\n"
    )
    assert recipe["save_strategy"] == "no" and recipe["learning_rate"] == "1e-7" and recipe["log_completions"] is False
    assert recipe["lr_scheduler_kwargs"] == {"min_lr": 1e-7, "power": 2000.0, "name": "1e-7x"}
    assert recipe["chat_template_kwargs"] == {"enable_thinking": False}
    assert recipe["methods"] == {"a": {"beta": 0.5, "keep": False, "list": [0.01, True]}}
    file = tmp_path / "r.yaml"
    file.write_bytes("\ufeff".encode() + f"output_dir: {tmp_path}\nuse_cpu: yes\nsave_strategy: no\nbf16: no\n".encode()
                     + b"method: gkd\nmethod_options: {beta: 1e-7}\nlearning_rate: 1e-7\n")  # fmt: skip
    assert read_recipes([file])["save_strategy"] == "no"
    _, config, _ = parse(["--config", str(file)])
    assert config.save_strategy == "no" and config.use_cpu is True and config.bf16 is False
    assert config.learning_rate == 1e-7 and config.method_options == {"beta": 1e-7}


@pytest.mark.parametrize(
    "word,expected", [("True", "latest"), ("latest", "latest"), ("no", None), ("runs/checkpoint-3", "runs/checkpoint-3")]
)
def test_the_last_checkpoint_is_asked_for_by_flag_as_by_recipe(tmp_path, word, expected):
    file = tmp_path / "r.yaml"
    base = f"output_dir: {tmp_path}\nuse_cpu: true\n"
    file.write_text(base)
    assert parse(["--config", str(file), "--resume_from_checkpoint", word])[1].resume_from_checkpoint == expected
    file.write_text(base + f"resume_from_checkpoint: {word}\n")
    assert parse(["--config", str(file)])[1].resume_from_checkpoint == expected


# ---------------------------------------------------------------------- what an outside tester broke


def test_a_ragged_table_is_refused_with_its_line(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("prompt,completion\nq1,a1,\nq2,a2,\n")
    assert load_rows(str(file)).to_list() == [{"prompt": "q1", "completion": "a1"}, {"prompt": "q2", "completion": "a2"}]
    file.write_text("prompt,completion\nq1,a1\nq1,3, so 3\n")
    with pytest.raises(ValueError, match=r"p\.csv, line 3 has 3 cells where the header has 2"):
        load_rows(str(file))
    table = tmp_path / "p.tsv"
    table.write_text('prompt\tcompletion\n"Hello\ta\nfoo\t"bar\n')
    with pytest.raises(ValueError, match=r"p\.tsv, line 3 is no row of a table"):
        load_rows(str(table))


def test_a_folders_split_is_the_asked_one(tmp_path):
    for name in ("train.jsonl", "validation.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(json.dumps({"prompt": name}) + "\n")
    assert load_rows(str(tmp_path / "a"))["prompt"] == ["train.jsonl"]
    assert load_rows(str(tmp_path / "a"), split="train+validation")["prompt"] == ["train.jsonl", "validation.jsonl"]
    with pytest.raises(ValueError, match=r"holds no file of the split 'test'; it has train.jsonl, validation.jsonl"):
        load_rows(str(tmp_path / "a"), split="test")
    parts = {name: Dataset.from_dict({"prompt": [f"{name}{i}" for i in range(3)]}) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(tmp_path / "b")
    assert load_rows(str(tmp_path / "b"), split="train[:1]+test[1:2]")["prompt"] == ["train0", "test1"]


def test_columns_that_carry_a_prompt_are_read():
    system = map_prompts(Dataset.from_list([{"conversations": SHAREGPT[1:], "system": "s"}]))
    assert [turn["content"] for turn in system[0]["prompt"]] == ["s", "q"]
    gemma = [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]
    assert map_prompts(Dataset.from_list([{"messages": gemma}]))[0]["completion"] == [{"role": "assistant", "content": "a"}]
    dolly = {"instruction": "Add.", "context": "1 2", "response": "3"}
    assert map_prompts(Dataset.from_list([dolly])).to_list() == [{"prompt": "Add.\n\n1 2", "completion": "3"}]
    row = {"instruction": None, "input": "x", "output": "y", "system": "s", "history": [["a", "b"]]}
    made = map_prompts(Dataset.from_list([row]))[0]
    assert [turn["content"] for turn in made["prompt"]] == ["s", "a", "b", "x"]


def test_what_arrow_cannot_hold_is_kept_or_named(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "id": 99999999999999999999999}\n{"prompt": "b", "id": 1}\n')
    assert load_rows(str(file))["prompt"] == ["a", "b"]
    file.write_text('{"prompt": "a"}\n{"prompt": "\\ud83d"}\n')
    with pytest.raises(ValueError, match=r"row 1 of .*p\.jsonl holds half a character in 'prompt'"):
        load_rows(str(file))
    contents = ["q", [{"type": "text", "text": "r"}]]
    mixed = [{"messages": [{"role": "user", "content": content}]} for content in contents]
    file.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    assert [row["prompt"][0]["content"] for row in load_prompts(str(file))] == ["q", "r"]


def test_a_frame_of_pandas_and_a_torch_stream_with_a_length_are_read():
    import pandas

    assert as_data_set(pandas.DataFrame({"prompt": ["a", "b"]}), "x")["prompt"] == ["a", "b"]

    class Sized(Stream):
        def __len__(self):
            return len(QUESTIONS)

    assert next(iter(as_data_set(Sized(), "x"))) == {"prompt": QUESTIONS[0]}
