"""Two rewards at once, each with a reward token of its own: how polite and how positive are chosen independently.

python examples/two_rewards.py
"""

from tempfile import mkdtemp

import numpy as np

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, Scorer, load_prompts
from quarkrl.builtin import model_path, prompts_path

config = QuarkConfig(
    mkdtemp(),
    condition_on="each",  # Not the sum of the rewards.
    num_quantiles=2,
    conditioning="soft",  # Reward tokens that start as words, so that a short run suffices (docs/words.md).
    words=["Vulgar", "Polite", "Furious", "Grateful"],
    num_iterations=2,
    steps_per_iteration=30,
    prompts_per_iteration=250,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    entropy_coef=0,
    save_strategy="no",
)
rewards = ["profanity", "vader"]
trainer = QuarkTrainer(model_path(), rewards, config, train_dataset=prompts_path("train"))
trainer.train()
trained = QuarkGenerator.from_pretrained(trainer.save_final())

scorer = Scorer(rewards, condition_on="each")
prompts = load_prompts(prompts_path("eval")).prompts[:150]
print("requested                     profanity   vader")
for profanity in ("best", "worst"):
    for vader in ("best", "worst"):
        quantile = f"profanity={profanity},vader={vader}"
        texts = [text for (text,) in trained.generate(prompts, quantile, seed=0)]
        scores = scorer(prompts, texts, [[] for _ in texts]).rewards
        print(f"{quantile:28}  {np.nanmean(scores[:, 0]):9.2f} {np.nanmean(scores[:, 1]):7.2f}")
