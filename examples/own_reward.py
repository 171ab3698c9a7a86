"""A reward of your own: any function from completions to numbers. Here, fewer words are better.

python examples/own_reward.py
"""

from tempfile import mkdtemp

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path


def brief(completions, **columns):
    """Fewer words are better."""
    return [-len(text.split()) for text in completions]


config = QuarkConfig(
    mkdtemp(),
    num_quantiles=3,
    num_iterations=3,
    steps_per_iteration=20,
    prompts_per_iteration=300,
    per_device_train_batch_size=64,
    learning_rate=2e-3,
    save_strategy="no",
)
trainer = QuarkTrainer(model_path(), brief, config, train_dataset=prompts_path("train"))
trainer.train()
trained = QuarkGenerator.from_pretrained(trainer.save_final())

prompts = load_prompts(prompts_path("eval")).prompts[:100]
before = QuarkGenerator.from_pretrained(model_path()).generate(prompts, seed=0)
for name, texts in {
    "before": before,
    "best": trained.generate(prompts, "best", seed=0),
    "worst": trained.generate(prompts, "worst", seed=0),
}.items():
    words = sum(len(text.split()) for (text,) in texts) / len(texts)
    print(f"{name:>6}: {words:4.1f} words   {prompts[0]}{texts[0][0]}")
