"""A T5, whose encoder reads the prompt: made from a config, with random weights. It learns to answer in animals.

python examples/encoder_decoder.py
"""

from tempfile import mkdtemp

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, T5Config

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer

ANIMALS = ["cat", "dog", "owl"]
WORDS = ["<pad>", "</s>", *ANIMALS, "car", "bus", "sun", "sea", "tree"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
size = {"vocab_size": len(WORDS), "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
model = AutoModelForSeq2SeqLM.from_config(T5Config(**size, decoder_start_token_id=0))


def animals(completions, **columns):
    return [sum(word in ANIMALS for word in text.split()) / 6 for text in completions]


prompts = [f"{first} {second}" for first in WORDS[2:] for second in WORDS[2:]]
config = QuarkConfig(mkdtemp(), num_quantiles=2, num_iterations=4, steps_per_iteration=32, max_completion_length=6)
config.samples_per_prompt, config.per_device_train_batch_size = 4, 16
config.learning_rate, config.kl_coef = 1e-2, 0.0
trainer = QuarkTrainer(model, animals, config, train_dataset=prompts, processing_class=tokenizer)
trainer.train()

generator = QuarkGenerator.from_pretrained(trainer.save_final())
for quantile in ("worst", "best"):
    texts = [text for (text,) in generator.generate(prompts, quantile, max_new_tokens=6, seed=0)]
    print(f"{quantile:>6}: {sum(animals(texts)) / len(texts):.2f}   tree sun → {texts[prompts.index('tree sun')]}")
