"""Saves of a run: checkpoints that are whole or not there, and the one that a run goes on with."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from tsdkd.data import commits
from tsdkd.provenance import BLANK, redacted
from tsdkd.trainers.guard import NonFiniteError
from tsdkd.trainers.health import Health
from tsdkd.trainers.identity import identity, refuse_another_run
from tsdkd.trainers.run_record import planned_steps

logger = logging.getLogger(__name__)
LATEST = "latest"  # the newest whole checkpoint, or a start where there is none


@contextmanager
def without_secrets(args: Any) -> Iterator[None]:
    """A run's options without secrets, as long as they are saved: transformers pickles them beside every model."""
    kept = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        blank = redacted(value, field.name) if isinstance(value, (str, dict, list)) else value
        if blank != value:
            kept[field.name] = value
            setattr(args, field.name, None if blank == BLANK else blank)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


class Saving:
    """A trainer's saves.

    Args:
        trainer: whose they are.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.temporary: Path | None = None  # where a checkpoint is being written
        self._identity: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """This run's; worked out once."""
        if self._identity is None:
            self._identity = identity(self.trainer)
        return self._identity

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Gives the folder that a checkpoint is written into, and puts it to its place afterwards; then older ones go."""
        trainer = self.trainer
        accelerator, state = trainer.accelerator, trainer.state
        root, place = self.folder / commits.SAVING, self.folder / f"checkpoint-{step}"
        self._refuse_unsound(step)
        identity = self.identity  # on every process
        if accelerator.is_main_process:
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
        accelerator.wait_for_everyone()
        self.temporary = root
        try:
            with without_secrets(trainer.args):
                yield root / place.name
        finally:
            self.temporary = None
        accelerator.wait_for_everyone()
        best = state.best_model_checkpoint
        if best is not None and Path(best).parent == root:
            state.best_model_checkpoint = str(place)
        if accelerator.is_main_process:
            if best != state.best_model_checkpoint:
                state.save_to_json(str(root / place.name / "trainer_state.json"))
            commits.write_manifest(root / place.name, {"step": step, "run": identity})
            commits.put(root / place.name, place)
            shutil.rmtree(root, ignore_errors=True)
            self._rotate()
        accelerator.wait_for_everyone()

    def _refuse_unsound(self, step: int) -> None:
        """Refuse to save weights that an update has made overflow, which a finite gradient can.

        Raises:
            NonFiniteError: on every process, naming the first.
        """
        trainer = self.trainer
        named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        shares = ((name, getattr(p, "ds_tensor", p)) for name, p in named if p.requires_grad)
        wrong = next((name for name, share in shares if not bool(torch.isfinite(share.detach()).all())), None)
        if trainer.any_process(wrong is not None):
            raise NonFiniteError(
                f"step {step}: the student's weights are not finite after it ({wrong or 'on another process'}), though its "
                "gradients were: the update overflowed. Nothing of it is saved: go back to the last checkpoint, with a lower "
                "learning rate, or train in float32."
            )

    def _rotate(self) -> None:
        limit, best = self.trainer.args.save_total_limit, self.trainer.state.best_model_checkpoint
        rotate_checkpoints(output_dir=str(self.folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=False)

    @contextmanager
    def student(self, folder: str) -> Iterator[str]:
        """Gives the folder that a student is written into; its files go to `folder` one by one, the manifest last."""
        accelerator, place = self.trainer.accelerator, Path(folder)
        self._refuse_unsound(self.trainer.state.global_step)
        written = place / commits.SAVING
        if accelerator.is_main_process:
            shutil.rmtree(written, ignore_errors=True)
        accelerator.wait_for_everyone()
        with without_secrets(self.trainer.args):
            yield str(written)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and written.is_dir():
            commits.put_files(written, place, {"step": self.trainer.state.global_step})
        accelerator.wait_for_everyone()

    @contextmanager
    def begun(self, wanted: Any) -> Iterator[tuple[str | None, TrainOutput | None]]:
        """Hold the run's folder against another run; give the checkpoint that this one goes on with, and what `train` gives of
        a run that has ended.

        Raises:
            ValueError: another run trains into the folder, or what `found` refuses.
        """
        first = self.trainer.accelerator.is_main_process
        with commits.locked(self.folder, "a run trains into it") if first else nullcontext():
            checkpoint = self.found(wanted)
            yield None if checkpoint is None else str(checkpoint), self.finished(checkpoint)
            health = next((c for c in self.trainer.callback_handler.callbacks if isinstance(c, Health)), None)
            if health is not None and health.signs and health.action == "back":
                self.back(health.signs)

    # ------------------------------------------------------------------ going on

    def finished(self, checkpoint: Path | None) -> TrainOutput | None:
        """What `train` gives of a run that its checkpoint has ended, whose student this one then is; None of any other."""
        trainer = self.trainer
        if checkpoint is None:
            return None
        step, wanted = commits.read_manifest(checkpoint)["step"], planned_steps(trainer)
        budget, spent = trainer.args.token_budget, trainer.loop.checkpoints.read(checkpoint).get("trained_tokens", 0)
        if step < wanted and (budget is None or spent < budget):
            return None
        logger.warning("%s is of the run's end (%d of %d steps): nothing is left to train.", checkpoint, step, wanted)
        if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            trainer.load_weights(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return TrainOutput(step, 0.0, {})

    def found(self, wanted: Any) -> Path | None:
        """The checkpoint that a run goes on with: a path, or with True the newest whole one, with `"latest"` likewise, or none
        where there is none yet; None is none.

        Raises:
            ValueError: the path's is not whole, or is of another run; with True, there is none.
        """
        if wanted is None or wanted is False:
            return None
        answer: list[Any] = [None, None]
        if self.trainer.accelerator.is_main_process:
            try:
                path = self._found(wanted)
                answer[0] = None if path is None else str(path)
            except ValueError as error:
                answer[1] = str(error)
        name, failure = broadcast_object_list(answer)
        if failure is not None:
            raise ValueError(failure)
        return None if name is None else Path(name)

    def back(self, signs: list[int]) -> None:
        """Give the trainer the student of its best checkpoint, or of the last whole one before the first of some steps."""
        best = self.trainer.state.best_model_checkpoint
        before = [path for path in commits.checkpoints(self.folder) if int(path.name.split("-")[-1]) < signs[0]]
        for path in [*([Path(best)] if best else []), *before]:
            try:
                commits.check(path)
            except ValueError as error:
                logger.warning("%s is passed over: %s.", path, error)
                continue
            self.trainer.load_weights(str(path))
            logger.warning("the student is that of %s again.", path)
            return
        logger.warning("no checkpoint from before step %d is there to go back to: the student is the last step's.", signs[0])

    def _found(self, wanted: Any) -> Path | None:
        if wanted is True or wanted == LATEST:
            commits.recover(self.folder)
            path, skipped = commits.newest(self.folder)
            for torn, why in skipped:
                logger.warning("%s is passed over: %s.", torn, why)
            if path is None and wanted == LATEST:
                logger.warning("%s holds no whole checkpoint yet: the run starts.", self.folder)
                return None
            if path is None:
                there = f", and of {len(skipped)} none is whole" if skipped else ""
                raise ValueError(
                    f"No valid checkpoint found in output directory ({self.folder}){there}: leave resume_from_checkpoint out "
                    "to start a run."
                )
        else:
            path = Path(wanted).expanduser()
            try:
                if not path.is_dir():
                    raise ValueError("there is no such folder")
                commits.check(path)
            except ValueError as error:
                raise ValueError(f"the checkpoint {path} cannot be gone on with: {error}. {self._others(path)}") from error
        changed = refuse_another_run(path, commits.read_manifest(path).get("run") or {}, self.identity)
        if changed:
            logger.warning("going on with %s, changed: %s.", path, "; ".join(changed))
        return path

    def _others(self, path: Path) -> str:
        """The whole checkpoints beside one that is none."""
        whole = []
        for other in commits.checkpoints(path.parent if path.parent.is_dir() else self.folder):
            try:
                commits.check(other)
                whole.append(other.name)
            except ValueError:
                continue
        return f"Whole ones are there: {', '.join(whole)}." if whole else "No whole one is there: start the run again."
