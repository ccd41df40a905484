"""`tsdkd inspect`: what a method decides of every token of a completion, as a page."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from tsdkd.checks import check_writable


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tsdkd inspect",
        allow_abbrev=False,
        description="Write a page that shows what a method decides of every token: the student writes completions of some "
        "prompts (or reads given ones), the teacher reads them, nothing is trained. Flags that are not listed here are tsdkd "
        "train's, recipes (--config) included: --student, --teacher, --method and its options, --max_completion_length, …",
        epilog="Example: tsdkd inspect --student s --teacher t --dataset_name prompts.jsonl --limit 4 --out page.html",
    )
    parser.add_argument("--prompt", action="append", help="a prompt's text; several times for several")
    parser.add_argument("--completion", action="append", help="a completion's text, one for each --prompt; read, not written")
    parser.add_argument("--limit", type=int, default=8, help="the first rows of --dataset_name (default: %(default)s)")
    parser.add_argument("--given", action="store_true", help="read the data set's completions in place of having them written")
    parser.add_argument("--out", type=Path, default=Path("inspect.html"), help="the page (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the tables into this file, too")
    parser.add_argument("--beside", metavar="STUDENT", help="another student, a checkpoint, on the same text, side by side")
    parser.add_argument("--beside_method", metavar="METHOD", help="another method's decisions on the same text, side by side")
    parser.add_argument("--beside_options", metavar="JSON", help="that method's options, by name, e.g. '{\"beta\": 0.5}'")
    own, rest = parser.parse_known_args(arguments)
    if own.beside_options and not own.beside_method:
        raise ValueError("--beside_options has no effect without --beside_method: pass it, or leave it out.")
    if own.limit < 1:
        raise ValueError(f"--limit {own.limit}: it must be 1 or more.")
    if own.completion and len(own.completion) != len(own.prompt or ()):
        raise ValueError(f"{len(own.completion)} --completion for {len(own.prompt or ())} --prompt: give each prompt one.")
    if any(not text.strip() for text in own.prompt or ()):
        raise ValueError("--prompt is empty: pass a text.")
    if own.beside and own.beside[0] in "./~" and not Path(own.beside).expanduser().is_dir():
        raise ValueError(f"--beside: there is no folder {own.beside}: pass a student's folder or name.")
    check_writable("out", own.out)
    check_writable("json", own.json)

    from tsdkd.cli.parsing import as_mapping, parse
    from tsdkd.methods import METHODS, resolve_method

    if own.beside_method is not None and own.beside_method not in METHODS:
        from tsdkd.cli.options import closest

        raise ValueError(f"--beside_method {own.beside_method}: unknown.{closest(own.beside_method, METHODS)}")
    with tempfile.TemporaryDirectory(prefix="tsdkd-") as folder:
        data, config, model = parse([*rest, "--output_dir", folder, "--report_to", "none"])
        if own.prompt and data.dataset_name:
            raise ValueError("--prompt and --dataset_name were both given: leave one out.")
        if not own.prompt and not data.dataset_name:
            raise ValueError("no prompts were given: pass --prompt TEXT, or --dataset_name NAME_OR_FILE.")
        config.save_strategy = "no"
        rows = _rows(own, data, model, config)

        from tsdkd.cli.train import build, inputs
        from tsdkd.inspection import Reader
        from tsdkd.trainers import TokenDistillTrainer

        bare = dataclasses.replace(data, dataset_name=None, eval_tasks=None)
        trainer = build(bare, config, model, inputs(bare, config, model, needs_prompts=False))
        reader = Reader(trainer)
        rollouts = reader.rollouts(rows, seed=config.seed, given=True if own.completion or own.given else None)
        readers = [reader]
        if own.beside or own.beside_method:
            options = as_mapping(own.beside_options, "--beside_options")
            method = trainer.method if own.beside_method is None else resolve_method(own.beside_method, options)
            student = own.beside or trainer.accelerator.unwrap_model(trainer.model)
            teacher = trainer.teacher_model if trainer.teacher_model is not None else config.teacher_model_name_or_path
            other = _beside(config, folder)
            kwargs = {} if own.beside else {"processing_class": trainer.processing_class}
            readers.append(Reader(TokenDistillTrainer(student, teacher, other, method=method, **kwargs)))
            if readers[0].label == readers[1].label:
                readers[1].label += " (beside)"
        try:
            completions = [[each.table(rollouts.rows([row])).to_json() for each in readers] for row in range(len(rollouts))]
        except ValueError as error:
            raise ValueError(f"{error} (of {len(rollouts)} completions)") from error

    from tsdkd.provenance import provenance
    from tsdkd.reporting.pages import as_bytes
    from tsdkd.reporting.token_page import token_page

    own.out.parent.mkdir(parents=True, exist_ok=True)
    page = token_page(completions, origin=f"tsdkd {provenance()['versions'].get('tsdkd', '')}, seed {config.seed}")
    own.out.write_bytes(as_bytes(page))
    tokens = sum(len(views[0]["tokens"]) for views in completions)
    found = "1 completion" if len(completions) == 1 else f"{len(completions)} completions"
    print(f"{found}, {tokens} tokens: the page is {own.out} ({len(as_bytes(page)) / 1e6:.1f} MB)")
    if own.json is not None:
        own.json.parent.mkdir(parents=True, exist_ok=True)
        own.json.write_text(json.dumps(completions, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"The tables are in {own.json}")
    return 0


def _rows(own: argparse.Namespace, data: Any, model: Any, config: Any) -> list[dict[str, Any]]:
    """The prompts as rows; of --prompt as the model is talked to."""
    from tsdkd.cli.train import prompts_of
    from tsdkd.data.teacher_prompts import columns_named, made_by, with_teacher_prompts
    from tsdkd.teachers.sources import has_chat_template

    if data.dataset_name:
        template = config.teacher_prompt_template
        found = prompts_of(data, data.dataset_name, data.dataset_train_split, template)
        first = found.select(range(min(own.limit, len(found))))
        return [dict(row) for row in with_teacher_prompts(first, template, data.dataset_name)]
    name = model.model_name_or_path
    as_chat = data.prompt_as_chat or bool(name and has_chat_template(name, model.model_revision, config.trust_remote_code))
    if as_chat and not data.prompt_as_chat:
        print("Prompts are put as chats: the student has a chat template.")
    texts = own.completion or [None] * len(own.prompt)
    made = []
    for prompt, completion in zip(own.prompt, texts, strict=True):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt}] if as_chat else prompt}
        if config.teacher_prompt_template is not None:
            if columns_named(config.teacher_prompt_template) != ["prompt"]:
                raise ValueError("--prompt has no other columns for teacher_prompt_template: pass --dataset_name with them.")
            row["teacher_prompt"] = made_by(config.teacher_prompt_template, row)
        if completion is not None:
            row["completion"] = [{"role": "assistant", "content": completion}] if as_chat else completion
        made.append(row)
    return made


def _beside(config: Any, folder: str) -> Any:
    """The options of the reader beside the first, of any method."""
    from tsdkd.trainers import TokenDistillConfig

    names = (
        "max_completion_length", "max_length", "temperature", "bf16", "fp16", "use_cpu", "teacher_placement", "teacher_urls",
        "teacher_model_revision", "teacher_model_init_kwargs", "model_init_kwargs", "trust_remote_code", "seed", "fused_impl",
        "token_aliases", "disable_dropout", "chat_template_kwargs", "teacher_prompt_template", "teacher_chat_template_kwargs",
        "self_teacher", "ema_decay",
    )  # fmt: skip
    return TokenDistillConfig(
        output_dir=folder, report_to="none", save_strategy="no", **{name: getattr(config, name) for name in names}
    )
