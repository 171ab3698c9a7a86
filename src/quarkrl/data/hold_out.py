"""Set prompts aside before training, so that the result of a run is measured on prompts that it never saw."""

import hashlib
import json
from typing import Any

from quarkrl.data.prompts import Prompts

# Fewer different prompts than this are all trained on. Of more, at most one in five is held out.
LEAST_PROMPTS, LARGEST_SHARE = 20, 0.2


def hold_out(prompts: Prompts, count: int) -> tuple[Prompts, Prompts]:
    """Split prompts into those to train on and those to measure on.

    The prompts with the smallest SHA-256 are held out, so the choice does not depend on their order. Equal prompts are
    on one side.

    Args:
        prompts: all prompts.
        count: how many to hold out at most.

    Returns:
        The prompts to train on, and the held-out ones, each once. The second is empty if there are too few prompts.
    """
    digests = [_digest(prompt) for prompt in prompts.prompts]
    distinct = sorted(set(digests))
    number = min(count, int(LARGEST_SHARE * len(distinct))) if len(distinct) >= LEAST_PROMPTS else 0
    chosen = set(distinct[:number])
    first = {digest: index for index, digest in reversed(list(enumerate(digests)))}
    kept = prompts.where([digest not in chosen for digest in digests])
    held_out = prompts.where([digest in chosen and first[digest] == index for index, digest in enumerate(digests)])
    held_out.skipped_rows = []
    return kept, held_out


def choose_prompts(prompts: Prompts, count: int) -> Prompts:
    """Return at most `count` prompts in their order, chosen as `hold_out` chooses; all of them if they are no more."""
    if len(prompts) <= count:
        return prompts
    order = sorted(range(len(prompts)), key=lambda index: _digest(prompts.prompts[index]))
    chosen = set(order[:count])
    return prompts.where([index in chosen for index in range(len(prompts))])


def _digest(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()
