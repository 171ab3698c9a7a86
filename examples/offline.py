"""Learn from scored samples alone: a file of prompts, completions and rewards, and no call of a reward.

python examples/offline.py
"""

import json
from pathlib import Path
from tempfile import mkdtemp

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, Scorer, load_prompts
from quarkrl.builtin import model_path, prompts_path

run, score = Path(mkdtemp()), Scorer("vader")
prompts = load_prompts(prompts_path("train")).prompts[:1000]
texts = QuarkGenerator.from_pretrained(model_path()).generate(prompts, top_p=1.0, num_return_sequences=2, seed=0)

# A file as it may come from people or from a log. Here the model itself wrote the completions, and VADER scores them.
rows = [{"prompt": prompt, "completion": text} for prompt, pair in zip(prompts, texts, strict=True) for text in pair]
rewards = score([row["prompt"] for row in rows], [row["completion"] for row in rows], [[] for _ in rows]).rewards[:, 0]
lines = [json.dumps({**row, "reward": float(reward)}) for row, reward in zip(rows, rewards, strict=True)]
(run / "scored.jsonl").write_text("\n".join(lines), encoding="utf-8")

config = QuarkConfig(
    run,
    num_quantiles=4,
    num_iterations=4,  # Nothing is explored: each iteration is a pass over the samples.
    steps_per_iteration=16,
    learning_rate=2e-3,
    kl_coef=0.4,
    entropy_coef=0,
    save_strategy="no",
)
trainer = QuarkTrainer(model_path(), None, config, scored_data=str(run / "scored.jsonl"))
trainer.train()
trained, held_out = QuarkGenerator.from_pretrained(trainer.save_final()), load_prompts(prompts_path("eval")).prompts
results = {"before": QuarkGenerator.from_pretrained(model_path()).generate(held_out, seed=0)}
results |= {quantile: trained.generate(held_out, quantile, seed=0) for quantile in ("worst", "best")}
for name, texts in results.items():
    print(f"{name:>6}: {score(held_out, [text for (text,) in texts], [[] for _ in texts]).rewards.mean():+.2f}")
