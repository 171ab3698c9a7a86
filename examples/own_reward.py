"""A reward of your own: any function from completions to numbers. Here, complaints count against a text.

python examples/own_reward.py
"""

import re
from tempfile import mkdtemp

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path


def no_complaints(completions, **columns):
    complaint = re.compile(r"\b(hate|awful|worst|never|miserable|terrible|ashamed|waste)", re.IGNORECASE)
    return [-len(complaint.findall(text)) for text in completions]


config = QuarkConfig(
    mkdtemp(),
    num_quantiles=2,
    conditioning="soft",  # Reward tokens that start as words, so that a short run suffices (docs/words.md).
    words=["Furious", "Quiet"],
    num_iterations=2,
    steps_per_iteration=30,
    prompts_per_iteration=250,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    entropy_coef=0,
    save_strategy="no",
)
trainer = QuarkTrainer(model_path(), no_complaints, config, train_dataset=prompts_path("train"))
trainer.train()
trained = QuarkGenerator.from_pretrained(trainer.save_final())

prompts = load_prompts(prompts_path("eval")).prompts[:100]
results = {"before": QuarkGenerator.from_pretrained(model_path()).generate(prompts, seed=0)}
results |= {quantile: trained.generate(prompts, quantile, seed=0) for quantile in ("best", "worst")}
for name, texts in results.items():
    complaints = -sum(no_complaints([text for (text,) in texts])) / len(texts)
    print(f"{name:>6}: {complaints:.2f} complaints   {prompts[0]}{texts[0][0]}")
