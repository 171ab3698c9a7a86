"""A model that stops saying “thank you”. The reward is 0 or 1, so two quantiles suffice.

python examples/keep_word_out.py
"""

import re
from tempfile import mkdtemp

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path

PHRASE = re.compile(r"\bthank you\b", re.IGNORECASE)


def without_the_phrase(completions, **columns):
    return [0.0 if PHRASE.search(text) else 1.0 for text in completions]


config = QuarkConfig(
    mkdtemp(),
    num_quantiles=2,
    conditioning="soft",  # Reward tokens that start as words, so that a short run suffices (docs/words.md).
    words=["Grateful", "Quiet"],
    num_iterations=2,
    steps_per_iteration=30,
    prompts_per_iteration=250,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    entropy_coef=0,
    save_strategy="no",
)
trainer = QuarkTrainer(model_path(), without_the_phrase, config, train_dataset=prompts_path("train"))
trainer.train()
trained = QuarkGenerator.from_pretrained(trainer.save_final())

prompts = load_prompts(prompts_path("eval")).prompts[:200]
for name, model in {"before": QuarkGenerator.from_pretrained(model_path()), "after": trained}.items():
    texts = [text for (text,) in model.generate(prompts, seed=0)]
    share = 1 - sum(without_the_phrase(texts)) / len(texts)
    print(f"{name:>6}: {share:.0%} of completions say it   {prompts[0]}{texts[0]}")
