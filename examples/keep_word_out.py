"""A model that stops saying “so”. The reward is 0 or 1, so two quantiles suffice.

python examples/keep_word_out.py
"""

import re
from tempfile import mkdtemp

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path

WORD = re.compile(r"\bso\b", re.IGNORECASE)


def without_the_word(completions, **columns):
    return [0.0 if WORD.search(text) else 1.0 for text in completions]


config = QuarkConfig(
    mkdtemp(),
    num_quantiles=2,
    num_iterations=3,
    steps_per_iteration=60,
    prompts_per_iteration=125,
    samples_per_prompt=8,
    dpo_coef=0.2,  # Pairs of completions of a prompt are compared.
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    entropy_coef=0,
)
trainer = QuarkTrainer("builtin", without_the_word, config, train_dataset="builtin")
trainer.train()
trained = QuarkGenerator.from_pretrained(trainer.save_final())

prompts = load_prompts(prompts_path("eval")).prompts[:300]
before = QuarkGenerator.from_pretrained(model_path())
for name, model, scale in [("before", before, 1), ("after", trained, 1), ("after, guided", trained, 4)]:
    texts = [text for (text,) in model.generate(prompts, guidance_scale=scale, seed=0)]
    share = 1 - sum(without_the_word(texts)) / len(texts)
    print(f"{name:>13}: {share:.0%} of completions say it   {prompts[0]}{texts[0]}")
