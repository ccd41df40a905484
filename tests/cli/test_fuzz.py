"""Whatever is typed and whatever a file holds: a result, or one line that says what is wrong."""

from __future__ import annotations

import gzip
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsdkd.cli import main, told
from tsdkd.cli.options import split
from tsdkd.cli.parsing import parse
from tsdkd.cli.recipes import read_recipes
from tsdkd.data.files import as_data_set, load_rows
from tsdkd.data.prompts import map_prompts, prompt_problems

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FLAGS = """--student --method --max_steps --learning_rate --lmbda --gkd.beta --beta --method_options --max_length --bf16
    --eval_tasks --dry_run --teacher_urls --seed --config --top_k --lora_r --resume_from_checkpoint --prompt_column
    --teacher_deepspeed --token_aliases --save_strategy""".split()
VALUES = ["", "0", "-1", "1", "nan", "1e-7", "gkd", "tsd_kd", "true", "no", "{}", '{"beta": 0.5}', "[1]", "{", "x y", "é", "--"]
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8))


def _nested(inner):
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3))


JSON = st.recursive(LEAF, _nested, max_leaves=6)
TURN = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls", "name"]), JSON, max_size=4)
COLUMN = st.sampled_from(
    ["prompt", "completion", "messages", "conversations", "instruction", "input", "output", "tools", "system"]
)
ROW = st.dictionaries(COLUMN, st.one_of(JSON, st.lists(TURN, max_size=3)), max_size=4)


def refused(error: BaseException) -> str:
    """What is said of an error that is the user's."""
    assert isinstance(error, ValueError), repr(error)
    text, status = told(error)
    assert status == 2 and text.strip()
    return text


@FEW
@given(st.lists(st.one_of(st.sampled_from(FLAGS), st.sampled_from(VALUES), st.text(max_size=6)), max_size=5))
def test_flags_are_read_or_refused(tmp_path, words):
    if {"-h", "--help", "--help_all"} & set(words):
        return
    try:
        parse(["--use_cpu", "--output_dir", str(tmp_path / "o"), *words])
    except ValueError as error:
        refused(error)
    assert not (tmp_path / "o").exists()


@MANY
@given(st.text(max_size=12))
def test_a_flag_is_a_name_or_it_is_none(word):
    name, value = split(word)
    assert name is None or (word.startswith("--") and "=" not in name and (value is None) == ("=" not in word))


@FEW
@given(st.dictionaries(st.sampled_from([flag[2:] for flag in FLAGS]), JSON, max_size=4))
def test_recipes_are_read_or_refused(tmp_path, recipe):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"use_cpu": True, "output_dir": str(tmp_path / "o"), **recipe}))
    try:
        parse(["--config", str(file)])
    except ValueError as error:
        refused(error)


@MANY
@given(st.binary(max_size=60))
def test_a_recipe_of_any_bytes_is_read_or_refused(tmp_path, content):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    try:
        read_recipes([file])
    except ValueError as error:
        refused(error)


@MANY
@given(st.binary(max_size=60), st.sampled_from(["p.jsonl", "p.json", "p.csv", "p.tsv", "p.JSONL", "p.jsonl.gz", "p.txt"]))
def test_a_file_of_any_bytes_is_read_or_refused(tmp_path, content, name):
    for data in (content, gzip.compress(content, mtime=0)):
        (tmp_path / name).write_bytes(data)
        try:
            load_rows(str(tmp_path / name))
        except ValueError as error:
            assert name in refused(error) or str(tmp_path) in str(error)


@MANY
@given(st.lists(ROW, min_size=1, max_size=4))
def test_rows_of_any_shape_are_mapped_or_refused(tmp_path, rows):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        made = map_prompts(load_rows(str(file)))
    except ValueError as error:
        refused(error)
        return
    assert "prompt" in made.column_names and len(made) == len(rows)
    list(prompt_problems(made, "train_dataset"))


@MANY
@given(JSON)
def test_what_is_given_as_a_data_set_is_one_or_refused(given_rows):
    try:
        made = as_data_set(given_rows, "train_dataset")
    except ValueError as error:
        refused(error)
        return
    if made is not None and not isinstance(made, dict):
        list(prompt_problems(made, "train_dataset"))


@pytest.mark.parametrize("command", ["train", "compare", "evaluate", "table", "methods", "demo"])
@pytest.mark.parametrize("words", [["--no_such"], ["no_such"], ["--config"], ["--config", "nowhere.yaml"], ["--limit", "x"]])
def test_no_command_shows_a_traceback(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main([command, *words])
    except SystemExit as ended:  # argparse's own
        status = ended.code
    err = capsys.readouterr().err
    assert status == 2 and "Traceback" not in err and err.strip()
    assert not list(tmp_path.iterdir())
