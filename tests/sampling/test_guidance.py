"""Guidance: the formula, and the same tokens and scores from every road to it as from a loop without cache."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.guidance import Contrast, Guidance, GuidanceOptions, GuidedDecoder, guided_logits, make_contrast
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling

EOS_ID, VOCAB = 256, 257
PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90, 100], [11, 21]]
GREEDY = Sampling(max_new_tokens=6, do_sample=False)
CHANCE = Sampling(max_new_tokens=8, temperature=0.7, top_p=0.8)


def trained(architecture: str = "gpt2", attributes=("reward",), **kwargs):
    """A tiny model with three quantiles, and its conditioning."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(architecture, tokenizer, **kwargs)
    conditioning, _ = Conditioning.add_to(tokenizer, model, 3, attributes)
    assert conditioning.vocab_size == VOCAB
    return model, conditioning


def pairs(conditioning: Conditioning, prompts=PROMPTS, guidance_from="worst"):
    """The prompts behind the best tokens, and behind the others."""
    best = [conditioning.prefix(ids, conditioning.best) for ids in prompts]
    return best, [conditioning.prefix(ids, conditioning.quantiles_of(guidance_from)) for ids in prompts]


def run(model, wanted, sampling=GREEDY, *, end_ids=(EOS_ID,), seed=0, **kwargs):
    return complete(model, wanted, sampling, end_ids=end_ids, vocab_size=VOCAB, seed=seed, **kwargs)


@torch.no_grad()
def by_hand(model, wanted, contrast, scale, steps, contrast_model=None):
    """Greedy guidance of one prompt: no cache, no padding, no batch. The tokens, and each step's scores."""
    tokens, all_scores = [], []
    for _ in range(steps):
        p = model(torch.tensor([[*wanted, *tokens]])).logits[0, -1, :VOCAB].softmax(-1)
        q = (contrast_model or model)(torch.tensor([[*contrast, *tokens]])).logits[0, -1, :VOCAB].softmax(-1)
        scores = p.log() + (scale - 1) * (p.log() - q.log())
        all_scores.append(scores)
        tokens.append(int(scores.argmax()))
        if tokens[-1] == EOS_ID:
            break
    return tokens, torch.stack(all_scores)


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


# The formula


def test_the_formula_by_hand():
    """Of .5 .3 .2 against .25 .25 .5, γ = 2 is p²/q: 1, .36, .08; γ = 3 is p³/q²: 2, .432, .032."""
    wanted, contrast = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert guided_logits(wanted, [contrast], [2.0]).exp()[0].tolist() == pytest.approx([1.0, 0.36, 0.08])
    assert guided_logits(wanted, [contrast], [3.0]).exp()[0].tolist() == pytest.approx([2.0, 0.432, 0.032])
    assert guided_logits(wanted, [contrast], [1.0]).exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert guided_logits(wanted, [contrast], [0.0]).exp()[0].tolist() == pytest.approx([0.25, 0.25, 0.5])
    # Logits need not be normalised.
    torch.testing.assert_close(
        guided_logits(wanted + 7, [contrast - 3], [2.0]), guided_logits(wanted, [contrast], [2.0])
    )


def test_the_rule_lower_by_hand():
    """Of .5 .3 .2 against .25 .25 .5, only the last token is more likely in the contrast: .2 becomes .2²/.5 = .08."""
    wanted, contrast = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert guided_logits(wanted, [contrast], [2.0], "lower").exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.08])
    assert guided_logits(wanted, [contrast], [3.0], "lower").exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.032])
    assert guided_logits(wanted, [contrast], [1.0], "lower").exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    scales = torch.tensor([[1.0], [2.0]])
    rows = guided_logits(wanted.repeat(2, 1), [contrast.repeat(2, 1)], [scales], "lower")
    assert rows.exp().flatten().tolist() == pytest.approx([0.5, 0.3, 0.2, 0.5, 0.3, 0.08])


@pytest.mark.parametrize("rule", ["both", "lower"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 9.0])
def test_what_cannot_come_stays_out(scale, rule):
    ruled_out = torch.tensor([[0.0, -torch.inf, 1.0]])
    for contrast in (ruled_out, torch.zeros(1, 3)):
        assert guided_logits(ruled_out, [contrast], [scale], rule).isfinite().tolist() == [[True, False, True]]


# Every road, against the loop


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("road", ["one batch", "own forward"])
def test_greedy_tokens_are_those_of_a_loop_without_cache(architecture, road):
    model, conditioning = trained(architecture)
    wanted, contrast = pairs(conditioning)
    other = model if road == "own forward" else None
    found = run(model, wanted, contrast=Contrast(3.0, contrast, other))
    assert found == [by_hand(model, w, c, 3.0, 6)[0] for w, c in zip(wanted, contrast, strict=True)]
    assert found != run(model, wanted)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 4.0])
def test_scores_in_plain_generate_are_those_of_the_loop(architecture, scale):
    model, conditioning = trained(architecture)
    wanted, contrast = pairs(conditioning)
    inputs, mask = left_padded(wanted)
    guidance = Guidance.between(model, conditioning, inputs, mask, guidance_scale=scale)
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    found = model.generate(inputs, attention_mask=mask, logits_processor=[guidance], **options)
    scores = torch.stack(found.scores, 1)  # (batch, steps, V + K)
    assert scores[..., VOCAB:].eq(-torch.inf).all()
    for row, (w, c) in enumerate(zip(wanted, contrast, strict=True)):
        tokens, expected = by_hand(model, w, c, scale, 5)
        assert EOS_ID not in tokens
        assert found.sequences[row, inputs.shape[1] :].tolist() == tokens
        torch.testing.assert_close(scores[row, :, :VOCAB], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("road", ["one batch", "own forward"])
def test_the_rule_lower_holds_in_the_sampler_and_in_plain_generate(road):
    model, conditioning = trained()
    wanted, contrast = pairs(conditioning)
    found = run(model, wanted, contrast=Contrast(9.0, contrast, model if road == "own forward" else None, "lower"))
    assert found != run(model, wanted, contrast=Contrast(9.0, contrast))
    inputs, mask = left_padded(wanted)
    guidance = Guidance.between(model, conditioning, inputs, mask, guidance_scale=9.0, rule="lower")
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": EOS_ID}
    plain = model.generate(inputs, attention_mask=mask, logits_processor=[guidance], **options)
    for row, completion in zip(plain[:, inputs.shape[1] :].tolist(), found, strict=True):
        assert row[: len(completion)] == completion


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("road", ["one batch", "own forward"])
def test_scores_of_a_guided_decoder_are_those_of_the_loop(architecture, road):
    model, conditioning = trained(architecture)
    wanted, contrast = pairs(conditioning)
    other = None if road == "one batch" else model
    decoder = GuidedDecoder(model, wanted, Contrast(2.0, contrast, other), VOCAB)
    expected = [by_hand(model, w, c, 2.0, 5) for w, c in zip(wanted, contrast, strict=True)]
    rows = torch.arange(4)
    scores = decoder.prefill()
    for step in range(5):
        for row, found in zip(rows.tolist(), scores, strict=True):
            torch.testing.assert_close(found, expected[row][1][step], rtol=0, atol=1e-4)
        if step == 2:
            rows = torch.tensor([3, 1])
            decoder.select(rows)
        if step < 4:
            scores = decoder.step(torch.tensor([expected[row][0][step] for row in rows]))


@pytest.mark.parametrize("road", ["one batch", "own forward"])
@pytest.mark.parametrize("sampling", [GREEDY, CHANCE], ids=["greedy", "chance"])
def test_a_completion_does_not_depend_on_its_batch(road, sampling):
    model, conditioning = trained("llama")
    wanted, contrast = pairs(conditioning)
    other = model if road == "own forward" else None
    options = {"contrast": Contrast(2.5, contrast, other)}
    expected = run(model, wanted, sampling, batch_size=128, **options)
    for batch_size in (1, 3):
        assert run(model, wanted, sampling, batch_size=batch_size, **options) == expected


def test_both_roads_draw_the_same_tokens():
    model, conditioning = trained()
    wanted, contrast = pairs(conditioning, PROMPTS * 8)
    together = run(model, wanted, CHANCE, contrast=Contrast(2.0, contrast))
    assert together == run(model, wanted, CHANCE, contrast=Contrast(2.0, contrast, model))
    assert together == run(model, wanted, CHANCE, contrast=Contrast(2.0, contrast, lambda: nullcontext(model)))
    assert together != run(model, wanted, CHANCE)


def test_one_is_plain_and_reads_no_contrast():
    model, conditioning = trained()
    wanted, contrast = pairs(conditioning)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    plain = run(model, wanted, CHANCE)
    steps = len(sizes)
    assert run(model, wanted, CHANCE, contrast=Contrast(1.0, contrast, model)) == plain
    assert len(sizes) == 2 * steps and set(sizes) == {4}  # As many passes, of as many rows.
    run(model, wanted, CHANCE, contrast=Contrast(2.0, contrast))
    assert set(sizes[2 * steps :]) == {8}  # One batch.


def test_zero_is_the_contrast():
    model, conditioning = trained()
    wanted, contrast = pairs(conditioning, PROMPTS * 8)
    for other in (None, model):
        options = {"contrast": Contrast(0.0, contrast, other)}
        assert run(model, wanted, GREEDY, **options) == run(model, contrast, GREEDY)
        assert run(model, wanted, CHANCE, **options) == run(model, contrast, CHANCE)


@pytest.mark.parametrize("road", ["one batch", "own forward"])
def test_eos_ends_a_completion_and_the_others_go_on(road):
    model, conditioning = trained()
    wanted, contrast = pairs(conditioning)
    options = {"contrast": Contrast(3.0, contrast, model if road == "own forward" else None)}
    whole = run(model, wanted, Sampling(max_new_tokens=12, top_p=1.0), end_ids=(), **options)
    ends = sorted({whole[0][2], whole[1][7]})
    found = run(model, wanted, Sampling(max_new_tokens=12, top_p=1.0), end_ids=ends, **options)
    for ids, all_of_it in zip(found, whole, strict=True):
        at = next((i for i, token in enumerate(all_of_it) if token in ends), len(all_of_it) - 1)
        assert ids == all_of_it[: at + 1]
    assert len({len(ids) for ids in found}) > 1
    # As long as EOS may not come it does not, though it is ruled out on both sides.
    least = Sampling(max_new_tokens=12, min_new_tokens=12, top_p=1.0)
    held = run(model, wanted, least, end_ids=ends, **options)
    assert all(len(ids) == 12 and not set(ids) & set(ends) for ids in held)


def test_no_reward_token_comes_out():
    model, conditioning = trained("llama", tied=False)

    def forced(_module, _inputs, logits):
        logits[..., VOCAB:] = 1000.0
        return logits

    model.get_output_embeddings().register_forward_hook(forced)
    wanted, contrast = pairs(conditioning)
    for other in (None, model):
        found = run(model, wanted, CHANCE, contrast=Contrast(3.0, contrast, other))
        assert all(token < VOCAB for ids in found for token in ids)


def test_temperature_and_nucleus_come_after_guidance():
    """p²/q of .5 .3 .2 and .25 .25 .5 is .694 .25 .056 when normalised: a nucleus of .9 leaves two, plain .9 three."""
    tokenizer = tiny_tokenizer(words=["a"])  # and <unk>, EOS
    model = tiny_model("gpt2", tokenizer)
    p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.25, 0.25, 0.5]).log()

    def halves(_module, _inputs, logits):
        count = len(logits) // 2
        return torch.cat((p.expand_as(logits[:count]), q.expand_as(logits[count:])))

    model.lm_head.register_forward_hook(halves)
    options = {"end_ids": [], "vocab_size": 3, "seed": 0, "contrast": Contrast(2.0, [[1]] * 4000)}
    options["batch_size"] = 4000

    def shares(**how):
        ids = complete(model, [[0]] * 4000, Sampling(max_new_tokens=1, **how), **options)
        return np.bincount([row[0] for row in ids], minlength=3) / 4000

    assert shares(top_p=1.0) == pytest.approx([0.694, 0.25, 0.056], abs=0.03)
    assert shares(top_p=0.9) == pytest.approx([0.735, 0.265, 0], abs=0.03)
    # Squared by a temperature of 1/2: .482, .0625, .0031, in all .5478.
    assert shares(top_p=1.0, temperature=0.5) == pytest.approx([0.880, 0.114, 0.006], abs=0.02)


# Several attributes, adapters, the reference


def test_several_attributes_are_contrasted_together():
    model, conditioning = trained(attributes=("kind", "calm"))
    wanted, contrast = pairs(conditioning)
    assert wanted[1] == [259, 262, 40] and contrast[1] == [257, 260, 40]
    found = run(model, wanted, contrast=Contrast(3.0, contrast))
    assert found == [by_hand(model, w, c, 3.0, 6)[0] for w, c in zip(wanted, contrast, strict=True)]
    ids, mask = left_padded(wanted)
    guidance = Guidance.between(model, conditioning, ids, mask, guidance_scale=3.0)
    out = model.generate(ids, attention_mask=mask, logits_processor=[guidance], max_new_tokens=6, pad_token_id=0)
    assert out[:, ids.shape[1] :].tolist() == found


def adapted():
    """A policy with an adapter that says something else than its base."""
    model, conditioning = trained("llama")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return conditioning.add_adapter(model, config).eval(), conditioning


def test_an_adapter_guides_from_its_worst_token_and_from_the_model_without_it():
    model, conditioning = adapted()
    wanted, contrast = pairs(conditioning)
    found = run(model, wanted, contrast=Contrast(3.0, contrast))
    assert found == [by_hand(model, w, c, 3.0, 6)[0] for w, c in zip(wanted, contrast, strict=True)]
    base, _ = trained("llama")

    @contextmanager
    def switched_off():
        with model.disable_adapter():
            yield model

    contrast = make_contrast(conditioning, PROMPTS, GuidanceOptions(3.0, "reference"), reference=switched_off)
    away = run(model, wanted, contrast=contrast)
    expected = [by_hand(model, w, p, 3.0, 6, base)[0] for w, p in zip(wanted, PROMPTS, strict=True)]
    assert away == expected != found


def test_what_guidance_is_from():
    _, conditioning = trained()
    model = object()

    def contrast_from(guidance_from):
        return make_contrast(conditioning, [[5]], GuidanceOptions(2.0, guidance_from), reference=model)

    assert contrast_from("worst") == Contrast(2.0, [[257, 5]])
    assert contrast_from(1) == Contrast(2.0, [[258, 5]])
    assert contrast_from("reference") == Contrast(2.0, [[5]], model)
    with pytest.raises(UserError, match="quantile 'base'"):
        contrast_from("base")
    with pytest.raises(UserError, match="guidance_from 2: must differ from quantile 'best'"):
        contrast_from(2)


# Plain generate


def test_several_completions_of_each_prompt_in_plain_generate():
    model, conditioning = trained()
    wanted, contrast = pairs(conditioning)
    ids, mask = left_padded(wanted)
    options = {"max_new_tokens": 5, "do_sample": True, "top_k": 1, "num_return_sequences": 2, "pad_token_id": 0}
    guidance = Guidance.between(model, conditioning, ids, mask, guidance_scale=3.0)
    out = model.generate(ids, attention_mask=mask, logits_processor=[guidance], **options)
    expected = [by_hand(model, w, c, 3.0, 5)[0] for w, c in zip(wanted, contrast, strict=True)]
    assert out[:, ids.shape[1] :].tolist() == [row for row in expected for _ in range(2)]


def test_one_leaves_plain_generate_as_it_is():
    model, conditioning = trained()
    ids = torch.tensor(pairs(conditioning, [[10, 20]])[0])
    guidance = Guidance.between(model, conditioning, ids, guidance_scale=1.0)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _model, _inputs: passes.append(1))
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, logits_processor=[guidance], **options))
    assert len(passes) == 2 * 4


def test_a_second_generate_and_beams_are_refused():
    model, conditioning = trained()
    ids = torch.tensor(pairs(conditioning, [[10, 20]])[0])
    options = {"max_new_tokens": 6, "pad_token_id": 0}
    guidance = Guidance.between(model, conditioning, ids, guidance_scale=2.0)
    model.generate(ids, logits_processor=[guidance], **options)
    with pytest.raises(UserError, match="one call of generate without beam search"):
        model.generate(ids, logits_processor=[guidance], **options)
    guidance = Guidance.between(model, conditioning, ids, guidance_scale=2.0)
    with pytest.raises(UserError, match="one call of generate without beam search"):
        model.generate(ids, logits_processor=[guidance], num_beams=3, **options)


def test_between_wants_reward_tokens_and_another_quantile_than_theirs():
    model, conditioning = trained()
    best, _ = pairs(conditioning, [[10]])
    with pytest.raises(UserError, match="guidance_from 'best': must differ from the quantile of the prompts"):
        Guidance.between(model, conditioning, torch.tensor(best), guidance_scale=2.0, guidance_from="best")
    with pytest.raises(UserError, match="prompts that start with reward tokens"):
        Guidance.between(model, conditioning, torch.tensor([[10, 20]]), guidance_scale=2.0)


# For users


@pytest.fixture
def final(tmp_path):
    """A saved model of Quark's, and the model it was trained from."""
    tokenizer = tiny_tokenizer(pad="own")
    model = tiny_model("llama", tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    conditioning, extended = Conditioning.add_to(tokenizer, model, 3)
    with torch.no_grad():  # As if trained.
        for parameter in model.model.layers.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "final")
    conditioning.steer_tokenizer(extended).save_pretrained(tmp_path / "final")
    conditioning.save(tmp_path / "final", reference={"name": str(tmp_path / "base")})
    return tmp_path / "final"


TEXTS = ["ab", "a longer one", "x"]


def test_the_generator_guides_from_a_quantile_or_the_reference(final):
    generator = QuarkGenerator.from_pretrained(final, device="cpu")
    base = AutoModelForCausalLM.from_pretrained(final.parent / "base").eval()
    model, conditioning = generator.model, generator.conditioning
    plain = [conditioning.strip(ids) for ids in generator.encode(TEXTS)]
    options = {"max_new_tokens": 5, "do_sample": False}

    def expected(guidance_from, reader=None):
        rows = []
        for ids in plain:
            other = ids if reader else conditioning.prefix(ids, conditioning.quantiles_of(guidance_from))
            best = conditioning.prefix(ids, conditioning.best)
            rows.append(by_hand(model, best, other, 3.0, 5, reader)[0])
        return [[text] for text in generator.decode(plain, rows)]

    found = [expected("worst"), expected(1), expected("reference", base)]
    assert generator.generate(TEXTS, guidance_scale=3.0, **options) == found[0]
    assert generator.generate(TEXTS, guidance_scale=3.0, guidance_from=1, batch_size=2, **options) == found[1]
    assert generator.generate(TEXTS, guidance_scale=3.0, guidance_from="reference", **options) == found[2]
    assert generator.generate(TEXTS, **options) not in found and found[0] != found[1] != found[2]


def test_the_generator_and_plain_generate_agree(final):
    model = AutoModelForCausalLM.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    guidance = Guidance.between(model, Conditioning.load(final), **inputs, guidance_scale=3.0)
    out = model.generate(**inputs, logits_processor=[guidance], do_sample=False, max_new_tokens=5)
    texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    generator = QuarkGenerator.from_pretrained(final, device="cpu")
    found = generator.generate(TEXTS, guidance_scale=3.0, max_new_tokens=5, do_sample=False)
    assert [[text] for text in texts] == found


def test_the_command_guides(final, capsys):
    def said(*flags):
        capsys.readouterr()
        flags = ["--prompt", "ab", "--prompt", "x", "--max_new_tokens", "5", "--greedy", "--json", *flags]
        assert main(["generate", str(final), *flags]) == 0
        return [json.loads(line)["completions"] for line in capsys.readouterr().out.splitlines()]

    generator = QuarkGenerator.from_pretrained(final, device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = generator.generate(["ab", "x"], **options)
    assert said() == said("--guidance_scale", "1") == plain
    worst, reference = (
        generator.generate(["ab", "x"], guidance_scale=4.0, guidance_from=other, **options)
        for other in ("worst", "reference")
    )
    assert said("--guidance_scale", "4") == worst != plain
    assert said("--guidance_scale", "4", "--guidance_from", "reference", "--batch_size", "1") == reference != worst
    assert main(["generate", str(final), "--prompt", "ab", "--guidance_scale", "2", "--guidance_from", "best"]) == 2
    assert "guidance_from 'best': must differ from quantile 'best'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1}, "guidance_scale -1: must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan: must be"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf: must be"),
        ({"guidance_scale": 2, "guidance_from": "base"}, "quantile 'base'"),
        ({"guidance_scale": 2, "guidance_from": 3}, "quantile 3: must be"),
        ({"guidance_scale": 2, "guidance_from": "best"}, "guidance_from 'best'.*quantile 'best'"),
        ({"guidance_scale": 2, "quantile": 0}, "guidance_from 'worst'.*quantile 0"),
    ],
    ids=str,
)
def test_impossible_guidance_is_one_error(final, options, message):
    with pytest.raises(UserError, match=message) as caught:
        QuarkGenerator.from_pretrained(final, device="cpu").generate("ab", **options)
    assert "\n" not in str(caught.value)


def test_guidance_without_what_it_needs_is_one_error(final):
    model, conditioning = trained()
    with pytest.raises(UserError, match=r"guidance_scale -1"):
        Contrast(-1.0, [[1]])
    with pytest.raises(UserError, match=r"guidance_rule 'up': must be both or lower"):
        Contrast(2.0, [[1]], rule="up")
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="guidance_from 'reference'"):
        generator = QuarkGenerator(model, tokenizer, conditioning)
        generator.generate("ab", guidance_scale=2.0, guidance_from="reference")
    with pytest.raises(UserError, match="guidance_from 'worst'"):
        QuarkGenerator(model, tokenizer, None).generate("ab", guidance_scale=2.0)


@pytest.mark.parametrize("guided", [False, True])
def test_guidance_costs_twice_the_tokens_of_plain_sampling(guided):
    """And as many forward passes: both prompts of a pair are in one batch."""
    model, conditioning = trained()
    wanted, contrast = pairs(conditioning)
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    options = {"contrast": Contrast(2.0, contrast)} if guided else {}
    run(model, wanted, Sampling(max_new_tokens=20), end_ids=(), **options)
    rows, width = len(PROMPTS) * (1 + guided), max(map(len, wanted))
    assert shapes == [(rows, width)] + [(rows, 1)] * 19
