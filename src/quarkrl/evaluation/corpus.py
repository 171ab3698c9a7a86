"""A model as a reader of text that people wrote: rep, wrep, token accuracy and perplexity (Welleck et al. 2020).

At each place of a text the model predicts the next token from the true ones before it. Texts longer than the model's
context are read in pieces that fit, side by side. A model that Quark trained reads each piece behind its reward
tokens; of every piece the first token is given, to it and to its reference alike, and not predicted. Predictions are
over the original vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quarkrl.errors import UserError
from quarkrl.evaluation.intervals import Interval, Ratio, intervals
from quarkrl.evaluation.perplexity import by_length
from quarkrl.metrics import last_seen
from quarkrl.models.batching import build_batch
from quarkrl.models.completion_logits import completion_logits
from quarkrl.sampling.generator import QuarkGenerator

# How far back a prediction counts as a repetition, in tokens (Welleck et al. 2020).
SPANS = (16, 32, 128, 512)


@dataclass(frozen=True)
class CorpusRow:
    """How well a model, asked for one quantile, predicts a corpus.

    Attributes:
        name: "reference", "model" or the quantile asked for.
        figures: metric name → value.
        intervals: metric name → its 95 % bootstrap interval, over texts.
        left_out: why texts did not count → how many.
        tokens: how many were predicted.
    """

    name: str
    figures: dict[str, float]
    intervals: dict[str, Interval]
    left_out: dict[str, int]
    tokens: int


def corpus_row(
    name: str,
    generator: QuarkGenerator,
    text_ids: Sequence[Sequence[int]],
    quantile: str | int,
    batch_size: int,
    resamples: int,
) -> CorpusRow:
    """Measure a model on texts.

    Args:
        name: of the row.
        generator: the model.
        text_ids: the texts' token ids, N of them, without reward tokens.
        quantile: what to ask for; "best" for a plain model.
        batch_size: pieces read at a time.
        resamples: of the bootstrap.

    Raises:
        UserError: no text has two tokens.
    """
    ratios = corpus_ratios(generator, text_ids, quantile, batch_size)
    short = sum(len(ids) < 2 for ids in text_ids)
    figures = {name: ratio.value for name, ratio in ratios.items()}
    found = intervals(ratios, resamples)
    # The mean NLL is the ratio; its exponential takes the interval's ends along.
    figures["perplexity"] = float(np.exp(figures["perplexity"]))
    found["perplexity"] = (float(np.exp(found["perplexity"][0])), float(np.exp(found["perplexity"][1])))
    tokens = int(ratios["token accuracy"].denominators.sum())
    return CorpusRow(name, figures, found, {"shorter than 2 tokens": short} if short else {}, tokens)


def corpus_ratios(
    generator: QuarkGenerator, text_ids: Sequence[Sequence[int]], quantile: str | int, batch_size: int
) -> dict[str, Ratio]:
    """Each metric as a ratio of sums over texts; "perplexity" is still the mean NLL, whose exponential it is.

    - token accuracy: share of argmax predictions that are the next token.
    - rep/l: share of argmax predictions that occur among the previous l tokens; wrep/l: and are wrong.
    - rep, wrep: mean over l.

    Raises:
        UserError: no text has two tokens.
    """
    prefix = len(generator.condition([], quantile))
    room = generator.context_length - prefix
    pieces = [
        (i, tuple(ids[start : start + room]))
        for i, ids in enumerate(text_ids)
        for start in range(0, len(ids), room)
        if len(ids) - start > 1
    ]
    if not pieces:
        raise UserError("the corpus has no text of two tokens or more: nothing can be predicted")
    names = ["perplexity", "token accuracy", *(f"{kind}/{span}" for kind in ("rep", "wrep") for span in SPANS)]
    sums = np.zeros((len(text_ids), len(names)))
    counts = np.zeros(len(text_ids))
    for batch in by_length(pieces, [prefix + len(ids) for _, ids in pieces], batch_size):
        for (i, ids), (nll, predicted) in zip(batch, _predict(generator, [p for _, p in batch], quantile), strict=True):
            wrong = predicted != np.asarray(ids[1:])
            back = last_seen(ids, predicted)
            repeated = [back <= span for span in SPANS]
            sums[i] += [nll.sum(), (~wrong).sum(), *(r.sum() for r in repeated), *((r & wrong).sum() for r in repeated)]
            counts[i] += len(ids) - 1
    ratios = {name: Ratio(sums[:, k], counts) for k, name in enumerate(names)}
    for kind in ("rep", "wrep"):
        columns = [k for k, name in enumerate(names) if name.startswith(f"{kind}/")]
        ratios[kind] = Ratio(sums[:, columns].mean(axis=1), counts)
    return ratios


def _predict(
    generator: QuarkGenerator, pieces: Sequence[Sequence[int]], quantile: str | int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each piece, NLL and argmax prediction of its second to last token."""
    given = [generator.condition(ids[:1], quantile) for ids in pieces]
    batch = build_batch(given, [ids[1:] for ids in pieces])
    device = generator.model.device
    input_ids, mask, labels = (batch[name].to(device) for name in ("input_ids", "attention_mask", "labels"))
    with torch.inference_mode():
        logits = completion_logits(generator.model, input_ids, mask, labels)[:, : generator.vocab_size].float()
        nll = torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="none")
        predicted = logits.argmax(-1)
    ends = np.cumsum([len(ids) - 1 for ids in pieces])[:-1]
    return list(zip(np.split(nll.double().cpu().numpy(), ends), np.split(predicted.cpu().numpy(), ends), strict=True))
