"""What the trainer trains and logs on tiny real models."""

from __future__ import annotations

import math

import pytest
import torch
from running import Gradients, by_prompt, make, rows
from tiny import FAMILIES, config, prompts, save_tiny, tiny_model

from tsdkd import TokenDistillConfig, TokenDistillTrainer, TSDKDConfig, TSDKDTrainer
from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import Method
from tsdkd.teachers.heads import check_head, head_of, last_hidden_state
from tsdkd.types import Rollouts


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
        assert row[f"hidden_grad_norm/{term}"] == row[f"grad_norm/{term}"]
        assert row[f"hidden_grad_norm/{term}"] == pytest.approx(captured[term].norm().item(), rel=1e-5)
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
