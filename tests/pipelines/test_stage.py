"""Stages: a rerun does what has changed and nothing else, a kill loses the row in hand, what is replaced is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tsdkd.pipelines.pipeline import Pipeline
from tsdkd.pipelines.stage import Planned, Stage


class Numbers(Stage):
    """Rows from the ones before, each `plus` more."""

    made = 0

    def __init__(self, name, after=(), plus=0, count=4, files=()):
        super().__init__(name, after, {"plus": plus, "count": count}, files)

    def make(self, work):
        type(self).made += 1
        before = self.after[0].rows if self.after else [{"id": str(i), "n": i} for i in range(self.settings["count"])]
        for number, row in enumerate(before):
            if row["id"] not in work.done:
                work.add({"id": row["id"], "n": row["n"] + self.settings["plus"]})
            work.progress(number + 1, len(before))
        work.count("rows", len(work.done))

    def plan(self):
        return Planned(3, 0.5)


class Folder(Stage):
    is_folder = True

    def make(self, work):
        (work.folder / "a.txt").write_text(json.dumps(self.after[0].rows))
        work.count("files")


def line(folder, plus=1, last=5, say=None):
    first = Numbers("first")
    second = Numbers("second", [first], plus)
    third = Folder("third", [second])
    fourth = Numbers("fourth", [second], last)
    said: list[str] = []
    return Pipeline("test", [first, second, third, fourth], folder, say or said.append), said


def test_a_rerun_makes_nothing_and_a_change_makes_what_depends_on_it(tmp_path):
    made, said = line(tmp_path)
    made.run()
    assert [row["n"] for row in made.stages[3].rows] == [6, 7, 8, 9]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == "0") == [
        "01-first.jsonl", "01-first.stage.json", "02-second.jsonl", "02-second.stage.json", "03-third", "03-third.stage.json",
        "04-fourth.jsonl", "04-fourth.stage.json",
    ]  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    made, said = line(tmp_path)
    made.run()
    assert all("as it was made" in text for text in said) and len(said) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path.name[0] == "0")
    made, said = line(tmp_path, last=7)
    made.run()
    assert [("as it was" in text) for text in said] == [True, True, True, False, False]
    assert "plus 5 → 7" in said[3] and [row["n"] for row in made.stages[3].rows] == [8, 9, 10, 11]
    kept = [path for path in (tmp_path / "replaced").iterdir() if path.suffix != ".json"]
    assert len(kept) == 1 and [json.loads(text)["n"] for text in kept[0].read_text().splitlines()] == [6, 7, 8, 9]


def test_an_input_that_comes_out_the_same_leaves_what_follows_as_it_is(tmp_path):
    line(tmp_path)[0].run()
    made, said = line(tmp_path)
    made.stages[0].settings["count"] = 4.0  # another key, the same rows
    made.stages[0].make = lambda work: Numbers.make(Numbers("first"), work)
    made.run()
    assert "made again" in said[0] and all("as it was made" in text for text in said[2:])


def test_a_file_that_is_read_is_part_of_the_key(tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("a")
    for text, says in (("a", "first: rows"), ("a", "as it was made"), ("b", "what it reads has changed")):
        source.write_text(text)
        said: list[str] = []
        Pipeline("test", [Numbers("first", files=[source])], tmp_path / "out", said.append).run()
        assert says in said[0]


@pytest.mark.parametrize("name", ["02-second.jsonl", "03-third/a.txt"])
def test_an_output_that_was_changed_by_hand_is_made_again(tmp_path, name):
    line(tmp_path)[0].run()
    file = tmp_path / name
    if file.suffix == ".jsonl":
        file.write_text(file.read_text().replace("1", "9"))
    else:
        (file.parent / "tsdkd_manifest.json").unlink()
    made, said = line(tmp_path)
    made.run()
    assert any("made again (it is not whole)" in text for text in said)
    assert [row["n"] for row in made.stages[3].rows] == [6, 7, 8, 9]


def test_from_and_until(tmp_path):
    made, said = line(tmp_path)
    with pytest.raises(ValueError, match="first is not made yet"):
        made.run(first="second")
    made.run(until="second")
    assert not made.stages[2].output.exists() and made.stages[1].about is not None
    made, said = line(tmp_path)
    made.run(first="second", until="second")
    assert "as it was made" in said[0] and "made again (from_stage)" in said[1]
    with pytest.raises(ValueError, match="first is made with other settings"):
        other = line(tmp_path)[0]
        other.stages[0].settings["count"] = 3
        other.run(first="second")
    with pytest.raises(ValueError, match=r"no stage 'secnd'; the order is first, second, third, fourth\. Did you mean second"):
        made.run(first="secnd")
    with pytest.raises(ValueError, match="comes before"):
        made.run(first="third", until="first")


def test_a_dry_run_does_nothing_and_says_what_would_be_done(tmp_path):
    made, said = line(tmp_path / "out")
    made.run(dry_run=True)
    assert not (tmp_path / "out").exists()
    assert said[0] == "first: would be made: 3 calls, about 0.50" and said[2] == "third: would be made"
    assert said[-1] == "9 calls, about 1.50 in the price list's currency; nothing was done"
    made.run(until="second")
    made, said = line(tmp_path / "out", plus=2)
    made.run(dry_run=True)
    assert "as it was made" in said[0] and "would be made" in said[1]


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        line(tmp_path)[0].run()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    line(tmp_path / "a")[0].run()
    with pytest.raises(ValueError, match="holds a pipeline test, not other"):
        Pipeline("other", [Numbers("first")], tmp_path / "a").run()
    with pytest.raises(ValueError, match="one name"):
        Pipeline("test", [Numbers("a"), Numbers("a")], tmp_path / "b")


CHILD = """
    import os, sys
    sys.path.insert(0, {here!r})
    from test_stage import Numbers
    from tsdkd.pipelines.pipeline import Pipeline
    class Dies(Numbers):
        def make(self, work):
            add, seen = work.add, []
            def counted(row):
                add(row)
                seen.append(row)
                if len(seen) == {after}:
                    os.kill(os.getpid(), 9)
            work.add = counted
            super().make(work)
    Pipeline("test", [Dies("first", count=10)], {folder!r}, print).run()
"""


@pytest.mark.parametrize("after", [1, 4, 10])
def test_a_kill_loses_no_row(tmp_path, after):
    folder = tmp_path / "out"
    code = textwrap.dedent(CHILD).format(here=str(Path(__file__).parent), after=after, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len((folder / "01-first.jsonl.part").read_text().splitlines()) == after
    with (folder / "01-first.jsonl.part").open("a") as file:
        file.write('{"id": "torn')
    said: list[str] = []
    Pipeline("test", [Numbers("first", count=10)], folder, said.append).run()
    assert said[0] == f"first: goes on behind {after} rows" and len(Numbers("x").rows) == 0
    rows = [json.loads(text) for text in (folder / "01-first.jsonl").read_text().splitlines()]
    assert [row["n"] for row in rows] == list(range(10)) and not list(folder.glob("*.part*"))


def test_what_an_interrupted_making_with_other_settings_left_is_put_aside(tmp_path):
    tmp_path.joinpath("pipeline.json").write_text('{"pipeline": "test"}')
    (tmp_path / "01-first.jsonl.part").write_text('{"id": "0", "n": 99}\n')
    (tmp_path / "01-first.jsonl.part.key").write_text("another")
    said: list[str] = []
    made = Pipeline("test", [Numbers("first")], tmp_path, said.append)
    made.run()
    assert "goes to replaced/" in said[0] and [row["n"] for row in made.stages[0].rows] == [0, 1, 2, 3]
    assert any("99" in path.read_text() for path in (tmp_path / "replaced").iterdir())


def test_two_processes_in_one_folder(tmp_path):
    from tsdkd.data import commits

    with commits.locked(tmp_path, "another"):
        (tmp_path / "pipeline.json").write_text('{"pipeline": "test"}')
        code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_stage import Numbers
from tsdkd.pipelines.pipeline import Pipeline
Pipeline("test", [Numbers("first")], {str(tmp_path)!r}).run()
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
        assert done.returncode == 1 and "is in use by process" in done.stderr
