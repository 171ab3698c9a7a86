"""Tiny models of every architecture, and a batch of completions of unequal length for them."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model

EVERY_MODEL = pytest.mark.parametrize("architecture", ARCHITECTURES)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def unequal_rows() -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of three prompts and of their completions; 257 is BOS, 256 EOS."""
    prompts = [[257, 10, 20], [257, 30], [257, 40, 50, 60, 70, 80]]
    completions = [[11, 12, 13, 14], [31, 256], [41]]
    return prompts, completions


def tied_or_untied(architecture: str, tied: bool, seed: int = 0):
    """A tiny model of 258 tokens whose output embedding is the input embedding, or is not."""
    return tiny_model(architecture, tiny_tokenizer(bos=True), tied=tied, seed=seed)


def add_lora(model, **options):
    """A model with a LoRA adapter that changes its outputs from the start; in eval mode."""
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
