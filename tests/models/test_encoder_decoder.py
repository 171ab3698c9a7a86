"""T5 and BART: what the encoder reads, what the decoder predicts, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from helpers.errors import error_message
from helpers.tiny_models import tiny_encoder_decoder, tiny_model, tiny_tokenizer
from transformers import AutoModelForSeq2SeqLM

from quarkrl.models.batching import build_batch
from quarkrl.models.completion_logits import completion_logits
from quarkrl.models.encoder_decoder import check_encoder_decoder, decoder_start_ids, is_encoder_decoder
from quarkrl.models.head_access import completion_projection, decide_head_access
from quarkrl.models.loading import load_model, longest_prompt
from quarkrl.sampling.decoder import CachedDecoder
from quarkrl.sampling.recorded_steps import RecordedSteps
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling

BOTH = pytest.mark.parametrize("architecture", ["t5", "bart"])
PROMPTS = [[0, 1, 9], [2, 9], [0, 1, 9], [3, 4, 5, 6, 7, 9]]
COMPLETIONS = [[1, 2, 9], [4], [7, 7, 7, 7, 7, 9], [0, 3]]


def logits_by_labels(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """`(n, vocab)`, from the forward pass that transformers itself trains."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt]), labels=torch.tensor([completion])).logits[0]


@BOTH
def test_logits_are_those_of_the_forward_pass_with_labels(architecture):
    model, _ = tiny_encoder_decoder(architecture)
    expected = torch.cat([logits_by_labels(model, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)])
    batch = build_batch(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        torch.testing.assert_close(completion_logits(model, **batch), expected, rtol=1e-4, atol=1e-5)
        head = decide_head_access(model, [0, 1])
        assert head.sliced
        projection = completion_projection(model, **batch, head=head)
        torch.testing.assert_close(projection.logits(), expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_the_prompts_of_others_and_padding_do_not_matter(architecture):
    model, _ = tiny_encoder_decoder(architecture)
    with torch.no_grad():
        alone = [completion_logits(model, **build_batch([p], [c])) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        together = completion_logits(model, **build_batch(PROMPTS, COMPLETIONS))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_forced_first_token_stands_before_the_completion():
    """As the code of a language in mBART: `generate` writes it, and the completion follows."""
    model, _ = tiny_encoder_decoder("bart")
    model.generation_config.forced_bos_token_id = 6
    assert decoder_start_ids(model) == [model.config.decoder_start_token_id, 6]
    expected = torch.cat([logits_by_labels(model, p, [6, *c])[1:] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    with torch.no_grad():
        found = completion_logits(model, **build_batch(PROMPTS, COMPLETIONS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@BOTH
def test_the_decoder_gives_the_logits_of_the_forward_pass_with_labels(architecture):
    model, _ = tiny_encoder_decoder(architecture)
    decoder = CachedDecoder.for_prompts(model, PROMPTS, torch.device("cpu"))

    def expected(rows, completions):
        pairs = zip(rows, completions, strict=True)
        return torch.stack([logits_by_labels(model, PROMPTS[row], [*ids, 0])[-1] for row, ids in pairs])

    found = [decoder.prefill(), decoder.step(torch.tensor([1, 2, 3, 4]))]
    decoder.select(torch.tensor([3, 1]))
    found.append(decoder.step(torch.tensor([5, 6])))
    wanted = [
        expected(range(4), [[]] * 4),
        expected(range(4), [[1], [2], [3], [4]]),
        expected([3, 1], [[4, 5], [2, 6]]),
    ]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "forced"), [("t5", None), ("bart", None), ("bart", 6)])
def test_greedy_completions_are_those_of_generate(architecture, forced):
    varied = {"initializer_factor": 10.0} if architecture == "t5" else {}
    model, tokenizer = tiny_encoder_decoder(architecture, seed=3, **varied)
    model.generation_config.forced_bos_token_id = forced
    sampling = Sampling(max_new_tokens=10, min_new_tokens=2, do_sample=False)
    options = {"end_ids": [tokenizer.eos_token_id], "vocab_size": len(tokenizer)}
    found = complete(model, PROMPTS, sampling, batch_size=3, **options)
    starts = decoder_start_ids(model)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        limits = {"max_length": 10 + len(starts), "min_length": 2 + len(starts)}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
        assert out[0].tolist() == [*starts, *completion]
    assert found[0] == found[2] and len({tuple(ids) for ids in found}) == 3  # Two prompts are equal.


@BOTH
def test_a_seeded_completion_does_not_depend_on_its_batch(architecture):
    model, tokenizer = tiny_encoder_decoder(architecture)
    options = {"end_ids": [tokenizer.eos_token_id], "vocab_size": len(tokenizer), "seed": 7}
    sampling = Sampling(max_new_tokens=8)
    prompts = PROMPTS * 3
    assert complete(model, prompts, sampling, batch_size=12, **options) == complete(
        model, prompts, sampling, batch_size=1, **options
    )


def test_steps_are_not_recorded():
    model, _ = tiny_encoder_decoder("t5")
    decoder = RecordedSteps(devices=["cpu"]).decoder(model, PROMPTS, torch.device("cpu"), num_steps=20)
    assert type(decoder) is CachedDecoder


def test_prompt_and_completion_each_fit_into_the_context():
    bart, _ = tiny_encoder_decoder("bart")  # 64 positions, one of which the decoder's start token takes.
    assert [longest_prompt(bart, length) for length in (1, 63, 64)] == [64, 64, 0]
    t5, _ = tiny_encoder_decoder("t5")
    assert longest_prompt(t5, 1000) > 10**6
    assert longest_prompt(tiny_model("gpt2", tiny_tokenizer()), 28) == 100


@BOTH
def test_a_directory_is_loaded_with_its_encoder(tmp_path, architecture):
    model, _ = tiny_encoder_decoder(architecture)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is type(model)
    assert is_encoder_decoder(loaded) and loaded.config._attn_implementation == "eager"


def test_separate_embeddings_are_refused():
    bart, _ = tiny_encoder_decoder("bart", tie_word_embeddings=False)
    error_message(
        lambda: check_encoder_decoder(bart, "model"),
        "model BartForConditionalGeneration: must share one input embedding between encoder and decoder",
    )
    check_encoder_decoder(tiny_encoder_decoder("bart")[0], "model")
