"""A larger model that a small one steers: the formula without a cache, and what stays as it is."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.eight_letters import EOS_ID, PROMPTS, VOCAB
from helpers.eight_letters import TOKENIZER as WORDS
from helpers.errors import error_message
from helpers.evaluation_helpers import NoA, save_plain_model, save_quantile_model, short
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from quarkrl.cli.main import main
from quarkrl.data.prompts import load_prompts
from quarkrl.evaluation.evaluate import evaluate
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.generator import QuarkGenerator

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 2, "do_sample": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small model with three quantiles, its reference, and a larger model with the same tokenizer."""
    home = tmp_path_factory.mktemp("home")
    save_quantile_model(home / "small", save_plain_model(home / "before"))
    padded = tiny_model("gpt2", WORDS, rows=16, seed=5, n_embd=32, n_layer=3)  # As large models often are.
    padded.save_pretrained(home / "larger")
    WORDS.save_pretrained(home / "larger")
    return home


def steered(home, **options) -> QuarkGenerator:
    return QuarkGenerator.from_pretrained(home / "larger", device="cpu", steered_by=home / "small", **options)


@torch.no_grad()
def by_hand(home, prompt, scale, guidance_from, quantile="best"):
    """The steered completion of one prompt: no cache, no padding, no batch."""
    larger, small, before = (AutoModelForCausalLM.from_pretrained(home / n) for n in ("larger", "small", "before"))
    conditioning = QuarkGenerator.from_pretrained(home / "small", device="cpu").conditioning
    ids, tokens = WORDS(prompt)["input_ids"], []
    wanted = conditioning.prefix_named(ids, quantile)
    if guidance_from == "reference":
        other, reader = ids, before
    else:
        other, reader = conditioning.prefix_named(ids, guidance_from), small
    for position in range(GREEDY["max_new_tokens"]):
        pairs = [(larger, ids), (small, wanted), (reader, other)]
        base, best, worst = (
            model.eval()(torch.tensor([[*head, *tokens]])).logits[0, -1, :VOCAB].softmax(-1).log()
            for model, head in pairs
        )
        scores = base + (scale - 1) * (best - worst)
        if position < GREEDY["min_new_tokens"]:
            scores[EOS_ID] = -torch.inf
        tokens.append(int(scores.argmax()))
        if tokens[-1] == EOS_ID:
            break
    return WORDS.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("guidance_from", "quantile"), [("worst", "best"), ("worst", 1), ("best", "worst"), ("reference", "best")]
)
def test_the_formula_by_hand(home, guidance_from, quantile):
    generator = steered(home)
    options = {"guidance_scale": 3.0, "guidance_from": guidance_from, "quantile": quantile, **GREEDY}
    found = [text.strip() for (text,) in generator.generate(PROMPTS, batch_size=3, **options)]
    assert found == [by_hand(home, prompt, 3.0, guidance_from, quantile).strip() for prompt in PROMPTS]
    alone = QuarkGenerator.from_pretrained(home / "larger", device="cpu").generate(PROMPTS, **GREEDY)
    assert found != [text.strip() for (text,) in alone]


def test_the_default_is_gamma_2_and_gamma_1_is_the_larger_model_alone(home):
    generator, alone = steered(home), QuarkGenerator.from_pretrained(home / "larger", device="cpu")
    before = {name: weight.clone() for name, weight in generator.model.state_dict().items()}
    assert generator.generate(PROMPTS, seed=1) == generator.generate(PROMPTS, seed=1, guidance_scale=2.0)
    assert generator.generate(PROMPTS, seed=1, guidance_scale=1.0) == alone.generate(PROMPTS, seed=1)
    assert all(torch.equal(weight, before[name]) for name, weight in generator.model.state_dict().items())
    assert "".join(generator.stream("a b", seed=(1, 0), sampling=None))  # Streams, too.


def test_reward_tokens_of_the_small_model_are_never_sampled(home):
    generator = steered(home)
    small = generator.steered_by
    assert small is not None and small.conditioning is not None
    with torch.no_grad():  # The small model now prefers its reward tokens to all others.
        small.model.get_input_embeddings().weight[small.conditioning.new_token_ids] *= 100
    for texts in generator.generate(PROMPTS, seed=2, num_return_sequences=20, top_p=1.0, guidance_scale=4.0):
        assert not any("reward" in text for text in texts)
    assert generator.vocab_size == VOCAB < generator.model.get_input_embeddings().weight.shape[0]
    assert generator.context_length == 128 - 1  # The small model's, behind a reward token.


def test_what_cannot_steer_is_one_error(home, tmp_path):
    def load(larger, small):
        return lambda: QuarkGenerator.from_pretrained(home / larger, device="cpu", steered_by=small)

    error_message(load("larger", home / "before"), "steered_by", "must be a model that Quark trained")
    error_message(load("small", home / "small"), "must steer a model without reward tokens")
    other = tiny_tokenizer(words=[*"abcdefg"])
    tiny_model("gpt2", other).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    error_message(load(tmp_path, home / "small"), "must have the tokenizer of", "has 10 tokens instead of 9")
    error_message(lambda: steered(home).generate("a", quantile=7), "quantile 7")
    error_message(lambda: steered(home).generate("a", quantile="worst"), "guidance_from 'worst': must differ")


def test_the_command_steers(home, capsys):
    command = ["generate", str(home / "larger"), "a b", "--json", "--greedy", "--max_new_tokens", "6"]
    assert main([*command, "--min_new_tokens", "2", "--steered_by", str(home / "small")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["completions"][0].strip() == by_hand(home, "a b", 2.0, "worst").strip()
    assert main([*command, "--steered_by", str(home / "before")]) == 2
    assert "must be a model that Quark trained" in capsys.readouterr().err
    assert main([*command, "--steered_by", str(home / "none")]) == 2
    assert "steered_by" in capsys.readouterr().err


def test_an_evaluation_compares_with_the_larger_model_alone(home):
    options = short(steered_by=str(home / "small"), guidance_scales=(2, 3), seed=1)
    evaluation = evaluate(home / "larger", load_prompts(PROMPTS), Scorer(NoA()), options)
    assert [row.name for row in evaluation.rows] == ["reference", "best γ=2", "best γ=3"]
    assert [row.guidance_scale for row in evaluation.rows] == [1, 2, 3]
    texts = QuarkGenerator.from_pretrained(home / "larger").generate(
        PROMPTS, max_new_tokens=5, num_return_sequences=2, seed=1
    )
    assert evaluation.rows[0].completions == texts
    assert evaluation.protocol["steered_by"] == str(home / "small")
    assert {weights["name"] for weights in evaluation.protocol["weights"]} == {
        str(home / "larger"),
        str(home / "small"),
    }
    (default,) = evaluate(
        home / "larger", load_prompts(PROMPTS), Scorer(NoA()), short(steered_by=str(home / "small"), reference="none")
    ).rows
    assert default.name == "best γ=2"
    error_message(lambda: short(steered_by="x", quantiles=("all",)), "quantiles all: must be left out with steered_by")
