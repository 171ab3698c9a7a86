"""Short runs on SmolLM2-135M-Instruct with an adapter, on texts and on chats."""

from __future__ import annotations

import re
from pathlib import Path

from peft import LoraConfig

from quarkrl import QuarkConfig, QuarkTrainer

TEXTS = [
    "The weather today is",
    "Last summer we",
    "She opened the door and",
    "When I was young,",
    "The old man said that",
]
QUESTIONS = [
    "How are you?",
    "What is a river?",
    "Why do birds sing?",
    "Say something nice.",
    "Give me a tip for cooking.",
]
FUNCTION_WORDS = {"the", "a", "of", "to", "in", "and"}
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
FRIENDLY = f"{Path(__file__).parents[2] / 'examples/chat/rewards.py'}:friendly"


def share_of_function_words(prompts, completions, **_):
    """The share of words that are "the", "a", "of", "to", "in" or "and"."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    words = [re.findall(r"[a-z]+", text.lower()) for text in texts]
    return [sum(word in FUNCTION_WORDS for word in found) / max(len(found), 1) for found in words]


def train(model: Path, directory: Path, prompts: list, reward=share_of_function_words, **options) -> Path:
    """Train for three iterations of 60 completions of 6 tokens by default; return the directory of the run."""
    config = QuarkConfig(
        output_dir=str(directory),
        **{
            "num_quantiles": 2,
            "num_iterations": 3,
            "samples_per_prompt": 12,
            "steps_per_iteration": 14,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 0,
            "entropy_coef": 0.0,
            "max_completion_length": 6,
            "min_completion_length": 4,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": [],
            **options,
        },
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = QuarkTrainer(str(model), reward, config, prompts, peft_config=lora)
    trainer.train()
    trainer.save_final()
    return directory
