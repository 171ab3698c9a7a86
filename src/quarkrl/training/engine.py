"""Make the engine that samples a run's completions: the policy itself, or vLLM with a copy of its weights."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from quarkrl.sampling.engine import BuiltinEngine, SamplingEngine
from quarkrl.sampling.vllm_backends import Backend, ColocatedVllm, VllmServer
from quarkrl.sampling.vllm_engine import VllmEngine
from quarkrl.training.config import QuarkConfig


def make_engine(  # noqa: PLR0913 - two callbacks
    args: QuarkConfig,
    builtin: BuiltinEngine,
    *,
    shares_start: bool,
    prompts: Sequence[list[int]],
    longest: int,
    batch_size: int,
    tokenizer: PreTrainedTokenizerBase,
    note: Callable[[str], None],
    stop_if_requested: Callable[[], None],
) -> SamplingEngine:
    """Return the engine that the options name.

    Args:
        args: the run's options.
        builtin: the built-in engine.
        shares_start: whether policy and reference start with the same weights.
        prompts: token ids of the prompts to explore.
        longest: tokens of the longest prompt and its completion.
        batch_size: completions sampled at a time.
        tokenizer: puts the best reward tokens first.
        note: shows a line to the user.
        stop_if_requested: ends the run if a signal requests it.

    Raises:
        UserError: vLLM is not installed, or does not support the model.
    """
    if args.engine == "builtin":
        return builtin
    policy, dtype = builtin.policy_model(), _dtype_name(args, builtin.policy_model())
    backend: Backend
    if args.engine_url is None:
        model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        backend = ColocatedVllm(
            model,
            builtin.conditioning,
            dtype=dtype,
            longest=longest,
            batch_size=args.passes * batch_size,
            guided=args.passes > 1,
        )
    else:
        directory = Path(args.output_dir) / "engine"
        backend = VllmServer(
            args.engine_url,
            directory,
            builtin.conditioning,
            tokenizer,
            dtype=dtype,
            guided=args.passes > 1,
            note=note,
            stop_if_requested=stop_if_requested,
        )
    return VllmEngine(backend, builtin, shares_start=shares_start, prompts=prompts, dtype=dtype)


def _dtype_name(args: QuarkConfig, policy: Any) -> str:
    """The data type that the policy computes in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else str(policy.dtype).removeprefix("torch.")
