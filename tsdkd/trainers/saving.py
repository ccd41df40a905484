"""Saves of a run: checkpoints that are whole or not there, and students beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import TrainOutput

from tsdkd.data import commits
from tsdkd.trainers.guard import NonFiniteError
from tsdkd.trainers.health import Health
from tsdkd.trainers.resuming import Resuming


class Saving:
    """A trainer's saves.

    Args:
        trainer: whose they are.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.resuming = Resuming(trainer)
        self.temporary: Path | None = None  # where a checkpoint is being written

    @property
    def folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Gives the folder that a checkpoint is written into, and puts it to its place afterwards; then older ones go."""
        trainer = self.trainer
        accelerator, state = trainer.accelerator, trainer.state
        root, place = self.folder / commits.SAVING, self.folder / f"checkpoint-{step}"
        self._refuse_unsound(step)
        identity = self.resuming.identity  # on every process
        if accelerator.is_main_process:
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
        accelerator.wait_for_everyone()
        self.temporary = root
        try:
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
            self._rotate(place)
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

    def _rotate(self, written: Path) -> None:
        """Take older checkpoints away: the one just written stays, and the best, and of the others the newest (those of later
        steps are what this run does not go on with)."""
        limit, best = self.trainer.args.save_total_limit, self.trainer.state.best_model_checkpoint
        if not limit or limit < 1:
            return
        kept = {written.name, *([Path(best).name] if best else [])}
        others = [path for path in commits.checkpoints(self.folder) if path.name not in kept]
        number = lambda path: int(path.name.rsplit("-", 1)[1])  # noqa: E731
        others.sort(key=lambda path: (number(path) < number(written), number(path)), reverse=True)
        for path in others[max(0, limit - len(kept)) :]:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def student(self, folder: str) -> Iterator[str]:
        """Gives the folder that a student is written into; its files go to `folder` one by one, the manifest last."""
        accelerator, place = self.trainer.accelerator, Path(folder)
        self._refuse_unsound(self.trainer.state.global_step)
        written = place / commits.SAVING
        if accelerator.is_main_process:
            shutil.rmtree(written, ignore_errors=True)
        accelerator.wait_for_everyone()
        yield str(written)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and written.is_dir():
            self.trainer.loop.spent.save(written)
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
            checkpoint = self.resuming.found(wanted)
            yield None if checkpoint is None else str(checkpoint), self.resuming.finished(checkpoint)
            health = next((c for c in self.trainer.callback_handler.callbacks if isinstance(c, Health)), None)
            if health is not None and health.signs and health.action == "back":
                self.resuming.back(health.signs)
