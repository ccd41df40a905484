"""Models as people name and load them: adapters, folders, dtypes, mixtures, dropout, what a generation_config adds."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from running import Gradients, by_prompt, general, make, rows, student
from tiny import prompts, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, LlamaModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from tsdkd.demo.recreate import make_tokenizer
from tsdkd.methods import GKD, MiniLLM
from tsdkd.rollouts import as_asked, leftovers
from tsdkd.teachers.sources import adapter_config, base_of, dtype_of, expanded, loading_options
from tsdkd.trainers.models import check_same_tokens


def adapter_on(base, folder, scale=0.3):
    """The folder of an adapter that changes its base."""
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    made.save_pretrained(folder)
    return str(folder)


def logits(model):
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# ---------------------------------------------------------------------- adapters


def test_an_adapter_is_a_student_and_a_teacher_by_its_folder(tmp_path):
    base, other = save_tiny(tmp_path / "b", seed=1), save_tiny(tmp_path / "t", seed=2, hidden=48)
    learner, teacher = adapter_on(base, tmp_path / "la"), adapter_on(other, tmp_path / "ta")
    trainer = make(tmp_path / "o", student=learner, teacher=teacher, processing_class=None, rollouts=by_prompt)
    assert isinstance(trainer.model, PeftModel) and not isinstance(trainer.teacher_model, PeftModel)
    assert {"lora"} == {name.split("lora")[0] and "lora" for name, p in trainer.model.named_parameters() if p.requires_grad}
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(other), teacher)
    torch.testing.assert_close(logits(trainer.teacher_model), logits(expected))
    before = logits(trainer.model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not torch.equal(before, logits(trainer.model)) and adapter_config(str(tmp_path / "saved"))["r"] == 2
    again = make(tmp_path / "p", student=str(tmp_path / "saved"), teacher=other, processing_class=None)
    torch.testing.assert_close(logits(again.model), logits(trainer.model))


def test_an_adapter_saved_on_a_base_by_a_path_from_here_finds_it_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base", seed=1)
    for number, model in enumerate(("base", AutoModelForCausalLM.from_pretrained("base"))):
        trainer = make(tmp_path / f"o{number}", student=model, peft_config=LoraConfig(r=2, target_modules="all-linear"))
        trainer.save_model(str(tmp_path / f"a{number}"))
        monkeypatch.chdir("/")
        saved = str(tmp_path / f"a{number}")
        assert base_of(saved, adapter_config(saved)) == str(tmp_path / "base")
        monkeypatch.chdir(tmp_path)


def test_a_base_is_found_above_the_adapter_or_named(tmp_path, monkeypatch):
    save_tiny(tmp_path / "base")
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    monkeypatch.chdir("/")
    assert base_of(str(folder), {"base_model_name_or_path": "base"}) == str(tmp_path / "base")
    assert base_of(str(folder), {"base_model_name_or_path": "org/base"}) == "org/base"
    with pytest.raises(ValueError, match=r"the base ./nowhere of the adapter .* cannot be found: it is neither in / nor above"):
        base_of(str(folder), {"base_model_name_or_path": "./nowhere"})
    with pytest.raises(ValueError, match=r"does not name its base model"):
        base_of(str(folder), {"base_model_name_or_path": None})


def test_an_adapter_is_refused_as_a_teacher_elsewhere(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "b", seed=2, hidden=48)
    teacher = adapter_on(base, tmp_path / "a")
    with pytest.raises(ValueError, match=r"is an adapter, which is read whole in this process only: merge it into its base"):
        make(tmp_path / "o", teacher=teacher, teacher_placement="server", teacher_urls=["http://127.0.0.1:1"])


def test_an_object_with_a_loaded_adapter_is_read_with_it(tmp_path):
    base = save_tiny(tmp_path / "b", seed=2, hidden=48)
    teacher = AutoModelForCausalLM.from_pretrained(base)
    teacher.load_adapter(adapter_on(base, tmp_path / "a"))
    expected = logits(teacher)
    trainer = make(tmp_path / "o", teacher=teacher, rollouts=by_prompt)
    trainer.train()
    torch.testing.assert_close(logits(trainer.teacher_model), expected)
    head = trainer.teacher.head
    from tsdkd.types import Rollouts

    (hidden,) = trainer.teacher.hidden(Rollouts([[0]], [list(range(1, 8))], [[1] * 7]), [7])
    torch.testing.assert_close(head.logits(hidden), expected[0, :7], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- names and kinds


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny(tmp_path / "s", seed=1)
    save_tiny(tmp_path / "t", seed=2, hidden=48)
    assert expanded("~/s") == str(tmp_path / "s") and expanded("org/name") == "org/name"
    trainer = make(tmp_path / "o", student="~/s", teacher="~/t", processing_class=None)
    assert trainer.model.config._name_or_path == str(tmp_path / "s") and trainer.vocab_size == 64


def t5():
    return T5(T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0))


def test_models_of_another_kind_are_refused_by_name(tmp_path):
    headless = LlamaModel(tiny_model("llama").config)
    for models, message in (
        ({"student": t5()}, "the student is an encoder-decoder"),
        ({"teacher": t5()}, "the teacher is an encoder-decoder"),
        ({"teacher": headless}, "the teacher is a LlamaModel without a language-model head"),
        ({"student": headless}, "the student is a LlamaModel without a language-model head"),
        ({"teacher": torch.nn.Linear(2, 2)}, "the teacher is a Linear, which has no config"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **models)
    t5().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match=r"the teacher is an encoder-decoder \(t5\)"):
        make(tmp_path, teacher=str(tmp_path / "t5"))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_checkpoint_without_a_head_is_refused_and_a_tied_one_is_whole(tmp_path, role):
    untied, tied = (tiny_model("llama", tie_word_embeddings=tie, hidden=48) for tie in (False, True))
    for name, model in (("untied", untied), ("tied", tied)):
        model.model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=rf"the {role}'s checkpoint .*untied lacks 1 weights .*\(lm_head.weight\)"):
        make(tmp_path / "o", **{role: str(tmp_path / "untied")})
    trainer = make(tmp_path / "p", **{role: str(tmp_path / "tied")})
    torch.testing.assert_close(logits(trainer.model if role == "student" else trainer.teacher_model), logits(tied))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_name_that_nothing_has_is_told_with_its_role(tmp_path, role):
    with pytest.raises(ValueError, match=rf"the {role} 'my-modl' cannot be read: there is no such folder here"):
        make(tmp_path, **{role: "my-modl"})


def test_a_misspelt_folder_is_told_the_one_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "my-student")
    with pytest.raises(
        ValueError, match=r"the student 'my-studnt' cannot be read: there is no such folder here \(but my-student\)"
    ):
        make(tmp_path / "o", student="my-studnt")


def test_a_student_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "s")
    with pytest.raises(ValueError, match=r"the student's folder .*s holds no tokenizer"):
        make(tmp_path / "o", student=str(tmp_path / "s"), processing_class=None)


def test_the_students_revision_is_read_everywhere(tmp_path, monkeypatch):
    """A Hub cache made by hand: the default revision is another model."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache), raising=False)
    asked = []
    from transformers import AutoConfig, AutoProcessor

    from tsdkd.trainers import sources

    folder = save_tiny(tmp_path / "s", seed=1)
    for module, name in ((AutoConfig, "config"), (AutoProcessor, "processor")):
        real = module.from_pretrained.__func__

        def watched(cls, source, *args, real=real, name=name, **kwargs):
            if source == "org/student":
                asked.append((name, kwargs.get("revision")))
                source = folder
            return real(cls, source, *args, **kwargs)

        monkeypatch.setattr(module, "from_pretrained", classmethod(watched))
    monkeypatch.setattr(sources, "adapter_config", lambda name, revision=None: None)

    def create(source, **kwargs):
        asked.append(("model", kwargs.get("revision")))
        return tiny_model("llama", seed=1), {}

    monkeypatch.setattr(sources, "create_model_from_path", create)
    make(tmp_path / "o", student="org/student", processing_class=None, model_init_kwargs={"revision": "v2"})
    assert {name for name, _ in asked} == {"config", "processor", "model"} and {r for _, r in asked} == {"v2"}


# ---------------------------------------------------------------------- dtypes


def test_a_dtype_is_read_in_every_spelling(tmp_path):
    for word in ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16, "BF16"):
        assert dtype_of(word) is torch.bfloat16
        for key in ("dtype", "torch_dtype"):
            assert loading_options({key: word}, "x", None) == {"dtype": torch.bfloat16}
    assert loading_options(None, "x", "auto") == {"dtype": "auto"} and dtype_of(None) is None
    with pytest.raises(ValueError, match="dtype='int3' is unknown; choose one of: auto, bfloat16"):
        dtype_of("int3")
    with pytest.raises(ValueError, match=r"x has dtype=torch.float16 and torch_dtype=torch.float32: leave one out"):
        loading_options({"dtype": "half", "torch_dtype": "float32"}, "x", None)


def test_both_models_are_loaded_in_the_dtype_that_was_asked_for(tmp_path):
    learner, teacher = tmp_path / "s", tmp_path / "t"
    for folder, model in ((learner, tiny_model("llama", seed=1)), (teacher, tiny_model("llama", seed=2, hidden=48))):
        model.to(torch.bfloat16).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    named = {"student": str(learner), "teacher": str(teacher), "processing_class": None}
    default = make(tmp_path / "a", **named)
    assert default.model.dtype is torch.float32 and default.teacher_model.dtype is torch.bfloat16
    for given in ({"torch_dtype": "float16"}, {"dtype": torch.float16}, {"dtype": "half"}):
        asked = make(tmp_path / "b", **named, model_init_kwargs=dict(given), teacher_model_init_kwargs=dict(given))
        assert asked.model.dtype is torch.float16 and asked.teacher_model.dtype is torch.float16
        assert asked.args.model_init_kwargs == given  # as it was given, for the record of a run
    auto = make(tmp_path / "c", **named, model_init_kwargs={"dtype": "auto"})
    assert auto.model.dtype is torch.bfloat16


# ---------------------------------------------------------------------- ids


def test_ids_that_no_token_has_are_never_written(tmp_path):
    """The demo's tokenizer has 60 tokens, the models 64 rows: four that no text can mean."""
    for method in (GKD(), MiniLLM()):
        trainer = general(tmp_path / method.name, method, student=student(), max_steps=3, max_completion_length=30)
        assert trainer.unknown_ids == [60, 61, 62, 63] and trainer.vocab_size == 64
        seen = []
        kept = trainer.loop.prepare
        trainer.loop.prepare = lambda rollouts, kept=kept, seen=seen: seen.extend(rollouts.completion_ids) or kept(rollouts)
        trainer.train()
        assert sum(map(len, seen)) > 60 and max(map(max, seen)) < 60


def test_a_renamed_token_is_one_by_an_alias_that_the_refusal_shows(tmp_path):
    ours, theirs = {"a": 0, "<end>": 1, "b": 2}, {"a": 0, "<stop>": 1, "b": 2}
    with pytest.raises(ValueError, match=r"id 1 is '<end>' for the student .*token_aliases=\{'<end>': '<stop>'\}"):
        check_same_tokens(ours, theirs, 3)
    check_same_tokens(ours, theirs, 3, {"<end>": "<stop>"})
    for wrong, message in (({"<no>": "<stop>"}, "the student has no token '<no>'"), ({"<end>": "<no>"}, "the teacher has no")):
        with pytest.raises(ValueError, match=message):
            check_same_tokens(ours, theirs, 3, wrong)
    folders = [save_tiny(tmp_path / name, seed=seed, hidden=h) for name, seed, h in (("s", 1, 32), ("t", 2, 48))]
    file = tmp_path / "t" / "tokenizer.json"
    for path in (file, tmp_path / "t" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<|end|>", "<|stop|>"))
    named = {"student": folders[0], "teacher": folders[1], "processing_class": None}
    with pytest.raises(ValueError, match=r"token_aliases=\{'<\|end\|>': '<\|stop\|>'\}"):
        make(tmp_path / "o", **named)
    make(tmp_path / "p", **named, token_aliases=json.dumps({"<|end|>": "<|stop|>"}))


# ---------------------------------------------------------------------- generation_config


def test_rollouts_and_scores_are_what_was_asked_whatever_the_model_adds(tmp_path, caplog):
    def written(trainer):
        torch.manual_seed(0)
        return trainer.write(trainer.tokenize(list(prompts(4)["prompt"])), None, {})

    plain = make(tmp_path / "a", student=student())
    shaped = student()
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        shaped.generation_config.update(
            repetition_penalty=1.9, no_repeat_ngram_size=2, suppress_tokens=[5, 6, 7], min_new_tokens=9, top_k=1
        )
        other = make(tmp_path / "b", student=shaped)
    assert "generation_config also has" in caplog.text and "no_repeat_ngram_size=2" in caplog.text
    assert written(plain) == written(other)
    assert shaped.generation_config.no_repeat_ngram_size == 2  # it is the model's, and saved with it
    assert leftovers(student()) == {}
    asked = make(tmp_path / "c", student=student(), generation_kwargs={"min_new_tokens": 6})
    assert min(map(len, written(asked))) >= 6


def test_a_wrapped_model_generates_as_asked_too():
    model = student()
    model.generation_config.repetition_penalty = 1.7
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with as_asked(wrapped):
        assert model.generation_config.repetition_penalty is None or model.generation_config.repetition_penalty == 1.0
        assert model.generation_config.eos_token_id == 1
    assert model.generation_config.repetition_penalty == 1.7


# ---------------------------------------------------------------------- mixtures and dropout


def mixture(**more):
    torch.manual_seed(0)
    options = dict(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
                   num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
                   max_position_embeddings=128, eos_token_id=1, pad_token_id=0, initializer_range=0.3)  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options, **more))


def test_a_mixture_with_router_logits_writes_and_says_that_its_loss_is_not_trained(tmp_path, caplog):
    learner = mixture(output_router_logits=True, router_aux_loss_coef=0.5)
    with caplog.at_level(logging.WARNING, logger="tsdkd"):
        trainer = make(tmp_path, student=learner)
    trainer.train()
    assert "set router_loss_weight (its family's router_aux_loss_coef is 0.5)" in caplog.text
    assert learner.config.output_router_logits and "loss/router" not in rows(trainer)[0]


def test_the_router_loss_is_the_familys_own_and_joins_with_its_weight(tmp_path):
    """One micro-batch: the gradient is the method's and the weighted loss's that transformers computes of the same text."""
    flats, values = {}, {}
    for weight in (0.0, 0.7):
        seen = Gradients()
        run = {"student": mixture(), "rollouts": by_prompt, "callbacks": [seen], "max_steps": 1, "max_grad_norm": 1e9}
        trainer = make(tmp_path / str(weight), **run, router_loss_weight=weight)
        texts = []
        kept = trainer.loop.loss._read
        trainer.loop.loss._read = lambda model, step, kept=kept, texts=texts: texts.append(step) or kept(model, step)
        trainer.train()
        flats[weight], values[weight] = seen.flat, rows(trainer)[0]
    model, (step,) = mixture(), texts
    read = step.rollouts.first(step.plan.student)
    ids, mask, _ = read.padded(0, torch.device("cpu"))
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    output = model.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    expected = load_balancing_loss_func(output.router_logits, 4, 2, mask)
    assert math.isclose(float(values[0.7]["loss/router"]), expected.item(), rel_tol=1e-4)
    expected.backward()
    alone = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])
    torch.testing.assert_close(flats[0.7] - flats[0.0], 0.7 * alone, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"router_loss_weight=0.1 takes a mixture of experts .* the student is a Qwen2"):
        make(tmp_path / "dense", router_loss_weight=0.1)


def test_every_kind_of_dropout_is_off_when_that_is_asked(tmp_path, caplog):
    from transformers import GPT2Config, GPT2LMHeadModel

    def forward(model):
        ids = torch.arange(8).unsqueeze(0)
        return model.train()(input_ids=ids).logits

    def gpt2():
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=1,
                                          bos_token_id=1, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5))  # fmt: skip

    for number, learner in enumerate((tiny_model("llama", seed=1, attention_dropout=0.5), gpt2())):
        with caplog.at_level(logging.WARNING, logger="tsdkd"):
            trainer = make(tmp_path / str(number), student=learner, disable_dropout=True)
        torch.testing.assert_close(forward(trainer.model), forward(trainer.model), rtol=0, atol=0)
        assert "still draws at random" not in caplog.text
    kept = make(tmp_path / "kept", student=tiny_model("llama", seed=1, attention_dropout=0.5))
    assert not torch.equal(forward(kept.model), forward(kept.model))
