"""A student that teaches itself with more to read, on a CPU: worked solutions, and an instruction to be brief. Minutes.

`python examples/08_self_distillation.py [output_dir] [steps]`. A small model is made first that can do three things: solve a
question, with a habit of miscounting that it picks up at the end; copy a worked solution that stands behind the question; and,
where the prompt begins with `?`, give the answer alone. Then it learns from itself with another prompt
(`teacher_model="self"`): what the worked solutions say, or to be brief without being told. Nothing larger is in the process.
"""

import random
import shutil
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tsdkd import TokenDistillConfig, TokenDistillTrainer
from tsdkd.data.answers import is_correct
from tsdkd.data.intervals import wilson_interval
from tsdkd.demo.problems import held_out, make_problem, make_problems
from tsdkd.demo.second_student import make_blank, make_second_tokenizer
from tsdkd.pipelines.students import Inference, student_answers

LEVELS = (1, 2)


def made(folder: Path, steps: int, habit: int) -> str:
    """A model of three skills, each a third of its training; in its last steps, `habit`, what it solves alone has faults."""
    if (folder / "model.safetensors").is_file():
        return str(folder)
    tokenizer = make_second_tokenizer()
    model, draws = make_blank(tokenizer, seed=3), random.Random(3)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50, 0.15 + (steps - step) / steps)
        rows = []
        for number in range(64):
            problem = make_problem(draws, draws.choice(LEVELS))
            alone = make_problem(draws, draws.choice(LEVELS), faulty=0.5 if step >= steps - habit else 0.0)
            prompt, completion = [
                (f"{alone.question}\n", alone.solution),
                (f"{problem.question}\n{problem.solution}\n", problem.solution),
                (f"?{problem.question}\n", f"#### {problem.answer}"),
            ][number % 3]
            ids = tokenizer([prompt, completion], add_special_tokens=False)["input_ids"]
            rows.append((ids[0], [*ids[1], tokenizer.eos_token_id]))
        longest = max(len(a) + len(b) for a, b in rows)
        pad = [[tokenizer.pad_token_id] * (longest - len(a) - len(b)) for a, b in rows]
        inputs = torch.tensor([a + b + c for (a, b), c in zip(rows, pad, strict=True)])
        labels = torch.tensor([[-100] * len(a) + b + [-100] * len(c) for (a, b), c in zip(rows, pad, strict=True)])
        optimizer.zero_grad()
        loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"made: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def told(model: str, texts: list[str], answers: list[str], what: str) -> None:
    """Print accuracy with its interval, and the mean tokens, of greedy completions of some prompts."""
    written = list(student_answers(model, texts, Inference(max_tokens=48, batch_size=250)))
    right = sum(is_correct(row["text"], answer) for row, answer in zip(written, answers, strict=True))
    low, high = wilson_interval(right, len(answers))
    tokens = sum(row["tokens"] for row in written) / len(written)
    print(f"{what}: {right / len(answers):.1%} ({low:.1%}-{high:.1%}), {tokens:.1f} tokens", flush=True)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "self-distillation")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    base = made(out / "base", *((1800, 60) if steps >= 100 else (2, 1)))
    problems = make_problems(max(32, 8 * steps), seed=5, levels=LEVELS)
    test = held_out(500 if steps >= 100 else 20, seed=77, seen={p.question for p in problems}, levels=LEVELS)
    answers = [p.answer for p in test]
    data = Dataset.from_list([{"prompt": f"{p.question}\n", "solution": p.solution} for p in problems])
    # `student_answers` puts a line's end behind each prompt by itself.
    solved, briefly = [f"{p.question}\n{p.solution}" for p in test], [f"?{p.question}" for p in test]
    told(base, [p.question for p in test], answers, "before, alone")
    told(base, solved, answers, "before, with the worked solution")
    told(base, briefly, answers, "before, told to be brief")
    for name, template, hows, context, what in (
        ("solutions", "{prompt}{solution}\n", ("start", "live", "ema"), solved, "with the worked solution"),
        ("brief", "?{prompt}", ("start",), briefly, "told to be brief"),
    ):
        for how in hows:
            folder = out / f"{name}-{how}"
            shutil.rmtree(folder, ignore_errors=True)
            trainer = TokenDistillTrainer(
                base,
                "self",
                TokenDistillConfig(
                    output_dir=str(folder), method="gkd", method_options={"beta": 0.5}, teacher_prompt_template=template,
                    self_teacher=how, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-3,
                    max_length=192, max_completion_length=48, save_strategy="no", report_to="none", disable_tqdm=True,
                    logging_steps=50, sample_completions=0, **({"ema_decay": 0.99} if how == "ema" else {}),
                ),
                data,
            )  # fmt: skip
            trainer.train()
            trainer.save_model()
            told(str(folder), [p.question for p in test], answers, f"{name}, self_teacher={how}: after, alone")
            told(str(folder), context, answers, f"{name}, self_teacher={how}: after, {what}")
    AutoModelForCausalLM.from_pretrained(out / "solutions-start")  # a folder as any other


if __name__ == "__main__":
    main()
