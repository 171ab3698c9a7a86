"""Make the engine that samples a run's completions: the policy itself, or vLLM with a copy of its weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from quarkrl.sampling.engine import BuiltinEngine, SamplingEngine
from quarkrl.sampling.vllm_backends import Backend, ColocatedVllm, VllmServer
from quarkrl.sampling.vllm_engine import VllmEngine
from quarkrl.training.config import QuarkConfig
from quarkrl.training.setup import Start


def make_engine(
    start: Start,
    *,
    policy_model: Callable[[], Any],
    reference_model: Callable[[], AbstractContextManager[Any]],
    autocast: Callable[[], AbstractContextManager[Any]],
    note: Callable[[str], None],
    stop_if_requested: Callable[[], None],
) -> SamplingEngine:
    """Return the engine that the options name.

    Args:
        start: the options, the models and the prompts of the run.
        policy_model: returns the policy.
        reference_model: a context with the reference p_0.
        autocast: a context for forward passes.
        note: shows a line to the user.
        stop_if_requested: ends the run if a signal requests it.

    Raises:
        UserError: vLLM is not installed, or does not support the model.
    """
    args, models, memory_plan = start.args, start.models, start.memory_plan
    builtin = BuiltinEngine(
        policy_model=policy_model,
        ref_model=models.reference,
        reference_model=reference_model,
        conditioning=models.conditioning,
        end_ids=start.end_ids,
        guidance_from=args.guidance_from,
        autocast=autocast,
        merges_adapters=memory_plan.merges_adapters,
    )
    if args.engine == "builtin":
        return builtin
    policy, dtype = policy_model(), _dtype_name(args, policy_model())
    batch_size = max(memory_plan.generation_batch_size, args.per_device_eval_batch_size)
    backend: Backend
    if args.engine_url is None:
        model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        backend = ColocatedVllm(
            model,
            models.conditioning,
            dtype=dtype,
            longest=start.longest_prompt + args.max_completion_length,
            batch_size=args.passes * batch_size,
            guided=args.passes > 1,
        )
    else:
        directory = Path(args.output_dir) / "engine"
        backend = VllmServer(
            args.engine_url,
            directory,
            models.conditioning,
            models.steered_tokenizer,
            dtype=dtype,
            guided=args.passes > 1,
            note=note,
            stop_if_requested=stop_if_requested,
        )
    shares_start, prompts = models.shares_start, start.supply.first.ids
    return VllmEngine(backend, builtin, shares_start=shares_start, prompts=prompts, dtype=dtype)


def _dtype_name(args: QuarkConfig, policy: Any) -> str:
    """The data type that the policy computes in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else str(policy.dtype).removeprefix("torch.")
