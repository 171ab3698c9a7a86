"""Runs of T5 and BART: the loss, what is served, resuming, adapters, distillation, evaluation, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.errors import error_message
from helpers.runs import (
    KillBefore,
    assert_same_weights,
    distinct_rewards,
    figures_of,
    share_of_a_to_d,
    small_trainer,
    weights_of,
)
from helpers.tiny_models import tiny_encoder_decoder, tiny_model, tiny_tokenizer
from peft import LoraConfig
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartTokenizer, T5Tokenizer

from quarkrl import Guidance, QuarkGenerator, evaluate
from quarkrl.data.prompts import load_prompts
from quarkrl.evaluation.options import EvaluationOptions
from quarkrl.evaluation.perplexity import PerplexityModel
from quarkrl.models.export import export_gguf
from quarkrl.rewards.scorer import Scorer

BOTH = pytest.mark.parametrize("architecture", ["t5", "bart"])
PROMPTS = ["a b", "c", "d e f g h", "h h", "b a c", "e e e e", "f", "g a"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)


def trainer_of(directory, architecture, rewards=distinct_rewards, seed=0, **options):
    model, tokenizer = tiny_encoder_decoder(architecture, seed)
    return small_trainer(directory, rewards, model, PROMPTS, processing_class=tokenizer, **options)


def textbook_loss(policy, reference, conditioning, samples, kl_coef, entropy_coef) -> float:
    """-log p(y | x, r) + β KL(p' || q) - α H(p') per token, from transformers' own forward passes with labels."""
    total, tokens = 0.0, 0
    for sample in samples:
        prompt, completion = sample.prompt_ids.tolist(), torch.tensor([sample.completion_ids.tolist()])
        conditioned = conditioning.prefix(prompt, sample.quantiles.tolist())
        z = policy(input_ids=torch.tensor([conditioned]), labels=completion).logits[0]
        log_q = reference(input_ids=torch.tensor([prompt]), labels=completion).logits[0].log_softmax(-1)
        log_p = z[:, : conditioning.vocab_size].log_softmax(-1)
        nll = torch.nn.functional.cross_entropy(z, completion[0], reduction="sum")
        kl = (log_p.exp() * (log_p - log_q[:, : conditioning.vocab_size])).sum()
        entropy = -(log_p.exp() * log_p).sum()
        total += float(nll + kl_coef * kl - entropy_coef * entropy)
        tokens += completion.shape[1]
    return total / tokens


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "adapter"])
@BOTH
def test_the_loss_is_the_textbooks(tmp_path, architecture, peft_config):
    options = {"min_completion_length": 0, "kl_coef": 0.3, "entropy_coef": 0.1, "peft_config": peft_config}
    trainer = trainer_of(tmp_path, architecture, learning_rate=1e-2, **options)
    trainer.train()  # Otherwise policy and reference are equal.
    reference, _ = tiny_encoder_decoder(architecture)
    samples = [trainer.pool[int(trainer.draws[number])] for number in range(8)]
    found = trainer.compute_loss(trainer.model.eval(), trainer.collate(range(8))).detach()
    with torch.no_grad():
        expected = textbook_loss(trainer.model, reference, trainer.conditioning, samples, 0.3, 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert figures_of(tmp_path, "kl")[-1] > 0


@BOTH
def test_the_encoder_reads_prefix_prompt_and_eos_and_the_reference_no_prefix(tmp_path, architecture):
    trainer = trainer_of(tmp_path, architecture)
    tokenizer, (worst, *_) = trainer.plain_tokenizer, trainer.conditioning.new_token_ids
    before = [tokenizer.bos_token_id] if architecture == "bart" else []
    assert trainer.prompts.ids[0] == [*before, 0, 1, tokenizer.eos_token_id]
    assert trainer.conditioning.prefix(trainer.prompts.ids[0], [0]) == [*before, worst, 0, 1, tokenizer.eos_token_id]
    trainer.train()
    batch = trainer.collate(range(8))
    for row, ref_row, mask in zip(batch["input_ids"], batch["ref_input_ids"], batch["ref_attention_mask"], strict=True):
        assert trainer.conditioning.strip(row.tolist()) == [
            *ref_row[mask.bool()].tolist(),
            *[0] * int((mask == 0).sum()),
        ]


@pytest.mark.parametrize(
    ("architecture", "iterations", "gain"), [("t5", 3, 0.2), pytest.param("bart", 5, 0.1, marks=pytest.mark.slow)]
)
def test_a_run_moves_the_reward(tmp_path, architecture, iterations, gain):
    options = {"num_quantiles": 4, "steps_per_iteration": 30, "samples_per_prompt": 16, "kl_coef": 0.0}
    options |= {"num_iterations": iterations, "learning_rate": 1e-2}
    trainer_of(tmp_path, architecture, share_of_a_to_d, **options).train()
    rewards = figures_of(tmp_path, "reward")
    assert rewards[-1] > rewards[0] + gain, rewards


@BOTH
def test_final_behaves_as_served(tmp_path, architecture):
    trainer = trainer_of(tmp_path, architecture, learning_rate=1e-2)
    trainer.train()
    final = trainer.save_final()
    plain, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert tokenizer("a b")["input_ids"] == trainer.conditioning.prefix(trainer.prompts.ids[0], [2])
    generator = QuarkGenerator.from_pretrained(final)
    served = generator.generate(PROMPTS, do_sample=False, max_new_tokens=8)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = plain.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert [[text] for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] == served
    guided = generator.generate(PROMPTS, do_sample=False, max_new_tokens=8, guidance_scale=3.0)
    guidance = [Guidance.between(plain, generator.conditioning, **inputs, guidance_scale=3.0)]
    ids = plain.generate(**inputs, logits_processor=guidance, do_sample=False, max_new_tokens=8)
    assert [[text] for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] == guided != served
    plain.generation_config.forced_bos_token_id = 0
    error_message(
        lambda: Guidance.between(plain, generator.conditioning, **inputs, guidance_scale=3.0), "forces a first token"
    )
    plain.generation_config.forced_bos_token_id = None
    sampled = plain.generate(**inputs, do_sample=True, num_return_sequences=8, max_new_tokens=8)
    assert sampled.max() < trainer.conditioning.vocab_size  # Reward tokens are suppressed.
    assert ["".join(generator.stream("a b", seed=(1,)))] == generator.generate("a b", seed=1)[0]
    assert "AutoModelForSeq2SeqLM" in (final / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("architecture", "peft_config", "step"), [("t5", None, 4), ("bart", LORA, 7)])
def test_a_run_with_guidance_and_distillation_resumes_exactly(tmp_path, architecture, peft_config, step):
    """Step 4 is in an iteration of Quark, step 7 in that of distillation."""
    options = {"distill_guidance_scale": 2.0, "distill_iterations": 1, "explore_guidance_scale": 1.5}
    options |= {"save_strategy": "steps", "save_steps": 1, "peft_config": peft_config}
    whole = trainer_of(tmp_path / "whole", architecture, **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "cut", architecture, **options, callbacks=[KillBefore(step)]).train()
    resumed = trainer_of(tmp_path / "cut", architecture, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


@BOTH
def test_an_adapter_trains_the_rows_of_reward_tokens_and_is_merged(tmp_path, architecture):
    options = {"learning_rate": 1e-2, "peft_config": LORA, "save_strategy": "epoch", "processing_class": None}
    trainer = small_trainer(tmp_path, distinct_rewards, saved(tmp_path / "start", architecture), PROMPTS, **options)
    trainer.train()
    layer, ids = trainer.model.get_input_embeddings(), torch.tensor(trainer.conditioning.new_token_ids)
    assert trainer.model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert ((layer(ids) - layer.original_module.weight[ids]).abs().amax(1) > 1e-4).all()
    batch = {"input_ids": torch.tensor([[*ids.tolist(), 1, 2]]), "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    (checkpoint,) = tmp_path.glob("checkpoint-6")
    for directory in (trainer.save_final(), checkpoint):
        merged = QuarkGenerator.from_pretrained(directory).model
        with torch.no_grad():
            expected = trainer.model.eval()(**batch).logits
            torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["text", "soft"])
@BOTH
def test_words_stand_before_the_encoders_input(tmp_path, architecture, conditioning):
    options = {"conditioning": conditioning, "words": ["a b", "c", ""], "kl_guidance_scale": 2.0}
    trainer = trainer_of(tmp_path, architecture, **options)
    trainer.train()
    tokenizer = AutoTokenizer.from_pretrained(trainer.save_final())
    assert tokenizer("d")["input_ids"] == trainer.plain_tokenizer("d")["input_ids"]  # The best has no words.
    worst = trainer.conditioning.prefix(trainer.prompts.ids[1], [0])
    assert trainer.conditioning.strip(worst) == trainer.prompts.ids[1] or conditioning == "text"
    assert len(worst) == len(trainer.prompts.ids[1]) + 2


def sentencepiece_like_t5():
    letters = [(f"▁{c}", -3.0) for c in "abcdefgh"] + [(c, -4.0) for c in "abcdefgh:"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *letters], extra_ids=2)


def bytes_like_bart():
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefgh:Ġ", "<mask>"]
    return BartTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


@pytest.mark.parametrize("make", [sentencepiece_like_t5, bytes_like_bart])
def test_the_tokenizers_of_t5_and_bart_serve_the_ids_of_training(tmp_path, make):
    tokenizer, architecture = make(), "t5" if make is sentencepiece_like_t5 else "bart"
    starts = {"decoder_start_token_id": tokenizer.pad_token_id if architecture == "t5" else tokenizer.eos_token_id}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model, _ = tiny_encoder_decoder(architecture, vocab_size=len(tokenizer), **ids, **starts)
    texts = []

    def note(completions, completion_ids, **_):
        texts.extend(zip(completions, completion_ids, strict=True))
        return distinct_rewards(completion_ids)

    trainer = small_trainer(tmp_path, note, model, PROMPTS, processing_class=tokenizer)
    trainer.train()
    served = AutoTokenizer.from_pretrained(trainer.save_final())
    best = trainer.conditioning.best
    for prompt, plain_ids in zip(PROMPTS, trainer.prompts.ids, strict=True):
        assert plain_ids == tokenizer(prompt)["input_ids"]
        assert served(prompt)["input_ids"] == trainer.conditioning.prefix(plain_ids, best)
    for text, completion in texts:  # Decoded alone, not as what continues the prompt.
        assert text == tokenizer.decode(completion, skip_special_tokens=True)


def test_scored_samples_are_the_decoders_sequences(tmp_path):
    rows = [
        {"prompt": p, "completion": c, "reward": r} for p, c, r in [("a b", "c d", 1), ("c", " e", 0), ("h", "f", 2)]
    ]
    model, tokenizer = tiny_encoder_decoder("t5")
    trainer = small_trainer(tmp_path, None, model, None, processing_class=tokenizer, scored_data=rows)
    end = tokenizer.eos_token_id
    assert trainer.scored.completions == [[2, 3, end], [4, end], [5, end]]
    trainer.train()
    assert [sample.prompt_ids.tolist() for sample in trainer.pool] == [[0, 1, end], [2, end], [7, end]]


def saved(directory, architecture, seed=0):
    model, tokenizer = tiny_encoder_decoder(architecture, seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@BOTH
def test_perplexity_is_that_of_the_completion_given_the_prompt(tmp_path, architecture):
    directory = saved(tmp_path / "start", architecture)
    reference, _ = tiny_encoder_decoder(architecture)
    trainer = small_trainer(tmp_path, distinct_rewards, directory, PROMPTS, processing_class=None)
    trainer.train()
    final = trainer.save_final()
    policy, start = QuarkGenerator.from_pretrained(final), QuarkGenerator.from_pretrained(directory)
    prompts = load_prompts(PROMPTS).encode(start.tokenizer, max_length=50)
    completions = [[i % 8, 3, i // 2] for i in range(len(PROMPTS))]
    sums, counts, truncated = PerplexityModel(start, policy).nll(prompts, range(8), completions, [""] * 8, 3)
    assert (counts, truncated) == ([3] * 8, 0)
    for prompt, completion, nll in zip(trainer.prompts.ids, completions, sums, strict=True):
        z = reference(input_ids=torch.tensor([prompt]), labels=torch.tensor([completion])).logits[0]
        assert nll == pytest.approx(
            float(torch.nn.functional.cross_entropy(z, torch.tensor(completion), reduction="sum"))
        )

    options = EvaluationOptions(samples=2, max_new_tokens=6, quantiles=("all",), guidance_scales=(2.0,))
    rows = evaluate(final, load_prompts(PROMPTS), Scorer(distinct_rewards), options).rows
    assert [row.name for row in rows] == ["reference", "0", "1", "2", "best γ=2"]
    assert all(1 < row.figures["perplexity"] < math.inf for row in rows)


def test_a_decoder_only_model_reads_prompt_and_completion_as_lines(tmp_path):
    directory, judge = saved(tmp_path / "t5", "t5"), tmp_path / "judge"
    tokenizer = tiny_tokenizer()
    tiny_model("gpt2", tokenizer).save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    options = EvaluationOptions(samples=1, max_new_tokens=4, perplexity_model=str(judge))
    row = evaluate(directory, load_prompts(PROMPTS), Scorer(distinct_rewards), options).rows[0]
    assert 0 < row.figures["perplexity"] < math.inf
    swapped = EvaluationOptions(samples=1, max_new_tokens=4, perplexity_model=directory)
    error_message(
        lambda: evaluate(str(judge), load_prompts(PROMPTS), Scorer(distinct_rewards), swapped),
        "perplexity_model T5ForConditionalGeneration: must be the reference or a decoder-only model",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vllm"}, "engine vllm: must be builtin for an encoder–decoder model"),
        ({"ref_model": tiny_model("gpt2", tiny_tokenizer())}, "ref_model GPT2LMHeadModel: must be an encoder–decoder"),
        (
            {"peft_config": LoraConfig(r=2, target_modules=["q", "lm_head"])},
            "must leave embedding and output layer of an encoder–decoder model as they are",
        ),
        ({"max_completion_length": 100, "model": "bart"}, "prompt length limit -1: must be at least 1 token"),
    ],
)
def test_what_is_refused_is_one_line(tmp_path, options, message):
    architecture = options.pop("model", "t5")
    error_message(lambda: trainer_of(tmp_path, architecture, **options), message)


def test_corpus_mauve_and_gguf_are_refused(tmp_path):
    directory, prompts, scorer = saved(tmp_path / "t5", "t5"), load_prompts(PROMPTS), Scorer(distinct_rewards)
    options = EvaluationOptions(samples=1, max_new_tokens=4)
    refused = "must be left out for an encoder–decoder model"
    error_message(lambda: evaluate(directory, prompts, scorer, options, corpus=prompts), f"corpus: {refused}")
    human = EvaluationOptions(samples=1, max_new_tokens=4, human_column="text")
    error_message(lambda: evaluate(directory, prompts, scorer, human), f"human_column: {refused}")
    trainer = small_trainer(tmp_path, distinct_rewards, directory, PROMPTS, processing_class=None)
    trainer.train()
    error_message(
        lambda: export_gguf(trainer.save_final(), tmp_path / "x.gguf", "f16"), "gguf: model type 't5' must be"
    )


@pytest.mark.parametrize(("prompt", "length"), [("a " * 63, 5), ("a", 64)])
def test_a_prompt_or_a_completion_that_is_too_long_is_refused(tmp_path, prompt, length):
    generator = QuarkGenerator.from_pretrained(saved(tmp_path, "bart"))
    generator.generate("a " * 62, max_new_tokens=63)  # 64 positions with BOS and EOS, and 63 with the start token.
    message = f"max_new_tokens {length}, and a prompt of"
    error_message(lambda: generator.generate(prompt, max_new_tokens=length), message)
