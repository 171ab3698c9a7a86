"""Guidance in vLLM: the logits processor, which an entry point registers (`vllm.logits_processors`).

    vllm serve runs/x/final --scheduler-cls quarkrl.sampling.vllm_scheduler.GuidedScheduler

A request names its γ in `vllm_xargs`: `{"guidance_scale": 2}`. `GuidedScheduler` adds a second request, the
contrast, and keeps both in step. This processor combines their logits (`engine_guidance`). It leaves requests
without guidance alone.

vLLM has two model runners with an interface each. The class implements both: an entry point names one class, and the
second runner refuses one without its interface. The API server loads this module too, to validate requests. Without
vLLM the module can be imported, and the class has no base.
"""

import logging
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from quarkrl.errors import UserError
from quarkrl.sampling.engine_guidance import SCALE, GroupMember, guide_rows, read_guidance

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunnerProcessor
except ImportError:
    _BASES: tuple[type, ...] = ()
else:
    _BASES = (FirstRunnerProcessor,)
    try:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunnerProcessor
    except ImportError:  # vLLM before 0.32
        pass
    else:
        _BASES = (FirstRunnerProcessor, SecondRunnerProcessor)

GROUP = "quarkrl_group"  # Where the scheduler puts the `GroupMember` into the arguments of a request.
SCHEDULER = "quarkrl.sampling.vllm_scheduler.GuidedScheduler"
PROCESSOR = "quarkrl.sampling.vllm_guidance:GuidanceLogitsProcessor"

# These act behind logits processors, and guidance has chosen the token by then.
_UNSUPPORTED = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "prompt_logprobs": None}

logger = logging.getLogger("vllm.quarkrl")  # Below vLLM's logger, which has a handler.


def processors_to_name() -> list[str]:
    """Return what an engine must be given as `logits_processors`: nothing if the package is installed as a plugin."""
    plugins = entry_points(group="vllm.logits_processors")
    return [] if PROCESSOR in [plugin.value for plugin in plugins] else [PROCESSOR]


class GuidanceLogitsProcessor(*_BASES):  # type: ignore[misc]
    """Samples guided requests; for vLLM, which creates it.

    Args:
        vllm_config: the configuration of the engine.
        runner_state: what the model runner adds, which this class does not need.
    """

    def __init__(self, vllm_config: Any, *runner_state: Any):
        # First runner: by row, the request, the length of its prompt, and its output, which grows.
        self._rows: dict[int, tuple[GroupMember | int, int, list[int]]] = {}
        # Second runner: by slot, the request.
        self._slots: dict[int, GroupMember | int] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check the arguments of a request; vLLM answers with the message and status 400.

        Raises:
            UserError: an argument is out of its limits, or another option has no effect with guidance.
        """
        arguments = sampling_params.extra_args or {}
        if GROUP in arguments:
            raise UserError(f"{GROUP}: must not be set by a client. Set {SCALE}.")
        if read_guidance(arguments) is None:
            return
        for name, neutral in _UNSUPPORTED.items():
            if (value := getattr(sampling_params, name)) != neutral:
                raise UserError(f"{name} {value}: must be {neutral} with {SCALE}. Remove it.")

    def is_argmax_invariant(self) -> bool:
        """Whether greedy decoding needs no call; first runner."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the batch; first runner."""
        from vllm.v1.sample.logits_processor import process_dict_updates

        process_dict_updates(self._rows, batch_update, self._new_row)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Remember a request by its slot, and return whether it is guided; second runner."""
        request = _guided_request(sampling_params)
        if request is None:
            self._slots.pop(req_idx, None)
            return False
        self._slots[req_idx] = request
        return True

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Choose the tokens of guided requests, in place.

        Args:
            logits: `(batch, vocab)` in float32.
            ctx: the layout of the batch; second runner.
        """
        if ctx is None:
            rows = {row: (request, length + len(output)) for row, (request, length, output) in self._rows.items()}
        else:
            lengths = ctx.seq_lens_upper_bound_np
            rows = {
                row: (self._slots[slot], int(lengths[row]))
                for row, slot in enumerate(ctx.idx_mapping_np.tolist())
                if slot in self._slots
            }
        for row, (request, _) in rows.items():
            if isinstance(request, int):  # Refused: it ends.
                logits[row] = -torch.inf
                logits[row, request] = 0.0
        guided = {row: (request, length) for row, (request, length) in rows.items() if isinstance(request, GroupMember)}
        return guide_rows(logits, guided)

    def _new_row(
        self, params: Any, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> tuple[GroupMember | int, int, list[int]] | None:
        request = _guided_request(params)
        return None if request is None else (request, len(prompt_ids or ()), output_ids)


def _guided_request(params: Any) -> GroupMember | int | None:
    """Return the part of a request in its group; or, without `GuidedScheduler`, the token that ends it; or None."""
    arguments = params.extra_args or {}
    if GROUP in arguments or read_guidance(arguments) is None:
        return arguments.get(GROUP)
    # An exception would stop the engine, for all its clients. A completion without guidance would be a wrong one.
    logger.error("%s needs vllm serve --scheduler-cls %s. The request gets an empty completion.", SCALE, SCHEDULER)
    return params.eos_token_id if params.eos_token_id is not None else min(params.all_stop_token_ids, default=0)
