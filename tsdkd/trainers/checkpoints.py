"""What a checkpoint keeps beside TRL's: the parts of a run that have a state, a JSON file a process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Stateful(Protocol):
    """A part of a run with a state."""

    def state_dict(self) -> Any:
        """What a checkpoint keeps, as JSON; None is nothing."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Continue from a checkpoint."""
        ...


class Kept(Protocol):
    """A part of a run that keeps tensors, the same on every process."""

    def save(self, folder: Path) -> None:
        """Write its file into a checkpoint."""
        ...

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint."""
        ...


class Checkpoints:
    """The registry of the parts.

    Args:
        identity: what must be the same when a run goes on: the method's name and the number of processes.
        process: this one's number.
        parts: by their name in the file.
        kept: those with files of their own, which the first process writes.
    """

    def __init__(
        self, identity: Mapping[str, Any], process: int, parts: Mapping[str, Stateful], kept: Sequence[Kept] = ()
    ) -> None:
        self.identity, self.process, self.parts, self.kept = dict(identity), process, dict(parts), list(kept)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of this process; None is nothing."""
        kept = {name: state for name, part in self.parts.items() if (state := part.state_dict()) is not None}
        return {**self.identity, **kept} if kept else None

    def file(self, folder: str | Path) -> Path:
        """This process's file in a checkpoint."""
        return Path(folder) / f"tsdkd_state_{self.process}.json"

    def save(self, folder: Path) -> None:
        """Write the file, where there is something to keep."""
        for part in self.kept if self.process == 0 else ():
            part.save(folder)
        state = self.state()
        if state is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.file(folder).write_text(json.dumps(state))

    def read(self, folder: str | Path) -> dict[str, Any]:
        """What this process's file holds; empty without one.

        Raises:
            ValueError: it is damaged.
        """
        file = self.file(folder)
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"the checkpoint's {file} is damaged ({error}): go on with another one.") from error
        return found if isinstance(found, dict) else {}

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it lacks the file, or was written by another method or number of processes.
        """
        for part in self.kept:
            part.load(Path(folder))
        file = self.file(folder)
        if file.is_file():
            self.restore(self.read(folder))
        elif self.state() is not None:
            raise ValueError(
                f"the checkpoint {folder} has no {file.name}, which holds the method's state ({', '.join(self.parts)}): it was "
                "written by another method, with fewer processes, or without a token_budget. Go on with what wrote it."
            )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave.

        Raises:
            ValueError: the identity differs.
        """
        for what, value in self.identity.items():
            if state[what] != value:
                raise ValueError(
                    f"the checkpoint keeps a state of {what} {state[what]!r}, and this run has {value!r}: it would be lost or "
                    f"torn. Resume with {what} {state[what]!r}."
                )
        for name, part in self.parts.items():
            if name in state:
                part.load_state_dict(state[name])
