"""Adapters: the reward tokens train with each kind, or it is refused; what is saved loads with the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from quarkrl.errors import UserError
from quarkrl.models.adapters import lora_config, merge, merge_start
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.export import save_steered, try_saving
from quarkrl.models.loading import load_model, load_tokenizer
from quarkrl.models.options import AdapterOptions
from quarkrl.sampling.generator import QuarkGenerator

TOKENIZER = tiny_tokenizer()  # The reward tokens are 257, 258 and 259.
IDS = torch.tensor([[257, 3, 1, 4], [259, 1, 5, 9], [258, 64, 65, 66]])
SEED = 5
MODELS = pytest.mark.parametrize(
    ("architecture", "tied"), [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)]
)
# Layers by what they are, in the names of both architectures.
NAMES = {
    "gpt2": {"maps": "c_attn", "inputs": "wte", "outputs": "lm_head", "norm": "ln_f"},
    "llama": {"maps": "q_proj", "inputs": "embed_tokens", "outputs": "lm_head", "norm": "model.norm"},
}
LORAS = {
    "linear maps": {"target_modules": ["maps"]},
    "rsLoRA": {"target_modules": ["maps"], "use_rslora": True},
    "DoRA": {"target_modules": ["maps"], "use_dora": True},
    "inputs and outputs": {"target_modules": ["maps", "inputs", "outputs"]},
    "inputs": {"target_modules": ["inputs"], "use_dora": True},
    "outputs": {"target_modules": ["outputs"]},
    "saved outputs": {"target_modules": ["maps"], "modules_to_save": ["outputs"]},
    "saved norm": {"target_modules": ["maps"], "modules_to_save": ["norm"]},
    "saved inputs": {"target_modules": ["maps"], "modules_to_save": ["inputs"]},
    "some rows": {"target_modules": ["maps"], "trainable_token_indices": [3]},
    "rows of outputs": {"target_modules": ["maps"], "trainable_token_indices": {"outputs": [3]}},
}


def lora(architecture: str, **options) -> LoraConfig:
    names = NAMES[architecture]
    for option, value in options.items():
        if isinstance(value, list | dict):
            options[option] = type(value)(
                (names[key], value[key]) if isinstance(value, dict) else names.get(key, key) for key in value
            )
    return LoraConfig(r=2, **options)


def start(directory, architecture="llama", tied=True):
    """A model from a directory, with reward tokens; their conditioning; the tokenizer that knows them."""
    tiny_model(architecture, TOKENIZER, tied=tied).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    model = load_model(directory)
    conditioning, tokenizer = Conditioning.add_to(TOKENIZER, model, 3, seed=SEED)
    return model, conditioning, tokenizer


def train(adapted) -> None:
    """Three steps that move each trained weight."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.3)
    for _ in range(3):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save_checkpoint(adapted, conditioning, tokenizer, directory, base) -> None:
    """Write what a checkpoint of a run has."""
    adapted.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    conditioning.save(directory, start={"name": str(base)}, config={"seed": SEED})


def saved_numbers(directory) -> int:
    return sum(weight.numel() for weight in load_file(directory / "adapter_model.safetensors").values())


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def assert_same_logits(model, expected) -> None:
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


@MODELS
@pytest.mark.parametrize("options", LORAS.values(), ids=LORAS.keys())
def test_reward_tokens_train_and_final_and_checkpoint_give_the_trainers_logits(tmp_path, architecture, tied, options):
    model, conditioning, tokenizer = start(tmp_path / "base", architecture, tied)
    before = logits_of(model)
    adapted = conditioning.add_adapter(model, lora(architecture, **options))
    torch.testing.assert_close(logits_of(adapted), before)
    rows = adapted.get_input_embeddings()(IDS[:, 0]).detach().clone()
    train(adapted)
    assert (adapted.get_input_embeddings()(IDS[:, 0]) != rows).any(-1).all()
    with adapted.disable_adapter():
        torch.testing.assert_close(logits_of(adapted), before)
    expected = logits_of(adapted)

    (tmp_path / "final").mkdir()
    save_steered(adapted, tokenizer, conditioning, tmp_path / "final", {})
    assert_same_logits(load_model(tmp_path / "final"), expected)
    save_checkpoint(adapted, conditioning, tokenizer, tmp_path / "checkpoint", tmp_path / "base")
    assert saved_numbers(tmp_path / "checkpoint") == sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    loaded = load_model(tmp_path / "checkpoint")
    assert_same_logits(loaded, expected)
    assert all(weight.requires_grad for weight in loaded.parameters())


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["embed_tokens"]),
        LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        TrainableTokensConfig(token_indices=[3], target_modules=["embed_tokens"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters_train_the_reward_tokens_with_the_input_embedding(tmp_path, config):
    model, conditioning, tokenizer = start(tmp_path / "base")
    adapted = conditioning.add_adapter(model, config)
    rows = adapted.get_input_embeddings()(IDS[:, 0]).detach().clone()
    train(adapted)
    assert (adapted.get_input_embeddings()(IDS[:, 0]) != rows).any(-1).all()
    expected = logits_of(adapted)
    save_checkpoint(adapted, conditioning, tokenizer, tmp_path / "checkpoint", tmp_path / "base")
    assert_same_logits(load_model(tmp_path / "checkpoint"), expected)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING: must be an adapter that can"),
        (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "P_TUNING: must be an adapter that can"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING: must be an adapter that can"),
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=1), "ADAPTION_PROMPT: must be an adapter that can"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3: must train the embedding rows"),
        (LoraConfig(target_modules=["nowhere"]), "Target modules .*nowhere"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights 'pissa': must keep"),
        (LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"), "init_lora_weights 'olora': must keep"),
        (LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True), "ensure_weight_tying True: must be False"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_an_adapter_that_cannot_do_it_is_refused_in_one_line(tmp_path, config, words):
    model, conditioning, _ = start(tmp_path)
    with pytest.raises(UserError, match=f"^peft_config.*{words}") as caught:
        conditioning.add_adapter(model, config)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


def test_the_users_configuration_is_not_changed(tmp_path):
    model, conditioning, _ = start(tmp_path)
    config = lora("llama", target_modules=["maps"], trainable_token_indices=[3])
    before = config.to_dict()
    conditioning.add_adapter(model, config)
    assert config.to_dict() == before


def test_each_option_is_that_of_the_same_name_in_peft():
    options = AdapterOptions(4, lora_dropout=0.1, lora_target_modules=["q_proj", "v_proj"], use_rslora=True)
    config = lora_config(options)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert (config.target_modules, config.use_rslora, config.use_dora) == ({"q_proj", "v_proj"}, True, False)
    assert lora_config(AdapterOptions(4, lora_alpha=16, use_dora=True)).to_dict() == {
        **LoraConfig(r=4, lora_alpha=16, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM").to_dict()
    }
    assert lora_config(AdapterOptions()) is None and lora_config(AdapterOptions(lora_rank=0)) is None


# Saved adapters


def save_adapter(directory, base, architecture="llama", **options):
    """Train and save an adapter that Quark knows nothing of; the logits of the model with it."""
    adapted = get_peft_model(load_model(base), lora(architecture, task_type="CAUSAL_LM", **options))
    torch.manual_seed(0)
    train(adapted)
    adapted.save_pretrained(directory)
    return logits_of(adapted)


@MODELS
def test_a_saved_adapter_is_merged_into_its_base(tmp_path, architecture, tied):
    tiny_model(architecture, TOKENIZER, tied=tied, rows=260).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    expected = save_adapter(tmp_path / "adapter", tmp_path / "base", architecture, target_modules=["maps", "inputs"])
    loaded = load_model(tmp_path / "adapter")
    assert_same_logits(loaded, expected)
    assert type(loaded) is type(load_model(tmp_path / "base")) and not hasattr(loaded, "peft_config")
    assert loaded.config._name_or_path == str(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter")("ab") == load_tokenizer(tmp_path / "base")("ab")
    assert QuarkGenerator.from_pretrained(tmp_path / "adapter").generate("a", max_new_tokens=2)


@pytest.mark.parametrize("rows", [None, [3, 261]], ids=["linear maps", "rows"])
def test_an_adapter_with_more_embedding_rows_than_its_base_brings_them_along(tmp_path, rows):
    tiny_model("llama", TOKENIZER, tied=False).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    model.resize_token_embeddings(264)
    config = lora("llama", target_modules=["maps"], trainable_token_indices=rows, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    train(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert_same_logits(load_model(tmp_path / "adapter"), logits_of(adapted))


def test_an_adapter_on_an_adapter_is_merged_twice(tmp_path):
    tiny_model("llama", TOKENIZER, rows=260).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "first", tmp_path / "base", target_modules=["maps"])
    expected = save_adapter(tmp_path / "second", tmp_path / "first", target_modules=["maps"])
    config = PeftConfig.from_pretrained(tmp_path / "second")
    config.base_model_name_or_path = str(tmp_path / "first")
    config.save_pretrained(tmp_path / "second")
    assert_same_logits(load_model(tmp_path / "second"), expected)


def damage_base(directory):
    edit_config(directory, base_model_name_or_path=str(directory / "gone"))


def damage_name(directory):
    edit_config(directory, base_model_name_or_path=None)


def damage_cycle(directory):
    edit_config(directory, base_model_name_or_path=str(directory))


def damage_weights(directory):
    weights = load_file(directory / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), directory / "adapter_model.safetensors")


def damage_file(directory):
    (directory / "adapter_model.safetensors").unlink()


def damage_kind(directory):
    PromptTuningConfig(base_model_name_or_path="x", num_virtual_tokens=2).save_pretrained(directory)


def damage_type(directory):
    edit_config(directory, peft_type="NOTHING")


def edit_config(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_base, "its base model .*gone': no such directory"),
        (damage_name, "must name its base model"),
        (damage_cycle, "must name its base model"),
        (damage_weights, "no weights for 1 tensors, among them .*lora_A"),
        (damage_file, "must have its weights in adapter_model.safetensors"),
        (damage_kind, "PROMPT_TUNING: must be an adapter that can be merged"),
        (damage_type, "cannot be loaded"),
    ],
)
def test_a_saved_adapter_that_is_damaged_is_one_line(tmp_path, damage, words):
    tiny_model("llama", TOKENIZER, rows=260).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["maps"])
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=words) as caught:
        load_model(tmp_path / "adapter")
    assert len(str(caught.value).splitlines()) == 1 and str(tmp_path / "adapter") in str(caught.value)


# A PeftModel as the start


def test_a_peft_model_is_merged_and_gives_the_configuration_of_its_adapter(tmp_path):
    tiny_model("llama", TOKENIZER, rows=260).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_model(tmp_path / "base"), lora("llama", target_modules=["maps", "inputs"]))
    train(adapted)
    expected = logits_of(adapted)
    model, config = merge_start(adapted)
    assert_same_logits(model, expected)
    assert config.r == 2 and config.target_modules == {"q_proj", "embed_tokens"}
    assert model.config._name_or_path == ""  # No directory holds these weights.


def test_a_fresh_adapter_leaves_the_model_its_name(tmp_path):
    tiny_model("llama", TOKENIZER, rows=260).save_pretrained(tmp_path)
    adapted = get_peft_model(load_model(tmp_path), lora("llama", target_modules=["maps"], modules_to_save=["outputs"]))
    assert merge_start(adapted)[0].config._name_or_path == str(tmp_path)


def test_merged_weights_of_tied_layers_stay_what_the_adapter_made_them():
    adapted = get_peft_model(
        tiny_model("llama", TOKENIZER, rows=260),
        lora("llama", target_modules=["maps"], modules_to_save=["inputs"], ensure_weight_tying=True),
    )
    train(adapted)
    expected = logits_of(adapted)
    merged = merge(adapted)
    assert_same_logits(merged, expected)
    inputs, outputs = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (inputs is outputs) == merged.config.tie_word_embeddings


# Saving is tried before the first sample


@pytest.mark.parametrize("adapter", [False, True])
def test_saving_is_tried_without_weights(tmp_path, adapter):
    model, conditioning, tokenizer = start(tmp_path)
    policy = conditioning.add_adapter(model, lora("llama", target_modules=["maps"])) if adapter else model
    try_saving(policy, tokenizer, conditioning, {})
    model.generation_config.early_stopping = "perhaps"
    with pytest.raises(UserError, match=r"cannot be saved.*early_stopping") as caught:
        try_saving(policy, tokenizer, conditioning, {})
    assert len(str(caught.value).splitlines()) == 1
    model.generation_config.early_stopping = None
    with pytest.raises(UserError, match=r"cannot be saved.*JSON"):
        try_saving(policy, tokenizer, conditioning, {"fact": object()})


# An adapter of the hub


def test_an_adapter_of_the_hub_is_loaded_from_its_cache(tmp_path, monkeypatch):
    tiny_model("llama", TOKENIZER, rows=260).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    repository = tmp_path / "cache" / "models--user--adapter"
    expected = save_adapter(repository / "snapshots" / "0123", tmp_path / "base", target_modules=["maps"])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123", encoding="utf-8")
    for module in ("transformers.utils.hub", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True, raising=False)
    assert_same_logits(load_model("user/adapter"), expected)
    assert load_tokenizer("user/adapter")("ab") == TOKENIZER("ab")
