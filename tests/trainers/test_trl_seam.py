"""What the seam relies on in TRL 1.16 and transformers: an upgrade that moves it fails here, in one clear line."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import transformers
import trl
from tiny import save_tiny
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import _ForwardRedirection

DISTILLATION, TRAINER = trl.DistillationTrainer, transformers.Trainer
SIGNATURES = [
    (DISTILLATION, "_generate", "self, prompts"),
    (DISTILLATION, "_generate_single_turn", "self, prompt_ids, images, multimodal_fields, has_tool_images"),
    (DISTILLATION, "_generate_and_score_completions", "self, inputs"),
    (DISTILLATION, "_tokenize_prompts", "self, prompts"),
    (DISTILLATION, "_prepare_inputs", "self, generation_batch"),
    (DISTILLATION, "compute_loss", "self, model, inputs, return_outputs, num_items_in_batch"),
    (DISTILLATION, "training_step", "self, model, inputs, num_items_in_batch"),
    (DISTILLATION, "prediction_step", "self, model, inputs, prediction_loss_only, ignore_keys"),
    (DISTILLATION, "log", "self, logs, start_time"),
    (DISTILLATION, "create_model_card", "self, model_name, dataset_name, tags"),
    (TRAINER, "_get_grad_norm", "self, model, grad_norm"),
    (TRAINER, "_prepare_for_training", "self, max_steps, train_dataloader, resume_from_checkpoint"),
    (TRAINER, "_load_optimizer_and_scheduler", "self, checkpoint"),
    (
        TRAINER,
        "evaluation_loop",
        "self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix",
    ),
    (TRAINER, "save_model", "self, output_dir, _internal_call"),
    (_ForwardRedirection, "__call__", "self, wrapper_module, original_module, method, args, kwargs"),
]


@pytest.mark.parametrize("owner,name,expected", SIGNATURES, ids=[f"{o.__name__}.{n}" for o, n, _ in SIGNATURES])
def test_signature(owner, name, expected):
    assert ", ".join(inspect.signature(getattr(owner, name)).parameters) == expected


def test_the_constructor_takes_a_subclass_that_supplies_the_teacher():
    parameters = inspect.signature(DISTILLATION.__init__).parameters
    assert list(parameters)[:6] == ["self", "model", "teacher_model", "args", "train_dataset", "eval_dataset"]
    assert parameters["teacher_model"].default is None
    assert DISTILLATION.loss_is_scaled_for_ga is True


@pytest.mark.parametrize(
    "name", ["_buffered_inputs", "generation_kwargs", "generation_config", "_forward_redirection", "_metrics"]
)
def test_attribute(name):
    assert f"self.{name} = " in inspect.getsource(DISTILLATION)


def test_vllm_generation_keeps_what_the_seam_sets():
    source = inspect.getsource(VLLMGeneration)
    assert "self.generation_kwargs = " in source and "self.max_completion_length = " in source


def private_names():
    """Methods, class attributes and instance attributes of TRL's trainer and of transformers', whoever sets them."""
    names = set()
    for cls in DISTILLATION.__mro__:
        if cls.__module__.partition(".")[0] in ("trl", "transformers"):
            assigned = re.findall(r"self\.(_[a-z]\w*)\b *(?::[^=\n]+)?=[^=]", inspect.getsource(cls))
            names |= {name for name in {*vars(cls), *assigned} if name.startswith("_") and not name.startswith("__")}
    return names - {"_name", "_paper", "_tag_names"}  # what TRL documents for subclasses to set


def test_private_names_of_trl_stand_in_the_seam_alone():
    private = private_names()
    assert {"_step", "_tokenizer", "_buffered_inputs", "_dist", "_generate", "_save_checkpoint"} <= private
    package = Path(__file__).parents[2] / "tsdkd"
    seam = {package / "trainers" / name for name in ("trl_seams.py", "processors.py", "engines.py", "loading.py")}
    for path in package.rglob("*.py"):
        if path not in seam:
            used = {name for name in re.findall(r"\.(_[a-z]\w*)", path.read_text()) if name in private}
            used -= {"_name"}
            assert not used, f"{path.relative_to(package)} uses {used}"


def test_trls_own_example_runs_with_the_class_names_changed(tmp_path, monkeypatch):
    """The docstring of TRL's trainer, `Distillation` → `TSDKD`; its hub names lead to tiny local models and prompts."""
    import datasets

    import tsdkd

    lines = re.search(r"```python\n(.*?)```", DISTILLATION.__doc__, re.DOTALL).group(1).splitlines()
    example = "\n".join(line.strip()[4:] for line in lines if line.strip())
    assert "DistillationTrainer(" in example and "trainer.train()" in example
    code = example.replace("from trl import DistillationTrainer", "from tsdkd import TSDKDTrainer").replace(
        "DistillationTrainer(", "TSDKDTrainer("
    )
    student = save_tiny(tmp_path / "student", seed=1, positions=1024, closes_soon=True)
    teacher = save_tiny(tmp_path / "teacher", seed=2, hidden=48, positions=1024)
    code = code.replace("Qwen/Qwen2.5-0.5B-Instruct", student).replace("Qwen/Qwen2.5-1.5B-Instruct", teacher)
    assert student in code and teacher in code
    rows = datasets.Dataset.from_dict({"prompt": ["Tom has 3 apples. How many apples now?"] * 8})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.chdir(tmp_path)
    # As a GPU user's shell would not set it: the default precision must suit this machine by itself.
    scope: dict = {}
    exec(compile(code, "example", "exec"), scope)
    assert scope["trainer"].state.global_step == 3 and isinstance(scope["trainer"], tsdkd.TSDKDTrainer)


def test_the_prepared_batch_can_be_split_again():
    source = inspect.getsource(DISTILLATION._prepare_inputs)
    assert "self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]" in source
    assert "shuffle_sequence_dict" in source and "split_tensor_dict" in source
