"""The model card of a student: what it is of, how it was made, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tsdkd.data.intervals import wilson_interval
from tsdkd.data.rows import read_scores
from tsdkd.provenance import provenance
from tsdkd.teachers.heads import without_adapter_wrapper
from tsdkd.trainers.host import batch_rows
from tsdkd.trainers.run_record import summary


def _link(name: str) -> str:
    """A model's name as a link where it is one of the Hub."""
    return f"[{name}](https://huggingface.co/{name})" if name.count("/") == 1 and not Path(name).exists() else f"`{name}`"


def card(
    *,
    title: str,
    method: str,
    paper: Mapping[str, str],
    models: Mapping[str, str],
    base: str | None,
    is_adapter: bool,
    about: Mapping[str, str],
    versions: Mapping[str, str],
    scores: Mapping[str, str] | None = None,
    chats: bool = True,
    tags: list[str] | None = None,
) -> str:
    """Markdown with its header.

    Args:
        title: what the model is called.
        method, paper: the method's title, and its `title`, `id`, `citation`.
        models: names of `student` and `teacher`.
        base: of an adapter; None: the student.
        is_adapter: whether the folder holds an adapter on it.
        about: the lines of the run's table.
        versions: of the packages that made it.
        scores: what it scored, by name.
        chats: whether it was trained on chats.
        tags: of the Hub.
    """
    base = base or models["student"]
    on_hub = base.count("/") == 1 and not Path(base).exists()
    header: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "tags": sorted(set(tags or []))}
    if on_hub:
        header["base_model"] = base
    if is_adapter:
        load = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            'folder = "path/of/this/folder"',
            "model = AutoPeftModelForCausalLM.from_pretrained(folder)",
        ]
    else:
        load = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "path/of/this/folder"',
            "model = AutoModelForCausalLM.from_pretrained(folder)",
        ]
    load.append("tokenizer = AutoTokenizer.from_pretrained(folder)")
    if chats:
        load += [
            'chat = [{"role": "user", "content": "What is 12 + 5?"}]',
            'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        ]
    else:
        load.append('inputs = tokenizer("What is 12 + 5?", return_tensors="pt")')
    load += [
        "output = model.generate(**inputs, max_new_tokens=128)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    teacher = "" if models["teacher"] == "none" else f", distilled from {_link(models['teacher'])}"
    kind = "An adapter on" if is_adapter else "A student made of"
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"{kind} {_link(base)}{teacher}, with {method}"
        + (f" ([{paper['title']}](https://arxiv.org/abs/{paper['id']}))" if paper.get("id") else "")
        + ", by tsdkd.",
        "",
        "## Use",
        "```python",
        *load,
        "```",
        "",
        "## How it was made",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in about.items()),
        f"| versions | {', '.join(f'{name} {version}' for name, version in versions.items())} |",
    ]
    if scores:
        lines += ["", "## Scores", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in scores.items())]
    if paper.get("citation"):
        lines += ["", "## Citation", "```bibtex", paper["citation"].strip(), "```"]
    return "\n".join(lines) + "\n"


def card_of(trainer: Any, title: str | None, data: str | None, tags: list[str]) -> str:
    """The card of a `TokenDistillTrainer`'s student."""
    about = summary(trainer)
    about.pop("written to")
    data = data or trainer.run_record.options.get("dataset_name")
    if data:
        about["prompts"] = f"{about['prompts']}, of {_link(str(data))}"
    steps = trainer.state.global_step
    if steps:
        seen = min(steps, trainer.state.max_steps) * batch_rows(trainer.args) * trainer.accelerator.num_processes
        about["trained on"] = f"{seen:,} rollouts, {trainer.trained_tokens:,} tokens of them, in {steps} steps"
    model, folder = trainer.model, Path(trainer.args.output_dir)
    is_adapter = hasattr(model, "peft_config")
    return card(
        title=title or folder.name,
        method=trainer.method.title or trainer.method.name,
        paper=trainer.method.paper,
        models=trainer.loop.names,
        base=(without_adapter_wrapper(model).config._name_or_path or None) if is_adapter else None,
        is_adapter=is_adapter,
        about=about,
        versions=provenance()["versions"],
        scores=_scores(Path(trainer.run_record.folder) / "benchmarks.jsonl"),
        chats=trainer.has_chats,
        tags=tags,
    )


def _scores(path: Path) -> dict[str, str]:
    """The last scores of a run that was scored while it trained, with their 95 % intervals."""
    rows = [row for row in read_scores(path) if row.main and row.step is not None] if path.is_file() else []
    last = max((row.step or 0 for row in rows), default=0)
    made = {}
    for row in rows:
        if row.step != last:
            continue
        text = f"{row.score:.3f}"
        if 0 <= row.score <= 1 and row.n:
            low, high = wilson_interval(round(row.score * row.n), row.n)
            text += f" ({low:.3f} to {high:.3f})"
        made[row.name] = f"{text}, {row.n} items, step {last}"
    return made
