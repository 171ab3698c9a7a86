"""Facts about the embedded model that users and the demo rely on; offline, a few seconds in all."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl.builtin import model_path, prompts_path
from tools.builtin_model import build, corpus, lexicon

MIB = 2**20

# The shipped prompts were sieved by this version's scores; another version scores a little differently.
same_scorer = pytest.mark.skipif(
    version("alt-profanity-check") != "1.9.1", reason="the prompts were sieved by alt-profanity-check 1.9.1"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path()).eval()


@pytest.fixture(scope="module")
def made() -> build.Corpus:
    """The texts and prompts a full build makes, generated anew."""
    pytest.importorskip("profanity_check")
    return build.make_corpus()


def read_prompts(split) -> list[str]:
    return [json.loads(line)["prompt"] for line in prompts_path(split).read_text(encoding="utf-8").splitlines()]


def test_files_are_small_and_plain():
    files = [path for path in model_path().iterdir() if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    prompts = [prompts_path("train"), prompts_path("eval")]
    assert sum(path.stat().st_size for path in files + prompts) <= 8 * MIB


def test_unknown_split_is_an_error_that_names_the_splits():
    with pytest.raises(ValueError, match=r"'test'.*\"train\" and \"eval\""):
        prompts_path("test")  # type: ignore[arg-type]


def test_model_is_a_tiny_gpt2_with_a_tied_head(model, tokenizer):
    assert model.config.model_type == "gpt2"
    assert model.num_parameters() <= 2_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.vocab_size == len(tokenizer) == build.VOCAB_SIZE
    assert model.config.n_positions == tokenizer.model_max_length == build.CONTEXT_TOKENS


def test_special_tokens_are_those_of_gpt2(model, tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token is None
    end = tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == model.generation_config.bos_token_id == end
    assert end not in tokenizer("The soup was cold.")["input_ids"]  # As GPT-2's, it adds nothing by itself.


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("The waiter smiled.", " two  spaces\n", "naïve 🙂 über", *read_prompts("eval")):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_corpus_is_deterministic_varied_and_of_the_promised_length():
    texts = list(corpus.texts(20_000, seed=7))
    assert texts[:50] == list(corpus.texts(50, seed=7))
    assert texts[:50] != list(corpus.texts(50, seed=8))
    assert len(set(texts)) > 0.99 * len(texts)
    assert all(8 <= len(text.split()) <= 40 for text in texts)
    assert not any(slot in text for text in texts for slot in "{}/")


def test_corpus_has_rude_texts_and_mostly_polite_ones():
    pytest.importorskip("profanity_check")
    scores = build.profanity(list(corpus.texts(5_000, seed=7)))
    assert 0.05 < sum(score >= 0.5 for score in scores) / len(scores) < 0.2


@same_scorer
def test_prompts_are_clean_distinct_and_disjoint():
    pytest.importorskip("profanity_check")
    train, evaluation = read_prompts("train"), read_prompts("eval")
    assert (len(train), len(evaluation)) == (20_000, 300)
    assert len({*train, *evaluation}) == 20_300
    assert all(4 <= len(prompt.split()) <= 8 for prompt in train + evaluation)
    assert max(build.profanity(train + evaluation)) < 0.3


def test_too_few_texts_for_the_prompts_is_an_error():
    pytest.importorskip("profanity_check")
    with pytest.raises(ValueError, match="generate more texts"):
        build.cut_prompts(list(corpus.texts(5, seed=0)), 10, seed=0)


def test_tokenizer_training_is_deterministic():
    texts = list(corpus.texts(3_000, seed=1))
    first, second = (build.train_tokenizer(texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_every_text_is_a_row_of_its_own_ended_by_eos(tokenizer):
    texts = list(corpus.texts(100, seed=3))
    batches = build.batched(texts, tokenizer)  # (64, length), (36, length)
    assert [len(batch) for batch in batches] == [64, 36]
    rows = [row for batch in batches for row in batch.tolist()]
    end = tokenizer.eos_token_id
    assert {tokenizer.decode(row[: row.index(end)]) for row in rows} == set(texts)
    assert all(set(row[row.index(end) :]) == {end} for row in rows)


def test_model_writes_texts_that_end(model, tokenizer):
    prompts = read_prompts("eval")[:20]
    torch.manual_seed(0)
    ended = 0
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, do_sample=True, max_new_tokens=80, pad_token_id=tokenizer.eos_token_id)
        ended += int(out[0, -1] == tokenizer.eos_token_id)
    assert ended >= 18


@pytest.mark.slow
def test_model_is_sometimes_rude_on_clean_prompts(model, tokenizer):
    pytest.importorskip("profanity_check")
    completions = build.sample(model, tokenizer, read_prompts("eval")[:60])
    probability, share = build.toxicity(completions)
    assert 0.3 < probability < 0.8  # 60 prompts: ± 0.13 around the figure of all prompts.
    assert 0.03 < share < 0.09


@pytest.mark.slow
def test_model_is_as_rude_as_a_demo_wants(model, tokenizer):
    pytest.importorskip("profanity_check")
    probability, share = build.toxicity(build.sample(model, tokenizer, read_prompts("eval")))
    assert 0.4 < probability < 0.7
    assert 0.04 < share < 0.09


@same_scorer
@pytest.mark.slow
def test_rebuild_gives_the_shipped_prompts_and_tokenizer(tmp_path, made):
    """All of a build but its training, which takes half an hour."""
    assert made.train_prompts == read_prompts("train")
    assert made.eval_prompts == read_prompts("eval")
    assert not set(made.held_out) & set(made.train)
    build.train_tokenizer(made.train[: build.NUM_TOKENIZER_TEXTS]).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (model_path() / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_training_is_deterministic_and_learns(tokenizer):
    texts = list(corpus.texts(40 * build.BATCH_ROWS, seed=11))
    batches = build.batched(texts, tokenizer)
    first, second = (build.train_model(batches, tokenizer) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    unseen = list(corpus.texts(50, seed=12))
    assert (
        build.perplexity(first, tokenizer, unseen) < build.perplexity(build.new_model(tokenizer), tokenizer, unseen) / 3
    )


@pytest.mark.slow
def test_model_knows_its_corpus_and_listens_to_tone(model, tokenizer):
    pytest.importorskip("profanity_check")
    assert build.perplexity(model, tokenizer, list(corpus.texts(300, seed=build.HELD_OUT_SEED))) < 4.2
    shares = {
        temper: build.toxicity(build.sample(model, tokenizer, [f"{temper} {who} writes:" for who in lexicon.SPEAKERS]))[
            1
        ]
        for temper in ("Polite", "Furious")
    }
    assert shares["Polite"] < 0.04 and shares["Furious"] > 2 * shares["Polite"]
