"""A model that stops saying a word. The reward is 1 without the word and 0 with it, so two quantiles suffice.

python examples/keep_word_out.py
"""

import re
from tempfile import mkdtemp

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path

WORD = re.compile(r"\bwas\b", re.IGNORECASE)


def without_the_word(completions, **columns):
    return [0.0 if WORD.search(text) else 1.0 for text in completions]


config = QuarkConfig(
    mkdtemp(),
    num_quantiles=2,
    num_iterations=3,
    steps_per_iteration=20,
    prompts_per_iteration=300,
    per_device_train_batch_size=64,
    learning_rate=2e-3,
    save_strategy="no",
)
trainer = QuarkTrainer(model_path(), without_the_word, config, train_dataset=prompts_path("train"))
trainer.train()
trained = QuarkGenerator.from_pretrained(trainer.save_final())

prompts = load_prompts(prompts_path("eval")).prompts[:200]
for name, model in {"before": QuarkGenerator.from_pretrained(model_path()), "after": trained}.items():
    texts = [text for (text,) in model.generate(prompts, seed=0)]
    share = 1 - sum(without_the_word(texts)) / len(texts)
    print(f"{name:>6}: {share:.0%} of completions say {WORD.pattern!r}   {prompts[0]}{texts[0]}")
