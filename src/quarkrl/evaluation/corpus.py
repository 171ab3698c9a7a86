"""Metrics of a model on human-written texts: rep, wrep, token accuracy and perplexity (Welleck et al. 2020).

At each position the model predicts the next token from the true preceding tokens. A text longer than the context is
split into chunks that fit. A model with reward tokens reads each chunk after the requested reward tokens. The first
token of a chunk is not predicted, for the model and its reference alike. Predictions are over the original vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from quarkrl.errors import UserError
from quarkrl.evaluation.intervals import Ratio, intervals
from quarkrl.evaluation.predictions import predict
from quarkrl.evaluation.results import CorpusRow
from quarkrl.metrics import last_seen
from quarkrl.models.batching import batches_by_length, build_batch
from quarkrl.sampling.generator import QuarkGenerator

# The distances l, in tokens, within which a prediction counts as a repetition (Welleck et al. 2020).
SPANS = (16, 32, 128, 512)


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
        text_ids: N lists of token ids, without reward tokens.
        quantile: the quantile to request; "best" for a model without quantiles.
        batch_size: chunks per batch.
        resamples: number of bootstrap resamples.

    Raises:
        UserError: no text has two tokens.
    """
    ratios = corpus_ratios(generator, text_ids, quantile, batch_size)
    too_short = sum(len(ids) < 2 for ids in text_ids)
    figures = {metric: ratio.value for metric, ratio in ratios.items()}
    ranges = intervals(ratios, resamples)
    # The ratio is the mean NLL. The exponential is monotonic, so it maps the interval's ends too.
    low, high = ranges["perplexity"]
    figures["perplexity"] = float(np.exp(figures["perplexity"]))
    ranges["perplexity"] = (float(np.exp(low)), float(np.exp(high)))
    tokens = int(ratios["token accuracy"].denominators.sum())
    return CorpusRow(name, figures, ranges, {"shorter than 2 tokens": too_short} if too_short else {}, tokens)


def corpus_ratios(
    generator: QuarkGenerator, text_ids: Sequence[Sequence[int]], quantile: str | int, batch_size: int
) -> dict[str, Ratio]:
    """Return each metric as a ratio of sums over texts. "perplexity" is the mean NLL, without the exponential.

    - token accuracy: the share of argmax predictions that equal the next token.
    - rep/l: the share of argmax predictions that occur among the previous l tokens; wrep/l: and are wrong.
    - rep, wrep: means over l.

    Raises:
        UserError: no text has two tokens.
    """
    prefix_length = len(generator.condition([], quantile))
    chunk_length = generator.context_length - prefix_length
    chunks = [
        (i, tuple(ids[start : start + chunk_length]))
        for i, ids in enumerate(text_ids)
        for start in range(0, len(ids), chunk_length)
        if len(ids) - start > 1
    ]
    if not chunks:
        raise UserError("corpus: no text has two tokens, so no token can be predicted. Choose longer texts.")
    names = ["perplexity", "token accuracy", *(f"{kind}/{span}" for kind in ("rep", "wrep") for span in SPANS)]
    sums = np.zeros((len(text_ids), len(names)))
    counts = np.zeros(len(text_ids))
    for batch in batches_by_length(chunks, [prefix_length + len(ids) for _, ids in chunks], batch_size):
        predictions = _predict(generator, [ids for _, ids in batch], quantile)
        for (i, ids), (nll, predicted) in zip(batch, predictions, strict=True):
            wrong = predicted != np.asarray(ids[1:])
            distances = last_seen(ids, predicted)
            repeated = [distances <= span for span in SPANS]
            sums[i] += [nll.sum(), (~wrong).sum(), *(r.sum() for r in repeated), *((r & wrong).sum() for r in repeated)]
            counts[i] += len(ids) - 1
    ratios = {name: Ratio(sums[:, k], counts) for k, name in enumerate(names)}
    for kind in ("rep", "wrep"):
        columns = [k for k, name in enumerate(names) if name.startswith(f"{kind}/")]
        ratios[kind] = Ratio(sums[:, columns].mean(axis=1), counts)
    return ratios


def _predict(
    generator: QuarkGenerator, chunks: Sequence[Sequence[int]], quantile: str | int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each chunk of n tokens, `(n - 1,)` NLL and `(n - 1,)` argmax prediction of its second to last token."""
    conditioned = [generator.condition(ids, quantile) for ids in chunks]
    conditioning = generator.conditioning
    prefixes = [
        (conditioning.position(ids) if conditioning else 0, len(whole) - len(ids))
        for ids, whole in zip(chunks, conditioned, strict=True)
    ]
    starts = [1 if position else 1 + length for position, length in prefixes]
    split = [(ids[:start], ids[start:]) for ids, start in zip(conditioned, starts, strict=True)]
    batch = build_batch([prompt for prompt, _ in split], [text for _, text in split])
    for row, (position, length) in enumerate(prefixes):
        # A prefix that follows the special tokens is not predicted.
        batch["labels"][row, position : position + length] = -100
    nll, predicted = predict(generator.model, batch, generator.vocab_size)
    ends = np.cumsum([len(ids) - 1 for ids in chunks])[:-1]
    return list(zip(np.split(nll, ends), np.split(predicted, ends), strict=True))
