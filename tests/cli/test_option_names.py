"""Options that people guess get a hint at ours, or a sentence that says what to do."""

from __future__ import annotations

import pytest

from quarkrl.cli.main import COMMANDS, main, parser_of
from quarkrl.cli.option_names import _ADVICE, _OURS, suggest
from quarkrl.cli.train_checks import inherited_options
from quarkrl.cli.train_options import train_parser

FLAGS = {name: {*parser_of(name).flag_names} for name, command in COMMANDS.items() if hasattr(command, "add_options")}
FLAGS["train"] = {*train_parser().flag_names, *inherited_options()}


def test_each_hint_names_an_option_that_a_command_has():
    known = set().union(*FLAGS.values())
    assert {ours for names in _OURS.values() for ours in names} <= known
    assert not {name for name in _OURS if name in FLAGS["train"] and not ({*_OURS[name]} & (known - FLAGS["train"]))}


def test_each_guess_has_a_hint_in_some_command():
    for name in {*_OURS, *_ADVICE}:
        assert any(suggest(name, flags) for flags in FLAGS.values()), name


# Of transformers' run_clm.py, TRL's ScriptArguments, ModelConfig and GRPOConfig, and vLLM's command line.
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model_name_or_path", "'--model'"),
        ("dataset_name", "'--prompts'"),
        ("dataset_train_split", "'--prompt_split'"),
        ("train_file", "'--prompts'"),
        ("max_train_samples", "'--prompts_per_iteration'"),
        ("torch_dtype", "'--dtype'"),
        ("tokenizer_name", "The model's own tokenizer"),
        ("model-revision", "hf download MODEL --revision"),
        ("use_peft", "'--lora_rank'"),
        ("load_in_8bit", "'--load_in_4bit'"),
        ("reward_funcs", "'--reward'"),
        ("num_generations", "'--samples_per_prompt'"),
        ("use_vllm", "'--engine'"),
        ("max-model-len", "vllm serve"),
        ("top_k", "--temperature and --top_p"),
        ("device", "A GPU is used if there is one. For the CPU, set --use_cpu."),
    ],
)
def test_names_of_other_tools_are_known_to_train(name, hint):
    assert hint in suggest(name, FLAGS["train"])


def test_a_guess_is_answered_for_the_command_at_hand(capsys):
    assert main(["generate", "builtin", "--prompt", "a", "--device", "cuda"]) == 2
    error = "error: unknown option --device. A GPU is used if there is one. For the CPU, set CUDA_VISIBLE_DEVICES to "
    assert capsys.readouterr().err.startswith(error)
    assert main(["generate", "builtin", "--prompt", "a", "--model", "b"]) == 2
    assert "The model is the first argument: quarkrl COMMAND MODEL." in capsys.readouterr().err
    assert main(["generate", "builtin", "--prompt", "a", "--per_device_eval_batch_size", "8"]) == 2
    assert "Did you mean '--batch_size'?" in capsys.readouterr().err
