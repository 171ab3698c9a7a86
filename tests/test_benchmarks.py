"""The textbook of benchmarks/ computes the same as quarkrl, and the comparison detects a difference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import iteration
import measure
import real_model
from measure import SHAPES, Shape
from textbook import Textbook

MICRO = SHAPES["micro"]
TASK: dict[str, Any] = {"num_quantiles": 3, "iterations": 2, "batches": 1, "batch_size": 8, "length": 5}
TASK |= {"device": "cpu", "bf16": False, "shape": measure.as_json(MICRO), "rates": True}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory of a very small model and of the prompts that an iteration of `TASK` explores."""
    measure.make_model(tmp_path, MICRO)
    (tmp_path / "prompts.txt").write_text("\n".join(measure.make_prompts(8, MICRO)), encoding="utf-8")
    return tmp_path


def prompts_of(directory: Path) -> list[str]:
    return (directory / "prompts.txt").read_text(encoding="utf-8").splitlines()


def test_textbook_and_quarkrl_agree_on_loss_gradients_and_greedy_completions(directory):
    assert iteration.disagreements(directory, prompts_of(directory), TASK) == []


def test_a_difference_is_detected(directory, monkeypatch):
    monkeypatch.setattr(
        Textbook, "_prepend_reward_tokens", lambda self, quantiles, ids, mask: (ids, mask)
    )  # No reward token.
    differences = iteration.disagreements(directory, prompts_of(directory), TASK)
    assert any(line.startswith("loss") for line in differences) and any(
        line.startswith("gradient") for line in differences
    )


@pytest.mark.parametrize("side", ["textbook", "quarkrl", "quarkrl-micro", "generate"])
def test_each_side_samples_the_same_number_of_tokens(directory, side, monkeypatch):
    monkeypatch.setattr(measure, "peak_rate", lambda *_: 1e9)
    figures = iteration.run({**TASK, "side": side, "directory": str(directory)})
    assert figures["tokens"] == 2 * 8 * 5
    assert figures["iteration"] == pytest.approx(
        sum(figures.get(part, 0) for part in ("sampling", "quantizing", "learning"))
    )
    assert ("learning_flops" in figures) == (side != "generate")


def test_tokenizing_decoded_text_gives_the_same_tokens(directory):
    textbook = Textbook(directory, num_quantiles=3, length=5)
    torch.manual_seed(0)
    texts = textbook.sample(prompts_of(directory), best=True)
    assert [len(textbook.tokenizer(text)["input_ids"]) for text in texts] == [5] * 8


def test_the_operations_of_learning_by_hand():
    # One layer of width 2: 12 * 4 = 48 parameters. A prompt of 2 and a completion of 3 tokens are 6 tokens to the
    # policy, which runs forward and backward (3 times 2 operations), and 5 to the reference, which runs forward only:
    # (3 * 6 + 5) * 2 * 48. Attention: 3 * 2 * 2 * 6 * 7 and 1 * 2 * 2 * 5 * 6. The output embedding, of 10 tokens and
    # at 3 positions: (3 + 1) * 2 * 2 * 10 * 3.
    shape = Shape(layers=1, width=2, heads=1, vocab=10, positions=8)
    assert measure.learning_flops(shape, [2], [3]) == 23 * 96 + (504 + 120) + 480


def test_the_operations_of_learning_an_adapter_by_hand():
    # As above, but frozen weights need no gradient: (2 * 6 + 5) * 96 and (2 + 1) * 2 * 2 * 10 * 3. The adapter, of rank
    # 1, has 8 + 4 + 10 + 10 parameters, each with 3 times 2 operations for 6 tokens.
    shape = Shape(layers=1, width=2, heads=1, vocab=10, positions=8)
    assert measure.learning_flops(shape, [2], [3], lora_rank=1) == 17 * 96 + 624 + 360 + 3 * 2 * 32 * 6


def test_the_operations_of_sampling_by_hand():
    # A prompt of 2 tokens, then 2 of 3 tokens are read, at 3 and 4 positions. The output layer: 2 * 2 * 10 each time.
    shape = Shape(layers=1, width=2, heads=1, vocab=10, positions=8)
    assert measure.sampling_flops(shape, [2], 3) == (2 * 96 + 2 * 2 * 2 * 3 + 40, 2 * (96 + 40) + 4 * 2 * (3 + 4))


def test_the_lora_loop_and_quarkrl_agree_on_loss_and_gradients(tmp_path):
    measure.make_model(tmp_path, SHAPES["micro-llama"])
    task = {**TASK, "lora_rank": 4}
    assert real_model.disagreements(tmp_path, measure.make_prompts(8, SHAPES["micro-llama"]), task) == []


def test_prompts_are_as_long_as_realtoxicityprompts():
    lengths = [len(prompt.split()) for prompt in measure.make_prompts(64, MICRO)]
    assert sum(lengths) / 64 == 16.5 and min(lengths) == 7 and max(lengths) == 35
