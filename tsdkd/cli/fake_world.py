"""`tsdkd plan --fake_world N`: a run of N processes, constructed and stepped once on this one, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_MARK = "fake world: "
_LONGEST = 900  # seconds


def tried(processes: int, student: str, teacher: str, flags: list[str]) -> str | None:
    """Why a run of so many processes fails at its construction or its first step; None where it does not.

    Args:
        student: `whole`, `zero2` or `zero3`.
        teacher: as `teacher_placement`.
        flags: of `tsdkd train`.

    Raises:
        ValueError: models without a tokenizer.
    """
    from tsdkd.cli.parsing import parse
    from tsdkd.preflight.fake_world import save_small
    from tsdkd.teachers.itself import SELF
    from tsdkd.trainers.sources import config_of

    _, config, model = parse([*flags, "--use_cpu"])
    trust = {"trust_remote_code": True} if config.trust_remote_code else {}
    named = {"student": model.model_name_or_path, "teacher": config.teacher_model_name_or_path}
    named |= {f"teacher {key}": one["model"] if isinstance(one, dict) else one for key, one in (config.teachers or {}).items()}
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for number, (role, name) in enumerate(named.items()):
            if name not in (None, SELF):  # here, since ZeRO-3 would have them in shares
                own = config_of(name, role.split()[0], config)
                made[role] = save_small(own, name, Path(folder, str(number)), **trust)
        asked = {"processes": processes, "student": student, "teacher": teacher, "flags": flags, "models": made}
        asked["output_dir"] = str(Path(folder, "run"))
        command = [sys.executable, "-m", "tsdkd.cli.fake_world", json.dumps(asked)]
        bare = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=bare, timeout=_LONGEST)
        except subprocess.TimeoutExpired:
            return f"it did not come to the end of its first step in {_LONGEST} s."
    if run.returncode == 0:
        return None
    told = [line for line in run.stderr.splitlines() if line.strip()]
    problem = next((line.removeprefix(_MARK) for line in reversed(told) if line.startswith(_MARK)), None)
    return problem or "\n".join(told[-12:])


def main(asked: dict[str, Any]) -> None:
    from tsdkd.preflight.fake_world import deepspeed_config, enter, step

    enter(asked["processes"])
    from tsdkd.checks import refuse
    from tsdkd.cli.parsing import parse
    from tsdkd.cli.train import build
    from tsdkd.trainers.setup import Setup
    from tsdkd.trainers.setup_placing import vllm_divides

    shards = deepspeed_config(asked["student"])
    if shards is not None:
        file = Path(asked["output_dir"]).with_name("deepspeed.json")
        file.write_text(json.dumps(shards))
    own = ["--use_cpu"] if shards is None else ["--deepspeed", str(file)]  # accelerate takes either
    data, config, model = parse([*asked["flags"], "--bf16", "false", "--fp16", "false", *own])
    whole = Setup.of(config, config.build_method(), model.model_name_or_path, config.teacher_model_name_or_path)
    refuse(vllm_divides(whole))
    # What a CPU does without, and what the small models stand for.
    model.model_name_or_path, model.model_revision, model.attn_implementation = asked["models"]["student"], None, None
    if "teacher" in asked["models"]:
        config.teacher_model_name_or_path = asked["models"]["teacher"]
    if config.teachers:
        config.teachers = {name: asked["models"][f"teacher {name}"] for name in config.teachers}
    config.teacher_model_revision = None
    config.teacher_placement = "local" if asked["teacher"] == "server" else asked["teacher"]
    config.teacher_model_init_kwargs = config.teacher_urls = None
    config.output_dir, config.save_strategy, config.push_to_hub, config.report_to = asked["output_dir"], "no", False, []
    config.rollouts_ahead, config.optim, config.bf16 = 0, "adamw_torch", False
    for field in dataclasses.fields(config):
        if field.name == "use_vllm" or field.name.startswith("vllm_"):
            setattr(config, field.name, field.default)
    config.load_best_model_at_end, config.eval_strategy, data.eval_tasks = False, "no", None
    model.load_in_4bit = model.load_in_8bit = False
    step(build(data, config, model))


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Exception as error:
        print(f"{_MARK}{' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        raise SystemExit(1) from error
