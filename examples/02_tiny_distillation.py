"""On-policy TSD-KD with two tiny models on a CPU, in a minute: `python examples/02_tiny_distillation.py [output_dir]`."""

import sys

from datasets import Dataset

from tsdkd import TSDKDConfig, TSDKDTrainer
from tsdkd.demo.problems import make_problems
from tsdkd.demo.run import shipped  # the folders of two tiny models; put yours here

problems = make_problems(512, seed=1, levels=(2, 3))
trainer = TSDKDTrainer(
    model=shipped("student"),
    teacher_model=shipped("teacher"),
    args=TSDKDConfig(
        output_dir=sys.argv[1] if len(sys.argv) > 1 else "tiny-tsdkd",
        per_device_train_batch_size=32,
        max_steps=10,
        max_length=128,
        max_completion_length=48,
        learning_rate=5e-4,
        # The paper's weights suit a vocabulary of 152 000 tokens; see the README for what they do at 60.
        indirect_weight=0.01,
        num_candidates=3,
        entropy_weight=0.01,
        logging_steps=2,
        report_to="none",
    ),
    train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": p.question}] for p in problems]}),
)
trainer.train()
trainer.save_model()
print("The student is in", trainer.args.output_dir)
