"""Stages in their order: what has changed is made again, what is replaced is kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tsdkd.data import commits
from tsdkd.data.rows import RowFile
from tsdkd.pipelines.processes import Processes, is_one_of_several
from tsdkd.pipelines.stage import Stage, Work, about_path, digest_of
from tsdkd.provenance import provenance, redacted

ABOUT = "pipeline.json"
REPLACED = "replaced"
OWN = (REPLACED, "replies")  # further folders of a pipeline's


class Pipeline:
    """Stages in their order, in a folder.

    Args:
        kind: the pipeline's name; a folder of another is refused.
        stages: in order.
        folder: where they write.
        say: what tells the progress.

    Raises:
        ValueError: two stages of one name.
    """

    def __init__(self, kind: str, stages: Sequence[Stage], folder: Path, say: Callable[[str], None] = print) -> None:
        self.kind, self.stages, self.folder, self.say = kind, list(stages), Path(folder), say
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have one name: {', '.join(names)}.")
        for number, stage in enumerate(self.stages, 1):
            stage.output = self.folder / f"{number:02d}-{stage.name}{'' if stage.is_folder else '.jsonl'}"

    def run(
        self,
        first: str | None = None,
        until: str | None = None,
        dry_run: bool = False,
        accepted: Sequence[str] = (),
    ) -> None:
        """Make what is missing or has changed.

        Args:
            first: begin at this stage, and make it and those behind it again whether they have changed or not.
            until: end after this one.
            dry_run: say what would be done, and do nothing.
            accepted: stages whose outputs, as they stand there now, are taken for theirs: written or changed by hand.

        Raises:
            ValueError: an unknown stage, one before `first` that is not made, a folder of something else.
        """
        begin, end = self._place(first, 0), self._place(until, len(self.stages) - 1)
        if end < begin:
            raise ValueError(f"until_stage {until} comes before from_stage {first}: the order is {self._order()}.")
        self._refuse_other()
        if dry_run:
            return self._planned(begin, end, forced=first is not None)
        for name in accepted:
            self._place(name, 0)
        fresh = self._to_make(begin, end, forced=first is not None)
        for stage in fresh:
            if self.stages.index(stage) >= begin:
                stage.check()
        if is_one_of_several() and accepted:
            raise ValueError("a stage is accepted by one process: run once without accelerate launch.")
        if is_one_of_several():
            self._refuse_apart(fresh)
            Processes().wait()  # until each has seen what is to be made
            if not Processes().is_first:
                return self._help(fresh)
        with commits.locked(self.folder, f"tsdkd pipeline {self.kind} writes there"):
            self._mark()
            self._put_strangers_aside()
            for number, stage in enumerate(self.stages[: end + 1]):
                if stage.name in accepted:
                    self._accept(stage)
                self._do(stage, number >= begin, forced=first is not None and number >= begin and stage.name not in accepted)

    def _refuse_apart(self, fresh: Sequence[Stage]) -> None:
        """Several processes make some stages together; what one process makes before them is made before."""
        last = max((number for number, stage in enumerate(fresh) if stage.is_together), default=0)
        alone = [stage.name for stage in fresh[:last] if not stage.is_together]
        if alone:
            raise ValueError(
                f"several processes make {fresh[last].name} together, and one process makes {', '.join(alone)} before it: run "
                f"once without accelerate launch and with --until_stage {alone[-1]}."
            )

    def _help(self, fresh: Sequence[Stage]) -> None:
        """Another process than the first takes part in what is made together, and writes nothing."""
        for stage in fresh:
            if stage.is_together:
                Processes().wait()  # the folder is there
                stage.make(Work(stage.name, None, _part(stage), lambda text: None))

    def _do(self, stage: Stage, wanted: bool, forced: bool) -> None:
        about = stage.about
        if about is not None and about["key"] == stage.key and not forced:
            self.say(f"{stage.name}: as it was made ({_said(about['summary'])})")
            return
        if not wanted:
            state = "not made yet" if about is None else f"made with other settings ({self._change(stage, about)})"
            raise ValueError(f"{stage.name} is {state}: leave from_stage out, or name it.")
        if about is not None or stage.output.exists():
            why = "from_stage" if forced else self._change(stage, about)
            self.say(f"{stage.name}: made again ({why}); the earlier {stage.output.name} goes to {REPLACED}/")
            _put_aside(stage.output, self.folder)
        self._make(stage)

    def _accept(self, stage: Stage) -> None:
        """Take an output as it stands there."""
        if stage.is_folder and stage.output.is_dir():
            commits.write_manifest(stage.output, {"step": 0, "stage": stage.name})
        rows = stage.rows  # refuses a damaged file
        lacking = sorted({name for row in rows for name in stage.columns if name not in row})
        if not stage.output.exists() or (lacking and not stage.is_folder):
            why = f"rows of it have no {', '.join(lacking)}" if lacking else "it is not there"
            raise ValueError(f"{stage.output} cannot be accepted: {why}.")
        self._write_about(stage, stage.output, stage.key, {"accepted as it stands": len(rows) or "a folder"})

    def _write_about(self, stage: Stage, output: Path, key: str, summary: dict[str, Any]) -> None:
        about = {
            "stage": stage.name, "key": key, "digest": digest_of(output), "settings": redacted(stage.settings),
            "summary": summary, "provenance": provenance(),
        }  # fmt: skip
        commits.put_text(about_path(stage.output), json.dumps(about, indent=1, ensure_ascii=False, default=str) + "\n")

    def _make(self, stage: Stage) -> None:
        began, key, part = time.monotonic(), stage.key, _part(stage)
        mark = part.with_name(f"{part.name}.key")
        if part.exists() and (not mark.is_file() or mark.read_text() != key):
            self.say(f"{stage.name}: what an interrupted making with other settings or inputs left goes to {REPLACED}/")
            _put_aside(part, self.folder)
        mark.write_text(key)
        if stage.is_folder:
            part.mkdir(exist_ok=True)
            work = Work(stage.name, None, part, self.say)
            if stage.is_together and is_one_of_several():
                Processes().wait()
            stage.make(work)
            commits.write_manifest(part, {"step": 0, "stage": stage.name})
        else:
            with RowFile(part) as rows:
                if rows.rows:
                    self.say(f"{stage.name}: goes on behind {len(rows.rows):,} rows")
                work = Work(stage.name, rows, None, self.say)
                stage.make(work)
        summary = {**work.counts, "seconds": round(time.monotonic() - began, 1)}
        self._write_about(stage, part, key, summary)  # first: it holds once the output is in its place
        os.replace(part, stage.output)
        commits.sync(self.folder)
        mark.unlink(missing_ok=True)
        self.say(f"{stage.name}: {_said(summary)}")

    def _to_make(self, begin: int, end: int, forced: bool) -> list[Stage]:
        """The stages up to `end` that are not made, or were with other settings or inputs; forced, all from `begin` on."""
        fresh: list[Stage] = []
        for number, stage in enumerate(self.stages[: end + 1]):
            again = (forced and number >= begin) or any(before in fresh for before in stage.after)
            if again or not stage.is_as_asked:
                fresh.append(stage)
        return fresh

    def _planned(self, begin: int, end: int, forced: bool) -> None:
        calls, cost, priced, open_ = 0, 0.0, False, False
        fresh = self._to_make(begin, end, forced)
        for stage in self.stages[: end + 1]:
            if stage not in fresh:
                self.say(f"{stage.name}: as it was made")
                continue
            plan = stage.plan()
            told = [plan.said] if plan.said else []
            if plan.calls is None:
                open_ = True
                told += [] if plan.said else ["as many calls as the stages before it leave"]
            elif plan.calls:
                told.append(f"{plan.calls:,} calls" + (f", about {plan.cost:.2f}" if plan.cost is not None else ""))
                calls, priced, cost = calls + plan.calls, priced or plan.cost is not None, cost + (plan.cost or 0.0)
            self.say(f"{stage.name}: would be made{': ' + ', '.join(told) if told else ''}")
        money = f", about {cost:.2f} in the price list's currency" if priced else ""
        self.say(f"{calls:,} calls{money}{', and those that are not known yet' if open_ else ''}; nothing was done")

    # ------------------------------------------------------------------ what it is told

    def _place(self, name: str | None, default: int) -> int:
        if name is None:
            return default
        names = [stage.name for stage in self.stages]
        if name not in names:
            import difflib

            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(
                f"there is no stage {name!r}; the order is {self._order()}.{f' Did you mean {near[0]}?' if near else ''}"
            )
        return names.index(name)

    def _order(self) -> str:
        return ", ".join(stage.name for stage in self.stages)

    def _change(self, stage: Stage, about: dict[str, Any] | None) -> str:
        if about is None:
            return "it is not whole" if about_path(stage.output).exists() else "nothing says what made it"
        old, new = about["settings"], json.loads(json.dumps(redacted(stage.settings), default=str))
        changed = [
            f"{name} {_short(old.get(name))} → {_short(new.get(name))}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        return "; ".join(changed) or "what it reads has changed"

    def _refuse_other(self) -> None:
        mark = self.folder / ABOUT
        if mark.is_file():
            try:
                kind = json.loads(mark.read_text()).get("pipeline")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{mark} is damaged ({error}): remove it, what stands beside it is gone on with.") from error
            if kind != self.kind:
                raise ValueError(f"{self.folder} holds a pipeline {kind}, not {self.kind}: name another output_dir.")
        elif self.folder.exists() and any(path.name != ".lock" and not self._is_ours(path) for path in self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} holds other files and no {ABOUT} of a pipeline {self.kind}: name another output_dir."
            )

    def _is_ours(self, path: Path) -> bool:
        return any(path.name.startswith(stage.output.name.removesuffix(".jsonl")) for stage in self.stages) or path.name in OWN

    def _mark(self) -> None:
        about = {"pipeline": self.kind, "stages": [stage.name for stage in self.stages]}
        commits.put_text(self.folder / ABOUT, json.dumps(about) + "\n")

    def _put_strangers_aside(self) -> None:
        """What stages of another order left is not mistaken for this one's."""
        own = {stage.output.name for stage in self.stages}
        for path in sorted(self.folder.glob("[0-9][0-9]-*")):
            name = path.name.removesuffix(".key").removesuffix(".part")
            if path.name.endswith(".stage.json"):
                name = next((n for n in own if n.removesuffix(".jsonl") == path.name.removesuffix(".stage.json")), "")
            if name not in own and path.exists():
                self.say(f"{path.name} is no stage of this order: it goes to {REPLACED}/")
                _put_aside(path, self.folder)


def _part(stage: Stage) -> Path:
    """Where a stage's output is while it is made."""
    return stage.output.with_name(f"{stage.output.name}.part")


def _put_aside(path: Path, folder: Path) -> None:
    """Move what a stage made, or was making, out of its place."""
    aside = folder / REPLACED / f"{path.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    aside.parent.mkdir(exist_ok=True)
    if path.exists():
        shutil.move(path, aside)
    about = about_path(path)
    if about.is_file():
        shutil.move(about, aside.with_name(f"{aside.name}.stage.json"))


def _said(summary: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, (int, float)) else f"{name} {value}" for name, value in summary.items()
    )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
