"""Recipes and launch configurations as they are shipped, and what a placement refuses."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from running import make
from tiny import config, prompts, save_tiny, tiny_model

from tsdkd import TokenDistillConfig, TokenDistillTrainer
from tsdkd.cli import main
from tsdkd.cli.train import parse
from tsdkd.teachers import LocalTeacher
from tsdkd.teachers.zero3 import zero3_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
PLACEMENTS = sorted((ROOT / "examples" / "recipes" / "placements").glob("*.yaml"))
LAUNCHES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse_into_the_config_and_map_their_columns(recipe):
    from datasets import Dataset

    from tsdkd.data.prompts import are_chats, map_prompts, prompt_problems

    data, config, model = parse(["--config", str(recipe), "--use_cpu"])
    gpus = 8
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * gpus == 128
    rate = {"gemma2-9b-to-2b": 1e-7, "qwen2.5-14b-to-1.5b-lora": 1e-4}.get(recipe.stem, 5e-6)
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_steps) == (rate, "cosine", 0.1)
    assert model.use_peft == recipe.stem.endswith("lora")
    assert (config.num_train_epochs, config.max_length, config.beta, config.num_candidates) == (3, 1024, 0.9, 10)
    assert model.model_name_or_path and config.teacher_model_name_or_path
    made = Dataset.from_dict({"task": ["a"] * 5, "instruction": ["q1", "q2", "q1", "q3", "q2"], "response": ["r"] * 5})
    rows = map_prompts(
        made, prompt_column=data.prompt_column, drop_duplicates=data.drop_duplicate_prompts, as_chat=data.prompt_as_chat
    )
    assert [row["prompt"][0]["content"] for row in rows] == ["q1", "q2", "q3"] and rows.column_names == ["prompt"]
    assert are_chats(rows) and not list(prompt_problems(rows, "train_dataset"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_take_every_method_with_the_same_training(recipe):
    from tsdkd.methods import METHODS

    settings = set()
    for method in METHODS:
        _, config, _ = parse(["--config", str(recipe), "--use_cpu", "--method", method])
        assert config.build_method().name == method
        settings.add((config.learning_rate, config.lr_scheduler_type, config.warmup_steps, config.num_train_epochs))
    assert len(settings) == 1


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_placed_everywhere(recipe, placement, monkeypatch):
    data, config, model = parse(["--config", str(recipe), "--config", str(placement), "--use_cpu"])
    gpus = 1 if placement.stem.startswith("1x") else 8
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * gpus == 128
    alone = yaml.safe_load(recipe.read_text())
    assert model.model_name_or_path == alone["model_name_or_path"] and data.dataset_name == alone["dataset_name"]
    expected = {"1x24gb": "local", "1x80gb": "local", "8xa100": "zero3", "2nodes": "server"}[placement.stem]
    assert config.teacher_placement == expected and config.use_vllm == (placement.stem != "1x24gb")
    if placement.stem == "1x24gb":
        from transformers import BitsAndBytesConfig

        options = config.teacher_model_init_kwargs["quantization_config"]
        assert model.use_peft and BitsAndBytesConfig(**options).quantization_method() == "nf4"


def test_the_placements_are_those_that_the_documents_name():
    assert {path.stem for path in PLACEMENTS} == {"1x24gb", "1x80gb", "8xa100", "2nodes"}
    told = (ROOT / "examples" / "README.md").read_text() + "".join(path.read_text() for path in PLACEMENTS)
    for path in [*PLACEMENTS, *LAUNCHES]:
        assert path.name in told
    for word in told.split():
        if word.startswith("examples/") and word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda path: path.stem)
def test_launch_configurations_are_accelerates_own(launch):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(launch))  # refuses keys that it does not know
    assert loaded.num_processes == int(launch.stem[0]) and loaded.mixed_precision == "bf16"
    if "zero" in launch.stem:
        assert loaded.distributed_type == "DEEPSPEED" and loaded.deepspeed_config["zero_stage"] == int(launch.stem[-1])
    else:
        assert loaded.distributed_type == "MULTI_GPU"


def test_a_later_recipe_wins_and_one_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model_name_or_path: a\nbeta: 0.5\nmax_steps: 7\n")
    (tmp_path / "b.yaml").write_text("beta: 0.25\n")
    _, config, model = parse([f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml"), "--use_cpu"])
    assert (model.model_name_or_path, config.beta, config.max_steps) == ("a", 0.25, 7)
    for text, message in (("- beta", "holds list"), ("beta: [", "cannot be read")):
        (tmp_path / "c.yaml").write_text(text)
        assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
        assert f"{tmp_path / 'c.yaml'} {message}" in capsys.readouterr().err
    assert main(["train", "--config"]) == 2 and "--config was given without a file" in capsys.readouterr().err


# ---------------------------------------------------------------------- what a placement refuses


def test_a_sharded_teacher_says_what_it_lacks_before_anything_is_loaded(tmp_path, monkeypatch):
    placed = {"student": "no/such-student", "teacher": "no/such-teacher", "teacher_placement": "zero3"}
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"zero3 needs deepspeed.*pip install 'tsdkd\[deepspeed\]'"):
        make(tmp_path, **placed)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    with pytest.raises(ValueError, match=r"over the processes of a launcher, and none started this one.*torchrun"):
        make(tmp_path, **placed)


def test_options_of_a_sharded_teacher_are_refused_elsewhere(tmp_path):
    for options in ({"teacher_cpu_offload": True}, {"teacher_deepspeed": {"zero_optimization": {}}}):
        with pytest.raises(ValueError, match="teacher_placement is 'local': pass teacher_placement=zero3"):
            config(tmp_path, **options)
    with pytest.raises(ValueError, match="teacher_placement"):
        config(tmp_path, teacher_placement="zero2")


def test_the_deepspeed_configuration_of_a_teacher(tmp_path):
    made = zero3_config(None, torch.bfloat16, cpu_offload=True)
    assert made["zero_optimization"]["stage"] == 3 and made["bf16"] == {"enabled": True} and made["fp16"] == {"enabled": False}
    assert made["zero_optimization"]["offload_param"]["device"] == "cpu"
    given = {
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8, "reduce_bucket_size": "auto"},
        "bf16": {"enabled": "auto"},
    }
    made = zero3_config(given, torch.float32, cpu_offload=False)
    shared = {"stage": 3, "memory_efficient_linear": False}
    assert made["zero_optimization"] == {**shared, "zero_hpz_partition_size": 8} and made["bf16"] == {"enabled": False}
    assert given["zero_optimization"]["reduce_bucket_size"] == "auto"  # the caller's is left as it was
    (tmp_path / "z.json").write_text('{"zero_optimization": {"stage": 3}, "wall_clock_breakdown": true}')
    assert zero3_config(str(tmp_path / "z.json"), torch.float32, False)["wall_clock_breakdown"] is True
    with pytest.raises(ValueError, match="ZeRO stage 2"):
        zero3_config({"zero_optimization": {"stage": 2}}, torch.float32, False)
    with pytest.raises(ValueError, match="no readable JSON file"):
        zero3_config(str(tmp_path / "none.json"), torch.float32, False)


@pytest.mark.parametrize("given", [{"zero_optimization": True}, "[1, 2]"])
def test_options_of_deepspeed_that_are_no_mapping_are_refused_with_the_arguments(tmp_path, given):
    if isinstance(given, str):
        (tmp_path / "z.json").write_text(given)
        given = str(tmp_path / "z.json")
    with pytest.raises(ValueError, match="must be a mapping of DeepSpeed's options"):
        config(tmp_path, teacher_placement="zero3", teacher_deepspeed=given)
    assert zero3_config({"zero_optimization": {"stage": "auto"}}, torch.float32, False)["zero_optimization"]["stage"] == 3


def test_a_teacher_that_must_write_cannot_be_sharded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    placed = {"student": "no/such-student", "teacher": "no/such-teacher", "teacher_placement": "zero3"}
    general = {"cls": TokenDistillTrainer, "args": None}
    for method, message in (("minillm", "written by student and teacher together"), ("seq_kd", "with teacher_placement=local")):
        args = config(tmp_path, TokenDistillConfig, method=method, teacher_placement="zero3")
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **{**placed, **general, "args": args})


def test_a_teacher_object_in_shares_is_refused_where_it_should_be_whole(tmp_path):
    teacher = tiny_model(seed=2, hidden=48)
    next(iter(teacher.parameters())).ds_status = "as ZeRO-3 marks it"
    with pytest.raises(ValueError, match=r"loaded in shares.*pass its name"):
        make(tmp_path, teacher=teacher)


def test_a_quantized_teacher_is_not_sharded(tmp_path):
    from tsdkd.trainers.sources import load_sharded_teacher

    args = config(
        tmp_path, teacher_placement="zero3", teacher_model_init_kwargs={"quantization_config": {"load_in_4bit": True}}
    )
    with pytest.raises(ValueError, match="quantized teacher, whose weights DeepSpeed cannot shard"):
        load_sharded_teacher(save_tiny(tmp_path / "t"), args)


def test_a_split_that_vllm_could_not_make_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("tsdkd.trainers.setup_placing.vllm_problem", lambda: None)
    monkeypatch.setattr("tsdkd.trainers.TSDKDConfig.world_size", 6)
    student = save_tiny(tmp_path / "s")  # two heads
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "data": prompts(24)}
    with pytest.raises(ValueError, match=r"size=3 does not divide the student's 2 attention heads.*one of 1, 2"):
        make(tmp_path, student=student, vllm_tensor_parallel_size=3, **vllm)
    with pytest.raises(ValueError, match=r"size=4 does not divide the 6 processes.*one of 1, 2, 3, 6"):
        make(tmp_path, student=student, vllm_tensor_parallel_size=4, **vllm)


def test_the_head_of_a_teacher_on_another_device_is_brought_to_the_loss_once():
    teacher = LocalTeacher(tiny_model(), pad_id=0, batch_size=2, device=torch.device("meta"))
    assert teacher.head.weight.device.type == "meta" and teacher.head is teacher.head
    here = LocalTeacher(tiny_model(), pad_id=0, batch_size=2, device=torch.device("cpu"))
    assert here.head.weight is here.model.get_output_embeddings().weight
