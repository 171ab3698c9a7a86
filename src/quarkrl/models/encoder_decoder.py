"""How an encoder–decoder model, such as T5 or BART, reads a prompt and its completion.

The encoder reads the prompt: prefix, text, and the special tokens that the tokenizer puts behind a text. The decoder
writes the completion behind start ids of its own. Elsewhere prompt and completion are one row of token ids, as for a
decoder-only model. Two places separate them: `completion_logits.forward_at_completions`, and `sampling.decoder`.
"""

from typing import Any

import torch
from torch import Tensor

from quarkrl.errors import UserError


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model of transformers has an encoder for the prompt."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def decoder_start_ids(model: Any) -> list[int]:
    """Return the ids that precede each completion in the decoder, as `generate` puts them there.

    They are the decoder's start token, and the token that the generation config forces behind it, such as BOS or the
    code of a language.
    """
    config = model.generation_config
    starts = config.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None), config.bos_token_id
    forced = config.forced_bos_token_id
    return [next(start for start in starts if start is not None), *([] if forced is None else [forced])]


def check_encoder_decoder(model: Any, option: str) -> None:
    """Check that Quark can train a model, if it is an encoder–decoder model.

    Raises:
        UserError: encoder and decoder have separate vocabularies.
    """
    if not is_encoder_decoder(model):
        return
    inputs = model.get_input_embeddings()
    parts = [part and part.get_input_embeddings() for part in (model.get_encoder(), model.get_decoder())]
    if any(part is None or part.weight is not inputs.weight for part in parts):
        raise UserError(
            f"{option} {type(model).__name__}: must share one input embedding between encoder and decoder, as T5 and "
            "BART do. Choose another model."
        )


def separate(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Separate the prompts of a batch from its completions.

    Args:
        model: an encoder–decoder model.
        input_ids, attention_mask, labels: `(batch, length)`, as in `completion_logits`. Prompts come first.

    Returns:
        The inputs of the model, and the decoder's positions that predict a completion token, `(batch, decoder length)`.
    """
    in_completion = labels != -100
    in_prompt = attention_mask.bool() & ~in_completion
    counts = in_completion.sum(1, keepdim=True)  # (batch, 1)
    longest_prompt, longest_completion = int(in_prompt.sum(1).max()), int(counts.max())
    order = (~in_completion).int().argsort(dim=1, stable=True)[:, :longest_completion]
    completions = input_ids.gather(1, order)
    starts = torch.tensor(decoder_start_ids(model), device=input_ids.device).expand(len(input_ids), -1)
    exists = torch.arange(longest_completion, device=input_ids.device) < counts
    inputs = {
        "input_ids": input_ids[:, :longest_prompt],
        "attention_mask": in_prompt[:, :longest_prompt].to(attention_mask.dtype),
        "decoder_input_ids": torch.cat((starts, completions[:, :-1]), 1),  # The last token predicts nothing.
    }
    return inputs, torch.cat((exists.new_zeros(len(exists), starts.shape[1] - 1), exists), 1)
