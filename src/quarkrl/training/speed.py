"""Measure how fast a model samples and learns, before its run starts: the plan's time, and what fits into a budget."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quarkrl.data.prompts import Prompts
from quarkrl.models.batching import build_batch
from quarkrl.models.completion_logits import completion_logits
from quarkrl.models.eval_mode import eval_mode
from quarkrl.models.loading import eos_ids, longest_prompt
from quarkrl.sampling.sampler import complete
from quarkrl.training.config import QuarkConfig
from quarkrl.training.runtime_tuning import limit_onednn_caches
from quarkrl.training.sizing import Speed

_FEW, _MANY = 8, 64  # Completions of the first measurement, and of the second if the first is quick.
_MANY_ON_GPU = 512  # A GPU takes about as long for one completion as for hundreds.
_QUICK = 0.5  # seconds
_FEW_ROWS = 16  # Texts that are read at a time: their logits take memory.
# A backward pass takes twice as long as a forward pass. With a KL term, the reference adds one.
_PASSES_OF_LEARNING = 3


def measure_speed(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, args: QuarkConfig) -> Speed | None:
    """Sample some completions and read them again; no weight, file or random state changes.

    Args:
        model: the model before training. It is moved to the device of the run.
        tokenizer: encodes the prompts.
        prompts: of the run.
        args: its options.

    Returns:
        The speed; None if no prompt can be encoded.
    """
    limit_onednn_caches()  # Before the first product of the process.
    limit = longest_prompt(model, args.max_completion_length)
    on_gpu = args.device.type == "cuda"
    encoded = prompts.first(_MANY).encode(tokenizer, max_length=limit, skip_bad=True, allow_none=True)
    if not len(encoded):
        return None
    model.to(args.device)
    with eval_mode(model), torch.no_grad(), _autocast(args):
        for count in (_FEW, _MANY_ON_GPU) if on_gpu else (_FEW, _MANY):
            ids = [encoded.ids[i % len(encoded)] for i in range(count)]
            speed = _measure(model, tokenizer, ids, args)
            if speed.per_completion * count > _QUICK and not on_gpu:  # On a GPU, the first warms up.
                break
    return speed


def _measure(model: Any, tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], args: QuarkConfig) -> Speed:
    rows = model.get_input_embeddings().weight.shape[0]
    start = time.perf_counter()
    completions = complete(
        model, ids, args.sampling(0), end_ids=eos_ids(model, tokenizer, rows), vocab_size=rows, seed=args.seed
    )
    sampled = time.perf_counter()
    batch = build_batch(ids[:_FEW_ROWS], completions[:_FEW_ROWS])
    completion_logits(model, **{name: tensor.to(args.device) for name, tensor in batch.items()})
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    read = time.perf_counter() - sampled
    passes = _PASSES_OF_LEARNING + bool(args.kl_coef)
    return Speed((sampled - start) / len(ids), passes * read / len(batch["labels"]))


def _autocast(args: QuarkConfig) -> Any:
    return torch.autocast(args.device.type, torch.bfloat16) if args.bf16 else nullcontext()
