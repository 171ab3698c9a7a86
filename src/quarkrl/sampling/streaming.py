"""One completion, token by token, for a person who reads it while it is sampled."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from quarkrl.sampling.guidance import Contrast, make_decoder
from quarkrl.sampling.sampler import check_and_mask
from quarkrl.sampling.strategy import Sampling


def stream_tokens(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    seed: Sequence[int] = (),
    *,
    end_ids: Sequence[int],
    vocab_size: int,
    contrast: Contrast | None = None,
) -> Iterator[int]:
    """Yield the tokens that `sampler.sample` returns for one prompt, as they are sampled.

    Args:
        model: any causal language model, in eval mode.
        prompt_ids: token ids of the prompt, with reward tokens if they are wanted.
        sampling: the sampling options.
        seed: makes the completion repeatable.
        end_ids, vocab_size, contrast: as in `sample`.

    Raises:
        UserError: the model's logits are not finite.
    """
    decoder = make_decoder(model, [prompt_ids], contrast, vocab_size)
    uniforms = sampling.uniforms(1, *seed)
    numbers = None if uniforms is None else torch.from_numpy(uniforms).to(model.device)
    eos = torch.tensor(list(end_ids), dtype=torch.long, device=model.device)
    logits = decoder.prefill()
    for position in range(sampling.max_new_tokens):
        ruled_out = eos if position < sampling.min_new_tokens else None
        scores = check_and_mask(logits[:, :vocab_size].float(), ruled_out)
        tokens = sampling.next_tokens(scores, None if numbers is None else numbers[:, position])
        yield int(tokens)
        if int(tokens) in end_ids or position + 1 == sampling.max_new_tokens:
            return
        logits = decoder.step(tokens)
