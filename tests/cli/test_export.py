"""`quarkrl export`: whole weights and adapters, both with the trainer's logits."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from helpers.eight_letters import PROMPTS, TOKENIZER
from helpers.runs import share_of_a_to_d, small_trainer
from helpers.tiny_models import tiny_model
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from quarkrl.cli.main import main
from quarkrl.sampling.generator import QuarkGenerator

IDS = torch.tensor([[12, 0, 1, 2], [10, 3, 3, 4]])


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def train(directory, architecture="llama", tied=True, rewards=share_of_a_to_d, **options):
    """Train a model from `base`, next to the run; the trainer."""
    tiny_model(architecture, TOKENIZER, tied=tied).save_pretrained(directory / "base")
    TOKENIZER.save_pretrained(directory / "base")
    options = {"num_iterations": 1, "learning_rate": 1e-2, "save_strategy": "epoch", **options}
    trainer = small_trainer(directory / "run", rewards, str(directory / "base"), processing_class=None, **options)
    trainer.train()
    return trainer


def worse_each_time():
    """A reward that falls from call to call, so that the first evaluation is the best."""
    calls = itertools.count()

    def reward(completion_ids, **_):
        number = next(calls)
        return [sum(i < 4 for i in ids) / len(ids) - number for ids in completion_ids]

    return reward


def export(source, form, output) -> int:
    return main(["export", str(source), f"--{form}", "--output", str(output)])


@pytest.mark.parametrize(
    ("architecture", "tied", "kind"),
    [
        ("gpt2", True, {}),
        ("gpt2", False, {"use_dora": True}),
        ("llama", True, {"use_dora": True}),
        ("llama", False, {"use_rslora": True}),
    ],
)
def test_both_forms_of_an_adapter_run_give_the_trainers_logits(tmp_path, architecture, tied, kind):
    trainer = train(tmp_path, architecture, tied, peft_config=LoraConfig(r=2, target_modules="all-linear", **kind))
    trainer.save_final()
    expected = logits_of(trainer.model)
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoint-3"):
        for form in ("merge", "adapter"):
            output = tmp_path / f"{form} {source.name}"
            assert export(source, form, output) == 0
            torch.testing.assert_close(
                logits_of(QuarkGenerator.from_pretrained(output).model), expected, rtol=1e-4, atol=1e-4
            )
            assert AutoTokenizer.from_pretrained(output)(PROMPTS) == trainer.processing_class(PROMPTS)
    # The libraries alone.
    merged = tmp_path / "merge checkpoint-3"
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(merged)), expected, rtol=1e-4, atol=1e-4)
    assert GenerationConfig.from_pretrained(merged).suppress_tokens == [10, 11, 12]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(13)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter run")
    torch.testing.assert_close(logits_of(adapted), expected, rtol=1e-4, atol=1e-4)
    weights = load_file(tmp_path / "adapter run" / "adapter_model.safetensors")
    rows = {name: weight.shape[0] for name, weight in weights.items() if "lora" not in name}
    assert list(rows.values()) == [3] * (1 if tied else 2), rows  # Of three reward tokens, in each layer of its own.


def test_a_checkpoint_of_all_weights_is_exported_as_final_is(tmp_path):
    trainer = train(tmp_path)
    assert export(tmp_path / "run", "merge", tmp_path / "merged") == 0  # There is no final/ yet.
    final = QuarkGenerator.from_pretrained(trainer.save_final())
    exported = QuarkGenerator.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(exported.model), logits_of(final.model))
    assert exported.generate(PROMPTS, seed=1) == final.generate(PROMPTS, seed=1)
    names = {path.name for path in (tmp_path / "run" / "final").iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names


def test_the_adapter_of_a_run_is_that_of_its_final_model(tmp_path):
    """With the best checkpoint at the end, the last checkpoint has other weights than final/."""
    trainer = train(
        tmp_path,
        num_iterations=2,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        eval_dataset=PROMPTS[:3],
        eval_strategy="epoch",
        load_best_model_at_end=True,
        rewards=worse_each_time(),
    )
    assert trainer.state.best_global_step == 3 and trainer.state.global_step == 6
    trainer.save_final()
    assert export(tmp_path / "run", "adapter", tmp_path / "adapter") == 0
    exported = QuarkGenerator.from_pretrained(tmp_path / "adapter").model
    torch.testing.assert_close(logits_of(exported), logits_of(trainer.model), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    trainer = train(tmp_path)
    final = trainer.save_final()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty" / "pool").mkdir(parents=True)
    checkpoint, new = tmp_path / "run" / "checkpoint-3", tmp_path / "new"
    mistakes = {
        ("export", final, "--output", new): "merge, adapter, gguf: exactly one must be set",
        ("export", final, "--merge", "--adapter", "--output", new): "merge, adapter, gguf: exactly one must be set",
        ("export", final, "--merge"): "Correct --output",
        ("export", final, "--gguf", new, "--output", new): "Correct --output",
        ("export", final, "--gguf", tmp_path / "full" / "file"): "must be a new file",
        ("export", final, "--gguf", new): "must be byte-level BPE",
        ("export", final, "--merge", "--output", tmp_path / "full"): "must be a new or an empty directory",
        ("export", checkpoint, "--adapter", "--output", new): "must be a checkpoint with an adapter. Use --merge",
        ("export", tmp_path / "base", "--merge", "--output", new): "must be a model that Quark trained",
        ("export", tmp_path / "empty", "--merge", "--output", new): "must hold final/ or a checkpoint",
        ("export", tmp_path / "nowhere", "--merge", "--output", new): "nowhere",
    }
    for arguments, words in mistakes.items():
        assert main([*map(str, arguments)]) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1, error
        assert not new.exists()
    shutil.rmtree(checkpoint)
    assert export(tmp_path / "run", "adapter", new) == 2
    assert "must hold the checkpoint of final/, and it was not kept" in capsys.readouterr().err


def test_weights_are_exported_in_the_dtype_that_is_set(tmp_path):
    train(tmp_path)
    command = ["export", str(tmp_path / "run"), "--merge", "--dtype", "bfloat16", "--output", str(tmp_path / "merged")]
    assert main(command) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
