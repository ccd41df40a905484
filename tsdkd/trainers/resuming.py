"""Which checkpoint a run goes on with: the newest whole one, or one that is named, of the same run."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from tsdkd.data import commits
from tsdkd.trainers.identity import identity, refuse_another_run
from tsdkd.trainers.run_record import planned_steps

logger = logging.getLogger(__name__)
LATEST = "latest"  # the newest whole checkpoint, or a start where there is none


class Resuming:
    """A trainer's checkpoints, read.

    Args:
        trainer: whose they are.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
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

    def find_best(self) -> None:
        """The best checkpoint of a run whose folder has moved, or that is named from another working directory."""
        state = self.trainer.state
        place = self.folder / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and place.is_dir():
            state.best_model_checkpoint = str(place)

    def finished(self, checkpoint: Path | None) -> TrainOutput | None:
        """What `train` gives of a run that its checkpoint has ended, whose student this one then is; None of any other."""
        trainer = self.trainer
        if checkpoint is None:
            return None
        step, wanted = commits.read_manifest(checkpoint)["step"], planned_steps(trainer, begun=False)
        budget, spent = trainer.args.token_budget, trainer.loop.checkpoints.read(checkpoint).get("trained_tokens", 0)
        if step < wanted and (budget is None or spent < budget):
            return None
        logger.warning("%s is of the run's end (%d of %d steps): nothing is left to train.", checkpoint, step, wanted)
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.find_best()
        trainer.loop.spent.load(checkpoint)
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            trainer.load_weights(best if best and Path(best).is_dir() else str(checkpoint))
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
            path = self._newest(wanted)
            if path is None:
                return None
        else:
            path = Path(wanted).expanduser()
            path = path if path.is_dir() or not (self.folder / path).is_dir() else self.folder / path
            if path.parent.is_dir():
                commits.recover(path.parent)
            try:
                if not path.is_dir():
                    raise ValueError("there is no such folder")
                self._check(path)
            except ValueError as error:
                raise ValueError(f"the checkpoint {path} cannot be gone on with: {error}. {self._others(path)}") from error
        changed = refuse_another_run(path, commits.read_manifest(path)["run"], self.identity)
        if changed:
            logger.warning("going on with %s, changed: %s.", path, "; ".join(changed))
        return path

    def _newest(self, wanted: Any) -> Path | None:
        """The newest whole checkpoint; those above it are set aside, so that none of them is taken for a later one."""
        commits.recover(self.folder)
        path, skipped = commits.newest(self.folder, self._check)
        for torn, why in skipped:
            logger.warning("%s is passed over: %s.", torn, why)
        if path is None and (skipped or wanted is True):
            there = f": of {len(skipped)} none is whole" if skipped else ""
            more = ", and take those away first (--overwrite_output_dir)" if skipped else ""
            raise ValueError(
                f"No valid checkpoint found in output directory ({self.folder}){there}. Leave resume_from_checkpoint out to "
                f"start a run{more}."
            )
        if path is None:
            logger.warning("%s holds no checkpoint yet: the run starts.", self.folder)
        for torn, _ in skipped:
            aside = torn.with_name(f".torn-{torn.name}")
            shutil.rmtree(aside, ignore_errors=True)
            torn.rename(aside)
        return path

    def _check(self, path: Path) -> dict[str, Any]:
        """A whole checkpoint's manifest, from which a run can go on.

        Raises:
            ValueError: what is missing or damaged.
        """
        made = commits.check(path)
        names = set(made["files"])
        if "trainer_state.json" not in names or not isinstance(made.get("run"), dict):
            raise ValueError(
                "it is no checkpoint of a run: a student alone is in it, or its manifest does not say of which run it is"
            )
        trainer = self.trainer
        processes = made["run"].get("listed", {}).get("processes", 1)
        states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{number}.pth" for number in range(processes)]
        wanted = (
            states if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled else ["optimizer.pt", "scheduler.pt", *states]
        )
        lacking = [name for name in wanted if name not in names]
        if lacking:
            raise ValueError(
                f"its {lacking[0]} was not saved (save_only_model?): the optimizer or the draws would start anew. Its weights "
                "can be trained as a student of a new run"
            )
        return made

    def _others(self, path: Path) -> str:
        """The whole checkpoints beside one that is none."""
        places = dict.fromkeys(place.resolve() for place in (path.parent, self.folder) if place.is_dir())
        whole = []
        for other in (other for place in places for other in commits.checkpoints(place)):
            try:
                self._check(other)
                whole.append(other.name)
            except ValueError:
                continue
        return f"Whole ones are there: {', '.join(whole)}." if whole else "No whole one is there: start the run again."
