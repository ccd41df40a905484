"""A teacher that takes the student's place on the device while it reads: the same numbers, and never both at once."""

from __future__ import annotations

import copy

import pytest
import torch
from asked import ASKED, hidden_by_hand, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from live import LiveBytes
from running import Gradients, by_prompt, general, gradients_by_batching, make, rows
from tiny import config, prompts, tiny_model

from tsdkd import TSDKDTrainer
from tsdkd.teachers.swap import Parked, SwapTeacher

NUMBERS = ("loss", "loss/direct", "loss/indirect", "loss/entropy", "teacher/entropy", "grad_norm", "candidates/tau")


def run(folder, **kwargs):
    """Three steps and an evaluation: what was logged, the first gradient, the weights at the end."""
    gradients = Gradients()
    trainer = make(
        folder, rollouts=by_prompt, callbacks=[gradients], eval_dataset=prompts(5), **{"max_steps": 3, **kwargs}
    )  # fmt: skip
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return rows(trainer), loss, gradients.flat, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_swapped_is_local_to_the_bit(tmp_path):
    local = run(tmp_path / "local")
    for optimizer in (False, True):
        logged, loss, gradient, weights = run(tmp_path / str(optimizer), teacher_placement="swap", swap_optimizer=optimizer)
        assert [[row[name] for name in NUMBERS] for row in logged] == [[row[name] for name in NUMBERS] for row in local[0]]
        assert loss == local[1]
        assert torch.equal(gradient, local[2]) and torch.equal(weights, local[3])
        assert 0 < logged[-1]["time/swap"] < logged[-1]["time/teacher"]


def test_micro_batches_do_not_change_a_step(tmp_path):
    flat = gradients_by_batching(tmp_path, ((8, 1), (2, 4), (1, 8)), teacher_placement="swap", teacher_batch_size=3)
    for other in flat[1:]:
        torch.testing.assert_close(other, flat[0], rtol=1e-4, atol=1e-6)


def test_several_teachers_rotate(tmp_path):
    """One after the other, and the student leaves and comes back once a step."""
    data = prompts(8).add_column("teacher", ["a", "b"] * 4)
    found = []
    for where in ("local", "swap"):
        both = {name: {"model": tiny_model(seed=seed, hidden=48), "placement": where} for name, seed in (("a", 2), ("b", 3))}
        trainer = make(
            tmp_path / where, teacher=both, data=data, rollouts=by_prompt, max_steps=2, per_device_train_batch_size=8
        )
        if where == "swap":
            up: set[str] = set()
            moves = []
            for name, teacher in trainer.teacher.teachers.items():
                watched(teacher._weights, name, up, moves)
            trainer.train()
            assert moves == ["a", "b"] * 2 and not up
        else:
            trainer.train()
        found.append([[row[name] for name in (*NUMBERS, "teacher/a/entropy", "teacher/b/entropy")] for row in rows(trainer)])
    assert found[0] == found[1]


def watched(parked, name, up, moves):
    rise, sink = parked.up, parked.down

    def to_device():
        assert not up, "two teachers at a time"
        up.add(name)
        moves.append(name)
        rise()

    def away():
        sink()
        up.discard(name)

    parked.up, parked.down = to_device, away


@pytest.mark.parametrize("optimizer", [False, True])
def test_the_peak_is_the_larger_phase_not_the_sum(tmp_path, optimizer):
    """Live tensor bytes of two steps: what a device would hold where CPU memory is not the device's."""
    peaks, sizes = {}, {}
    for where in ("local", "swap"):
        teacher = tiny_model(seed=2, hidden=256, num_hidden_layers=3)
        sizes["teacher"] = bytes_of(teacher.parameters())
        sizes["head"] = bytes_of([teacher.get_output_embeddings().weight])
        options = {"teacher_placement": where, "swap_optimizer": optimizer and where == "swap", "teacher_batch_size": 1}
        student = tiny_model(seed=1, hidden=96)
        trainer = make(tmp_path / where, student=student, teacher=teacher, rollouts=by_prompt, **options)
        sizes["student"] = bytes_of(trainer.model.parameters())
        room = getattr(trainer.teacher, "room", None)

        def apart(trainer=trainer, room=room):
            parked = () if room is None else (trainer.teacher._weights, room._weights, room._states)
            return [storage for each in parked for storage in each._copies]

        with LiveBytes([*trainer.model.parameters(), *teacher.parameters()], apart) as live:
            trainer.train()
        peaks[where] = live.peak
    student, whole = sizes["student"], sizes["teacher"]
    rest = peaks["local"] - whole - 4 * student  # activations, logits, batches; weights, gradient and Adam's two are the four
    assert 0 < rest < whole  # or the test would tell nothing
    left = 0 if optimizer else 2 * student
    assert peaks["swap"] <= max(whole + left, 4 * student + sizes["head"]) + rest
    assert peaks["swap"] < peaks["local"] - min(whole, student) / 2


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_the_larger_phase_not_the_sum(tmp_path):
    """As above by what CUDA says, with models that are large beside its own blocks."""
    peaks = {}
    for where in ("local", "swap"):
        teacher, student = tiny_model(seed=2, hidden=1024, num_hidden_layers=12), tiny_model(seed=1, hidden=512)
        sizes = bytes_of(teacher.parameters()), bytes_of(student.parameters())
        options = {"teacher_placement": where, "swap_optimizer": where == "swap", "use_cpu": False, "bf16": False}
        trainer = make(tmp_path / where, student=student, teacher=teacher, rollouts=by_prompt, **options)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peaks[where] = torch.cuda.max_memory_allocated()
        del trainer, teacher, student
        torch.cuda.empty_cache()
    assert peaks["swap"] < peaks["local"] - 0.7 * min(sizes[0], 4 * sizes[1])


def bytes_of(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_the_teachers_own_prompts_and_hidden_states_in_cpu_memory(tmp_path):
    teacher = tiny_model(seed=2, hidden=48)
    trainer = make(
        tmp_path, teacher=copy.deepcopy(teacher), data=ASKED, rollouts=by_prompt, teacher_placement="swap", max_length=None
    )
    asked = seen(trainer)
    trainer.train()
    assert len(asked) == 8
    for prompt, completion, states in asked:
        torch.testing.assert_close(states, hidden_by_hand(teacher, prompt, completion), rtol=1e-4, atol=1e-5)
        assert states.device.type == "cpu"


def test_a_swapped_teacher_is_recorded(tmp_path):
    trainer = make(tmp_path, rollouts=by_prompt, teacher_placement="swap", max_steps=1, per_device_train_batch_size=8)
    assert trainer.record(tmp_path / "recording")["rollouts"] == 8
    local = make(tmp_path / "local", rollouts=by_prompt, max_steps=1, per_device_train_batch_size=8)
    local.train()
    args = config(
        tmp_path / "again", max_steps=1, per_device_train_batch_size=8, recording=str(tmp_path / "recording")
    )  # fmt: skip
    again = TSDKDTrainer(tiny_model(seed=1), args=args, processing_class=trainer.tokenizer)
    again.train()
    assert rows(again)[0]["loss"] == pytest.approx(rows(local)[0]["loss"], rel=1e-6)


def test_a_run_with_a_swapped_teacher_goes_on_bit_for_bit(tmp_path):
    """A checkpoint knows the teacher, whose weights are away when it is written."""

    def go(resume=None, **options):
        trainer = make(
            tmp_path, rollouts=by_prompt, teacher_placement="swap", swap_optimizer=True, max_steps=3, save_strategy="steps",
            save_steps=1, **options,
        )  # fmt: skip
        trainer.train(resume and str(tmp_path / resume))
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    whole = go()
    assert torch.equal(go("checkpoint-1"), whole)
    with pytest.raises(ValueError, match="teacher"):
        go("checkpoint-1", teacher=tiny_model(seed=5, hidden=48))


def test_the_optimizers_states_leave_by_where_the_weights_are(tmp_path):
    """accelerate's device has no number where a GPU's tensors have one."""
    trainer = make(tmp_path, rollouts=by_prompt, teacher_placement="swap", swap_optimizer=True, max_steps=1)
    trainer.train()
    trainer.accelerator.state.device = torch.device("cpu", 7)
    states = trainer.teacher.room._of_optimizer()
    assert bytes_of(states) == 2 * bytes_of(trainer.model.parameters())


def test_a_teacher_object_comes_back_when_it_is_closed(tmp_path):
    teacher, ids = tiny_model(seed=2, hidden=48), torch.arange(6).unsqueeze(0)
    before = teacher(ids).logits
    trainer = make(tmp_path / "a", teacher=teacher, rollouts=by_prompt, teacher_placement="swap")
    trainer.train()
    with pytest.raises(ValueError, match=r"are with another trainer, which swaps them: call its teacher\.close\(\)"):
        make(tmp_path / "b", teacher=teacher)
    trainer.teacher.close()
    torch.testing.assert_close(teacher(ids).logits, before)
    make(tmp_path / "b", teacher=teacher, rollouts=by_prompt, teacher_placement="swap").train()


def test_an_adapter_and_a_head_that_is_tied(tmp_path):
    from peft import LoraConfig

    found = []
    for where in ("local", "swap"):
        options = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")}
        teacher = tiny_model(seed=2, hidden=48, tie_word_embeddings=True)
        trainer = make(tmp_path / where, teacher=teacher, rollouts=by_prompt, teacher_placement=where, **options)
        trainer.train()
        found.append([[row[name] for name in NUMBERS] for row in rows(trainer)])
    assert found[0] == found[1]


def test_a_teacher_that_fails_leaves_the_student_whole(tmp_path):
    trainer = make(tmp_path, rollouts=by_prompt, teacher_placement="swap")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.teacher.model.forward = None
    trainer.teacher.read = lambda ids, mask: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    seed=st.integers(0, 99),
)
def test_parked_tensors_come_back(shapes, dtype, seed):
    """Also views and what is tied; what changed in between is what comes back."""
    torch.manual_seed(seed)
    tensors = [(torch.randn(shape) * 9).to(dtype) for shape in shapes]
    tensors += [tensors[0].T, tensors[0]]
    parked = Parked(tensors)
    for _ in range(2):
        tensors[0].add_(1)
        wanted = [tensor.clone() for tensor in tensors]
        parked.down()
        assert bytes_of(tensors) == 0
        parked.up()
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, wanted, strict=True))
    assert parked.holds(tensors) and not parked.holds([torch.ones(1)])


def test_it_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"swap_optimizer has no effect.*teacher_placement=swap"):
        make(tmp_path, swap_optimizer=True)
    with pytest.raises(ValueError, match="speculative_kd has its completions written by student and teacher together"):
        general(tmp_path, "speculative_kd", teacher_placement="swap")
    with pytest.raises(ValueError, match="student is sharded"):
        make(tmp_path, teacher_placement="swap", fsdp=True)
    teacher = tiny_model(seed=2, hidden=48)
    teacher.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"in shares \(ZeRO-3\) or over several devices"):
        SwapTeacher(teacher, pad_id=0, batch_size=1, device=torch.device("cpu"))
