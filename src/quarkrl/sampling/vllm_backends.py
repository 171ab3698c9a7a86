"""The two places of vLLM: this process (`ColocatedVllm`), and a server (`VllmServer`)."""

import copy
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import httpx2
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quarkrl.errors import UserError, one_line
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.engine_guidance import SCALE
from quarkrl.sampling.vllm_guidance import SCHEDULER, processors_to_name
from quarkrl.storage.atomic import atomic_directory

# Read by vLLM when it is imported. Without the first it would run in a process of its own, where Ctrl-C ends it.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # Learning in the same process uses all threads.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",  # Nothing is reported to vLLM's authors.
}
_BLOCK = 128  # Tokens of a block of vLLM's cache on a CPU, the largest of its block sizes.
_LARGEST_CACHE = 4 * 2**30
_SERVER_REQUESTS = 128  # At a time.
_SERVER_START = 900.0  # Seconds to wait for a server.


class Backend(Protocol):
    """A vLLM, in this process or another."""

    def load(self, model: Any, weights: dict[str, Tensor]) -> None:
        """Replace the weights.

        Args:
            model: the policy without adapters.
            weights: its weights by name, with those of an output layer that shares the input embedding's.
        """

    def generate(
        self, prompt_ids: Sequence[list[int]], requests: Sequence[dict[str, Any]], guidance: Mapping[str, Any]
    ) -> list[list[int]]:
        """Complete prompts.

        Args:
            prompt_ids: the prompts, with their reward tokens.
            requests: the fields that vLLM's `SamplingParams` and its HTTP interface share.
            guidance: what `engine_guidance.read_guidance` reads; empty without guidance.
        """

    def log_probs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Return the log-probability of each token of a sequence but the first."""


class ColocatedVllm:
    """vLLM in this process, on the same device as the policy.

    Args:
        model: the policy without adapters: its shape, not its weights, which `load` gives.
        conditioning: its reward tokens.
        dtype: the data type of the weights, by name.
        longest: tokens of the longest prompt and its completion.
        batch_size: requests at a time.
        guided: whether requests have guidance.

    Raises:
        UserError: vLLM is not installed, or does not support the model.
    """

    def __init__(
        self,
        model: Any,
        conditioning: Conditioning,
        *,
        dtype: str,
        longest: int,
        batch_size: int,
        guided: bool,
    ):
        require_vllm()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._architecture = type(model).__name__
        self._allowed = list(range(conditioning.vocab_size))
        self._directory = tempfile.TemporaryDirectory(prefix="quarkrl-vllm-")
        directory = Path(self._directory.name)
        write_shape(model, conditioning, directory)
        group = 1 + len(conditioning.attributes)  # The most requests that guidance ties to each other.
        batch_size = max(batch_size, group)
        set_num_threads = torch.set_num_threads  # vLLM replaces it by a function without effect.
        try:
            from vllm import LLM

            self._llm = LLM(
                str(directory),
                dtype=dtype,
                load_format="dummy",
                skip_tokenizer_init=True,
                max_model_len=longest + 1,
                max_num_seqs=batch_size,
                kv_cache_memory_bytes=_cache_bytes(model.config, getattr(torch, dtype).itemsize, batch_size, longest),
                # On a CPU, compiling takes minutes, and vLLM 0.32 ends at a request with a seed whose prompt is read in
                # chunks.
                enforce_eager=model.device.type == "cpu",
                enable_chunked_prefill=model.device.type != "cpu",
                # Without chunks, one step reads the prompts of a group.
                max_num_batched_tokens=max(8192, group * (longest + 1)),
                scheduler_cls=SCHEDULER if guided else None,
                logits_processors=processors_to_name() if guided else None,
            )
        except Exception as error:
            # vLLM raises exceptions of many types for a model or a machine that it does not support.
            raise self._unsupported(error) from error
        finally:
            torch.set_num_threads = set_num_threads

    def load(self, model: Any, weights: dict[str, Tensor]) -> None:
        """Replace the weights."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        self._llm.reset_prefix_cache()

    def generate(
        self, prompt_ids: Sequence[list[int]], requests: Sequence[dict[str, Any]], guidance: Mapping[str, Any]
    ) -> list[list[int]]:
        """Complete prompts; tokens beyond the original vocabulary are masked."""
        always = {"extra_args": {**guidance}} if guidance else {"allowed_token_ids": self._allowed}
        outputs = self._run(prompt_ids, [{**request, **always} for request in requests])
        return [list(output.outputs[0].token_ids) for output in outputs]

    def log_probs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Return the log-probability of each token of a sequence but the first."""
        outputs = self._run(sequences, [{"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}] * len(sequences))
        return [
            [tokens[token].logprob for token, tokens in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def _run(self, prompt_ids: Sequence[list[int]], fields: Sequence[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        params = [SamplingParams(**values, detokenize=False) for values in fields]
        try:
            return self._llm.generate(prompts, params, use_tqdm=False)
        except RuntimeError as error:  # Of attention, for example: some shapes are refused when they are computed.
            raise self._unsupported(error) from error

    def _unsupported(self, error: Exception) -> UserError:
        subject = f"engine vllm: must support {self._architecture} on this machine"
        return UserError(f"{subject} ({one_line(error)}). Set --engine builtin.")


class VllmServer:
    """A server of vLLM, which reads weights from the same file system.

    Args:
        url: of the server, without /v1.
        directory: where `load` writes the weights, and what the server serves.
        conditioning: the policy's reward tokens.
        tokenizer: puts the best reward tokens first.
        dtype: the data type of the server's weights, by name; for the command that a user is shown.
        guided: whether requests have guidance.
        note: shows a line to the user.
        stop_if_requested: ends the run while it waits for the server, if a signal requests it.
    """

    def __init__(
        self,
        url: str,
        directory: Path,
        conditioning: Conditioning,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        guided: bool,
        note: Callable[[str], None],
        stop_if_requested: Callable[[], None],
    ):
        self._stop_if_requested = stop_if_requested
        self._url, self._directory, self._dtype = url.rstrip("/"), directory.absolute(), dtype
        self._guided = guided
        self._conditioning, self._tokenizer, self._note = conditioning, tokenizer, note
        self._client = httpx2.Client(timeout=3600, limits=httpx2.Limits(max_connections=None))
        self._name: str | None = None
        self._banned: dict[str, Any] = {}

    @property
    def _command(self) -> str:
        serve = f"python -m vllm.entrypoints.openai.api_server --model {self._directory} --dtype {self._dtype}"
        return f"VLLM_SERVER_DEV_MODE=1 {serve}" + (f" --scheduler-cls {SCHEDULER}" if self._guided else "")

    def load(self, model: Any, weights: dict[str, Tensor]) -> None:
        """Write the weights, wait for the server if it has not started yet, and let it read them."""
        with atomic_directory(self._directory) as stage:
            write_shape(model, self._conditioning, stage)
            self._tokenizer.save_pretrained(stage)
            # Tied weights are written twice: vLLM would keep the old ones of a layer that is missing.
            whole = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
            save_file(whole, stage / "model.safetensors", {"format": "pt"})
        if self._name is None:
            self._name = self._wait()
            if self._guided:
                self._check_guidance()
            rows = next(iter(model.get_input_embeddings().parameters())).shape[0]
            padding = set(range(self._conditioning.vocab_size, rows)) - set(self._conditioning.new_token_ids)
            # vLLM masks "bad words". Rows without a token have no word; a bias of -100 is the strongest there is.
            self._banned = {"bad_words": self._conditioning.token_names}
            if padding:
                self._banned["logit_bias"] = {str(token): -100 for token in sorted(padding)}
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self._directory)}})
        self._post("/reset_prefix_cache", None)

    def generate(
        self, prompt_ids: Sequence[list[int]], requests: Sequence[dict[str, Any]], guidance: Mapping[str, Any]
    ) -> list[list[int]]:
        """Complete prompts; reward tokens are masked."""
        always = {**self._banned, **({"vllm_xargs": {**guidance}} if guidance else {})}
        answers = self._complete(prompt_ids, [{**request, **always} for request in requests])
        return [answer["token_ids"] for answer in answers]

    def log_probs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Return the log-probability of each token of a sequence but the first."""
        request = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answers = self._complete(sequences, [request] * len(sequences))
        return [
            [
                tokens[str(token)]["logprob"]
                for token, tokens in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True)
            ]
            for ids, answer in zip(sequences, answers, strict=True)
        ]

    def _complete(self, prompt_ids: Sequence[list[int]], requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send one request for each prompt, because each has a seed of its own."""
        always = {"model": self._name, "return_token_ids": True, "add_special_tokens": False}
        neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # Not the server's defaults.
        bodies = [
            {**always, **neutral, "prompt": list(ids), **request}
            for ids, request in zip(prompt_ids, requests, strict=True)
        ]
        with ThreadPoolExecutor(_SERVER_REQUESTS) as pool:
            return [
                answer["choices"][0] for answer in pool.map(lambda body: self._post("/v1/completions", body), bodies)
            ]

    def _check_guidance(self) -> None:
        """Check that the server reads guidance, and has the scheduler for it.

        Raises:
            UserError: it does not.
        """
        prompt = self._conditioning.prefix([0], self._conditioning.best)
        # The plugin refuses a negative γ. Without the scheduler it ends a request at once, by the stop token.
        refused = {"model": self._name, "prompt": prompt, "max_tokens": 1, "vllm_xargs": {SCALE: -1}}
        request = {"max_tokens": 1, "min_tokens": 1, "temperature": 0.0, "ignore_eos": True, "stop_token_ids": [0]}
        is_plugin = self._client.post(f"{self._url}/v1/completions", json=refused).status_code == 400
        if not is_plugin or self.generate([prompt], [request], {SCALE: 2}) == [[0]]:
            raise UserError(
                f"engine_url {self._url}: must sample with guidance. Install quarkrl in the server's environment, and "
                f"start it: {self._command}"
            )

    def _wait(self) -> str:
        """Return the name of the server's model, as soon as the server answers."""
        start, shows_command = time.monotonic(), True
        while True:
            try:
                answer = self._client.get(f"{self._url}/v1/models", timeout=10)
                answer.raise_for_status()
                return answer.json()["data"][0]["id"]
            except (httpx2.HTTPError, ValueError, LookupError) as error:
                if time.monotonic() - start > _SERVER_START:
                    raise UserError(
                        f"engine_url {self._url}: must answer ({one_line(error)}). Start it: {self._command}"
                    ) from error
            if shows_command:
                self._note(f"waiting for {self._url}. Start it, in another shell: {self._command}")
                shows_command = False
            self._stop_if_requested()
            time.sleep(1)

    def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        try:
            answer = self._client.post(f"{self._url}{path}", json=body)
        except httpx2.HTTPError as error:
            raise UserError(
                f"engine_url {self._url}: must answer ({one_line(error)}). Start it again: {self._command}"
            ) from error
        if answer.is_success:
            return answer.json() if answer.content else None
        if answer.status_code == 404:
            remedy = f"Start it with VLLM_SERVER_DEV_MODE=1, and with this directory: {self._command}"
            raise UserError(f"engine_url {self._url}: must accept new weights ({path} is not found). {remedy}")
        raise UserError(
            f"engine_url {self._url}: must accept {path}; it answers {answer.status_code}, "
            f"{one_line(RuntimeError(answer.text))}."
        )


def require_vllm() -> None:
    """Check that vLLM is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("engine vllm: needs the package vllm. Install it: pip install 'quarkrl[vllm]'")


def write_shape(model: Any, conditioning: Conditioning, directory: Path) -> None:
    """Write what vLLM reads of a model beside its weights and its tokenizer: its configuration, and `quark.json`."""
    config = copy.deepcopy(model.config)
    config.architectures, config.use_cache = [type(model).__name__], True
    config.save_pretrained(directory)
    conditioning.save(directory)


def _cache_bytes(config: Any, itemsize: int, rows: int, longest: int) -> int:
    """The size of vLLM's cache of keys and values: that of all rows, up to a limit. vLLM queues what does not fit."""
    shape = config.get_text_config()
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    blocks = 1 + longest // _BLOCK
    row = 2 * shape.num_hidden_layers * heads * width * itemsize * blocks * _BLOCK
    return max(2 * row, min(rows * row, _LARGEST_CACHE) + row)
