"""A small model learns not to say “so”, and steers a larger one, which is not trained.

The larger one is the built-in model. The small one is a copy with three of its four layers.

python examples/steer_larger.py
"""

import re
from tempfile import mkdtemp

from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path

WORD = re.compile(r"\bso\b", re.IGNORECASE)


def without_the_word(completions, **columns):
    return [0.0 if WORD.search(text) else 1.0 for text in completions]


small, tokenizer = AutoModelForCausalLM.from_pretrained(model_path()), AutoTokenizer.from_pretrained(model_path())
del small.transformer.h[3:]
small.config.n_layer = 3

options = {"num_quantiles": 2, "num_iterations": 3, "steps_per_iteration": 60, "prompts_per_iteration": 1000}
options |= {"per_device_train_batch_size": 32, "learning_rate": 2e-3, "entropy_coef": 0, "save_strategy": "no"}
config, prompts = QuarkConfig(mkdtemp(), **options), prompts_path("train")
trainer = QuarkTrainer(small, without_the_word, config, train_dataset=prompts, processing_class=tokenizer)
trainer.train()
steered = QuarkGenerator.from_pretrained(model_path(), steered_by=trainer.save_final())

prompts = load_prompts(prompts_path("eval")).prompts[:300]
for name, scale in [("alone", 1), ("steered", 2), ("steered further", 4)]:
    texts = [text for (text,) in steered.generate(prompts, guidance_scale=scale, seed=0)]
    share = 1 - sum(without_the_word(texts)) / len(texts)
    print(f"{name:>16}: {share:.0%} of completions say it   {prompts[0]}{texts[0]}")
