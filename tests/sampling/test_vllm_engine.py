"""The vLLM engine without vLLM: what it sends, and its check of the weights. test_vllm.py runs the real one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial

import httpx2
import numpy as np
import pytest
import torch
from helpers.eight_letters import EOS_ID, PROMPTS, TOKENIZER, VOCAB
from helpers.runs import LORA, small_trainer

from quarkrl.errors import UserError
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling
from quarkrl.sampling.vllm_backends import VllmServer
from quarkrl.sampling.vllm_engine import VllmEngine, log_probs_of, seed_of


class Copy:
    """A backend with a copy of the model, in transformers."""

    def __init__(self, model, missing=()):
        self.model, self.missing = copy.deepcopy(model), missing

    def load(self, model, weights):
        assert model is not self.model
        weights = {name: weight for name, weight in weights.items() if name not in self.missing}
        self.model.load_state_dict(weights, strict=not self.missing)

    def generate(self, prompt_ids, requests, guidance):
        self.requests, self.guidance = requests, guidance
        sampling = Sampling(requests[0]["max_tokens"], do_sample=False)
        end_ids = requests[0]["stop_token_ids"]
        return complete(self.model, prompt_ids, sampling, end_ids=end_ids, vocab_size=VOCAB)

    def log_probs(self, sequences):
        return log_probs_of(self.model, sequences)


def engine_of(trainer, backend):
    return VllmEngine(backend, trainer.engine, shares_start=True, prompts=trainer.prompts.ids, dtype="float32")


def learn(model):
    """Change every trained weight."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape))


@pytest.mark.parametrize("adapter", [None, LORA])
def test_the_engine_takes_over_the_weights_with_adapters_merged(tmp_path, adapter):
    trainer = small_trainer(tmp_path, peft_config=adapter)
    base = trainer.model.get_base_model() if adapter else trainer.model
    plain = base if adapter is None else copy.deepcopy(trainer.model).merge_and_unload()
    engine = engine_of(trainer, Copy(plain))
    learn(trainer.model)
    with pytest.raises(UserError, match=r"^engine vllm: its log-probabilities differ from the policy's by .*--engine"):
        engine.check()
    engine.synchronize()
    assert engine.differences[-1] < 1e-5
    with engine.policy(1.0) as ours, trainer.engine.policy(1.0) as builtin:
        prompts, sampling = [[0, 1], [2]], Sampling(6, 0, do_sample=False)
        assert ours(prompts, sampling, None) == builtin(prompts, sampling, None)


def test_weights_that_the_engine_has_not_taken_over_end_the_run(tmp_path):
    trainer = small_trainer(tmp_path)
    engine = engine_of(trainer, Copy(trainer.model, missing=("transformer.h.0.mlp.c_fc.weight",)))
    learn(trainer.model)
    with pytest.raises(UserError, match=r"must be at most 0\.001 in float32"):
        engine.synchronize()


def test_a_tied_output_layer_is_among_the_weights(tmp_path):
    trainer, names = small_trainer(tmp_path), []
    backend = Copy(trainer.model)
    backend.load = lambda model, weights: names.extend(weights)
    engine_of(trainer, backend).synchronize()
    assert trainer.model.config.tie_word_embeddings
    assert {"transformer.wte.weight", "lm_head.weight"} <= {*names}


def test_a_completion_has_a_seed_of_its_own_that_its_batch_does_not_change(tmp_path):
    trainer = small_trainer(tmp_path)
    backend = Copy(trainer.model)
    sampling = Sampling(6, 2, temperature=0.7, top_p=0.9)
    uniforms = sampling.uniforms(3, 1, 2)
    with engine_of(trainer, backend).reference() as complete_prompts:
        complete_prompts([[0], [0], [0]], sampling, uniforms)
        seeds = [request.pop("seed") for request in backend.requests]
        complete_prompts([[0]], sampling, uniforms[2:])
    assert backend.requests[0].pop("seed") == seeds[2] and len({*seeds}) == 3
    assert all(0 <= seed < 2**63 for seed in seeds) and seeds[0] == seed_of(uniforms[0])
    wanted = {"max_tokens": 6, "min_tokens": 2, "temperature": 0.7, "top_p": 0.9, "ignore_eos": True}
    assert backend.requests[0] == {**wanted, "stop_token_ids": [EOS_ID]}


def test_a_reward_token_that_was_sampled_ends_the_run(tmp_path):
    trainer = small_trainer(tmp_path)
    backend = Copy(trainer.model)
    backend.generate = lambda prompt_ids, requests, guidance: [[0, VOCAB]] * len(prompt_ids)
    with engine_of(trainer, backend).policy(1.0) as complete_prompts, pytest.raises(UserError, match="reward token 10"):
        complete_prompts([[0]], Sampling(2), np.zeros((1, 2), np.float32))


def test_guidance_is_that_of_the_run(tmp_path):
    trainer = small_trainer(tmp_path, engine="builtin", eval_guidance_scale=2.0, guidance_from="1")
    backend = Copy(trainer.model)
    expected = [
        (1.0, {}),
        (2.0, {"guidance_scale": 2.0, "guidance_from": "1", "guidance_rule": "lower"}),
        ("reward=1", {}),
    ]
    for scale, guidance in expected:
        with engine_of(trainer, backend).policy(scale, "lower") as complete_prompts:
            complete_prompts([[0]], Sampling(2, do_sample=False), None)
        assert backend.guidance == guidance


def test_another_reference_explores_iteration_0_with_the_builtin_sampler(tmp_path):
    trainer = small_trainer(tmp_path)
    engine = replace(engine_of(trainer, Copy(trainer.model)), shares_start=False)
    with engine.reference() as complete_prompts:
        assert complete_prompts.func.__name__ == "sample"


def answers_of(requests, request):
    """What a vLLM server answers."""
    requests.append((request.url.path, json.loads(request.content or b"{}")))
    if request.url.path == "/v1/models":
        return httpx2.Response(200, json={"data": [{"id": "served"}]})
    return httpx2.Response(200, json={"choices": [{"token_ids": [1, EOS_ID]}]})


def server_of(trainer, directory, answer, guided=False):
    server = VllmServer(
        "http://localhost:8000/",
        directory,
        trainer.conditioning,
        trainer.processing_class,
        dtype="float32",
        guided=guided,
        note=print,
        stop_if_requested=lambda: None,
    )
    server._client = httpx2.Client(transport=httpx2.MockTransport(answer))
    return server


def test_a_server_reads_the_weights_and_bans_reward_tokens_by_name(tmp_path):
    trainer, requests = small_trainer(tmp_path / "run"), []
    server = server_of(trainer, tmp_path / "engine", partial(answers_of, requests))
    server.load(trainer.model, trainer.model.state_dict())
    assert server.generate([[0, 1]], [{"seed": 3}], {}) == [[1, EOS_ID]]
    paths, bodies = zip(*requests, strict=True)
    assert paths == ("/v1/models", "/collective_rpc", "/reset_prefix_cache", "/v1/completions")
    assert bodies[1] == {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "engine")}}
    assert bodies[3]["prompt"] == [0, 1] and bodies[3]["seed"] == 3
    assert bodies[3]["bad_words"] == ["<|reward_0|>", "<|reward_1|>", "<|reward_2|>"]
    files = {path.name for path in (tmp_path / "engine").iterdir()}
    assert {"config.json", "model.safetensors", "quark.json", "tokenizer.json"} <= files


def test_a_server_that_takes_no_weights_is_one_line_with_the_command_that_starts_it(tmp_path):
    trainer = small_trainer(tmp_path / "run")

    def answer(request):
        return answers_of([], request) if request.url.path == "/v1/models" else httpx2.Response(404)

    server = server_of(trainer, tmp_path / "engine", answer)
    with pytest.raises(UserError, match=r"VLLM_SERVER_DEV_MODE=1 python -m .*engine --dtype float32") as error:
        server.load(trainer.model, trainer.model.state_dict())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lacks", ["nothing", "plugin", "scheduler"])
def test_a_server_that_cannot_guide_is_one_line_with_the_command_that_starts_it(tmp_path, lacks):
    trainer, requests = small_trainer(tmp_path / "run"), []

    def answer(request):
        usual, body = answers_of(requests, request), requests[-1][1]
        if "vllm_xargs" not in body:
            return usual
        if body["vllm_xargs"]["guidance_scale"] < 0:
            return usual if lacks == "plugin" else httpx2.Response(400)
        # Without its scheduler, the processor ends a request by the stop token.
        ids = body["stop_token_ids"] if lacks == "scheduler" else [1]
        return httpx2.Response(200, json={"choices": [{"token_ids": ids}]})

    server = server_of(trainer, tmp_path / "engine", answer, guided=True)
    if lacks == "nothing":
        server.load(trainer.model, trainer.model.state_dict())
        server.generate([[0]], [{"seed": 3}], {"guidance_scale": 2.0})
        assert requests[-1][1]["vllm_xargs"] == {"guidance_scale": 2.0}
        return
    with pytest.raises(UserError, match=r"must sample with guidance\. Install quarkrl .*--scheduler-cls quarkrl"):
        server.load(trainer.model, trainer.model.state_dict())


def test_vllm_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package vllm\. Install it: pip install 'quarkrl\[vllm\]'"):
        small_trainer(tmp_path, engine="vllm", processing_class=TOKENIZER, prompts=PROMPTS)
