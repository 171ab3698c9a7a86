"""Runs that explore with the real vLLM, on a CPU: `make test-vllm`."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.eight_letters import EOS_ID, PROMPTS, TOKENIZER, VOCAB
from helpers.runs import figures_of, logs_of, share_of_a, share_of_a_to_d, small_trainer
from helpers.tiny_models import tiny_model
from peft import LoraConfig

from quarkrl.errors import UserError
from quarkrl.sampling.strategy import Sampling

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]
EXACT = 1e-4
GREEDY = Sampling(6, 1, do_sample=False)


def model_of(kind: str):
    # vLLM's attention on CPUs takes heads of 32 numbers at least.
    shape = {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64, "head_dim": 32}
    return tiny_model(kind, TOKENIZER, **shape)


def learn(model) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A run of a model with tied weights, after its end."""
    directory = tmp_path_factory.mktemp("run")
    trainer = small_trainer(directory, model=model_of("gpt2"), engine="vllm", learning_rate=0.01, eval_dataset=PROMPTS)
    trainer.train()
    return trainer


def test_a_run_explores_and_evaluates_with_the_weights_that_it_has_learned(trainer):
    trainer.evaluate()
    assert trainer.model.config.tie_word_embeddings
    assert len(trainer.engine.differences) == 3 and max(trainer.engine.differences) < EXACT
    assert len(trainer.pool) == 2 * len(PROMPTS)
    completions = [sample.completion_ids.tolist() for sample in trainer.pool]
    assert all(1 <= len(ids) <= 6 and max(ids) < VOCAB for ids in completions)
    assert all(EOS_ID not in ids[:-1] and ids[0] != EOS_ID for ids in completions)
    assert len(figures_of(trainer.pool_directory.parent, "reward")) == 2


def test_greedy_completions_are_those_of_the_builtin_sampler(trainer):
    learn(trainer.model)
    trainer.engine.synchronize()
    prompts = trainer.prompts.ids
    with trainer.engine.policy(1.0) as vllm, trainer.engine.builtin.policy(1.0) as builtin:
        assert vllm(prompts, GREEDY, None) == builtin(prompts, GREEDY, None)
    with trainer.engine.reference() as vllm:
        plain = vllm(prompts, GREEDY, None)
    assert plain != vllm([trainer.conditioning.prefix(ids, trainer.conditioning.best) for ids in prompts], GREEDY, None)


def test_a_completion_is_repeatable_and_does_not_depend_on_its_batch(trainer):
    sampling = Sampling(6, 2, top_p=0.9)
    uniforms = sampling.uniforms(16, 5)
    with trainer.engine.policy(1.0) as vllm:
        together = vllm([[0, 1]] * 16, sampling, uniforms)
        assert vllm([[0, 1]] * 16, sampling, uniforms) == together
        assert vllm([[0, 1]], sampling, uniforms[7:8]) == together[7:8]
    assert len({*map(tuple, together)}) > 8 and all(len(ids) >= 3 for ids in together)


def test_tokens_have_their_probabilities_and_reward_tokens_have_none(trainer):
    with torch.no_grad():
        rows = trainer.model.get_input_embeddings().weight
        rows[VOCAB:] = rows[:3] * 3  # Otherwise the likeliest outputs of all.
    trainer.engine.synchronize()
    prompt, sampling = [0, 1, 2], Sampling(1, top_p=1.0)
    ids = trainer.conditioning.prefix(prompt, trainer.conditioning.best)
    with torch.no_grad():
        expected = trainer.model.eval()(torch.tensor([ids])).logits[0, -1, :VOCAB].softmax(-1).numpy()
    with trainer.engine.policy(1.0) as vllm:
        tokens = [ids[0] for ids in vllm([prompt] * 2000, sampling, sampling.uniforms(2000, 7))]
    shares = np.bincount(tokens, minlength=VOCAB) / 2000
    assert len(shares) == VOCAB and np.abs(shares - expected).max() < 5 * np.sqrt(0.25 / 2000)


def test_a_tied_output_layer_that_is_left_out_is_noticed(trainer, monkeypatch):
    backend = trainer.engine.backend
    whole = type(backend).load
    monkeypatch.setattr(
        type(backend), "load", lambda self, model, weights: whole(self, model, dict(model.named_parameters()))
    )
    learn(trainer.model)
    with pytest.raises(UserError, match="engine vllm: its log-probabilities differ"):
        trainer.engine.synchronize()
    monkeypatch.undo()
    trainer.engine.synchronize()
    assert trainer.engine.differences[-1] < EXACT


def test_the_threads_of_learning_can_still_be_set(trainer):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_an_adapter_explores_merged(tmp_path):
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = small_trainer(tmp_path, model=model_of("llama"), engine="vllm", peft_config=adapter, learning_rate=0.05)
    trainer.train()
    learn(trainer.model)
    trainer.engine.synchronize()
    assert max(trainer.engine.differences) < EXACT
    prompts = trainer.prompts.ids
    with trainer.engine.policy(1.0) as vllm, trainer.engine.builtin.policy(1.0) as builtin:
        assert vllm(prompts, GREEDY, None) == builtin(prompts, GREEDY, None)


def assert_guided_greedy_completions_are_those_of_the_builtin_sampler(trainer, *guidance) -> None:
    prompts, seen = trainer.prompts.ids, set()
    for scale, rule in guidance:
        with trainer.engine.policy(scale, rule) as vllm, trainer.engine.builtin.policy(scale, rule) as builtin:
            for sampling in (GREEDY, replace(GREEDY, min_new_tokens=5)):
                completions = vllm(prompts, sampling, None)
                assert completions == builtin(prompts, sampling, None)
                seen.add(str(completions))
    assert len(seen) > len(guidance) // 2  # Guidance changes them.


def test_a_run_explores_evaluates_and_distils_with_guidance(tmp_path):
    """Both rewards condition. The first iteration samples the reference, the second is guided by each reward."""
    trainer = small_trainer(
        tmp_path,
        rewards=[share_of_a, share_of_a_to_d],
        model=model_of("gpt2"),
        engine="vllm",
        condition_on="each",
        explore_guidance_of="share_of_a=3,share_of_a_to_d=2",
        eval_guidance_scale=2.0,
        distill_guidance_scale=[2.0, 1.5],
        distill_iterations=1,
        learning_rate=0.01,
        eval_dataset=PROMPTS,
    )
    trainer.train()
    trainer.evaluate()
    assert [row["distill_guidance_scale"] for row in logs_of(tmp_path, "distill_guidance_scale")] == [2.0, 1.5]
    learn(trainer.model)
    with torch.no_grad():  # Reward tokens that matter more.
        rows = trainer.model.get_input_embeddings().weight
        rows[VOCAB:] += torch.randn(rows[VOCAB:].shape)
    trainer.engine.synchronize()
    assert len(trainer.engine.differences) == 6 and max(trainer.engine.differences) < EXACT
    both = "share_of_a=3,share_of_a_to_d=0.5"
    assert_guided_greedy_completions_are_those_of_the_builtin_sampler(
        trainer, (1.0, "both"), (2.0, "both"), (3.0, "lower"), (0.0, "both"), (both, "both"), ("share_of_a=4", "lower")
    )
    sampling = Sampling(6, 2, top_p=0.9)
    uniforms = sampling.uniforms(16, 5)
    with trainer.engine.policy(2.0) as vllm:
        together = vllm([[0, 1]] * 16, sampling, uniforms)
        assert vllm([[0, 1]], sampling, uniforms[7:8]) == together[7:8]
    assert len({*map(tuple, together)}) > 8 and all(len(ids) >= 3 for ids in together)


def test_guided_tokens_have_their_probabilities(tmp_path):
    """Away from the quantile 1, and with a learned adapter."""
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"engine": "vllm", "guidance_from": "1", "explore_guidance_scale": [1.0, 2.0], "learning_rate": 0.05}
    trainer = small_trainer(tmp_path, model=model_of("llama"), peft_config=adapter, **options)
    trainer.train()
    learn(trainer.model)
    trainer.engine.synchronize()
    assert max(trainer.engine.differences) < EXACT
    assert_guided_greedy_completions_are_those_of_the_builtin_sampler(
        trainer, (1.0, "both"), (2.0, "both"), (5.0, "lower")
    )
    prompt, sampling, conditioning = [0, 1, 2], Sampling(1, top_p=1.0), trainer.conditioning
    with torch.no_grad():
        ids = [conditioning.prefix(prompt, quantiles) for quantiles in (conditioning.best, (1,))]
        wanted, contrast = trainer.model.eval()(torch.tensor(ids)).logits[:, -1, :VOCAB].log_softmax(-1)
    expected = (2 * wanted - contrast).softmax(-1).numpy()
    with trainer.engine.policy(2.0) as vllm:
        tokens = [ids[0] for ids in vllm([prompt] * 2000, sampling, sampling.uniforms(2000, 7))]
    shares = np.bincount(tokens, minlength=VOCAB) / 2000
    assert len(shares) == VOCAB and np.abs(shares - expected).max() < 5 * np.sqrt(0.25 / 2000)


def test_a_model_that_vllm_does_not_support_is_one_line(tmp_path):
    tiny = tiny_model("gpt2", TOKENIZER)  # Heads of 8 numbers.
    with pytest.raises(
        UserError, match=r"^engine vllm: must support GPT2LMHeadModel on this machine .*--engine builtin"
    ):
        small_trainer(tmp_path, model=tiny, engine="vllm").train()


def test_a_server_explores_with_the_weights_that_the_run_has_learned(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []

    def start(line: str) -> None:
        """Start the server with the command that the run shows."""
        assert f"http://127.0.0.1:{port}" in line and "VLLM_SERVER_DEV_MODE=1 python -m vllm" in line
        command = line.split("python ")[1].split()
        flags = ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--no-enable-chunked-prefill"]
        quiet = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **quiet, **threads}
        log = (tmp_path / "server.log").open("w", encoding="utf-8")
        processes.append(subprocess.Popen([sys.executable, *command, *flags], stdout=log, stderr=log, env=environment))

    def stop_if_ended() -> None:
        assert processes[0].poll() is None, (tmp_path / "server.log").read_text(encoding="utf-8")[-2000:]

    url = f"http://127.0.0.1:{port}"
    trainer = small_trainer(
        tmp_path / "run",
        model=model_of("gpt2"),
        engine="vllm",
        engine_url=url,
        learning_rate=0.01,
        explore_guidance_scale=[1.0, 2.0],
    )
    trainer.engine.backend._note, trainer.engine.backend._stop_if_requested = start, stop_if_ended
    try:
        trainer.train()
        learn(trainer.model)
        trainer.engine.synchronize()
        assert len(trainer.engine.differences) == 3 and max(trainer.engine.differences) < EXACT
        prompts = trainer.prompts.ids
        with trainer.engine.policy(1.0) as vllm, trainer.engine.builtin.policy(1.0) as builtin:
            assert vllm(prompts, GREEDY, None) == builtin(prompts, GREEDY, None)
            sampling = Sampling(6, 2)
            uniforms = sampling.uniforms(16, 5)
            together = vllm([[0, 1]] * 16, sampling, uniforms)
            assert vllm([[0, 1]], sampling, uniforms[7:8]) == together[7:8]
        assert_guided_greedy_completions_are_those_of_the_builtin_sampler(trainer, (2.0, "both"), (0.5, "lower"))
        assert all(max(sample.completion_ids.tolist()) < VOCAB for sample in trainer.pool)
    finally:
        for process in processes:
            process.terminate()
            process.wait(60)
