"""QuarkGenerator: prompts in, completions out as text, from the quantile that is requested."""

from __future__ import annotations

import functools

import huggingface_hub
import pytest
from helpers.preferred_tokens import prefer
from helpers.tiny_models import ARCHITECTURES, SHARED, needs_shared, tiny_model, tiny_tokenizer

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.loading import eos_ids, load_model
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling

EOS_ID = 256


def save_final(directory, bos=True, num_quantiles=3):
    """A saved model of Quark's, its steered tokenizer with a chat template."""
    tokenizer = tiny_tokenizer(bos=bos, pad="own", chat_template=True)
    model = tiny_model("llama", tokenizer)
    conditioning, extended = Conditioning.add_to(tokenizer, model, num_quantiles)
    model.save_pretrained(directory)
    conditioning.steer_tokenizer(extended).save_pretrained(directory)
    conditioning.save(directory)


@pytest.fixture(params=[True, False], ids=["bos", "no bos"])
def final(request, tmp_path):
    save_final(tmp_path, request.param)
    return QuarkGenerator.from_pretrained(tmp_path, device="cpu")


def test_every_file_of_a_model_on_the_hub_is_of_the_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    download = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    cached = tmp_path / "models--someone--model"
    (cached / "refs").mkdir(parents=True)
    for number, branch in enumerate(["main", "better"]):
        (cached / "refs" / branch).write_text(str(number) * 40, encoding="utf-8")
        save_final(cached / "snapshots" / (str(number) * 40), num_quantiles=3 + number)
    for branch, best in {"main": "<|reward_2|>", "better": "<|reward_3|>"}.items():
        generator = QuarkGenerator.from_pretrained("someone/model", revision=branch, device="cpu")
        assert generator.conditioning.token_names[-1] == best
        assert generator.tokenizer.decode(generator.tokenizer("ab")["input_ids"]) == f"<bos>{best}ab"
        assert generator.model.get_input_embeddings().weight.shape[0] == max(generator.conditioning.new_token_ids) + 1
    with pytest.raises(UserError, match="model 'someone/model': must be a local directory"):
        QuarkGenerator.from_pretrained("someone/model", revision="worse")


def test_a_prompt_gets_the_token_of_the_quantile_once(final):
    ids = final.conditioning.new_token_ids
    bos = [final.tokenizer.bos_token_id] if final.tokenizer.bos_token_id is not None else []
    for quantile, token in {"best": ids[2], "worst": ids[0], 1: ids[1], "1": ids[1]}.items():
        assert final.encode(["ab"], quantile) == [[*bos, token, 64, 65]]


def test_messages_get_the_token_of_the_quantile_once(final):
    chat = [{"role": "user", "content": "hi"}]
    best, worst = final.encode([chat])[0], final.encode([chat], "worst")[0]
    assert final.conditioning.strip(best) == final.conditioning.strip(worst)
    assert final.tokenizer.decode(worst).removeprefix("<bos>") == "<|reward_0|>[user] hi<eos>[assistant]"


def test_completions_come_per_prompt_and_repeatably(final):
    options = {"num_return_sequences": 3, "seed": 1, "max_new_tokens": 12}
    found = final.generate(["ab", "c"], **options)
    assert [len(texts) for texts in found] == [3, 3] and len(set(found[0])) == 3
    assert found == final.generate(["ab", "c"], **options) != final.generate(["ab", "c"], **{**options, "seed": 2})
    assert found != final.generate(["ab", "c"], quantile="worst", **options)
    assert final.generate("ab", **options) == final.generate(["ab"], **options)
    assert not any("<" in text and "reward" in text for texts in found for text in texts)


def test_a_completion_is_text_without_the_prompt(final):
    prefer(final.model, 65)
    assert final.generate("xyz", max_new_tokens=4) == [["bbbb"]]
    chat = [{"role": "user", "content": "hi"}]
    assert final.generate([chat, "x"], max_new_tokens=2) == [["bb"], ["bb"]]
    assert final.generate(chat, max_new_tokens=2) == [["bb"]]


def test_an_eos_that_the_tokenizer_adds_is_no_part_of_the_prompt():
    """A completion goes on from the prompt, as in training."""
    tokenizer = tiny_tokenizer(bos=True, eos_after=True)
    generator = QuarkGenerator(tiny_model("gpt2", tokenizer), tokenizer, None)
    assert generator.encode(["ab"]) == [[257, 64, 65]]
    assert generator.encode(["ab<eos>"]) == [[257, 64, 65, 256]]  # the user's own stays


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda g: g.generate("ab", quantile=3), "quantile 3: must be"),
        (lambda g: g.generate("ab", quantile="good"), "quantile 'good'"),
        (lambda g: g.generate("ab", top_k=5), "top_k: must be one of max_new_tokens, .*do_sample"),
        (lambda g: g.generate("ab", max_new_token=5), "max_new_token: .*Did you mean 'max_new_tokens'"),
        (lambda g: g.generate("ab", top_p=7), "top_p 7"),
        (lambda g: g.generate("ab", num_return_sequences=0), "num_return_sequences 0: must be at least 1"),
    ],
)
def test_a_mistake_is_a_one_line_error(final, call, wanted):
    with pytest.raises(UserError, match=wanted) as caught:
        call(final)
    assert len(str(caught.value).splitlines()) == 1


def test_an_empty_prompt_without_bos_is_refused(gpt2):
    generator = QuarkGenerator(gpt2, tiny_tokenizer(), None)
    with pytest.raises(UserError, match="prompt '': must have at least one token"):
        generator.generate("")


def test_a_plain_model_knows_no_quantile_but_itself(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    generator = QuarkGenerator.from_pretrained(tmp_path, device="cpu")
    assert generator.conditioning is None and generator.vocab_size == 257 and generator.context_length == 128
    assert generator.encode(["ab"]) == [[64, 65]]
    assert len(generator.generate("ab", seed=0)[0]) == 1
    for quantile in ("worst", 0):
        with pytest.raises(UserError, match=f"quantile {quantile!r}: must be 'best'"):
            generator.generate("ab", quantile=quantile)


def test_a_plain_models_padding_rows_are_no_words():
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen3", tokenizer, rows=300)
    prefer(model, 299, 257, 65)
    assert QuarkGenerator(model, tokenizer, None).generate("x", max_new_tokens=3) == [["bbb"]]


def test_a_missing_model_is_a_one_line_error(tmp_path):
    for call in (load_model, QuarkGenerator.from_pretrained):
        with pytest.raises(UserError, match="no such directory") as caught:
            call(tmp_path / "nothing")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_missing_tokenizer_is_a_one_line_error(architecture, tmp_path):
    """transformers makes an empty one for most architectures, which reads every prompt as nothing."""
    tiny_model(architecture, tiny_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer") as caught:
        QuarkGenerator.from_pretrained(tmp_path, device="cpu")
    assert len(str(caught.value).splitlines()) == 1


@needs_shared
def test_a_real_model_samples_the_same_in_any_batch():
    generator = QuarkGenerator.from_pretrained(SHARED / "models" / "webmix-gpt2", device="cpu")
    prompts = ["The weather is", "I", "You are the most"]
    together = generator.generate(prompts, seed=0, max_new_tokens=6)
    ids = generator.encode(prompts)
    one_by_one = complete(
        generator.model,
        ids,
        Sampling(max_new_tokens=6),
        end_ids=generator.end_ids,
        vocab_size=generator.vocab_size,
        seed=0,
        batch_size=1,
    )
    assert together == [[text] for text in generator.decode(ids, one_by_one)]


def test_the_ids_that_end_a_completion(gpt2):
    tokenizer = tiny_tokenizer()
    assert eos_ids(gpt2, tokenizer) == [EOS_ID]
    gpt2.generation_config.eos_token_id = [EOS_ID, 5]
    assert eos_ids(gpt2, tokenizer) == [EOS_ID, 5]
    gpt2.generation_config.eos_token_id = None
    assert eos_ids(gpt2, tokenizer) == [EOS_ID]
