"""One model, many levels: the reward at each quantile, and with guidance that goes on beyond the best one.

pip install "quarkrl[offline]"
python examples/control_curve.py
"""

from tempfile import mkdtemp

from quarkrl import EvaluationOptions, QuarkConfig, QuarkTrainer, Scorer, evaluate, load_prompts
from quarkrl.builtin import model_path, prompts_path

config = QuarkConfig(
    mkdtemp(),
    num_quantiles=4,
    conditioning="soft",  # Reward tokens that start as words, so that a short run suffices (docs/words.md).
    words=["Furious", "Angry", "Quiet", "Grateful"],
    num_iterations=2,
    steps_per_iteration=30,
    prompts_per_iteration=250,
    samples_per_prompt=2,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    entropy_coef=0,
    save_strategy="no",
)
scorer = Scorer("vader")
trainer = QuarkTrainer(model_path(), scorer, config, train_dataset=prompts_path("train"))
trainer.train()

options = EvaluationOptions(samples=1, quantiles=("all",), guidance_scales=(1.5, 2, 3))
prompts = load_prompts(prompts_path("eval")).first(150)
for row in evaluate(trainer.save_final(), prompts, scorer, options).rows:
    reward, perplexity = row.figures["reward"], row.figures["perplexity"]
    bar = "█" * round(30 * (reward + 1) / 2)
    print(f"{row.name:>10}  {bar:30}  reward {reward:5.2f}  perplexity {perplexity:5.2f}")
