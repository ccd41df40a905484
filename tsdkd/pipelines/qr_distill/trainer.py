"""Several students at once, a router that says which path teaches which, and what they learn from each other (2.4 to 2.6).

Every draw of a step (order, gates, dropout) is made of the seed and the step's number, so a run that goes on repeats it.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tsdkd.data import commits
from tsdkd.pipelines.processes import Processes
from tsdkd.pipelines.qr_distill.learners import Learner, check_alignment
from tsdkd.pipelines.qr_distill.mutual import Mutual
from tsdkd.pipelines.qr_distill.objective import baseline, mean_of_given
from tsdkd.pipelines.qr_distill.options import QRTraining
from tsdkd.pipelines.qr_distill.routing import Router, routing_entropy, temperature_at
from tsdkd.pipelines.students import save_student
from tsdkd.teachers.heads import without_dropout

ROUTED = ("id", "problem", "style", "level")  # what is kept of a path beside its gates


class QRDistillTrainer:
    """Trains students, router and projections together, in one process or, under `accelerate launch`, in several.

    Args:
        students: their names or folders, at least two.
        rows: the filtered paths, `problem`, `question`, `path`, `style`.
        encodings: of the paths, `[rows, width]`, in their order.
        options: see `QRTraining`.
        folder: where checkpoints stand while it trains.
        seed: of every draw.
        progress: is told of steps.

    One process places the students on the GPUs that it sees, in turn. Of several processes each holds all students and reads
    its part of a step's paths; gates, losses' means and gradients are those of one process that reads them all.

    Raises:
        ValueError: fewer than two students, another number of learning rates or rates, or no path that fits.
    """

    def __init__(
        self,
        students: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        encodings: torch.Tensor,
        options: QRTraining,
        folder: Path,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        if len(students) < 2:
            raise ValueError(f"QR-Distill trains at least two students together; {len(students)} was given.")
        if len(options.learning_rates) != len(students):
            raise ValueError(f"{len(students)} students have {len(options.learning_rates)} learning rates: give one each.")
        if isinstance(options.rate, tuple) and len(options.rate) != len(students):
            raise ValueError(f"{len(students)} students have {len(options.rate)} rates: give one for all, or one each.")
        if len(encodings) != len(rows):
            raise ValueError(f"{len(rows)} paths have {len(encodings)} encodings.")
        self.options, self.folder, self.seed, self.progress = options, Path(folder), seed, progress
        torch.manual_seed(seed)
        self.processes = Processes()
        devices = self.processes.devices(len(students))
        self.learners = [
            Learner(name, options.lora_r, device, options.four_bit) for name, device in zip(students, devices, strict=True)
        ]
        made = [learner.tokens(rows) for learner in self.learners]
        limits = [min(options.max_length, learner.context) for learner in self.learners]
        sizes = [[len(each[n].prompt) + len(each[n].path) for each in made] for n in range(len(rows))]
        fits = [all(size <= limit for size, limit in zip(own, limits, strict=True)) for own in sizes]
        self.too_long = len(rows) - sum(fits)
        kept = [number for number, fit in enumerate(fits) if fit]
        if not kept:
            raise ValueError(f"no path fits into max_length={options.max_length} and the students' contexts ({limits}).")
        self.rows, self.encodings = [rows[number] for number in kept], encodings[kept].float()
        self.tokens = [[each[number] for number in kept] for each in made]
        check_alignment(options.alignment, [learner.tokenizer for learner in self.learners])
        self.of_question: dict[Any, list[int]] = {}
        for number, row in enumerate(self.rows):
            self.of_question.setdefault(row["problem"], []).append(number)
        self.unaligned: set[int] = set()  # paths of which no piece is a token's of every student
        self._values = torch.zeros(0)
        self.router = Router(self.encodings.shape[1], len(students))
        self.mutual = Mutual([learner.width for learner in self.learners], options.shared, options.alignment, options.normalise)
        groups = [
            {"params": [p for p in learner.parameters() if p.requires_grad], "lr": rate}
            for learner, rate in zip(self.learners, options.learning_rates, strict=True)
        ]
        auxiliary = [*self.router.parameters(), *self.mutual.parameters()]
        groups.append({"params": auxiliary, "lr": options.auxiliary_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._rates = [*options.learning_rates, options.auxiliary_learning_rate]
        self.steps_of_epoch = -(-len(self.rows) // options.batch_size)
        self.steps = options.max_steps or self.steps_of_epoch * options.epochs
        self.routed: list[dict[str, Any]] = []  # every step's gates

    # ------------------------------------------------------------------ a step

    def batch(self, step: int) -> list[int]:
        """The paths of a step, in an order of its epoch's; those of a question stand together, since Eq. 3 is over them."""
        epoch, place = divmod(step, self.steps_of_epoch)
        questions = list(self.of_question)
        random.Random(f"{self.seed}/{epoch}").shuffle(questions)
        order = [number for question in questions for number in self.of_question[question]]
        return order[place * self.options.batch_size : (place + 1) * self.options.batch_size]

    def gates(self, numbers: Sequence[int], step: int) -> torch.Tensor:
        """`[paths, students]`, of a step's paths."""
        options, draws = self.options, torch.Generator().manual_seed(random.Random(f"{self.seed}/{step}").getrandbits(60))
        shape = (len(numbers), len(self.learners))
        if options.routing == "all":
            return torch.ones(shape)
        if options.routing == "random":
            return (torch.rand(shape, generator=draws) < torch.tensor(options.rate)).float()
        heat = temperature_at(step, self.steps, options.temperature, options.last_temperature, options.schedule)
        return self.router(self.encodings[list(numbers)], heat, draws).alpha

    def backward(self, numbers: Sequence[int], step: int) -> dict[str, Any]:
        """A step's gradients, and what it came to; the same whatever `micro_batch` is."""
        options, count = self.options, len(self.learners)
        alpha = self.gates(numbers, step)
        gates = alpha.detach().clone().requires_grad_()
        on = gates.detach() > 0.5
        given, base = on.sum(0), self._baseline(numbers, on)
        together = set((on.sum(1) > 1).nonzero().flatten().tolist()) if options.mutual_weight else set()
        sums = torch.zeros(count + 2)  # what the students' losses, the mutual loss and the norm come to
        for part in self._parts(numbers):
            losses, states = self._read(numbers, part, on)
            each = mean_of_given(losses, gates[part], given, base)
            loss = each.sum()
            sums[:count] += each.detach()
            for row in sorted(together.intersection(part)):
                found = {student: own[row] for student, own in enumerate(states) if row in own}
                spans = {s: self.tokens[s][numbers[row]].spans for s in found}
                try:
                    result = self.mutual({s: state.cpu() for s, state in found.items()}, spans)
                except ValueError:  # no piece of it is every student's
                    self.unaligned.add(numbers[row])
                    continue
                loss = loss + options.mutual_weight * result.loss / len(together)
                sums[count:] += torch.stack([result.loss.detach(), result.norm]) / len(together)
            loss.backward()
        parts = (*self.learners, self.mutual)
        self.processes.add_gradients([p for module in parts for p in module.parameters() if p.requires_grad])
        slopes = self.processes.sum(torch.zeros_like(gates) if gates.grad is None else gates.grad)
        sums = self.processes.sum(sums)
        entropy = routing_entropy(alpha, [self.rows[number]["problem"] for number in numbers], options.per_student)
        if options.routing == "learned":
            ((alpha * slopes).sum() - options.entropy_weight * entropy).backward()
        distill, mutual, norm = sums[:count], sums[count].item(), sums[count + 1].item()
        for row, number in enumerate(numbers):
            about = {name: self.rows[number][name] for name in ROUTED if name in self.rows[number]}
            self.routed.append({"step": step, **about, "to": on[row].int().tolist()})
        return {
            "loss": distill.sum().item() - options.entropy_weight * entropy.item() + options.mutual_weight * mutual,
            "distill": distill.tolist(),
            "entropy": entropy.item(),
            "mutual": mutual,
            "norm": norm,
            "rates": on.float().mean(0).tolist(),
        }

    def _parts(self, numbers: Sequence[int]) -> list[list[int]]:
        """The places of this process's paths of a step, some at a time."""
        own = list(range(self.processes.rank, len(numbers), self.processes.count))
        return [own[start : start + self.options.micro_batch] for start in range(0, len(own), self.options.micro_batch)]

    def _baseline(self, numbers: Sequence[int], on: torch.Tensor) -> torch.Tensor:
        """Every path's loss by every student, without dropout and without gradient, for the router's gradient; and `baseline`.
        Where the router learns nothing, neither is read."""
        if self.options.routing != "learned":
            return torch.zeros(len(self.learners))
        values = torch.zeros(on.shape)
        for student, learner in enumerate(self.learners):
            without_dropout(learner)
            for part in self._parts(numbers):
                with torch.no_grad():
                    values[part, student] = learner.read([self.tokens[student][numbers[row]] for row in part])[0].cpu()
            learner.train()
        self._values = self.processes.sum(values)
        return baseline(self._values, on)

    def _read(self, numbers: Sequence[int], part: Sequence[int], on: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
        """`[paths, students]` losses, with gradient where a path is given, and the hidden states of those."""
        columns, states = [], []
        for student, learner in enumerate(self.learners):
            given = [row for row in part if on[row, student]]
            values = {row: self._values[row, student] for row in part} if self.options.routing == "learned" else {}
            own: dict[int, torch.Tensor] = {}
            if given:
                losses, hidden = learner.read([self.tokens[student][numbers[row]] for row in given])
                values.update(zip(given, losses.cpu(), strict=True))
                own = dict(zip(given, hidden, strict=True))
            columns.append(torch.stack([values.get(row, torch.zeros(())) for row in part]))
            states.append(own)
        return torch.stack(columns, 1), states

    def train(self, save_every: int | None = None) -> list[dict[str, Any]]:
        """All steps, or those that are left; each step's row.

        Args:
            save_every: steps between two checkpoints; None: an epoch.
        """
        every, log = save_every or self.steps_of_epoch, self._resume()
        for step in range(len(log), self.steps):
            own = f"/{self.processes.rank}" if self.processes.rank else ""
            torch.manual_seed(random.Random(f"{self.seed}/dropout/{step}{own}").getrandbits(60))
            for module in (*self.learners, self.router, self.mutual):
                module.train()
            self.optimizer.zero_grad(set_to_none=True)
            row = self.backward(self.batch(step), step)
            if not all(torch.isfinite(p.grad).all() for p in self._named().values() if p.grad is not None):
                raise FloatingPointError(
                    f"step {step + 1}: NaN or Inf in a gradient; the step was not made. Lower the learning rate."
                )
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.options.rate_at(step, self.steps)
                if self.options.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(group["params"], self.options.max_grad_norm)
            self.optimizer.step()
            log.append({"step": step + 1, **row})
            self.progress(step + 1, self.steps)
            if (step + 1) % every == 0 and step + 1 < self.steps:
                self._checkpoint(log)
        self.unaligned = self.processes.union(self.unaligned)
        return log

    # ------------------------------------------------------------------ checkpoints and students

    @property
    def identity(self) -> dict[str, Any]:
        """What a run that goes on shares with its checkpoint."""
        rows = hashlib.sha256(json.dumps([dict(row) for row in self.rows], sort_keys=True, default=str).encode()).hexdigest()
        options = json.loads(json.dumps(self.options.settings))
        return {
            **options,
            "seed": self.seed,
            "rows": rows,
            "encodings": hashlib.sha256(self.encodings.numpy().tobytes()).hexdigest(),
        }

    def _named(self) -> dict[str, torch.Tensor]:
        """Everything that is trained, by name."""
        parts = {f"student-{number}": learner.model for number, learner in enumerate(self.learners, 1)}
        parts.update(router=self.router, mutual=self.mutual)
        return {
            f"{part}/{name}": p for part, module in parts.items() for name, p in module.named_parameters() if p.requires_grad
        }

    def _checkpoint(self, log: list[dict[str, Any]]) -> None:
        if self.processes.is_first:
            self._write_checkpoint(log)
        self.processes.wait()

    def _write_checkpoint(self, log: list[dict[str, Any]]) -> None:
        root, place = self.folder / commits.SAVING, self.folder / f"checkpoint-{len(log)}"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        named = self._named()
        save_file({name: p.detach().cpu().contiguous() for name, p in named.items()}, root / "weights.safetensors")
        moments = {
            f"{name}/{key}": value.detach().cpu().reshape(-1).contiguous()
            for name, p in named.items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        save_file(moments, root / "optimizer.safetensors")
        (root / "log.json").write_text(json.dumps({"log": log, "routed": self.routed}))
        commits.write_manifest(root, {"step": len(log), "run": self.identity})
        commits.put(root, place)
        for older in commits.checkpoints(self.folder)[1:]:
            shutil.rmtree(older, ignore_errors=True)

    def _resume(self) -> list[dict[str, Any]]:
        """Go on from the newest whole checkpoint, where there is one; its log."""
        checkpoint, _ = commits.newest(self.folder)
        if checkpoint is None:
            self.routed = []
            return []
        run = commits.read_manifest(checkpoint).get("run", {})
        changed = [name for name, value in self.identity.items() if run.get(name) != value]
        if changed:
            raise ValueError(
                f"{checkpoint} is of another run ({', '.join(changed)} differ): name another folder, or remove it."
            )
        weights, moments = load_file(checkpoint / "weights.safetensors"), load_file(checkpoint / "optimizer.safetensors")
        with torch.no_grad():
            for name, p in self._named().items():
                p.copy_(weights[name])
                state = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
                if state:
                    shapes = {key: () if key == "step" else tuple(p.shape) for key in state}
                    placed = {key: value.to("cpu" if key == "step" else p.device) for key, value in state.items()}
                    self.optimizer.state[p] = {key: value.reshape(shapes[key]) for key, value in placed.items()}
        kept = json.loads((checkpoint / "log.json").read_text())
        self.routed = kept["routed"]
        return kept["log"]

    def save(self, folder: Path) -> None:
        """Every student's folder, adapters merged, and the router and projections beside them; the first process writes."""
        if not self.processes.is_first:
            return
        for number, learner in enumerate(self.learners, 1):
            save_student(learner.whole(), learner.tokenizer, folder / f"student-{number}")
        for name, module in (("router", self.router), ("mutual", self.mutual)):
            save_file({key: value.contiguous() for key, value in module.state_dict().items()}, folder / f"{name}.safetensors")
