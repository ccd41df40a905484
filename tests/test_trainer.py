"""The trainer on tiny real models: what it trains, what it logs, what it refuses, and when it stops."""

from __future__ import annotations

import json
import math
import re
import time

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import FAMILIES, config, prompts, save_tiny, tiny_model
from transformers import TrainerCallback

from tsdkd import TokenDistillConfig, TokenDistillTrainer, TSDKDConfig, TSDKDTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import Method
from tsdkd.teachers.heads import check_head, head_of, last_hidden_state
from tsdkd.trainers import NonFiniteError
from tsdkd.types import Rollouts


def make(folder, *, student=None, teacher=None, data=None, rollouts=None, cls=TSDKDTrainer, method=None, **kwargs):
    """A trainer of tiny models; `rollouts` maps a prompt's ids to the completion written for it."""
    extra = {key: kwargs.pop(key) for key in ("eval_dataset", "callbacks", "peft_config", "processing_class") if key in kwargs}
    extra.setdefault("processing_class", make_tokenizer())
    if method is not None:
        extra["method"] = method
    trainer = cls(
        model=student if student is not None else tiny_model(seed=1),
        teacher_model=teacher if teacher is not None else tiny_model(seed=2, hidden=48),
        args=kwargs.pop("args", None) or config(folder, **kwargs),
        train_dataset=prompts(8) if data is None else data,
        **extra,
    )
    if rollouts is not None:
        trainer.write = lambda prompt_ids, *args, **kwargs: [list(rollouts(ids)) for ids in prompt_ids]
    return trainer


def by_prompt(ids):
    """A completion that depends on the prompt alone, of 1 to 12 tokens."""
    length = 1 + sum(ids) % 12
    return [(5 + 3 * sum(ids) + 7 * t) % 60 for t in range(length)]


class Gradients(TrainerCallback):
    """The gradient that reaches the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not hasattr(self, "flat"):
            self.flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def rows(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


# ---------------------------------------------------------------------- what it trains


def test_it_runs_as_the_readme_says_from_folders(tmp_path):
    student, teacher = save_tiny(tmp_path / "s", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    options = config(tmp_path / "out", max_length=None)
    trainer = TSDKDTrainer(model=student, teacher_model=teacher, args=options, train_dataset=prompts(8, chat=True))
    assert options.bf16 is torch.cuda.is_available()
    before = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert trainer.state.global_step == 2 and not torch.equal(before, after)
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "TSD-KD" in card and "2603.13260" in card and "Token-Selective Dual Knowledge Distillation" in card


def test_every_name_of_the_architecture_is_logged(tmp_path):
    trainer = make(tmp_path, term_grad_norm_steps=1)
    trainer.train()
    names = """loss/indirect loss/direct loss/entropy student/entropy teacher/entropy gate/mean opener/tokens opener/share
        entropy_selection/mean candidates/tau candidates/top1_agreement grad_norm/indirect grad_norm/direct grad_norm/entropy
        time/rollout time/teacher time/student time/loss tokens_per_second memory/peak_gib prompts/dropped
        completions/empty""".split()
    for row in rows(trainer):
        assert not [name for name in names if name not in row]
        assert all(math.isfinite(row[name]) for name in names)
        weights = trainer.method.terms()
        assert row["loss"] == pytest.approx(sum(w * row[f"loss/{t}"] for t, w in weights.items()), rel=1e-5)
        assert row["entropy_selection/mean"] == pytest.approx(row["loss/entropy"])
        assert 0 < row["opener/share"] <= 1 <= row["opener/tokens"]


@pytest.mark.parametrize("batch,accumulation,padding", [(1, 8, None), (2, 4, None), (4, 2, None), (8, 1, 16)])
def test_the_same_rollouts_give_the_same_gradient_however_they_are_split(tmp_path, batch, accumulation, padding):
    def first_step(per_device, steps, multiple):
        gradients = Gradients()
        trainer = make(
            tmp_path,
            rollouts=by_prompt,
            callbacks=[gradients],
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=steps,
            pad_to_multiple_of=multiple,
            max_steps=1,
            max_grad_norm=0.0,
        )
        trainer.train()
        return rows(trainer)[0], gradients.flat

    (one, expected), (other, gradient) = first_step(8, 1, None), first_step(batch, accumulation, padding)
    for name in ("loss", "loss/indirect", "loss/direct", "loss/entropy", "grad_norm", "student/entropy", "opener/tokens"):
        assert other[name] == pytest.approx(one[name], rel=2e-6), name  # float32 sums in another order
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_trainers_gradient_equals_the_public_loss_on_full_logits(tmp_path):
    """End to end: injected answers, left to right through both models, against `tsd_kd_loss` on padded logits."""
    from tsdkd import tsd_kd_loss

    gradients = Gradients()
    student, teacher = tiny_model(seed=1, vocab_size=64), tiny_model("gemma2", seed=2, vocab_size=70)
    trainer = make(
        tmp_path,
        student=student,
        teacher=teacher,
        rollouts=by_prompt,
        callbacks=[gradients],
        max_grad_norm=0.0,
        per_device_train_batch_size=8,
        max_steps=1,
    )
    reference = tiny_model(seed=1, vocab_size=64)
    trainer.train()
    tokenizer = make_tokenizer()
    asked = [tokenizer(q)["input_ids"] for q in prompts(8)["prompt"]]
    written = [by_prompt(ids) for ids in asked]
    width = max(map(len, written))
    logits = {"s": [], "t": []}
    for ids, completion in zip(asked, written, strict=True):
        whole = torch.tensor([ids + completion])
        for key, model in (("s", reference), ("t", teacher)):
            out = model(whole).logits[0, len(ids) - 1 : -1]
            logits[key].append(torch.nn.functional.pad(out, (0, 0, 0, width - len(completion))))
    mask = torch.arange(width) < torch.tensor([len(c) for c in written]).unsqueeze(1)
    terms = tsd_kd_loss(torch.stack(logits["s"]), torch.stack(logits["t"]).detach(), mask)
    terms.loss.backward()
    assert rows(trainer)[0]["loss"] == pytest.approx(terms.loss.item(), rel=1e-5)
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    torch.testing.assert_close(gradients.flat, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_a_window_is_the_sum_of_sums_over_the_sum_of_counts(tmp_path):
    """Steps of very different lengths: a mean of means would differ."""
    lengths = iter([1, 1, 1, 1, 12, 12, 12, 12] * 2)

    def uneven(ids):
        return [7] * next(lengths)

    def run(every):
        trainer = make(tmp_path, rollouts=uneven, logging_steps=every, learning_rate=0.0)
        trainer.train()
        return rows(trainer)

    single, whole = run(1), run(2)[0]
    counts = [4, 48]
    exact = sum(r["gate/mean"] * c for r, c in zip(single, counts, strict=True)) / sum(counts)
    assert whole["gate/mean"] == pytest.approx(exact, rel=1e-6)
    assert whole["gate/mean"] != pytest.approx(sum(r["gate/mean"] for r in single) / 2, rel=1e-3)


def test_evaluation_is_exact_whatever_its_batches(tmp_path):
    results = []
    for batch in (1, 3, 7):
        trainer = make(tmp_path, rollouts=by_prompt, eval_dataset=prompts(7), per_device_eval_batch_size=batch)
        results.append(trainer.evaluate())
    for other in results[1:]:
        for name in ("eval_loss", "eval_loss/direct", "eval_loss/indirect", "eval_loss/entropy", "eval_gate/mean"):
            assert other[name] == pytest.approx(results[0][name], rel=1e-5), name
    weights = trainer.method.terms()
    assert results[0]["eval_loss"] == pytest.approx(sum(w * results[0][f"eval_loss/{t}"] for t, w in weights.items()))


@pytest.mark.parametrize("student_size,teacher_size", [(64, 70), (70, 64)])
def test_unequal_vocabularies_train_unmodified_and_only_shared_ids_are_sampled(tmp_path, student_size, teacher_size):
    student = tiny_model(vocab_size=student_size, seed=1)
    with torch.no_grad():  # a student that would love the ids that the teacher lacks
        student.get_output_embeddings().weight[64:] *= 5
    seen = []
    trainer = make(tmp_path, student=student, teacher=tiny_model(vocab_size=teacher_size, seed=2), max_completion_length=24)
    original = trainer.loop.prepare
    trainer.loop.prepare = lambda rollouts: (seen.append(rollouts), original(rollouts))[1]
    trainer.train()
    ids = [i for rollouts in seen for completion in rollouts.completion_ids for i in completion]
    assert len(ids) > 50 and max(ids) < 64
    assert trainer.model.get_output_embeddings().weight.shape[0] == student_size
    assert trainer.teacher_model.get_output_embeddings().weight.shape[0] == teacher_size


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_last_hidden_is_the_models_own_logits(family):
    model = tiny_model(family)
    check_head(model, "student", 64)
    ids = torch.arange(5).unsqueeze(0)
    mask = torch.ones_like(ids)
    rebuilt = head_of(model).logits(last_hidden_state(model, ids, mask))
    torch.testing.assert_close(rebuilt, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_model_with_an_unknown_factor_is_refused_by_name(tmp_path):
    teacher = tiny_model("gemma2", seed=2)
    teacher.config.final_logit_softcapping, kept = None, teacher.config.final_logit_softcapping
    cap = teacher.forward

    def forward(*args, **kwargs):
        out = cap(*args, **kwargs)
        out.logits = kept * torch.tanh(out.logits / kept)
        return out

    teacher.forward = forward
    with pytest.raises(ValueError, match=r"the teacher, Gemma2ForCausalLM \(model_type 'gemma2'\), does not compute"):
        make(tmp_path, teacher=teacher)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_of_nans_is_refused_as_non_finite(tmp_path, role):
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"the {role}, Qwen2ForCausalLM .* non-finite logits"):
        make(tmp_path, **{role: model})


def test_the_teacher_is_frozen_in_eval_mode_and_in_its_checkpoints_dtype(tmp_path):
    teacher = tiny_model(seed=2).to(torch.bfloat16)
    teacher.save_pretrained(tmp_path / "t")
    make_tokenizer().save_pretrained(tmp_path / "t")
    trainer = make(tmp_path / "o", teacher=str(tmp_path / "t"))
    trainer.train()
    assert not trainer.teacher_model.training
    assert {p.dtype for p in trainer.teacher_model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.grad is not None for p in trainer.teacher_model.parameters())


def test_mixed_precision_reaches_both_loss_forwards(tmp_path):
    trainer = make(tmp_path, bf16=True, max_steps=1, rollouts=by_prompt)
    seen = {"student": set(), "teacher": set()}
    for role, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        layer = model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda module, inputs, output, role=role: seen[role].add(output.dtype))
    trainer.train()
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_the_teacher_scores_a_steps_rollouts_once(tmp_path):
    trainer = make(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, teacher_batch_size=8)
    calls = []
    trainer.teacher_model.model.register_forward_hook(lambda *a: calls.append(1))
    trainer.train()
    assert len(calls) == 2  # two optimizer steps of four micro-batches


def test_a_steps_rollouts_are_sorted_by_length_and_trimmed(tmp_path):
    """Micro-batches of like rows: what each computes is its own longest row, not the step's."""
    trainer = make(tmp_path, rollouts=by_prompt, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    widths, rows_seen = [], []
    original = trainer.loop.compute

    def spy(student, step):
        rollouts = step.rollouts
        sizes = [len(p) + len(c) for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
        ids, _, _ = rollouts.padded(0, "cpu")
        assert ids.shape == (2, max(sizes))
        widths.append(max(sizes))
        rows_seen.extend(tuple(p) for p in rollouts.prompt_ids)
        return original(student, step)

    trainer.loop.compute = spy
    trainer.train()
    assert widths == sorted(widths, reverse=True) and len(set(widths)) > 1
    assert len(set(rows_seen)) == 8  # every row once


def test_scores_do_not_depend_on_the_teachers_batches(tmp_path):
    trainer = make(tmp_path)
    asked = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    rollouts = Rollouts(asked, [[7, 8], [9], [5, 6, 7, 8]], [[1, 1], [0], [1, 0, 1, 1]])
    results = []
    for size in (1, 2, 3):
        trainer.teacher.batch_size = size
        results.append(trainer.teacher.hidden(rollouts, rollouts.lengths))
    assert [tuple(h.shape) for h in results[0]] == [(2, 48), (0, 48), (3, 48)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_term_gradient_norms_are_those_of_the_weighted_terms(tmp_path):
    trainer = make(tmp_path, rollouts=by_prompt, term_grad_norm_steps=1, max_steps=1, entropy_weight=0.0)
    captured = {}
    trainer.loop.loss.method = Spy(trainer.method, captured)
    trainer.train()
    row = rows(trainer)[0]
    hidden, total = captured["hidden"], 0.0
    for term in ("indirect", "direct"):
        total = total + captured[term]
        assert row[f"grad_norm/{term}"] == pytest.approx(captured[term].norm().item(), rel=1e-5)
    assert "grad_norm/entropy" not in row
    torch.testing.assert_close(total, hidden.grad, rtol=1e-4, atol=1e-8)


class Spy(Method):
    """A method of the user's own that notes the gradients of its terms; its loss is another method's."""

    name = "spy"

    def __init__(self, inner, notes, term=None):
        self.inner, self.notes, self.term = inner, notes, term
        self.paper = inner.paper

    def objective(self, batch=None, state=None):
        return self.inner.objective(batch, state)

    def only(self, term):
        return Spy(self.inner.only(term), self.notes, term)

    def loss(self, batch, *args, **kwargs):
        if self.term is None:
            batch.student_hidden.retain_grad()
            self.notes["hidden"] = batch.student_hidden
        else:
            batch.student_hidden.register_hook(lambda g: self.notes.__setitem__(self.term, g))
        return self.inner.loss(batch, *args, **kwargs)


def test_a_method_object_of_the_users_own(tmp_path):
    from tsdkd import TSDKD

    notes = {}
    args = config(tmp_path, cls=TokenDistillConfig)
    trainer = make(tmp_path, cls=TokenDistillTrainer, args=args, method=Spy(TSDKD(), notes))
    trainer.train()
    assert notes["hidden"].grad.abs().sum() > 0


def test_named_options_build_the_method(tmp_path):
    args = config(tmp_path, cls=TokenDistillConfig, method_options={"beta": 0.5, "gate": "none"})
    trainer = make(tmp_path, cls=TokenDistillTrainer, args=args)
    assert trainer.method.beta == 0.5 and trainer.method.gate == "none"
    assert TSDKDConfig(output_dir=str(tmp_path), beta=0.3, use_cpu=True).build_method().beta == 0.3
    with pytest.raises(ValueError, match="no option 'lambda'"):
        config(tmp_path, cls=TokenDistillConfig, method_options='{"lambda": 1}')
    with pytest.raises(ValueError, match="TSDKDConfig is TSD-KD"):
        config(tmp_path, method_options={"beta": 0.5})


def test_a_lora_student_trains_its_adapter_alone(tmp_path):
    from peft import LoraConfig

    trainer = make(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora" in name for name in moved)


@pytest.mark.parametrize("on_the_head", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": "all-linear"}])
def test_an_adapter_on_the_head_is_refused_and_all_linear_has_none(tmp_path, on_the_head):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, task_type="CAUSAL_LM", **on_the_head)
    if on_the_head["target_modules"] == "all-linear":
        assert make(tmp_path, peft_config=adapter).teacher is not None
        return
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make(tmp_path, peft_config=adapter)


def test_prompt_learning_is_refused(tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(ValueError, match="Prompt-learning PEFT methods"):
        make(tmp_path, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_a_head_that_is_trained_whole_beside_adapters_moves(tmp_path):
    from peft import LoraConfig

    trainer = make(
        tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    before = head_of(trainer.model).weight.detach().clone()
    trainer.train()
    assert not torch.equal(head_of(trainer.model).weight, before)
    check_head(trainer.model, "student", trainer.vocab_size)


def test_adapters_are_saved_merged_and_resumed(tmp_path):
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    student = save_tiny(tmp_path / "student", seed=1)
    ids = torch.arange(5, 25)[None]

    def run(name, **options):
        adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
        trainer = make(
            tmp_path / name,
            student=student,
            data=prompts(16),
            rollouts=by_prompt,
            peft_config=adapter,
            learning_rate=1e-2,
            max_steps=4,
            **options,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if name == "resumed" else None)
        return trainer

    whole = run("whole", save_strategy="steps", save_steps=2)
    whole.save_model(str(tmp_path / "saved"))
    resumed = run("resumed")
    with torch.no_grad():
        expected, untrained = whole.model.eval()(ids).logits, AutoModelForCausalLM.from_pretrained(student)(ids).logits
        assert (expected - untrained).abs().max() > 0.01
        torch.testing.assert_close(resumed.model.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert not (tmp_path / "saved" / "model.safetensors").exists()  # the adapter alone
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), tmp_path / "saved").merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    losses = []
    for checkpointing in (False, True):
        gradients = Gradients()
        trainer = make(
            tmp_path, rollouts=by_prompt, gradient_checkpointing=checkpointing, callbacks=[gradients], max_grad_norm=0.0
        )
        trainer.train()
        losses.append((rows(trainer)[0]["loss"], gradients.flat))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- empty answers, long prompts


def test_empty_completions_are_counted_and_never_a_crash(tmp_path):
    trainer = make(tmp_path, rollouts=lambda ids: by_prompt(ids) if sum(ids) % 2 else [], data=prompts(8))
    trainer.train()
    assert sum(row["completions/empty"] for row in rows(trainer)) > 0
    assert all(math.isfinite(row["loss"]) for row in rows(trainer))


def test_a_step_in_which_nothing_is_left_changes_nothing(tmp_path):
    trainer = make(tmp_path, rollouts=lambda ids: [], weight_decay=0.0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert [row["loss"] for row in rows(trainer)] == [0.0, 0.0]
    assert [row["completions/empty"] for row in rows(trainer)] == [4.0, 4.0]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_long_prompts_are_refused_with_the_reason_or_dropped(tmp_path):
    data = Dataset.from_dict({"prompt": [*prompts(8)["prompt"], "Tom has 1 apples." * 9]})
    with pytest.raises(
        ValueError, match=r"1 of 9 prompts of train_dataset are longer than 52 tokens, the first is row 8 with"
    ) as error:
        make(tmp_path, data=data)
    assert "max_length=64 less max_completion_length=12" in str(error.value)
    trainer = make(tmp_path, data=data, drop_long_prompts=True)
    assert len(trainer.train_dataset) == 8
    trainer.train()
    assert rows(trainer)[0]["prompts/dropped"] == 1
    with pytest.raises(ValueError, match="the student's context of 128 tokens less max_completion_length=120"):
        make(tmp_path, max_length=1024, max_completion_length=120)
    with pytest.raises(ValueError, match="max_completion_length=64 leaves no room for a prompt: max_length=64"):
        make(tmp_path, max_completion_length=64)


def test_an_unset_completion_limit_fits_a_small_context(tmp_path):
    trainer = make(tmp_path, max_completion_length=None)
    assert trainer.generation_config.max_new_tokens == 32  # half of max_length=64
    trainer.train()
    wide = [tiny_model(seed=seed, positions=2048) for seed in (1, 2)]
    roomy = make(tmp_path, student=wide[0], teacher=wide[1], max_completion_length=None, max_length=None)
    assert roomy.generation_config.max_new_tokens == 512


def test_when_every_prompt_is_too_long_dropping_is_no_way_out(tmp_path):
    with pytest.raises(
        ValueError, match=r"all 8 prompts of train_dataset are longer than 4 tokens, none is left: max_length=16"
    ):
        make(tmp_path, max_length=16, drop_long_prompts=True)


def test_a_prompt_id_that_one_model_lacks_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<|extra{i}|>" for i in range(6)])
    data = Dataset.from_dict({"prompt": [*prompts(7)["prompt"], "Tom has <|extra5|>"]})
    with pytest.raises(ValueError, match=r"row 7 of train_dataset holds id 65, '<\|extra5\|>', beyond the 64 ids"):
        make(tmp_path, student=tiny_model(vocab_size=70), data=data, processing_class=tokenizer)


def test_the_model_card_goes_where_the_model_goes(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.save_model(str(tmp_path / "student"))
    assert "TSD-KD" in (tmp_path / "student" / "README.md").read_text()
    assert not (tmp_path / "run" / "README.md").exists()


def test_evaluating_between_two_logs_keeps_the_trainings_times(tmp_path):
    trainer = make(tmp_path, eval_dataset=prompts(4), logging_steps=4, max_steps=4, eval_strategy="steps", eval_steps=3)
    steps = []
    original = trainer.training_step

    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = original(*args, **kwargs)
        steps.append(time.perf_counter() - began)
        return out

    trainer.training_step = timed
    trainer.train()
    row = rows(trainer)[0]
    logged = sum(row[f"time/{part}"] for part in ("rollout", "teacher", "student", "loss"))
    assert logged == pytest.approx(sum(steps) / 4, rel=0.05)  # all four steps, not the last alone


# ---------------------------------------------------------------------- what it refuses

REFUSED = [
    ({"data": Dataset.from_dict({"instruction": ["a"] * 8})}, r"no 'prompt' column; it has: instruction"),
    ({"data": Dataset.from_dict({"prompt": []})}, r"has 0 rows but one generation batch takes 4"),
    ({"data": prompts(3)}, r"3 rows but one generation batch takes 4 \(4 per device × 1 processes × 1 accumulation"),
    ({"data": DatasetDict({"train": prompts(8)})}, r"holds the splits train: pass one of them, e.g. dataset\['train'\]"),
    ({"data": Dataset.from_dict({"prompt": ["a", "", "b", " "]})}, r"2 prompts that are empty \(rows 1, 3\)"),
    ({"data": Dataset.from_dict({"prompt": ["a", None, "b", "c"]})}, r"1 prompts that are None \(row 1\)"),
    ({"data": Dataset.from_dict({"prompt": [1, 2, 3, 4]})}, r"4 prompts that are int \(rows 0, 1, 2, 3\)"),
    ({"data": Dataset.from_dict({"prompt": [[{"text": "a"}]] * 4})}, r"a list that is not chat messages"),
    ({"data": [{"prompt": "a"}] * 4}, r"train_dataset is a list: make it a data set with datasets.Dataset.from_list"),
    (
        {"data": Dataset.from_dict({"prompt": [[{"role": "user", "content": [{"type": "image"}]}]] * 4})},
        r"4 prompts that are chats with parts \(images\?\)",
    ),
    ({"data": Dataset.from_dict({"prompt": ["a"] * 4, "image": ["b"] * 4})}, r"has images"),
    ({"eval_dataset": Dataset.from_dict({"prompt": ["a", ""]})}, r"eval_dataset has 1 prompts that are empty \(row 1\)"),
    ({"num_candidates": 100}, r"num_candidates=100 but the two models share 64 tokens"),
    ({"opener_entropy_share": 2.0}, r"opener_entropy_share=2.0"),
    ({"max_length": 0}, r"max_length=0"),
    ({"kd_temperature": 0.0}, r"kd_temperature=0.0"),
    ({"fused_impl": "cuda"}, r"fused_impl='cuda' is unknown"),
]


@pytest.mark.parametrize("wrong,message", REFUSED, ids=[m for _, m in REFUSED])
def test_bad_input_is_refused_before_training(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **wrong)


def test_mixed_prompts_are_refused_with_their_rows(tmp_path):
    class Mixed(list):
        column_names = ["prompt"]  # noqa: RUF012

        def __getitem__(self, key):
            return list(self) if key == "prompt" else super().__getitem__(key)

    with pytest.raises(ValueError, match=r"mixes prompts of two types: 3 are text \(rows 0, 1, 3\) and 1 are chats \(row 2\)"):
        make(tmp_path, data=Mixed(["a", "b", [{"role": "user", "content": "c"}], "d"]))


def test_a_missing_or_identical_teacher_is_refused(tmp_path):
    model = tiny_model()
    options = dict(model=model, args=config(tmp_path), train_dataset=prompts(8), processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="no teacher was given"):
        TSDKDTrainer(**options)
    with pytest.raises(ValueError, match="the same object was passed as model and as teacher_model"):
        TSDKDTrainer(teacher_model=model, **options)


def test_a_chat_without_a_template_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        make(tmp_path, data=prompts(8, chat=True), processing_class=tokenizer)


def test_tokenizers_that_disagree_are_refused_with_a_token(tmp_path):
    folder = save_tiny(tmp_path / "t", seed=2)
    saved = tmp_path / "t" / "tokenizer.json"
    content = json.loads(saved.read_text())
    vocab = content["model"]["vocab"]
    vocab["+"], vocab["-"] = vocab["-"], vocab["+"]
    saved.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"the tokenizers disagree: id \d+ is '[+-]' for the student but '[+-]' for the teacher"
    ):
        make(tmp_path / "o", teacher=folder)


def test_training_without_prompts_is_refused(tmp_path):
    trainer = TSDKDTrainer(
        model=tiny_model(), teacher_model=tiny_model(seed=2), args=config(tmp_path), processing_class=make_tokenizer()
    )
    with pytest.raises(ValueError, match="no train_dataset was given"):
        trainer.train()


def test_trls_beta_is_refused_where_nothing_reads_it(tmp_path):
    with pytest.raises(ValueError, match=r"beta=0.5 is an option of the method: pass method_options=\{'beta': 0.5\}"):
        config(tmp_path, cls=TokenDistillConfig, beta=0.5)


def test_a_cpu_run_is_in_float32_also_beside_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("tsdkd.trainers.config.bf16_works_here", lambda: True)
    assert config(tmp_path).bf16 is False and config(tmp_path, bf16=True).bf16 is True


def test_a_config_of_trl_is_refused_with_the_class_to_use(tmp_path):
    from trl import DistillationConfig

    with pytest.raises(ValueError, match="args is a DistillationConfig; pass a TSDKDConfig"):
        make(tmp_path, args=DistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


# ---------------------------------------------------------------------- when it stops


def poison_teacher(trainer):
    calls = []

    def hook(module, inputs, output):
        calls.append(1)
        if len(calls) == 2:
            output.last_hidden_state[0, -2:] = float("nan")

    trainer.teacher_model.model.register_forward_hook(hook)


def poison_student(trainer):
    def hook(module, inputs, output):
        if trainer.state.global_step == 1 and torch.is_grad_enabled():
            output.last_hidden_state[:, -2:] = float("inf")

    trainer.model.model.register_forward_hook(hook)


def poison_gradient(trainer):
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    weight.register_hook(lambda g: g * float("inf") if trainer.state.global_step == 1 else g)


@pytest.mark.parametrize(
    "poison,names",
    [
        (poison_teacher, ["the teacher's hidden states", "the direct term"]),
        (poison_student, ["the student's hidden states", "the entropy term", "the loss"]),
        (poison_gradient, ["the gradient norm"]),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_nan_stops_before_the_optimizer_step_and_nothing_is_saved(tmp_path, poison, names, max_grad_norm):
    trainer = make(
        tmp_path, max_steps=4, rollouts=lambda ids: [7] * 12, save_strategy="steps", save_steps=2, max_grad_norm=max_grad_norm
    )
    poison(trainer)
    after = {}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            after[state.global_step] = [p.detach().clone() for p in model.parameters()]

    trainer.add_callback(Note())
    with pytest.raises(NonFiniteError, match=r"step 2: NaN or Inf in .*student: Qwen2ForCausalLM") as error:
        trainer.train()
    for name in names:
        assert name in str(error.value)
    if "hidden states" in names[0]:
        assert re.search(
            r"first at token \d+ of a completion after a prompt of \d+ tokens that ends with ids \[", str(error.value)
        )
    assert list(after) == [1] and all(torch.equal(a, b) for a, b in zip(after[1], trainer.model.parameters(), strict=True))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_student_that_diverged_is_named_when_it_cannot_write(tmp_path):
    trainer = make(
        tmp_path,
        learning_rate=1e30,
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_steps=4,
        save_strategy="steps",
        save_steps=4,
    )
    with pytest.raises(
        NonFiniteError, match=r"step \d: NaN or Inf in .*student.*lower the learning\s+rate|step \d: NaN or Inf"
    ):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
