"""A run with vLLM in this process, for test_vllm.py: `python vllm_run.py KIND FOLDER` writes FOLDER/result.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch

MAX_NEW = 24


def wider_student(folder: Path) -> str:
    """The demo's student with sixteen ids more than its teacher, each as likely as an ordinary one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsdkd.demo.run import shipped

    model = AutoModelForCausalLM.from_pretrained(shipped("student"), dtype=torch.float32)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 16, mean_resizing=False)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[size:] = weight[size - 16 : size]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped("student")).save_pretrained(folder)
    return str(folder)


def vllm_log_probs(trainer, prompts, completions):
    """log p of each completion's ids by the engine that wrote them."""
    from vllm import SamplingParams

    whole = [{"prompt_token_ids": p + c} for p, c in zip(prompts, completions, strict=True)]
    outputs = trainer.vllm_generation.llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    rows = []
    for output, prompt, completion in zip(outputs, prompts, completions, strict=True):
        at = output.prompt_logprobs[len(prompt) :]
        rows.append([at[t][token].logprob for t, token in enumerate(completion)])
    return rows


@torch.no_grad()
def student_log_probs(model, prompts, completions):
    """The same by the student itself, in float32; adapters are active."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        rows.append(logits.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist())
    return rows


@torch.no_grad()
def surprise(model, prompts, completions, vocab_size, temperature):
    """How far the ids' log-probabilities, summed, lie from what sampling at this temperature gives, in standard deviations."""
    off, variance = 0.0, 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :vocab_size]
        logits = logits.double() / temperature
        log_probs = logits.log_softmax(-1)
        mean = (log_probs.exp() * log_probs).sum(-1)
        off += (log_probs.gather(1, torch.tensor(completion)[:, None])[:, 0] - mean).sum().item()
        variance += ((log_probs.exp() * log_probs.square()).sum(-1) - mean.square()).sum().item()
    return off / variance**0.5


def rollouts(folder: Path, lora: bool) -> dict:
    from peft import LoraConfig
    from tiny import config, prompts

    from tsdkd import TSDKDConfig, TSDKDTrainer
    from tsdkd.demo.run import shipped

    options = dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128, max_length=128, max_steps=3)
    options.update(max_completion_length=MAX_NEW, learning_rate=3e-2 if lora else 3e-3, temperature=0.7)
    options.update(lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1e9)
    trainer = TSDKDTrainer(
        wider_student(folder / "student"),
        shipped("teacher"),
        config(folder / "out", TSDKDConfig, **options),
        prompts(16, chat=True),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0) if lora else None,
    )
    written = []
    write = type(trainer).write

    def watched(prompt_ids, *args, **kwargs):
        completions = write(trainer, prompt_ids, *args, **kwargs)
        row = {"prompts": prompt_ids, "completions": completions}
        row["student"] = student_log_probs(trainer.model, prompt_ids, completions)
        row["vllm"] = vllm_log_probs(trainer, prompt_ids, completions)
        row["surprise"] = {
            str(t): surprise(trainer.model, prompt_ids, completions, trainer.vocab_size, t) for t in (0.2, 0.7, 2.5)
        }
        written.append(row)
        return completions

    trainer.write = watched
    trainer.train()
    # The first step's answers by the trained student: how far the weights have moved since.
    moved = student_log_probs(trainer.model, written[0]["prompts"], written[0]["completions"])
    return {"written": written, "moved": moved, "ends": trainer.eos_token_ids, "vocab_size": trainer.vocab_size}


def seeded(folder: Path, resume: bool = False, probe: bool = False) -> dict:
    """Four steps, each prompt twice, saved at each; or gone on with from the second. What the engine wrote."""
    from tiny import config, prompts

    from tsdkd import TSDKDConfig, TSDKDTrainer
    from tsdkd.demo.run import shipped

    options = dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128, max_length=128, max_steps=4)
    options.update(
        max_completion_length=MAX_NEW, learning_rate=1e-3, save_strategy="steps", save_steps=1, shuffle_dataset=False
    )
    rows = prompts(8, chat=True)
    data = rows.select([i // 2 for i in range(16)])
    args = config(folder / "out", TSDKDConfig, per_device_train_batch_size=8, **options)
    trainer = TSDKDTrainer(shipped("student"), shipped("teacher"), args, data)
    if probe:
        return examined(trainer)
    written = []
    prepare = trainer.loop.prepare
    trainer.loop.prepare = lambda rollouts: written.append(rollouts.completion_ids) or prepare(rollouts)
    trainer.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2") if resume else None)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"written": written, "losses": losses}


def examined(trainer) -> dict:
    """The doctor's finding of the engine as it is, and where its weights have not followed the student's."""
    from tsdkd.preflight.doctor import batches_of
    from tsdkd.preflight.engine import engine

    prompt_ids = trainer.tokenize([dict(trainer.train_dataset[i]) for i in range(8)])
    result = {}
    for name in ("as it is", "left behind"):
        if name == "left behind":
            trainer.generation.vllm.sync_weights = lambda: None
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        (finding,) = engine(trainer, prompt_ids, batches_of)
        result[name] = [finding.level, finding.said]
    return result


def teacher_writes(folder: Path) -> dict:
    from tiny import config, prompts

    from tsdkd import TokenDistillConfig, TokenDistillTrainer
    from tsdkd.demo.run import shipped

    texts = {}
    for engine in ("transformers", "vllm"):
        trainer = TokenDistillTrainer(
            shipped("student"),
            shipped("teacher"),
            config(
                folder / engine,
                TokenDistillConfig,
                method="seq_kd",
                max_length=128,
                max_completion_length=48,
                teacher_answers_engine=engine,
            ),
            prompts(16, chat=True),
        )
        trainer.train()
        texts[engine] = trainer.train_dataset["completion_ids"][:]
    return texts


def by_api(folder: Path) -> dict:
    """The demo's teacher behind vLLM's OpenAI API: greedy replies with log-probabilities, beside transformers'; and faults."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm_server import vllm_server

    from tsdkd.demo.problems import make_problems
    from tsdkd.demo.run import shipped
    from tsdkd.rollouts.api_models import APIModel, Asked
    from tsdkd.rollouts.by_api import APIError, APIWriter
    from tsdkd.rollouts.greedily import written_greedily

    questions = [p.question for p in make_problems(24, 3, (1, 2))]
    asked = [Asked([{"role": "user", "content": question}]) for question in questions]
    with vllm_server(folder, shipped("teacher"), "--served-model-name", "t") as url:
        known = dict(name="t", base_url=f"{url}/v1", model="t", log_probs=True, concurrency=8)
        spec = APIModel(**known, options={"temperature": 0, "max_tokens": 40})
        with APIWriter(spec, folder / "replies") as writer:
            replies = writer(asked)
        with APIWriter(spec, folder / "replies") as writer:
            again, fresh = writer(asked), writer.fresh
        try:
            with APIWriter(APIModel(**{**known, "model": "u"}), folder / "other") as writer:
                writer(asked[:1])
        except APIError as error:
            unknown = str(error)
        short = APIModel(**{**known, "options": {"temperature": 0, "max_tokens": 3}})
        with APIWriter(short, folder / "short") as writer:
            cut = writer(asked[:1])[0]["finish"]
    tokenizer = AutoTokenizer.from_pretrained(shipped("teacher"))
    model = AutoModelForCausalLM.from_pretrained(shipped("teacher"), dtype=torch.float32)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
        for question in questions
    ]
    ids = written_greedily(model, tokenizer, prompts, 40)
    log_probs = [sum(row) / len(row) for row in student_log_probs(model, prompts, ids)]
    return {
        "replies": replies, "again": again == replies and fresh == 0, "unknown": unknown, "cut": cut,
        "texts": tokenizer.batch_decode(ids, skip_special_tokens=True), "log_probs": log_probs,
        "sizes": [[len(prompt), len(row)] for prompt, row in zip(prompts, ids, strict=True)],
    }  # fmt: skip


def served(folder: Path) -> dict:
    """Three steps with the demo's teacher here, and three with it behind a vLLM server."""
    from tiny import config, prompts
    from transformers import AutoModelForCausalLM
    from vllm_server import vllm_server

    from tsdkd import TSDKDConfig, TSDKDTrainer
    from tsdkd.demo.run import shipped

    pooler = json.dumps({"task": "token_embed", "use_activation": False})
    pooling = ["--runner", "pooling", "--convert", "embed", "--pooler-config", pooler, "--no-enable-prefix-caching"]
    result = {}
    with vllm_server(folder, shipped("teacher"), *pooling) as url:
        for name in ("local", "server"):
            placed = dict(teacher_placement="server", teacher_urls=[url]) if name == "server" else {}
            local = AutoModelForCausalLM.from_pretrained(shipped("teacher"), dtype=torch.float32)
            trainer = TSDKDTrainer(
                AutoModelForCausalLM.from_pretrained(shipped("student"), dtype=torch.float32),
                shipped("teacher") if placed else local,
                config(folder / name, TSDKDConfig, max_length=128, max_completion_length=32, max_steps=3, **placed),
                prompts(16, chat=True),
            )
            trainer.write = lambda prompt_ids, *a, **k: [[7 + (sum(ids) + t) % 40 for t in range(20)] for ids in prompt_ids]
            trainer.train()
            result[name] = [row for row in trainer.state.log_history if "loss" in row]
    return result


def learnt(folder: Path) -> dict:
    """The demo's student after the same prompts, its answers written by transformers and by vLLM; and without training."""
    from datasets import Dataset
    from tiny import config
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsdkd import TSDKDConfig, TSDKDTrainer
    from tsdkd.demo.problems import held_out, make_problems
    from tsdkd.demo.run import HELD_OUT_SEED, LEVELS, WEIGHTS, shipped
    from tsdkd.demo.scoring import accuracy

    steps, batch = 60, 64
    test = held_out(500, HELD_OUT_SEED, set(), LEVELS)
    questions = [p.question for p in make_problems(steps * batch, 1, LEVELS)]
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": q}] for q in questions]})
    tokenizer = AutoTokenizer.from_pretrained(shipped("student"))
    before = AutoModelForCausalLM.from_pretrained(shipped("student"), dtype=torch.float32)
    result = {"before": accuracy(before, tokenizer, test)["accuracy"]}
    for engine in ("transformers", "vllm"):
        options = dict(max_length=128, max_completion_length=48, max_steps=steps, per_device_train_batch_size=batch)
        options.update(learning_rate=WEIGHTS["gkd"].learning_rate, **WEIGHTS["gkd"].options)
        if engine == "vllm":
            options.update(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128)
        args = config(folder / engine, TSDKDConfig, **options)
        trainer = TSDKDTrainer(shipped("student"), shipped("teacher"), args, data)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        result[engine] = {"accuracy": accuracy(trainer.model, tokenizer, test)["accuracy"], "losses": losses}
        result[engine]["seconds"] = trainer.state.log_history[-1]["train_runtime"]
    return result


def evaluated(folder: Path) -> dict:
    """The demo's models on its held-out problems by transformers and by vLLM, both in float32, and where they part."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsdkd.cli import main
    from tsdkd.data.rows import read_scores
    from tsdkd.demo.run import shipped

    result = {}
    tokenizer = AutoTokenizer.from_pretrained(shipped("student"))
    for name in ("student", "teacher"):
        answers, found = {}, {}
        for engine in ("hf", "vllm"):
            out = folder / f"{name}-{engine}.jsonl"
            command = ["evaluate", "--model", shipped(name), "--tasks", "tsdkd_word_problems", "--chat_template", "on"]
            command += ["--dtype", "float32", "--engine", engine, "--out", str(out), "--log_samples"]
            assert main([*command, "--max_model_len", "128"]) == 0
            (row,) = read_scores(out)
            found[engine] = {"score": row.score, "right": row.items["right"], "versions": row.origin["versions"]}
            samples = out.with_suffix(".samples.jsonl").read_text().splitlines()
            answers[engine] = [json.loads(sample) for sample in samples]
        model = AutoModelForCausalLM.from_pretrained(shipped(name), dtype=torch.float32)
        parted = []
        for ours, theirs in zip(answers["vllm"], answers["hf"], strict=True):
            if ours["answer"] == theirs["answer"]:
                continue
            a, b = (tokenizer(x["answer"], add_special_tokens=False)["input_ids"] + [1] for x in (ours, theirs))
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            prompt = tokenizer(ours["prompt"], add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + a[:at]])).logits[0, -1].double()
            gaps = (logits.max() - logits[[a[at], b[at]]]).tolist()
            differs = ours["accuracy"] != theirs["accuracy"]
            parted.append({"item": ours["item"], "at": at, "gaps": gaps, "other_score": differs})
        result[name] = {**found, "parted": parted}
    return result


def scored_while_training(folder: Path) -> dict:
    """Two steps with vLLM's rollouts, the student scored by the same engine after each, and by transformers at the end."""
    from tiny import config, prompts

    from tsdkd import TSDKDConfig, TSDKDTrainer
    from tsdkd.cli.evaluate import bundled_tasks
    from tsdkd.data.rows import read_scores
    from tsdkd.demo.run import shipped
    from tsdkd.evaluation import harness
    from tsdkd.evaluation import tasks as harness_tasks
    from tsdkd.evaluation.while_training import EvaluateWhileTraining

    options = dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128, max_length=128, max_steps=2)
    options.update(max_completion_length=MAX_NEW, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0)
    trainer = TSDKDTrainer(
        shipped("student"), shipped("teacher"), config(folder / "out", TSDKDConfig, **options), prompts(16, chat=True)
    )
    scoring = EvaluateWhileTraining(
        trainer, ["tsdkd_word_problems"], 1, include_path=[bundled_tasks()], chat_template=True, limit=60
    )
    by_transformers = []
    make = harness.hf_model
    harness.hf_model = lambda *a, **k: by_transformers.append(1) or make(*a, **k)
    trainer.add_callback(scoring)
    trainer.train()
    rows = read_scores(folder / "out" / "benchmarks.jsonl")
    assert not by_transformers
    loaded = harness_tasks.load_task(scoring.manager, "tsdkd_word_problems")
    lm = make(trainer.model.eval(), tokenizer=trainer.processing_class, batch_size=60)
    scores, _ = harness.score(lm, loaded, "tsdkd_word_problems", chat_template=True, limit=60)
    return {
        "rows": [{"step": row.step, "score": row.score, "right": row.items["right"]} for row in rows],
        "transformers": scores[0].items["right"],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "engine": rows[0].settings["engine"],
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind in ("plain", "lora"):
        result = rollouts(folder, lora=kind == "lora")
    else:
        result = {
            "teacher": teacher_writes,
            "server": served,
            "learn": learnt,
            "evaluate": evaluated,
            "scored": scored_while_training,
            "seeded": seeded,
            "api": by_api,
            "again": lambda folder: seeded(folder, resume=True),
            "examined": lambda folder: seeded(folder, probe=True),
        }[kind](folder)
    (folder / "result.json").write_text(json.dumps(result))
    os._exit(0)  # vLLM's threads have nothing left to do
