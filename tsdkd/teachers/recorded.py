"""A teacher that was recorded: rollouts and hidden states on disk, so that any method trains on them without a teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdkd.data.commits import digest_of, manifest_digest
from tsdkd.types import Head, Rollouts

MANIFEST = "manifest.json"
_FORMAT = 1


def _key(prompt: Sequence[int], completion: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([list(prompt), list(completion)]).encode()).hexdigest()


def write_shard(
    folder: Path, name: str, prompts: list[dict[str, Any]], rollouts: Rollouts, hidden: list[torch.Tensor]
) -> dict[str, Any]:
    """One step's rows: prompts (as rows of a data set) and ids as JSONL, hidden states as safetensors.

    Returns:
        the shard's entry in the manifest: its files' checksums and its number of rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, states = folder / f"{name}.jsonl", folder / f"{name}.safetensors"
    completions = [ids if length else [] for ids, length in zip(rollouts.completion_ids, rollouts.lengths, strict=True)]
    theirs = rollouts.teacher_prompt_ids
    lines = [
        json.dumps(
            {**prompt, "prompt_ids": ids, "completion_ids": completion}
            | ({} if theirs is None else {"teacher_prompt_ids": theirs[row]})
        )
        for row, (prompt, ids, completion) in enumerate(zip(prompts, rollouts.prompt_ids, completions, strict=True))
    ]
    rows.write_text("\n".join(lines) + "\n")
    save_file({str(row): states_of_row.contiguous().cpu() for row, states_of_row in enumerate(hidden)}, states)
    return shard_entry(folder, name)


def shard_entry(folder: Path, name: str) -> dict[str, Any]:
    """A written shard's entry in the manifest."""
    rows, states = folder / f"{name}.jsonl", folder / f"{name}.safetensors"
    count = len(rows.read_text().splitlines())
    return {"name": name, "rows": count, "sha256": {path.name: digest_of(path) for path in (rows, states)}}


def write_manifest(
    folder: Path, shards: list[dict[str, Any]], head: Head, vocabulary: dict[str, int] | None, about: dict[str, Any]
) -> None:
    """The head, and at last the manifest: a recording without one is not finished.

    Args:
        vocabulary: the tokens that the ids stand for; None where no tokenizer came with the teacher.
        about: what a reader may want to know (models, versions, sampling).
    """
    tensors = {"weight": head.weight.detach()[: head.size].contiguous().cpu()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()[: head.size].contiguous().cpu()
    save_file(tensors, folder / "head.safetensors")
    manifest = {
        "format": _FORMAT,
        "shards": shards,
        "head": {"logit_scale": head.logit_scale, "softcap": head.softcap, "sha256": digest_of(folder / "head.safetensors")},
        "vocabulary": vocabulary,
        "about": about,
    }
    manifest["digest"] = manifest_digest(manifest)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest))
    partial.rename(folder / MANIFEST)


class Recording:
    """A recording on disk, checked: rows to train on, where their hidden states stand, and the teacher's head."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.about, self.vocabulary = folder, manifest["about"], manifest["vocabulary"]
        tensors = load_file(folder / "head.safetensors")
        stated = manifest["head"]
        self.head = Head(tensors["weight"], tensors.get("bias"), stated["logit_scale"], stated["softcap"])
        self.rows: list[dict[str, Any]] = []
        self._where: dict[str, tuple[str, str]] = {}
        self._prompt_ids: list[list[int]] = []
        for shard in manifest["shards"]:
            for number, line in enumerate((folder / f"{shard['name']}.jsonl").read_text().splitlines()):
                row = json.loads(line)
                read = row.get("teacher_prompt_ids", row["prompt_ids"])
                self._where[_key(read, row["completion_ids"])] = shard["name"], str(number)
                self._prompt_ids.append(row.pop("prompt_ids"))
                self.rows.append(row)

    @classmethod
    def open(cls, folder: str | Path) -> Recording:
        """A finished recording whose every file is as it was written.

        Raises:
            ValueError: no recording, one of another format, or a damaged or missing file (which).
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds no finished recording (no {MANIFEST}): write one with tsdkd train --record DIR.")
        damaged = f"{folder / MANIFEST} is damaged ({{}}): record again, or restore it."
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(damaged.format(error)) from error
        if not isinstance(manifest, dict):
            raise ValueError(damaged.format("it holds no mapping"))
        if manifest.get("format") != _FORMAT:
            raise ValueError(f"{folder} is a recording of format {manifest.get('format')}; this version reads {_FORMAT}.")
        if "digest" in manifest and manifest["digest"] != manifest_digest(manifest):
            raise ValueError(damaged.format("it was changed since it was written"))
        try:
            sums = {"head.safetensors": str(manifest["head"]["sha256"])}
            for shard in manifest["shards"]:
                sums.update({str(name): str(digest) for name, digest in shard["sha256"].items()})
            names = [*sums, *(str(shard["name"]) for shard in manifest["shards"])]
            scales = manifest["head"]["logit_scale"], manifest["head"]["softcap"]
            known = isinstance(manifest["about"], dict) and isinstance(manifest["vocabulary"], (dict, type(None)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(damaged.format(f"{type(error).__name__}: {error}")) from error
        if not known or not all(isinstance(scale, (int, float, type(None))) for scale in scales):
            raise ValueError(damaged.format("a part of it is of another type"))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(damaged.format(f"it names {outside[0]!r}, which is no file of the folder"))
        for name, expected in sums.items():
            if not (folder / name).is_file() or digest_of(folder / name) != expected:
                raise ValueError(
                    f"{folder / name} is missing or damaged (its checksum is not the manifest's): record again, or restore it."
                )
        try:
            return cls(folder, manifest)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, OSError) as error:
            raise ValueError(damaged.format(f"{type(error).__name__}: {error}")) from error

    def check_student(self, fingerprint: str | None, longest: int) -> None:
        """Refuse another student than the one that wrote the completions (None: any is meant), and a limit that would cut them.

        Raises:
            ValueError: saying what to do.
        """
        if fingerprint not in (None, self.about.get("student_fingerprint")):
            raise ValueError(
                f"the recording {self.folder} was made with another student ({self.about.get('models', {}).get('student')}) or "
                "other weights of it: its completions would be a stranger's. Record again with this student, or say that it "
                "is meant: any_recording=True."
            )
        recorded = max((len(row["completion_ids"]) for row in self.rows), default=0)
        if recorded > longest:
            raise ValueError(
                f"the recording {self.folder} has completions of up to {recorded} tokens, but "
                f"max_completion_length={longest} would cut them: pass {recorded} or more."
            )

    def check_rows(self, tokenize: Callable[[list], list[list[int]]]) -> None:
        """Refuse a student whose tokenizer or chat template reads the recorded prompts otherwise."""
        for start in range(0, len(self.rows), 1000):
            for row, ids in enumerate(tokenize(self.rows[start : start + 1000]), start):
                if list(ids) != self._prompt_ids[row]:
                    raise ValueError(
                        f"prompt {row} of the recording {self.folder} was recorded as the ids {self._prompt_ids[row][:8]}…, "
                        f"but this student's tokenizer gives {list(ids)[:8]}…: the recording was made for another tokenizer or "
                        "chat template. Record again with this student."
                    )

    def hidden(self, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
        """`[L, hidden_t]` of a recorded row.

        Raises:
            ValueError: the row was not recorded.
        """
        place = self._where.get(_key(prompt, completion))
        if place is None:
            raise ValueError(
                f"a prompt of {len(prompt)} and a completion of {len(completion)} tokens are not in the recording "
                f"{self.folder}: a recorded teacher knows its own rows alone. Keep max_completion_length and the prompts of "
                "the recording, and evaluate with a live teacher."
            )
        return self._shard(place[0]).get_tensor(place[1])

    @lru_cache(maxsize=64)  # noqa: B019  (a recording lives as long as its trainer)
    def _shard(self, name: str) -> Any:
        """A shard opened, not read: rows come one by one, in any order."""
        return safe_open(self.folder / f"{name}.safetensors", framework="pt")


class RecordedTeacher:
    """Gives the recorded hidden states of recorded rollouts.

    Args:
        recording: an opened recording.
        device: where the loss is computed.
    """

    writes = "not"
    is_remote = False

    def __init__(self, recording: Recording, device: torch.device) -> None:
        self.recording, self.device = recording, device
        bias = recording.head.bias
        self._head = Head(
            recording.head.weight.to(device),
            None if bias is None else bias.to(device),
            recording.head.logit_scale,
            recording.head.softcap,
        )

    @property
    def head(self) -> Head:
        return self._head

    def hidden(self, rollouts: Rollouts, lengths: Sequence[int]) -> list[torch.Tensor]:
        none = torch.zeros(0, self._head.hidden_size, dtype=self._head.weight.dtype, device=self.device)
        rows = zip(rollouts.prompt_ids, rollouts.completion_ids, lengths, strict=True)
        return [self.recording.hidden(p, c)[:length].to(self.device) if length else none for p, c, length in rows]

    def close(self) -> None:
        """Nothing is held open."""
