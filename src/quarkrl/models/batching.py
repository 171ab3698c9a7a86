"""Batches for a model: token sequences of unequal length as padded tensors, and items grouped by length.

The padding id is 0: the mask marks padding, the id never does.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Positions of a batch, padding included, that `batches_by_length` allows: a bound on memory.
_MAX_POSITIONS = 4096


def left_pad(rows: Sequence[Sequence[int]], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Pad sequences of token ids on the left, for a model that continues them.

    Returns:
        The ids and the attention mask (1 = counts), each `(batch, length)`.
    """
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return _to_tensor(ids, device), _to_tensor(mask, device)


def right_pad(rows: Sequence[Sequence[int]], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Pad sequences of token ids on the right, for a model that reads them once.

    Returns:
        The ids and the attention mask (1 = counts), each `(batch, length)`.
    """
    width = max(map(len, rows))
    ids = [list(row) + [0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return _to_tensor(ids, device), _to_tensor(mask, device)


def build_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Join prompts and completions into a right-padded batch with labels at the completion tokens.

    Args:
        prompts: token ids, one sequence per row of the batch.
        completions: token ids, as many sequences.

    Returns:
        `input_ids`, `attention_mask` (1 = counts) and `labels` (-100 outside the completion), each `(batch, length)`.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    input_ids, attention_mask = right_pad(rows)
    labels = torch.full_like(input_ids, -100)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        labels[i, len(prompt) : len(row)] = input_ids[i, len(prompt) : len(row)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def join_batches(batch: Mapping[str, Tensor], prefixes: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Join batches that have names with different prefixes, such as `ref_`, below each other.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each `(rows, length)`, padded on the right.
    """
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    width = max(batch[f"{prefix}labels"].shape[1] for prefix in prefixes)
    ids, mask, labels = (
        torch.cat([F.pad(t, (0, width - t.shape[1]), value=value) for t in (batch[f"{p}{name}"] for p in prefixes)])
        for name, value in padding.items()
    )
    return ids, mask, labels


def split_by_length(batch: Mapping[str, Tensor], max_positions: int) -> Iterator[dict[str, Tensor]]:
    """Split a right-padded batch into parts of similar length, and remove the padding that a part does not need.

    Args:
        batch: tensors of shape `(batch, length)`, among them `attention_mask`. Names with a prefix, such as `ref_`,
            have a mask of their own, and may have another length.
        max_positions: most positions of a part, padding included; a part has at least one row. A batch of no more
            positions stays as it is.
    """
    mask, suffix = batch["attention_mask"], "attention_mask"
    if mask.numel() <= max_positions:
        yield dict(batch)
        return
    prefixes = sorted((name.removesuffix(suffix) for name in batch if name.endswith(suffix)), key=len)
    masks = {name: batch[[p for p in prefixes if name.startswith(p)][-1] + suffix] for name in batch}
    lengths, start = mask.sum(1), 0
    order = lengths.argsort(stable=True)
    while start < len(order):
        count = 1
        while start + count < len(order) and lengths[order[start + count]] * (count + 1) <= max_positions:
            count += 1
        rows, part = order[start : start + count], {}
        for name, tensor in batch.items():
            part[name] = tensor[rows, : int(masks[name][rows].sum(1).max())]
        yield part
        start += count


def batches_by_length(items: Sequence[Any], lengths: Sequence[int], batch_size: int) -> Iterator[list[Any]]:
    """Yield batches of items of similar length, shortest first, so that little is padded.

    Args:
        items: what to group.
        lengths: of each item, in tokens.
        batch_size: most items in a batch. A batch has fewer where its padded size would exceed 4,096 tokens.
    """
    batch: list[Any] = []
    for i in sorted(range(len(items)), key=lambda i: lengths[i]):
        if batch and (len(batch) == batch_size or lengths[i] * (len(batch) + 1) > _MAX_POSITIONS):
            yield batch
            batch = []
        batch.append(items[i])
    if batch:
        yield batch


def _to_tensor(rows: list[list[int]], device: torch.device | str | None) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=device)
