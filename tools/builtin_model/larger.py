"""Make a larger model with the built-in model's tokenizer, on other texts of the same grammar, for docs/larger.md.

    python -m tools.builtin_model.larger DIR [--texts N]

It is a GPT-2 of 3.1M parameters, three times the built-in model, and trains from scratch for two minutes on an idle
core. Then it prints the held-out perplexity of both models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl.builtin import model_path
from tools.builtin_model.build import HELD_OUT_SEED, batched, perplexity, train_model
from tools.builtin_model.corpus import texts

SEED, LEARNING_RATE = 271828, 3e-3


def main() -> None:
    """Train, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--texts", type=int, default=20_000, help="texts to train on")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    batches = batched(list(texts(options.texts, SEED)), tokenizer)
    larger = train_model(batches, tokenizer, learning_rate=LEARNING_RATE, width=192, layers=6)
    larger.save_pretrained(options.directory)
    tokenizer.save_pretrained(options.directory)
    held_out = list(texts(200, HELD_OUT_SEED))
    for model in (AutoModelForCausalLM.from_pretrained(model_path()), larger):
        print(f"{model.num_parameters():,} parameters: perplexity {perplexity(model.eval(), tokenizer, held_out):.2f}")


if __name__ == "__main__":
    main()
