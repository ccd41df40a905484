"""A method and a selection of your own: `python examples/05_your_own_method.py [output_dir]`."""

import sys
from dataclasses import dataclass

from datasets import Dataset

from tsdkd import TokenDistillConfig, TokenDistillTrainer
from tsdkd.demo.problems import make_problems
from tsdkd.demo.run import shipped  # the folders of two tiny models; put yours here
from tsdkd.methods import DivergenceMethod


def disagreements(statistics):
    """The tokens where the two models favour different words."""
    return statistics.top1_agreement == 0


@dataclass(frozen=True, kw_only=True)
class Mine(DivergenceMethod):
    """Reverse KL on the student's answers; gate, selection, counts and engines come with the base."""

    name = "mine"
    paper = {"title": "Mine", "id": "none", "citation": ""}  # noqa: RUF012

    def divergence_of(self):
        return "reverse_kl", 0.0


trainer = TokenDistillTrainer(
    model=shipped("student"),
    teacher_model=shipped("teacher"),
    method=Mine(selection=disagreements),
    args=TokenDistillConfig(
        sys.argv[1] if len(sys.argv) > 1 else "mine", max_steps=2, max_completion_length=48, logging_steps=1
    ),
    train_dataset=Dataset.from_dict({"prompt": [p.question for p in make_problems(64, seed=1, levels=(2, 3))]}),
)
trainer.train()
