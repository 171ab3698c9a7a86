"""Two rewards at once, each with quantiles of its own: short, and without “so”. `python examples/two_rewards.py`"""

import re
from tempfile import mkdtemp

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path


def short(completions, **columns):
    return [-float(len(text.split())) for text in completions]


def no_so(completions, **columns):
    return [0.0 if re.search(r"\bso\b", text.lower()) else 1.0 for text in completions]


config = QuarkConfig(
    mkdtemp(),
    condition_on="each",  # Not the sum of the rewards.
    num_quantiles=2,
    num_iterations=3,
    steps_per_iteration=60,
    prompts_per_iteration=1000,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    entropy_coef=0,
    save_strategy="no",
)
trainer = QuarkTrainer(model_path(), [short, no_so], config, train_dataset=prompts_path("train"))
trainer.train()
trained = QuarkGenerator.from_pretrained(trainer.save_final())
prompts = load_prompts(prompts_path("eval")).prompts[:300]
results = {"before": QuarkGenerator.from_pretrained(model_path()).generate(prompts, seed=0)}
names = [f"short={first},no_so={second}" for first in ("best", "worst") for second in ("best", "worst")]
for name, rows in (results | {name: trained.generate(prompts, name, seed=0) for name in names}).items():
    texts = [text for (text,) in rows]
    words, so = -sum(short(texts)) / len(texts), 1 - sum(no_so(texts)) / len(texts)
    print(f"{name:24}  {words:4.1f} words  {so:4.0%} with so")
