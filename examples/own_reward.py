"""A reward of your own: any function from completions to numbers. Here, each word costs a point.

python examples/own_reward.py
"""

from tempfile import mkdtemp

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path


def short_sentences(completions, **columns):
    return [-float(len(text.split())) for text in completions]


config = QuarkConfig(
    mkdtemp(),
    num_quantiles=2,
    num_iterations=3,
    steps_per_iteration=60,
    prompts_per_iteration=1000,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    entropy_coef=0,
    save_strategy="no",
)
trainer = QuarkTrainer(model_path(), short_sentences, config, train_dataset=prompts_path("train"))
trainer.train()
trained = QuarkGenerator.from_pretrained(trainer.save_final())

prompts = load_prompts(prompts_path("eval")).prompts[:300]
results = {"before": QuarkGenerator.from_pretrained(model_path()).generate(prompts, seed=0)}
results |= {quantile: trained.generate(prompts, quantile, seed=0) for quantile in ("worst", "best")}
results["guided"] = trained.generate(prompts, "best", guidance_scale=4, seed=0)
for name, texts in results.items():
    words = -sum(short_sentences([text for (text,) in texts])) / len(texts)
    print(f"{name:>6}: {words:4.1f} words   {prompts[0]}{texts[0][0]}")
