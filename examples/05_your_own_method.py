"""A method and a selection of your own in the trainer: `python examples/05_your_own_method.py [output_dir]`."""

import sys
from dataclasses import dataclass

import torch
from datasets import Dataset

from tsdkd import TokenDistillConfig, TokenDistillTrainer
from tsdkd.demo.problems import make_problems
from tsdkd.demo.run import shipped  # the folders of two tiny models; put yours here
from tsdkd.methods import DivergenceMethod


def disagreements(statistics):
    """The tokens where the two models favour different words; a rule says with `needs` what it reads."""
    return (statistics.top1_agreement == 0) & statistics.mask


disagreements.needs = "both"


@dataclass(frozen=True, kw_only=True)
class ReverseKLWhereTheyDisagree(DivergenceMethod):
    """Reverse KL, on the student's answers, where it would have chosen another word than its teacher."""

    selection: object = disagreements
    name = "reverse_kl_where_they_disagree"
    paper = {"title": "Mine", "id": "none", "citation": ""}  # noqa: RUF012

    def divergence_of(self):
        return "reverse_kl", 0.0


torch.manual_seed(0)
problems = make_problems(64, seed=1, levels=(2, 3))
trainer = TokenDistillTrainer(
    model=shipped("student"),
    teacher_model=shipped("teacher"),
    method=ReverseKLWhereTheyDisagree(),
    args=TokenDistillConfig(
        output_dir=sys.argv[1] if len(sys.argv) > 1 else "own-method",
        per_device_train_batch_size=32,
        max_steps=2,
        max_length=128,
        max_completion_length=48,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": p.question}] for p in problems]}),
)
trainer.train()
