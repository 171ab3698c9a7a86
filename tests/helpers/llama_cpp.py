"""llama.cpp's server, of the package xllamacpp, in this process."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


class LlamaServer:
    """Serves a GGUF file on loopback, with greedy sampling on one thread.

    Args:
        path: the file.
        banned_ids: never sampled, as final/ bans reward tokens by its generation config.
    """

    def __init__(self, path: Path, banned_ids: Sequence[int]):
        self._options = {"temperature": 0, "logit_bias": [[i, False] for i in banned_ids]}
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.port, params.verbosity = str(path), 0, 0
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # Flash attention would keep keys and values in half precision.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)

    def post(self, path: str, **body: Any) -> Any:
        """Send a request and return the answer."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self._server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as response:
            return json.load(response)

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text as a prompt."""
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def render(self, question: str, **arguments: str) -> str:
        """A question as the chat template writes it, without the BOS that precedes a prompt.

        Args:
            question: a message of the user.
            arguments: of the template.
        """
        messages = [{"role": "user", "content": question}]
        return self.post("/apply-template", messages=messages, chat_template_kwargs=arguments)["prompt"]

    def complete(self, prompt: str | list, count: int) -> list[int]:
        """The ids of a greedy completion of a text, or of a list of ids and texts."""
        answer = self.post("/completion", prompt=prompt, n_predict=count, return_tokens=True, **self._options)
        return answer["tokens"]

    def answer(self, question: str, count: int) -> str:
        """The text of a greedy answer to a question."""
        messages = [{"role": "user", "content": question}]
        answer = self.post("/v1/chat/completions", messages=messages, max_tokens=count, **self._options)
        return answer["choices"][0]["message"]["content"]
