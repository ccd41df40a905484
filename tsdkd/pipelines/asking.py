"""Teachers asked side by side, and what that may cost."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tsdkd.data import commits
from tsdkd.data.rows import read_rows
from tsdkd.pipelines.stage import Planned, Stage, Work
from tsdkd.rollouts.api_models import APIModel, Asked
from tsdkd.rollouts.by_api import APIWriter

REPLIES = "replies"  # the folder of what was paid for
_CHARACTERS = 4  # of a token, for what a plan says
_UNKNOWN = 512  # tokens of a reply that nothing limits, likewise


class RunConfig(Protocol):
    """What every run's configuration has."""

    @property
    def output_dir(self) -> str: ...

    @property
    def replies_dir(self) -> str | None: ...


Config = TypeVar("Config", bound=RunConfig)


class OfRun(Stage, Generic[Config]):
    """A stage of a run.

    Args:
        config: the run's.
    """

    def __init__(self, name: str, config: Config, after: Sequence[Stage] = (), **settings: Any) -> None:
        super().__init__(name, tuple(after), settings)
        self.config = config

    @property
    def replies(self) -> Path:
        """Where the run's replies are kept."""
        shared = self.config.replies_dir
        return Path(self.config.output_dir) / REPLIES if shared is None else Path(shared)


def ask(
    teachers: Sequence[APIModel], asked: dict[str, list[Asked]], folder: Path, work: Work, allow_failed: float
) -> dict[str, list[dict[str, Any]]]:
    """Every teacher's replies, the teachers side by side; what failed is counted.

    Raises:
        APIError: a teacher is down, or refuses.
        ValueError: a key is missing, or more requests failed than may.
    """
    for teacher in teachers:
        teacher.check()  # before any call
    with commits.locked(folder, "a pipeline asks, and keeps its replies there"):
        return _ask(teachers, asked, folder, work, allow_failed)


def _ask(
    teachers: Sequence[APIModel], asked: dict[str, list[Asked]], folder: Path, work: Work, allow_failed: float
) -> dict[str, list[dict[str, Any]]]:
    total, done = sum(map(len, asked.values())), dict.fromkeys(asked, 0)

    def of(writer: APIWriter) -> list[dict[str, Any]]:
        def told(number: int, of: int) -> None:
            done[writer.model.name] = number
            work.progress(sum(done.values()), total)

        with writer:
            return writer(asked[writer.model.name], told)

    writers = [APIWriter(teacher, folder, work.say) for teacher in teachers]
    with ThreadPoolExecutor(len(writers)) as pool:
        running = {writer.model.name: pool.submit(of, writer) for writer in writers}
        try:
            for future in wait(running.values(), return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException as error:
            for writer in writers:
                writer.stop()
            if isinstance(error, KeyboardInterrupt):
                work.say(f"{work.name}: stops once the replies that are on their way are here")
            raise
    found = {name: future.result() for name, future in running.items()}
    for writer in writers:
        replies = list({reply["hash"]: reply for reply in found[writer.model.name]}.values())
        sizes = [(reply.get("prompt_tokens"), reply.get("completion_tokens")) for reply in replies]
        read, written = (sum(size[place] or 0 for size in sizes) for place in (0, 1))
        work.count("calls of this run", writer.fresh)
        work.count("tokens read", read)
        work.count("tokens written", written)
        unknown = sum(None in size and "error" not in reply for size, reply in zip(sizes, replies, strict=True))
        if unknown:
            work.count("replies of unknown size", unknown)
        cost = writer.model.cost(read, written)
        if cost is not None:
            work.count("cost", round(cost, 6))
    errors = [reply["error"] for replies in found.values() for reply in replies if "error" in reply]
    if len(errors) > allow_failed * total:
        raise ValueError(
            f"{len(errors):,} of {total:,} requests failed after every try ({errors[0]}); the others are kept in {folder}. "
            "Start again and they are asked again, or let a share of them fail (sampling: allow_failed)."
        )
    if errors:
        work.count("failed", len(errors))
    return found


def planned(teachers: Sequence[APIModel], asked: dict[str, list[Asked]], folder: Path) -> Planned:
    """How many calls are left, and what they may cost: prompts by their characters, replies as long as they may become."""
    calls, cost, priced = 0, 0.0, False
    for teacher in teachers:
        known = {row["hash"] for row in read_rows(folder / f"{teacher.name}.jsonl", "remove it")}
        once = {each.hash(teacher): each for each in asked[teacher.name]}
        left = [each for key, each in once.items() if key not in known]
        calls += len(left)
        read = sum(len(message["content"]) for each in left for message in each.messages) // _CHARACTERS
        longest = teacher.options.get("max_tokens") or teacher.options.get("max_completion_tokens") or _UNKNOWN
        price = teacher.cost(read, len(left) * int(longest))
        priced, cost = priced or price is not None, cost + (price or 0.0)
    said = []
    if any(
        not (t.options.get("max_tokens") or t.options.get("max_completion_tokens")) for t in teachers if t.price is not None
    ):
        said.append(f"a reply without max_tokens taken as {_UNKNOWN} tokens")
    unknown = [teacher.name for teacher in teachers if teacher.price is None]
    if priced and unknown:
        said.append(f"without {', '.join(unknown)}, whose price is not known")
    return Planned(calls, cost if priced else None, "; ".join(said))
