"""A run that goes wrong says so while it runs: one line with what it means and what to try, once for each sign."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from tsdkd.trainers.host import once_a_run

logger = once_a_run(__name__)  # every process sees the same logs, and ends alike

WINDOW = 3  # logs that are averaged, at the start and now
FAR = 10.0  # times the direct term's gradient


@dataclass(frozen=True)
class Sign:
    """Something that a run's numbers show.

    Args:
        name: of the number that is logged.
        shows: from its average at the start and now to whether it is wrong.
        means, try_: what is said.
    """

    name: str
    shows: Callable[[float, float], bool]
    means: str
    try_: str


_LESS = "lower the learning rate or the weight of the term whose loss or gradient is largest"
SIGNS = (
    Sign(
        "completions/clipped_ratio",
        lambda start, now: now >= 0.5 and now >= start + 0.3,
        "more and more completions reach max_completion_length without an end: the student rambles",
        f"{_LESS}, or train on given completions for a share of the steps (lmbda)",
    ),
    Sign(
        "completions/mean_length",
        lambda start, now: now > 2.0 * start + 4,
        "completions have become more than twice as long",
        f"{_LESS}, and read some (--log_completions)",
    ),
    Sign(
        "completions/mean_length",
        lambda start, now: now < 0.5 * start,
        "completions have become less than half as long: the student stops before it has said anything",
        f"{_LESS}, and read some (--log_completions)",
    ),
    Sign(
        "completions/repetition",
        lambda start, now: now > start + 0.25,
        "completions repeat themselves more and more",
        f"{_LESS}; minimising the entropy makes a student repeat itself (entropy_weight)",
    ),
    Sign(
        "completions/end_probability",
        lambda start, now: start >= 0.05 and now < 0.4 * start,
        "the student holds an end to be less and less likely where its completions stop: they will grow",
        f"{_LESS}, and look at the ends that student and teacher were trained with (tsdkd doctor)",
    ),
    Sign(
        "student/entropy",
        lambda start, now: now < 0.1 * start,
        "the student's entropy has collapsed: it hardly samples anything but its first choice",
        "lower entropy_weight or top_entropy_fraction, or the learning rate",
    ),
    Sign(
        "candidates/top1_agreement",
        lambda start, now: now < start - 0.15,
        "student and teacher agree less and less on the next token: the student moves away from the teacher",
        f"{_LESS}; the direct term is what pulls it back (direct_weight)",
    ),
)


ACTIONS = ("warn", "stop", "back")
# What follows from how long completions may be.
_BY_LENGTH = ("completions/mean_length", "completions/clipped_ratio", "completions/end_probability")


class Health(TrainerCallback):
    """Compares a run's last logs with its first and warns; by option it ends the run, too.

    Args:
        norms: gives the terms' gradient norms that were computed last, by name.
        say: what prints the terms' gradients of the first step.
        action: `"warn"` changes nothing; `"stop"` ends the run with a checkpoint; `"back"` ends it, and the student is
            then that of the best checkpoint, or of the last one before the sign.
        uniform: the entropy of a teacher that knows nothing, the logarithm of the vocabulary; None: not looked at.
    """

    def __init__(
        self,
        norms: Callable[[], Mapping[str, float]],
        say: Callable[[str], None] = print,
        action: str = "warn",
        uniform: float | None = None,
    ) -> None:
        self.norms, self.say, self.action, self.uniform = norms, say, action, uniform
        self.signs: list[int] = []  # the steps at which one showed
        self._seen: dict[str, list[float]] = {}
        self._told: set[int] = set()
        self._ratios: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._seen, self._told, self._ratios, self.signs = {}, set(), {}, []

    def on_step_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        norms = dict(self.norms())
        if state.global_step == 1 and len(norms) > 1:
            self._ratios = ratios(norms)
            self.say(gradients(norms))
        elif self._ratios:
            self._compare(ratios(norms), state.global_step)

    def _compare(self, now: Mapping[str, float], step: int) -> None:
        for term, ratio in now.items():
            start = self._ratios.get(term, 0.0)
            if start and ratio > FAR * max(start, 1.0):
                logger.warning(
                    "step %d: the gradient of the %s term is %.3g times the direct term's, and was %.3g times at the start: it "
                    "decides alone what is learnt. Lower its weight.",
                    step,
                    term,
                    ratio,
                    start,
                )
                self._ratios[term] = ratio

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        for name in {sign.name for sign in SIGNS}:
            if name in logs:
                self._seen.setdefault(name, []).append(float(logs[name]))
        for number, sign in enumerate(SIGNS):
            values = self._seen.get(sign.name, [])
            if sign.name in _BY_LENGTH and getattr(args, "prefix_rollouts", None):
                continue  # they are cut, and then they are not
            if number in self._told or len(values) < 2 * WINDOW:
                continue
            start, now = statistics.fmean(values[:WINDOW]), statistics.fmean(values[-WINDOW:])
            if sign.shows(start, now):
                self._told.add(number)
                logger.warning(
                    "step %d: %s (%s %.3g, at the start %.3g). Try: %s.",
                    state.global_step,
                    sign.means,
                    sign.name,
                    now,
                    start,
                    sign.try_,
                )
                self._act(state, control)
        self._uniform(state, control, logs or {})

    def _uniform(self, state: Any, control: Any, logs: Mapping[str, Any]) -> None:
        """A teacher that has become uniform teaches nothing: a wrong checkpoint, a server's zeros, a text it cannot read."""
        entropy = logs.get("teacher/entropy")
        if self.uniform is None or entropy is None or -1 in self._told or float(entropy) < 0.97 * self.uniform:
            return
        self._told.add(-1)
        logger.warning(
            "step %d: the teacher's entropy is %.3g nats of the %.3g of one that knows nothing: it teaches nothing. Look at "
            "its checkpoint, its server, and at completions (--log_completions).",
            state.global_step,
            float(entropy),
            self.uniform,
        )
        self._act(state, control)

    def _act(self, state: Any, control: Any) -> None:
        self.signs.append(state.global_step)
        if self.action == "warn":
            return
        logger.warning("step %d: on_trouble=%s ends the run here.", state.global_step, self.action)
        control.should_training_stop = True
        control.should_save = control.should_save or self.action == "stop"


def ratios(norms: Mapping[str, float]) -> dict[str, float]:
    """Each other term's gradient in units of the direct term's; none without one."""
    direct = norms.get("direct", 0.0)
    return {name: norm / direct for name, norm in norms.items() if name != "direct"} if direct else {}


def gradients(norms: Mapping[str, float]) -> str:
    """The terms' gradients of the first step, with a word where one is far above the direct term's."""
    far = [f"{name} {ratio:.0f} times" for name, ratio in ratios(norms).items() if ratio > FAR]
    text = "gradients      " + ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items()) + " (weighted, first step)"
    return text + (f"; far above the direct term's: {', '.join(far)}, see their weights" if far else "")


def repetition(ids: Sequence[int], size: int = 3) -> float:
    """The share of a completion's n-grams that stood in it before, 0 of one that is shorter.

    Example:
        >>> repetition([1, 2, 3, 4, 5]), repetition([1, 1, 1, 1, 1, 1])
        (0.0, 0.75)
    """
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def watch(trainer: Any) -> Health:
    """A trainer's."""
    norms = lambda: {name: float(norm) for name, norm in trainer.loop.loss.norms.items()}  # noqa: E731
    crossing = trainer.loop.scorer.crossing
    tokens = trainer.vocab_size if crossing is None else crossing.vocabularies.tokens
    return Health(norms, action=trainer.args.on_trouble, uniform=math.log(tokens))
