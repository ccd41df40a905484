"""Students together: a step against single students', exact accumulation, resume bit for bit, and what the router learns."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import QUESTIONS, save_tiny

from tsdkd.pipelines.qr_distill import QRDistillTrainer, QRTraining
from tsdkd.pipelines.qr_distill.learning import routing_rates

ROWS = [
    {"problem": i // 2, "question": QUESTIONS[i // 2], "path": f"{i}+{i}={2 * i}\n#### {2 * i}", "style": ("x", "y")[i % 2]}
    for i in range(12)
]
ENCODINGS = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Two of different width."""
    folder = tmp_path_factory.mktemp("students")
    return [save_tiny(folder / "a", seed=1, positions=256), save_tiny(folder / "b", seed=2, hidden=48, positions=256)]


def trainer(students, folder, rows=ROWS, encodings=ENCODINGS, seed=0, **options):
    given = {"learning_rates": (1e-3, 2e-3), "epochs": 2, "batch_size": 6, "lora_r": 0, "shared": 8, **options}
    return QRDistillTrainer(students, rows, encodings, QRTraining(**given), folder, seed)


def gradients(made):
    return {name: p.grad.clone() for name, p in made._named().items() if p.grad is not None}


def test_a_gradient_reaches_every_student_the_router_the_competence_and_every_projection(students, tmp_path):
    made = trainer(students, tmp_path)
    for part in (*made.learners, made.router, made.mutual):
        part.train()
    said = made.backward(made.batch(0), 0)
    assert said["mutual"] > 0 and any(sum(row["to"]) == 2 for row in made.routed)
    found = gradients(made)
    parts = [
        "router/layers.0",
        "router/layers.2",
        *(f"mutual/{part}.{n}" for part in ("projections", "competence") for n in (0, 1)),
    ]
    assert all(found[f"{part}.weight"].abs().max() > 0 for part in parts)
    for student in ("student-1", "student-2"):
        assert all(grad.abs().max() > 0 for name, grad in found.items() if name.startswith(student) and "embed" not in name)


def test_micro_batches_do_not_change_a_step(students, tmp_path):
    steps = []
    for size in (6, 4, 1):
        made = trainer(students, tmp_path / str(size), micro_batch=size)
        steps.append((made.backward(made.batch(0), 0), gradients(made)))
    for said, found in steps[1:]:
        assert said["loss"] == pytest.approx(steps[0][0]["loss"], rel=1e-5) and said["rates"] == steps[0][0]["rates"]
        for name, grad in steps[0][1].items():
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6)


def test_everything_to_both_without_mutual_distillation_is_two_students_alone(students, tmp_path):
    """Each student's gradient is that of plain supervised fine-tuning on all paths, computed here on its own."""
    made = trainer(students, tmp_path, routing="all", mutual_weight=0.0)
    numbers = made.batch(0)
    said = made.backward(numbers, 0)
    found = gradients(made)
    assert said["rates"] == [1.0, 1.0] and not any(name.startswith(("router", "mutual")) for name in found)
    for number, learner in enumerate(made.learners):
        learner.zero_grad()
        total = 0.0
        for path in numbers:
            tokens = made.tokens[number][path]
            ids = torch.tensor([tokens.prompt + tokens.path])
            labels = ids.clone()
            labels[0, : len(tokens.prompt)] = -100
            total = total + learner.model(input_ids=ids, labels=labels).loss / len(numbers)
        total.backward()
        assert said["distill"][number] == pytest.approx(total.item(), rel=1e-5)
        for name, p in learner.model.named_parameters():
            torch.testing.assert_close(found[f"student-{number + 1}/{name}"], p.grad, rtol=1e-3, atol=1e-6)


def test_a_student_that_is_given_nothing_trains_on_without_nan(students, tmp_path):
    made = trainer(students, tmp_path)
    with torch.no_grad():
        made.router.layers[2].weight.zero_()
        made.router.layers[2].bias.copy_(torch.tensor([0.0, 50.0, 50.0, 0.0]))  # all to the first, none to the second
    before = {name: p.detach().clone() for name, p in made._named().items()}
    log = made.train()
    assert log[0]["rates"] == [1.0, 0.0] and log[0]["mutual"] == 0 and log[0]["distill"][1] == 0
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in log)
    after = made._named()
    assert any((after[name] - before[name]).abs().max() > 0 for name in after if name.startswith("student-1"))


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_goes_on_bit_for_bit(students, tmp_path, lora):
    whole = trainer(students, tmp_path / "whole", lora_r=lora, micro_batch=4)
    log = whole.train(save_every=1)
    kept = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert kept == ["checkpoint-3"] and len(log) == 4  # of four steps; older ones go
    made = trainer(students, tmp_path / "part", lora_r=lora, micro_batch=4)
    made.steps = 2
    made.train(save_every=1)
    shutil.rmtree(tmp_path / "part" / ".saving", ignore_errors=True)
    again = trainer(students, tmp_path / "part", lora_r=lora, micro_batch=4)
    rows = again.train(save_every=1)
    assert rows == log and again.routed == whole.routed
    assert all(torch.equal(p, again._named()[name]) for name, p in whole._named().items())


def test_a_torn_checkpoint_is_passed_over(students, tmp_path):
    made = trainer(students, tmp_path)
    made.steps = 2
    made.train(save_every=1)
    file = next(tmp_path.glob("checkpoint-*")) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert [row["step"] for row in trainer(students, tmp_path).train()] == [1, 2, 3, 4]  # from the start


def test_the_router_learns_to_send_a_path_to_whom_it_helps(students, tmp_path):
    """By the objective alone: a gate goes off where the loss is large, and stays where it is small."""
    torch.manual_seed(0)
    made = trainer(students, tmp_path, entropy_weight=0.5, auxiliary_learning_rate=0.05, epochs=1)
    encodings = torch.eye(4).repeat(3, 2)
    losses = torch.tensor([[5.0, 0.1], [0.1, 5.0], [5.0, 0.1], [0.1, 5.0]]).repeat(3, 1)
    from tsdkd.pipelines.qr_distill import qr_objective

    optimizer = torch.optim.Adam(made.router.parameters(), 0.05)
    for step in range(200):
        optimizer.zero_grad()
        routing = made.router(encodings, 1.0, torch.Generator().manual_seed(step))
        qr_objective(losses, routing.alpha, list(range(4)) * 3, entropy_weight=0.5, mutual_weight=0).loss.backward()
        optimizer.step()
    on = made.router.eval()(encodings, 1.0).logits[:4]
    assert (on[:, 1] > on[:, 0]).tolist() == [True, False, True, False]


def test_the_trainers_router_gradient_is_the_objectives(students, tmp_path):
    made = trainer(students, tmp_path, mutual_weight=0.0, micro_batch=4)
    numbers = made.batch(0)
    made.backward(numbers, 0)
    found = {name: p.grad.clone() for name, p in made.router.named_parameters()}
    with torch.no_grad():
        losses = torch.stack(
            [learner.read([each[n] for n in numbers])[0] for learner, each in zip(made.learners, made.tokens, strict=True)], 1
        )
    made.router.zero_grad()
    from tsdkd.pipelines.qr_distill import qr_objective

    alpha = made.gates(numbers, 0)
    qr_objective(losses, alpha, [made.rows[n]["problem"] for n in numbers], mutual_weight=0.0).loss.backward()
    for name, p in made.router.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-7)


def test_a_questions_paths_stand_together_and_every_path_is_read_once_an_epoch(students, tmp_path):
    made = trainer(students, tmp_path, batch_size=4)
    for epoch in range(2):
        batches = [made.batch(epoch * made.steps_of_epoch + step) for step in range(made.steps_of_epoch)]
        assert sorted(n for batch in batches for n in batch) == list(range(12))
        assert all(len({ROWS[n]["problem"] for n in batch}) == 2 for batch in batches)  # two paths a question here
    assert made.batch(0) != made.batch(made.steps_of_epoch)


def test_a_checkpoint_of_another_run_is_refused(students, tmp_path):
    made = trainer(students, tmp_path)
    made.steps = 2
    made.train(save_every=1)
    for given, told in (
        ({"seed": 1}, "seed"),
        ({"routing": "all"}, "routing"),
        ({"shared": 4}, "shared"),
        ({"rows": ROWS[::-1]}, "rows"),
    ):
        with pytest.raises(ValueError, match=f"is of another run.*{told}"):
            trainer(students, tmp_path, **given).train()


def test_a_students_context_is_a_limit_too(students, tmp_path):
    short = [save_tiny(tmp_path / "c", seed=1, positions=100), students[1]]
    rows = [*ROWS[:-1], {**ROWS[-1], "path": "1+1=2\n" * 20}]
    made = trainer(short, tmp_path / "r", rows=rows)
    assert made.too_long == 1 and made.learners[0].context == 100


def test_random_routing_has_its_rate_and_moves_no_router(students, tmp_path):
    rows, encodings = ROWS * 10, ENCODINGS.repeat(10, 1)
    made = trainer(students, tmp_path, rows=rows, encodings=encodings, routing="random", rate=0.3, batch_size=120)
    before = {name: p.detach().clone() for name, p in made.router.named_parameters()}
    log = made.train()
    assert all(0.15 < rate < 0.45 for row in log for rate in row["rates"])
    assert all(torch.equal(p, before[name]) for name, p in made.router.named_parameters())
    rates = routing_rates(made.routed)
    assert set(rates) == {"x", "y"} and all(len(each) == 2 for each in rates.values())


def test_bad_input(students, tmp_path):
    for given, told in (
        ({"rows": ROWS[:5]}, "5 paths have 12 encodings"),
        ({"learning_rates": (1e-3,)}, "2 students have 1 learning rates"),
        ({"max_length": 5}, "no path fits"),
        ({"routing": "some"}, "routing='some'"),
        ({"rate": 2.0}, "rate"),
        ({"learning_rates": (0.0, 1.0)}, r"learning_rates\[0\]"),
    ):
        with pytest.raises(ValueError, match=told):
            trainer(students, tmp_path, **given)
    with pytest.raises(ValueError, match="at least two students"):
        QRDistillTrainer(students[:1], ROWS, ENCODINGS, QRTraining(learning_rates=(1e-3,)), tmp_path)
    long = [*ROWS[:-1], {**ROWS[-1], "path": "1+1=2\n" * 60}]
    made = trainer(students, tmp_path, rows=long, max_length=150)
    assert made.too_long == 1 and len(made.rows) == 11


def test_gradients_are_cut_for_each_student_and_for_the_rest(students, tmp_path):
    made = trainer(students, tmp_path, max_grad_norm=0.01, max_steps=1)
    found = []
    step = made.optimizer.step
    made.optimizer.step = lambda: (
        found.extend(
            torch.cat([p.grad.flatten() for p in group["params"] if p.grad is not None]).norm().item()
            for group in made.optimizer.param_groups
        ),
        step(),
    )
    made.train()
    assert found == pytest.approx([0.01, 0.01, 0.01], rel=1e-3)
    assert QRTraining().max_grad_norm == 1.0 and QRTraining(warmup_steps=2, decay="constant").rate_at(9, 10) == 1.0
