"""What a model predicts at each position of known texts, over its original vocabulary."""

import numpy as np
import torch
from transformers import PreTrainedModel

from quarkrl.models.completion_logits import completion_logits


def predict(model: PreTrainedModel, batch: dict[str, torch.Tensor], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Predict the completion tokens of a batch, each from the true preceding tokens.

    Args:
        model: a causal language model.
        batch: from `build_batch`.
        vocab_size: V, the size of the original vocabulary. Reward tokens are no outputs and have no probability.

    Returns:
        `(n,)` negative log-likelihoods in nats and `(n,)` argmax predictions, in the order of the n tokens.
    """
    input_ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
    with torch.inference_mode():
        logits = completion_logits(model, input_ids, mask, labels)[:, :vocab_size].float()
        nll = torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="none")
        predicted = logits.argmax(-1)
    return nll.cpu().double().numpy(), predicted.cpu().numpy()
