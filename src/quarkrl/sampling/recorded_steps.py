"""Decoding steps recorded as CUDA graphs: the kernels of one forward pass, launched by one call for each token.

Python launches the kernels of a step one by one. If the model is small, this takes several times as long as the GPU
needs to run them. A graph needs tensors that stay where they are, so the cache of keys and values has a fixed size. The
graphs of `RecordedSteps` serve all batches of the same size while the weights stay where they are.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, StaticLayer

from quarkrl.models.encoder_decoder import is_encoder_decoder
from quarkrl.models.sharding import is_sharded
from quarkrl.sampling.decoder import CachedDecoder, ModelSource, forward_parameters

logger = logging.getLogger(__name__)

# Cache lengths are multiples of it, so that batches with prompts of other lengths have the same graph.
LENGTH_MULTIPLE = 32
# Recording takes about as long as two steps.
MIN_STEPS = 6
# Recorded steps that are kept. Each has a cache of its own, and the memory plan leaves half of the free memory to it.
MAX_STEPS = 2
_NOT_RECORDABLE: set[type] = set()  # Classes of models whose steps could not be recorded in this process.


class _Layer(StaticLayer):
    """Keys and values of one layer, in one dtype: under autocast, rotary embeddings make only the keys float32."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the cache, and return all of it."""
        return super().update(key_states.to(self.dtype), value_states.to(self.dtype), *args, **kwargs)


class RecordedStep:
    """A step of a batch of fixed size: appends a token to each row, and computes the logits of the next one.

    Args:
        model: the model.
        cache: of a batch, as the model makes it.
        batch_size: rows.
        length: tokens per row that there is space for.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch_size: int, length: int):
        device = model.device
        self.length = length
        self._model = model
        self._cache = Cache(layers=[_Layer(max_cache_len=length) for _ in cache.layers])
        keys_dtype, autocast = cache.layers[0].keys.dtype, torch.is_autocast_enabled(device.type)
        # Attention under autocast computes in its dtype anyway.
        self._dtype = torch.get_autocast_dtype(device.type) if autocast else keys_dtype
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self._mask = torch.ones(batch_size, length, dtype=torch.long, device=device)
        self._used = 0
        parameters = forward_parameters(model)
        optional = {"position_ids": self._positions, "logits_to_keep": 1}
        self._optional = {name: value for name, value in optional.items() if name in parameters}
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def load(self, cache: Cache, mask: Tensor) -> None:
        """Copy the keys and values of a batch.

        Args:
            cache: of the batch.
            mask: `(batch, tokens)`, 1 = counts.
        """
        self._used = mask.shape[1]
        self._mask[:, : self._used] = mask
        self._mask[:, self._used :] = 1  # Later tokens are ruled out by the causal mask.
        self._positions.copy_(mask.sum(1, keepdim=True) - 1)
        for layer, source in zip(self._cache.layers, cache.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(
                    *(states[:, :, :0].to(self._dtype) for states in (source.keys, source.values))
                )
            layer.keys[:, :, : self._used] = source.keys
            layer.values[:, :, : self._used] = source.values
            layer.cumulative_length.fill_(self._used)

    def rows(self, rows: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return copies of the keys and values of rows, layer by layer, and their `(rows, tokens)` mask."""
        used = self._used
        states = [(layer.keys[rows, :, :used], layer.values[rows, :, :used]) for layer in self._cache.layers]
        return states, self._mask[rows, :used]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, `(batch,)`; return the `(batch, vocab)` logits, which the next call replaces."""
        self._tokens.copy_(tokens[:, None])
        self._positions.add_(1)
        self._used += 1
        if self._tokens.device.type != "cuda":
            return self._forward()
        with torch.cuda.device(self._tokens.device):  # Streams are those of the current device.
            if self._recorded is None:
                self._recorded = self._record()
            graph, logits = self._recorded
            graph.replay()
        return logits

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return the recorded kernels, and where they write the logits."""
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):  # Libraries allocate their workspaces in a first pass.
            self._forward()
        current.wait_stream(other)
        for layer in self._cache.layers:
            layer.cumulative_length.sub_(1)
        graph = torch.cuda.CUDAGraph()
        try:
            # A reward may use the GPU in another thread meanwhile.
            with torch.cuda.graph(graph, stream=other, capture_error_mode="thread_local"):
                logits = self._forward()
        except BaseException:
            # After a failed recording, PyTorch leaves its stream current, and random numbers in the state of recording.
            torch.cuda.set_stream(current)
            generator = torch.cuda.default_generators[self._tokens.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph, logits

    def _forward(self) -> Tensor:
        output = self._model(
            input_ids=self._tokens,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **self._optional,
        )
        return output.logits[:, -1]


class RecordedSteps:
    """The recorded steps of models whose weights stay where they are: within a rollout, or a call of `complete`.

    Args:
        devices: types of the devices where steps are recorded. Others only get a cache of fixed size, for tests.
    """

    def __init__(self, devices: Sequence[str] = ("cuda",)):
        self._devices = devices
        self._steps: dict[tuple[PreTrainedModel, int], RecordedStep] = {}

    def decoder(
        self, model: ModelSource, prompts: Sequence[Sequence[int]], device: torch.device, num_steps: int
    ) -> CachedDecoder:
        """Return a decoder with one row for each prompt, whose steps are recorded if that is possible and worth it.

        Args:
            model: the model. The steps of a function that provides one are not recorded: it may change adapters.
            prompts: token ids.
            device: of the model.
            num_steps: the most steps that follow.
        """
        is_recordable = isinstance(model, torch.nn.Module) and not is_encoder_decoder(model)
        if num_steps < MIN_STEPS or device.type not in self._devices or not is_recordable:
            return CachedDecoder.for_prompts(model, prompts, device)
        decoder = RecordedDecoder.for_prompts(model, prompts, device)
        length = max(map(len, prompts)) + num_steps
        decoder.find_step = partial(self._find_step, model, -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
        decoder.drop_step = partial(self._drop_step, model)
        return decoder

    def _find_step(self, model: PreTrainedModel, length: int, cache: Cache, batch_size: int) -> RecordedStep | None:
        """Return the step for a batch; None if the model's cache is of another kind, or recording has failed."""
        if any(type(layer) is not DynamicLayer for layer in cache.layers) or is_sharded(model):
            return None
        if type(model) in _NOT_RECORDABLE:
            return None
        step = self._steps.pop((model, batch_size), None)
        if step is None or step.length < length:
            step = RecordedStep(model, cache, batch_size, length)
            while len(self._steps) >= MAX_STEPS:
                del self._steps[next(iter(self._steps))]
        self._steps[model, batch_size] = step  # The latest is the last.
        return step

    def _drop_step(self, model: PreTrainedModel, batch_size: int) -> None:
        """Free the memory of a step that could not be recorded."""
        self._steps.pop((model, batch_size), None)


class RecordedDecoder(CachedDecoder):
    """A `CachedDecoder` whose steps are recorded. `RecordedSteps.decoder` creates it."""

    min_share_to_remove = 1 / 2  # A smaller batch is recorded again.
    find_step: Callable[[Cache, int], RecordedStep | None]
    drop_step: Callable[[int], None]
    _step: RecordedStep | None = None
    _is_ordinary = False

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, `(batch,)`; return the `(batch, vocab)` logits of the next token."""
        if self._step is not None:
            return self._step(tokens)
        if not self._is_ordinary and (step := self.find_step(self._cache, self.batch_size)):
            try:
                step.load(self._cache, self._mask)
                logits = step(tokens)
            except RuntimeError as error:  # A model may do what no graph can record, such as read a number of the GPU.
                logger.warning(f"{type(self._model).__name__}: sampling is not recorded, and slower: {error}")
                if not isinstance(error, torch.OutOfMemoryError):
                    _NOT_RECORDABLE.add(type(self._model))
                self.drop_step(self.batch_size)
                del step
            else:
                self._step = step
                for layer in self._cache.layers:  # The recorded step has a copy.
                    layer.keys = layer.values = layer.keys.new_empty(0)
                return logits
        self._is_ordinary = True
        self.min_share_to_remove = CachedDecoder.min_share_to_remove
        return super().step(tokens)

    def select(self, rows: Tensor) -> None:
        """Replace the batch by the rows with these indices, `(n,)`."""
        if self._step is None:
            super().select(rows)
            return
        states, self._mask = self._step.rows(rows)
        for layer, (keys, values) in zip(self._cache.layers, states, strict=True):
            layer.keys, layer.values = keys, values
        self._step = None
