"""Every sample of a run is a row of a Parquet file: look at the pool in pandas, and score it with another reward.

python examples/pool_in_pandas.py
"""

from pathlib import Path
from tempfile import mkdtemp

import pandas as pd

from quarkrl import QuarkConfig, QuarkTrainer, Scorer
from quarkrl.builtin import model_path, prompts_path

run = Path(mkdtemp())
config = QuarkConfig(
    run,
    num_quantiles=3,
    conditioning="soft",  # Reward tokens that start as words, so that a short run suffices (docs/words.md).
    words=["Furious", "Tired", "Grateful"],
    num_iterations=2,
    steps_per_iteration=15,
    prompts_per_iteration=250,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    entropy_coef=0,
    save_strategy="no",
)
trainer = QuarkTrainer(model_path(), "vader", config, train_dataset=prompts_path("train"))
trainer.train()

files = sorted((run / "pool").glob("*.parquet"))  # One for each iteration.
samples = pd.concat([pd.read_parquet(file).assign(iteration=i) for i, file in enumerate(files)], ignore_index=True)
prompts, texts = samples["prompt"].tolist(), samples["completion"].tolist()
samples["brevity"] = Scorer("brevity?max_words=20")(prompts, texts, [[] for _ in texts]).rewards[:, 0]
samples["text"] = samples["prompt"] + samples["completion"]

print(samples.groupby("iteration")[["reward", "brevity"]].mean().round(3), "\n")
print(f"correlation of the two rewards: {samples['reward'].corr(samples['brevity']):.2f}\n")
for title, rows in {"worst": samples.nsmallest(3, "reward"), "best": samples.nlargest(3, "reward")}.items():
    print(f"{title}:\n{rows[['reward', 'iteration', 'text']].to_string(index=False)}\n")
