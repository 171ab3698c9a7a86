"""Recorded steps give the tokens of ordinary ones. A GPU records them; on a CPU their cache is of fixed size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.runs import small_trainer
from helpers.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from peft import LoraConfig

from quarkrl.sampling import recorded_steps
from quarkrl.sampling.decoder import CachedDecoder
from quarkrl.sampling.guidance import Contrast
from quarkrl.sampling.recorded_steps import RecordedDecoder, RecordedSteps
from quarkrl.sampling.sampler import complete, sample
from quarkrl.sampling.strategy import Sampling

PROMPTS = [[int(token) for token in row] for row in np.random.default_rng(0).integers(0, 256, (24, 9))]
PROMPTS = [ids[: 1 + number % 9] for number, ids in enumerate(PROMPTS)]
ENDS = list(range(200, 216))  # Completions end at different steps.
HYBRID = ("gemma2", "mistral")  # Sliding windows have another kind of cache, which is not recorded.
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def completions(model, steps, contrast=None, length=40):
    sampling = Sampling(max_new_tokens=length, temperature=1.5)
    uniforms = sampling.uniforms(len(PROMPTS), 0)
    return sample(model, PROMPTS, sampling, uniforms, end_ids=ENDS, vocab_size=257, contrast=contrast, steps=steps)


def exact_model(architecture: str):
    """A model in float64, so that another order of sums changes no token; Gemma 2 masks with NaN there."""
    model = tiny_model(architecture, tiny_tokenizer()).eval()
    return model if architecture in HYBRID else model.double()


def not_recorded() -> RecordedSteps:
    return RecordedSteps(devices=())


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_of_fixed_size_gives_the_same_tokens_however_often_it_is_used(architecture, guided):
    model = exact_model(architecture)
    contrast = Contrast(2.0, [[7, *ids] for ids in PROMPTS]) if guided else None
    expected = completions(model, not_recorded(), contrast)
    assert len({len(ids) for ids in expected}) > 5
    steps = RecordedSteps(devices=("cpu",))
    for _ in range(2):
        assert completions(model, steps, contrast) == expected
    kept = list(steps._steps.values())
    assert (kept == []) == (architecture in HYBRID)
    assert len(kept) <= recorded_steps.MAX_STEPS and all(step.length == 64 for step in kept)


def test_keys_and_values_may_differ_in_dtype():
    model = tiny_model("llama", tiny_tokenizer()).eval()  # Rotary embeddings are in float32 under autocast.
    greedy = Sampling(max_new_tokens=20, do_sample=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected, same = (
            sample(model, PROMPTS, greedy, None, end_ids=[256], vocab_size=257, steps=steps)
            for steps in (not_recorded(), RecordedSteps(devices=("cpu",)))
        )
    assert np.mean([ids == others for ids, others in zip(expected, same, strict=True)]) > 0.7  # bfloat16 rounds.


def test_a_longer_batch_gets_a_longer_cache():
    model, steps = exact_model("llama"), RecordedSteps(devices=("cpu",))
    for length in (10, 80):
        assert completions(model, steps, length=length) == completions(model, not_recorded(), length=length)
    assert {step.length for step in steps._steps.values()} == {96}


def test_what_cannot_be_recorded_is_sampled_all_the_same_and_said_once(monkeypatch, caplog):
    model, steps = exact_model("llama"), RecordedSteps(devices=("cpu",))

    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorded_steps.RecordedStep, "_forward", fail)
    monkeypatch.setattr(recorded_steps, "_NOT_RECORDABLE", set())
    for _ in range(2):
        assert completions(model, steps) == completions(model, not_recorded())
    assert not steps._steps  # Its cache is free again.
    (record,) = caplog.records
    assert record.message.startswith("LlamaForCausalLM: sampling is not recorded, and slower: operation not")


def test_few_steps_other_devices_and_models_that_change_within_a_step_are_not_recorded():
    model, steps = exact_model("llama"), RecordedSteps(devices=("cpu",))
    assert isinstance(steps.decoder(model, PROMPTS, model.device, 40), RecordedDecoder)
    for source, devices, count in ((model, ("cpu",), 5), (model, ("cuda",), 40), (lambda: model, ("cpu",), 40)):
        decoder = RecordedSteps(devices).decoder(source, PROMPTS, model.device, count)
        assert type(decoder) is CachedDecoder


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gpu_records_the_steps_and_gives_the_same_tokens(architecture, guided):
    model = exact_model(architecture).cuda()
    contrast = Contrast(2.0, [[7, *ids] for ids in PROMPTS]) if guided else None
    expected, steps = completions(model, not_recorded(), contrast), RecordedSteps()
    for _ in range(2):
        assert completions(model, steps, contrast) == expected
    assert all(step._recorded is not None for step in steps._steps.values())
    assert (len(steps._steps) == 0) == (architecture in HYBRID)


@pytest.mark.gpu
@GPU
def test_on_a_gpu_each_call_samples_the_weights_of_its_time():
    model = exact_model("llama").cuda()

    def greedy():
        sampling = Sampling(max_new_tokens=12, do_sample=False)
        return complete(model, PROMPTS, sampling, end_ids=[256], vocab_size=257, batch_size=10)

    before = greedy()
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)  # Other storage, too.
    after = greedy()
    model.cpu()
    assert after != before and after == greedy()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"explore_guidance_scale": [1.0, 2.0]},
        {"explore_guidance_scale": [1.0, 2.0], "guidance_from": "reference"},
        {"peft_config": LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=None)},
        {
            "peft_config": LoraConfig(r=2, target_modules="all-linear"),
            "explore_guidance_scale": [1.0, 2.0],
            "guidance_from": "reference",
            "bf16": True,
        },
    ],
)
def test_a_run_on_a_gpu_explores_the_same_with_recorded_steps(tmp_path, monkeypatch, options):
    options = {"use_cpu": False, "max_completion_length": 12, "num_iterations": 3, "eval_strategy": "no", **options}
    pools = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(recorded_steps, "MIN_STEPS", 10**9)
        torch.manual_seed(0)
        trainer = small_trainer(tmp_path / str(recorded), **options)
        trainer.train()
        pools.append([trainer.pool[index].completion_ids.tolist() for index in range(len(trainer.pool))])
    first = len(pools[0]) // 3
    assert pools[0][:first] == pools[1][:first]  # Later ones follow learning, which rounds differently on a GPU.
    assert len(pools[0]) == len(pools[1])
