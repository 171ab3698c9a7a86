"""What a run starts from: its precision, its adapters, and that it can be saved."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.eight_letters import PROMPTS, TOKENIZER
from helpers.runs import LORA, share_of_a, small_trainer
from helpers.tiny_models import tiny_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from quarkrl.cli.main import main
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.evaluate import evaluate
from quarkrl.evaluation.options import EvaluationOptions
from quarkrl.models.loading import load_model
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import QuarkGenerator

IDS = torch.tensor([[12, 0, 1, 2], [10, 3, 3, 4]])


def save(model, directory):
    model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


@pytest.fixture
def base(tmp_path):
    return save(tiny_model("gpt2", TOKENIZER), tmp_path / "base")


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def refuse(completions, **_):
    raise AssertionError("a reward is called before the error")


# Precision


@pytest.fixture
def bf16(tmp_path):
    """A checkpoint in bfloat16."""
    return save(tiny_model("gpt2", TOKENIZER).to(torch.bfloat16), tmp_path / "bf16")


def test_a_checkpoint_in_bfloat16_is_float32_everywhere(bf16, tmp_path):
    assert AutoModelForCausalLM.from_pretrained(bf16).dtype == torch.bfloat16  # What transformers does.
    trainer = small_trainer(tmp_path / "run", model=str(bf16), ref_model=str(bf16), processing_class=None)
    assert {trainer.model.dtype, trainer.ref_model.dtype} == {torch.float32}
    generator = QuarkGenerator.from_pretrained(bf16)
    generator.reference_name = str(bf16)
    assert {generator.model.dtype, generator.reference.dtype} == {torch.float32}
    final = trainer.save_final()
    assert AutoModelForCausalLM.from_pretrained(final).dtype == torch.float32
    options = EvaluationOptions(samples=1, max_new_tokens=2)
    evaluation = evaluate(final, load_prompts(PROMPTS[:2]), Scorer(share_of_a), options)
    assert [weights["dtype"] for weights in evaluation.protocol["weights"]] == ["float32"] * 2
    assert evaluation.protocol["weights"][1]["name"] == str(bf16)


@pytest.mark.parametrize(("dtype", "expected"), [(None, "float32"), ("bfloat16", "bfloat16"), ("auto", "bfloat16")])
def test_policy_and_reference_of_the_command_have_the_dtype_that_is_set(bf16, tmp_path, monkeypatch, dtype, expected):
    dtypes = []

    def note(trainer, **_):
        dtypes.extend((trainer.model.dtype, trainer.ref_model.dtype))
        raise UserError("seen")

    monkeypatch.setattr("quarkrl.training.trainer.QuarkTrainer.train", note)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    files = [
        f"--{name}={path}" for name, path in (("model", bf16), ("ref_model", bf16), ("output_dir", tmp_path / "run"))
    ]
    options = [
        "--num_quantiles=2",
        "--max_completion_length=4",
        "--use_cpu=1",
        *([f"--dtype={dtype}"] if dtype else []),
    ]
    assert main(["train", *files, f"--prompts={tmp_path}/prompts.txt", "--reward=repetition", *options]) == 2
    assert dtypes == [getattr(torch, expected)] * 2


def test_a_note_says_that_weights_of_16_bits_are_trained(tmp_path):
    def notes_of(directory, **options) -> str:
        model = tiny_model("gpt2", TOKENIZER).bfloat16()
        return "\n".join(small_trainer(directory, model=model, **options).progress.start_notes)

    assert "dtype bfloat16: rounds away" in notes_of(tmp_path / "whole")
    assert "rounds away" not in notes_of(tmp_path / "lora", peft_config=LORA)  # peft trains adapters in float32.


# Adapters


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_a_checkpoint_of_an_adapter_run_is_loaded_everywhere(base, tmp_path, capsys, modules_to_save):
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=modules_to_save)
    trainer = small_trainer(
        tmp_path / "run",
        model=str(base),
        processing_class=None,
        peft_config=config,
        learning_rate=1e-2,
        save_strategy="epoch",
    )
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    expected = logits_of(trainer.model)
    assert (checkpoint / "adapter_model.safetensors").exists()
    generator = QuarkGenerator.from_pretrained(checkpoint)
    torch.testing.assert_close(logits_of(generator.model), expected, rtol=1e-4, atol=1e-4)
    final = QuarkGenerator.from_pretrained(trainer.save_final())
    assert generator.encode(PROMPTS, "worst") == final.encode(PROMPTS, "worst")
    assert main(["generate", str(checkpoint), "--prompt", "a b", "--seed", "1"]) == 0
    assert capsys.readouterr().out.startswith("a b")
    options = EvaluationOptions(samples=1, max_new_tokens=2)
    evaluation = evaluate(checkpoint, load_prompts(PROMPTS[:2]), Scorer(share_of_a), options)
    assert evaluation.protocol["reference"] == str(base)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "new adapter"])
def test_an_adapter_directory_is_merged_and_trained(base, tmp_path, peft_config):
    adapted = get_peft_model(load_model(base), LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(IDS[:, 1:]).logits
    trainer = small_trainer(
        tmp_path / "run",
        model=str(tmp_path / "adapter"),
        processing_class=None,
        peft_config=peft_config,
        learning_rate=1e-2,
        save_strategy="epoch",
    )
    with trainer.reference() as reference, torch.no_grad():
        logits = reference.eval()(IDS[:, 1:]).logits
    torch.testing.assert_close(logits[..., :10], expected[..., :10], rtol=1e-4, atol=1e-4)
    before = logits_of(trainer.model)
    trainer.train()
    assert not torch.allclose(logits_of(trainer.model), before)
    loaded = load_model(tmp_path / "run" / "checkpoint-6")
    torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model), rtol=1e-4, atol=1e-4)
    facts = json.loads((trainer.save_final() / "quark.json").read_text(encoding="utf-8"))
    assert facts["reference"]["name"] == facts["start"]["name"] == str(tmp_path / "adapter")


def test_a_peft_model_is_merged_and_a_new_adapter_like_its_own_is_trained(base, tmp_path):
    adapted = get_peft_model(load_model(base), LoraConfig(r=3, target_modules=["c_attn"], init_lora_weights=False))
    with torch.no_grad():
        expected = adapted.eval()(IDS[:, 1:]).logits
    trainer = small_trainer(tmp_path / "run", model=adapted, processing_class=None, learning_rate=1e-2)
    assert isinstance(trainer.model, PeftModel) and trainer.model.peft_config["default"].r == 3
    with trainer.reference() as reference, torch.no_grad():
        logits = reference(IDS[:, 1:]).logits
    torch.testing.assert_close(logits[..., :10], expected[..., :10], rtol=1e-4, atol=1e-4)
    before = logits_of(trainer.model)
    trainer.train()
    assert not torch.allclose(logits_of(trainer.model), before)
    assert trainer.identities["start"]["name"] is None  # No directory holds the merged weights.


def test_a_fresh_peft_model_trains_as_its_configuration_does(base, tmp_path):
    config = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = small_trainer(tmp_path, model=get_peft_model(load_model(base), config), processing_class=None)
    assert trainer.identities["start"]["name"] == str(base)
    plain = small_trainer(tmp_path, model=str(base), processing_class=None, peft_config=config)
    torch.testing.assert_close(trainer.model.state_dict(), plain.model.state_dict())


def test_a_reference_with_an_adapter_is_merged(base, tmp_path):
    adapted = get_peft_model(load_model(base), LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    with torch.no_grad():
        expected = adapted.eval()(IDS[:, 1:] % 8).logits
    trainer = small_trainer(tmp_path, ref_model=adapted)
    assert not hasattr(trainer.ref_model, "peft_config")
    with torch.no_grad():
        torch.testing.assert_close(trainer.ref_model(IDS[:, 1:] % 8).logits, expected, rtol=1e-4, atol=1e-4)


def with_adapter_of_transformers():
    model = tiny_model("gpt2", TOKENIZER)
    model.add_adapter(LoraConfig(target_modules=["c_attn"]))
    return model


def prompt_tuned():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(tiny_model("gpt2", TOKENIZER), config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_config": PromptTuningConfig(num_virtual_tokens=2)}, "peft_config PROMPT_TUNING: must be an adapter"),
        ({"model": prompt_tuned()}, "model PROMPT_TUNING: must be an adapter|model PeftModel.*: must be a causal"),
        ({"model": with_adapter_of_transformers()}, "must not have an adapter that transformers has loaded"),
        ({"ref_model": with_adapter_of_transformers()}, "must not have an adapter that transformers has loaded"),
        ({"model": torch.nn.Linear(2, 2)}, "model Linear: must be a causal language model"),
        ({"ref_model": torch.nn.Linear(2, 2)}, "ref_model Linear: must be a causal language model"),
    ],
)
def test_what_cannot_be_a_start_is_refused_in_one_line_before_sampling(tmp_path, options, words):
    with pytest.raises(UserError, match=words) as caught:
        small_trainer(tmp_path, refuse, **options)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


# Saving


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 7}, {"do_sample": True, "top_k": 7}),
        (
            {"length_penalty": 2.0, "max_new_tokens": 5},
            {"do_sample": None, "length_penalty": None, "max_new_tokens": 5},
        ),
        ({"output_scores": True}, {"output_scores": None}),
    ],
)
def test_a_generation_config_that_transformers_loads_and_does_not_save_is_corrected(base, tmp_path, parameters, kept):
    """Llama 2 chat and Vicuna have temperature and top_p without do_sample."""
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **parameters}), encoding="utf-8")
    trainer = small_trainer(tmp_path / "run", model=str(base), processing_class=None, save_strategy="epoch")
    trainer.train()
    saved = GenerationConfig.from_pretrained(trainer.save_final())
    assert {name: getattr(saved, name) for name in kept} == kept


def test_a_run_that_could_not_save_its_model_is_refused_before_sampling(tmp_path):
    model = tiny_model("gpt2", TOKENIZER)
    model.generation_config.num_return_sequences = 4
    with pytest.raises(UserError, match=r"cannot be saved.*num_return_sequences"):
        small_trainer(tmp_path, refuse, model=model)


def test_a_reward_whose_identity_is_no_json_is_refused_before_sampling(tmp_path):
    scorer = Scorer(share_of_a)
    scorer.identity = [{"name": object()}]
    with pytest.raises(UserError, match=r"cannot be saved.*JSON"):
        small_trainer(tmp_path, scorer)


def test_the_tokenizer_of_a_run_is_that_of_its_model(base, tmp_path):
    trainer = small_trainer(tmp_path / "run", model=str(base), processing_class=None)
    assert trainer.plain_tokenizer("a b") == AutoTokenizer.from_pretrained(base)("a b")
