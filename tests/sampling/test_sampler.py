"""Sampling: only words are sampled, from the right distribution, and each completion depends on its own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.preferred_tokens import prefer
from helpers.statistics import chi_square
from helpers.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from quarkrl.models.conditioning import Conditioning
from quarkrl.models.loading import eos_ids
from quarkrl.sampling.sampler import complete, sample
from quarkrl.sampling.strategy import Sampling

EVERY_MODEL = pytest.mark.parametrize("architecture", ARCHITECTURES)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90, 100], [11, 21]]
EOS_ID = 256
GREEDY = Sampling(max_new_tokens=8, do_sample=False)


def run(model, prompts=PROMPTS, sampling=None, *, end_ids=(EOS_ID,), vocab_size=257, seed=0, **kwargs):
    """`complete` for a model over 256 bytes and EOS."""
    sampling = sampling or Sampling(max_new_tokens=8, top_p=1.0)
    return complete(model, prompts, sampling, end_ids=end_ids, vocab_size=vocab_size, seed=seed, **kwargs)


# What can come out


@EVERY_MODEL
@TIED
@pytest.mark.parametrize("do_sample", [True, False])
def test_reward_tokens_and_rows_that_pad_are_never_sampled(architecture, tied, do_sample):
    tokenizer = tiny_tokenizer()
    # Final soft-capping would make the forced logits equal to the others' highest: lift the cap here.
    uncapped = {"final_logit_softcapping": None} if architecture == "gemma2" else {}
    model = tiny_model(architecture, tokenizer, tied=tied, rows=270, **uncapped)
    conditioning, _ = Conditioning.add_to(tokenizer, model, 5)
    assert conditioning.vocab_size == 257 and model.get_output_embeddings().weight.shape[0] == 270
    forbidden = list(range(257, 270))
    prefer(model, *forbidden, 65)
    prompts = [conditioning.prefix(ids, conditioning.best) for ids in PROMPTS]
    sampling = Sampling(max_new_tokens=6, do_sample=do_sample)
    assert run(model, prompts, sampling, vocab_size=conditioning.vocab_size) == [[65] * 6] * len(prompts)
    # The forbidden ones are what it would have said.
    assert set(run(model, prompts, sampling, vocab_size=270)[0]) <= set(forbidden)


def test_a_completion_ends_with_its_eos_and_holds_nothing_after_it(gpt2):
    plain = run(gpt2, sampling=Sampling(max_new_tokens=40, top_p=1.0), end_ids=())
    assert all(len(ids) == 40 for ids in plain)
    ends = sorted({plain[0][3], plain[1][10]})
    stopped = run(gpt2, sampling=Sampling(max_new_tokens=40, top_p=1.0), end_ids=ends)
    for ids, whole in zip(stopped, plain, strict=True):
        at = next((i for i, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert ids == whole[: at + 1]
    assert len(stopped[0]) <= 4 and stopped[0][-1] in ends


def test_eos_is_the_whole_completion_where_it_comes_first(gpt2):
    prefer(gpt2, EOS_ID)
    assert run(gpt2) == [[EOS_ID]] * 4


def test_min_new_tokens_keeps_eos_out(gpt2):
    prefer(gpt2, EOS_ID, 7)
    for do_sample in (True, False):
        sampling = Sampling(max_new_tokens=8, min_new_tokens=3, do_sample=do_sample)
        assert run(gpt2, sampling=sampling) == [[7, 7, 7, EOS_ID]] * 4


@pytest.mark.parametrize("pad", ["eos", "own", None])
@pytest.mark.parametrize("bos", [True, False])
def test_the_choice_of_padding_token_changes_nothing(pad, bos):
    tokenizer = tiny_tokenizer(bos=bos, pad=pad)
    model = tiny_model("llama", tokenizer, rows=259)
    expected = run(tiny_model("llama", tiny_tokenizer(), rows=259), vocab_size=256)
    assert run(model, vocab_size=256, end_ids=eos_ids(model, tokenizer)) == expected


def test_a_pad_token_that_is_sampled_is_a_word(gpt2):
    """Padding is told by where it stands, not by its id: 0 is the filler here, and a token too."""
    prefer(gpt2, 0)
    assert run(gpt2, end_ids=()) == [[0] * 8] * 4


# Batches


@EVERY_MODEL
@TIED
def test_left_padding_does_not_change_greedy_completions(architecture, tied):
    model = tiny_model(architecture, tiny_tokenizer(), tied=tied)
    alone = [sample(model, [ids], GREEDY, None, end_ids=[EOS_ID], vocab_size=257)[0] for ids in PROMPTS]
    assert sample(model, PROMPTS, GREEDY, None, end_ids=[EOS_ID], vocab_size=257) == alone
    assert alone[0] != alone[1]


@EVERY_MODEL
def test_greedy_completions_are_those_of_generate(architecture):
    model = tiny_model(architecture, tiny_tokenizer())
    whole = [model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, pad_token_id=0) for ids in PROMPTS]
    expected = [row[0, len(ids) :].tolist() for row, ids in zip(whole, PROMPTS, strict=True)]
    sampling = Sampling(max_new_tokens=12, do_sample=False)
    assert sample(model, PROMPTS, sampling, None, end_ids=[EOS_ID], vocab_size=257) == expected


def test_a_prompt_is_read_once_for_all_its_samples_and_the_ended_leave(gpt2):
    read: list[tuple[int, int]] = []
    gpt2.register_forward_pre_hook(
        lambda _m, _a, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = [ids for ids in PROMPTS[:2] for _ in range(8)]
    sampling = Sampling(max_new_tokens=6, top_p=1.0)
    whole = run(gpt2, prompts, sampling, end_ids=())
    assert read == [(2, 3), *[(16, 1)] * 5]
    read.clear()
    ends = sorted({ids[1] for ids in whole[:4]})  # Four of sixteen end with their second token, or sooner.
    found = run(gpt2, prompts, sampling, end_ids=ends)
    until = [next((i for i, token in enumerate(ids) if token in ends), 5) for ids in whole]
    assert found == [ids[: end + 1] for ids, end in zip(whole, until, strict=True)]
    assert read[:2] == [(2, 3), (sum(end > 0 for end in until), 1)] and read[2][0] == sum(end > 1 for end in until)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_completion_depends_on_its_own_numbers_not_on_its_batch(architecture):
    model = tiny_model(architecture, tiny_tokenizer())
    expected = run(model, batch_size=128)
    for batch_size in (1, 2, 3):
        assert run(model, batch_size=batch_size) == expected
    sampling = Sampling(max_new_tokens=8, top_p=1.0)
    numbers = sampling.uniforms(4, 0)
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        turned = sample(model, [PROMPTS[i] for i in order], sampling, numbers[order], end_ids=[EOS_ID], vocab_size=257)
        assert turned == [expected[i] for i in order]


def test_a_seed_settles_the_completions(gpt2):
    assert run(gpt2, seed=0) == run(gpt2, seed=0) != run(gpt2, seed=1)
    assert run(gpt2, seed=None) != run(gpt2, seed=None)
    assert run(gpt2, [PROMPTS[0]] * 4)[0] != run(gpt2, [PROMPTS[0]] * 4)[1]  # each its own


def test_each_finished_batch_is_reported(gpt2):
    done: list[int] = []
    run(gpt2, batch_size=3, on_batch=done.append)
    assert done == [3, 1]
    assert run(gpt2, [], on_batch=done.append) == [] and done == [3, 1]


# The distribution


def test_each_step_takes_its_own_numbers():
    model = small_vocabulary()
    numbers = np.array([[0.1, 0.95], [0.95, 0.1]], dtype=np.float32)  # First word below .5, fourth from .9 on.
    sampling = Sampling(max_new_tokens=2, top_p=1.0)
    assert sample(model, [[0], [0]], sampling, numbers, end_ids=[], vocab_size=5) == [[0, 3], [3, 0]]


def small_vocabulary():
    """A model of five words whose next-word probabilities are .5 .25 .15 .07 .03, whatever it reads."""
    tokenizer = tiny_tokenizer(words=["a", "b", "c"])  # and <unk>, EOS
    model = tiny_model("gpt2", tokenizer)
    wanted = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: wanted.expand_as(logits))
    return model


def shares_of_first_words(**options) -> np.ndarray:
    sampling = Sampling(max_new_tokens=1, **options)
    ids = complete(small_vocabulary(), [[0]] * 4000, sampling, end_ids=[], vocab_size=5, seed=0, batch_size=4000)
    return np.bincount([row[0] for row in ids], minlength=5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_p": 1.0}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        # The smallest set that holds .8 is a, b, c (.9): .5/.9, .25/.9, .15/.9.
        ({"top_p": 0.8}, [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0, 0]),
        # A temperature of 1/2 squares the probabilities: .25 .0625 .0225 .0049 .0009, in all .3408.
        ({"temperature": 0.5, "top_p": 1.0}, [0.7336, 0.1834, 0.0660, 0.0144, 0.0026]),
        # First the temperature, then the nucleus: .7336 + .1834 = .917 holds .9, and plain .9 would take three words.
        ({"temperature": 0.5, "top_p": 0.9}, [0.8, 0.2, 0, 0, 0]),
        ({"do_sample": False}, [1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_temperature_and_top_p_do_what_they_say(options, expected):
    counts, expected = shares_of_first_words(**options), np.array(expected)
    assert (counts[expected == 0] == 0).all() and counts.sum() == 4000
    assert chi_square(counts[expected > 0], expected[expected > 0] / expected.sum()) < 18.5


# The model afterwards, and before


def test_each_module_is_back_in_its_mode_even_after_an_error(gpt2):
    gpt2.train()
    gpt2.transformer.h[1].eval()  # a user froze a part
    modes = [module.training for module in gpt2.modules()]
    run(gpt2)
    assert [module.training for module in gpt2.modules()] == modes
    with pytest.raises(IndexError):
        run(gpt2, [[10_000]])
    assert [module.training for module in gpt2.modules()] == modes
    run(gpt2.eval())
    assert not gpt2.training


def test_dropout_does_not_touch_sampling():
    dropout = {"resid_pdrop": 0.9, "embd_pdrop": 0.9, "attn_pdrop": 0.9}
    model = tiny_model("gpt2", tiny_tokenizer(), **dropout)
    ids = torch.tensor([PROMPTS[0]])
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)  # it does touch the model
    assert run(model.train()) == run(model.eval())


def test_the_global_generators_are_left_alone(gpt2):
    states = torch.get_rng_state(), np.random.get_state()[1]
    run(gpt2)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


OWN_SETTINGS = [
    {"min_new_tokens": 8},
    {"repetition_penalty": 9.0},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(128))},
    {"bad_words_ids": [[i] for i in range(128)]},
    {"forced_eos_token_id": EOS_ID},
    {"guidance_scale": 3.0},
    {"num_beams": 3},
    {"do_sample": True, "num_return_sequences": 2, "temperature": 9.0},
    {"return_dict_in_generate": True, "output_scores": True},
    {"stop_strings": ["a"]},
    {"max_time": 0.0},
    {"max_length": 2},
]


@pytest.mark.parametrize("settings", OWN_SETTINGS, ids=lambda settings: next(iter(settings)))
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_a_models_own_generation_config_adds_nothing(gpt2, settings, adapter):
    expected = run(gpt2), run(gpt2, sampling=GREEDY)
    model = get_peft_model(gpt2, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])) if adapter else gpt2
    own = gpt2.generation_config = GenerationConfig(**settings)
    assert (run(model), run(model, sampling=GREEDY)) == expected
    assert gpt2.generation_config is own and model.generation_config is own  # and is there again afterwards
