"""The stages that train (QR-Distill, 2.4 to 2.6): paths as vectors, students together, how paths were routed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tsdkd.pipelines.qr_distill.config import QRConfig
from tsdkd.pipelines.qr_distill.grading import right
from tsdkd.pipelines.qr_distill.learners import check_alignment
from tsdkd.pipelines.qr_distill.paths import OfQR
from tsdkd.pipelines.qr_distill.report import last_epoch, routing_rates
from tsdkd.pipelines.qr_distill.trainer import QRDistillTrainer
from tsdkd.pipelines.stage import Stage, Work, contents_of
from tsdkd.pipelines.students import check_four_bit, lora_config, tokenizer_of
from tsdkd.pipelines.tested import Tested
from tsdkd.teachers.sources import refuse_unreadable

_AT_ONCE = 32
ENCODINGS = "encodings.safetensors"


class Encoded(OfQR):
    """Every path by the frozen encoder, the mean of its last states over the path's tokens (Eq. 1)."""

    is_folder = True

    def __init__(self, config: QRConfig, paths: Stage) -> None:
        super().__init__("encoded", config, [paths])
        self.depends_on("encoder", config.encoder)

    def check(self) -> None:
        refuse_unreadable(self.config.encoder)
        _encoders_tokenizer(self.config.encoder)

    @torch.no_grad()
    def make(self, work: Work) -> None:
        from transformers import AutoModel

        assert work.folder is not None
        name, rows = self.config.encoder, self.after[0].rows
        tokenizer = _encoders_tokenizer(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
        encoder = model.get_encoder() if model.config.is_encoder_decoder else model
        # RoBERTa counts its positions from behind the padding's id.
        shift = (tokenizer.pad_token_id or 0) + 1 if model.config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        longest = min(int(getattr(model.config, "max_position_embeddings", 512)) - shift, tokenizer.model_max_length)
        made = []
        for start in range(0, len(rows), _AT_ONCE):
            texts = [row["path"] for row in rows[start : start + _AT_ONCE]]
            work.count("cut to the encoder's context", sum(len(ids) > longest for ids in tokenizer(texts)["input_ids"]))
            inputs = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt").to(device)
            mask = inputs["attention_mask"].unsqueeze(-1)
            states = encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            made.append(((states * mask).sum(1) / mask.sum(1)).cpu())
            work.progress(min(start + _AT_ONCE, len(rows)), len(rows))
        save_file({"encodings": torch.cat(made)}, work.folder / ENCODINGS)
        work.count("paths", len(rows))
        work.counts["width"] = made[0].shape[1]


def _encoders_tokenizer(name: str) -> Any:
    """An encoder's tokenizer; one without a padding token pads with its end, which the mask leaves out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of the encoder {name} has no token to pad with: set its pad_token, and save it.")
    return tokenizer


class Students(OfQR):
    """All students, trained together on the filtered paths; `routing.jsonl` has where each path went at each step."""

    is_folder = True
    is_together = True

    def __init__(self, config: QRConfig, paths: Stage, encoded: Stage | None) -> None:
        after = [paths] if encoded is None else [paths, encoded]
        super().__init__("students", config, after, students=list(config.students), seed=config.seed)
        self.settings.update(config.taught.settings)
        self.settings["students' files"] = [contents_of(name) for name in config.students]

    def check(self) -> None:
        for name in self.config.students:
            refuse_unreadable(name)
        tokenizers = [tokenizer_of(name) for name in self.config.students]
        if self.config.taught.mutual_weight:
            check_alignment(self.config.taught.alignment, tokenizers)
        lora_config(self.config.taught.lora_r)
        if self.config.taught.four_bit:
            check_four_bit()

    def make(self, work: Work) -> None:
        assert work.folder is not None
        config, rows, run = self.config, self.after[0].rows, work.folder / "run"
        encoded = self.after[1].output / ENCODINGS if len(self.after) > 1 else None
        encodings = torch.zeros(len(rows), 1) if encoded is None else load_file(encoded)["encodings"]
        trainer = QRDistillTrainer(config.students, rows, encodings, config.taught, run, config.seed, work.progress)
        log = trainer.train()
        trainer.save(work.folder)
        if not trainer.processes.is_first:
            return
        lines = {"log.jsonl": log, "routing.jsonl": trainer.routed}
        for name, rows in lines.items():
            (work.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(run, ignore_errors=True)
        work.count("paths", len(trainer.rows))
        work.count("too long", trainer.too_long)
        work.count("without a common piece", len(trainer.unaligned))
        work.count("steps", len(log))
        work.counts["loss"] = round(log[-1]["loss"], 4)
        work.counts["projections' norm"] = f"{log[0]['norm']:.3g} → {log[-1]['norm']:.3g}"
        for style, rates in routing_rates(last_epoch(trainer.routed)).items():
            work.counts[f"routed, {style}"] = " ".join(f"{rate:.0%}" for rate in rates)


def tested(config: QRConfig, students: Stage) -> Tested:
    """What every student answers before and after."""
    assert config.test is not None
    numbers = range(1, len(config.students) + 1)

    def trained() -> Mapping[str, Path]:
        return {f"student-{number}": students.output / f"student-{number}" for number in numbers}

    starts = {f"start-{number}": name for number, name in zip(numbers, config.students, strict=True)}

    def asked(question: str, label: str) -> str:
        return question + config.ending if label in starts else mark + question  # nobody told starts how an answer is stated

    mark = config.marks["label"] if config.recipe == "step_by_step" else ""
    marked = lambda text, label: right(text, label, config.answer)  # noqa: E731
    settings = {"answer": config.answer, "ending": config.ending} | ({"mark": mark} if mark else {})
    return Tested([students], config.test, starts, trained, config.inference, asked, marked, **settings)
