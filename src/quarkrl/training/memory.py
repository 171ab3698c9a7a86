"""How much memory a run takes, estimated before it begins.

Two peaks count: while exploring, the cache of keys and values with what reading the prompts takes, or later with the
logits of a batch; while learning, what a forward pass keeps for its backward pass and what the loss takes, or all
gradients at once if those are more. The formulas count floats that autograd keeps, per token and layer, and arrays that
the loss makes; tests/test_memory.py holds them against measured peaks. Not counted: the interpreter and its libraries
(about half a GB of main memory), a classifier that scores, experts of a mixture, the copy into which `save_final`
merges an adapter.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.activations import NewGELUActivation

from quarkrl.algorithm.sliced_loss import GRADIENT_CHUNK_ELEMENTS, default_slice_length
from quarkrl.models.head_access import is_one_product

# Arrays of batch x vocabulary that the choice of a token makes (decoding.py), without and with a nucleus; and that a
# contrast of two does (guidance.py).
_SAMPLING_ARRAYS, _GUIDED_ARRAYS = {False: 4, True: 6}, 8
# What comes and goes takes more room in main memory, as glibc keeps pieces of what is freed unless they are larger than
# its DEFAULT_MMAP_THRESHOLD_MAX: 1.1 to 1.6 times as much in tests/test_memory.py, more with gradient checkpointing. A
# cache that grows in bf16 took 1.2 to 2.1 times as much, perhaps as what oneDNN keeps lies in between. On a GPU nothing
# was measured.
_CPU_SLACK, _BF16_SLACK, _GIVEN_BACK = 1.5, 2.0, 2**25
# Arrays that an optimizer keeps of the trained parameters, each as large as they are but where it is of 8 or 4 bits.
_STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "adafactor": 0, "sgd": 0, "lomo": 0}


@dataclass(frozen=True)
class Anatomy:
    """What of a model its memory depends on.

    Attributes:
        weights, trained: bytes of all its parameters, and of those that are learned.
        layers, width, heads, kv_width, inner, vocab: as its config has them; `kv_width` is that of a token's keys.
        size: bytes of a number.
        norms: arrays of the width that a layer keeps for its norms.
        mlp: arrays of the inner width that a layer keeps for its feed-forward part.
        eager: attention keeps its scores.
        dropout, attention_dropout: whether there is any.
        head: bytes of the output matrix if it is learned: its gradient comes while all else is still kept.
        tied: it is the input matrix, too.
        reached: the loss makes logits of it a slice at a time; else they are held whole.
        merged: bytes of the embedding, if an adapter writes it anew in each pass, for the reward tokens' rows.
        rotary: positions are turned into queries and keys, in full even by autocast.
    """

    weights: int
    trained: int
    layers: int
    width: int
    heads: int
    kv_width: int
    inner: int
    vocab: int
    size: int = 4
    norms: float = 4
    mlp: int = 2
    eager: bool = True
    dropout: bool = False
    attention_dropout: bool = False
    head: int = 0
    tied: bool = True
    reached: bool = True
    merged: int = 0
    rotary: bool = False

    @classmethod
    def of(cls, model: Any) -> "Anatomy":
        """That of a causal language model, with an adapter or without."""
        config = model.config.get_text_config()
        parameters = list(model.parameters())
        embedding = model.get_input_embeddings().weight
        width = _number(config, "hidden_size") or embedding.shape[1]
        layers, heads = _number(config, "num_hidden_layers") or 1, _number(config, "num_attention_heads") or 1
        output = model.get_output_embeddings()
        head = 0 if output is None or not output.weight.requires_grad else bytes_of([output.weight])
        modules = list(model.named_modules())
        names = {name.rsplit(".", 1)[-1] for name, _ in modules}
        gated = bool(names & {"gate_proj", "gate_up_proj", "w1"})
        kinds = [(type(module).__name__, _first_size(module)) for _, module in modules]
        wide = sum("Norm" in kind and size == width for kind, size in kinds) / max(layers, 1)
        narrow = sum("Norm" in kind and size != width and size > 0 for kind, size in kinds) / max(layers, 1)
        # An RMS norm is written in several steps: it keeps what comes, what goes, and if it learns what is normed.
        rms = any("RMSNorm" in type(m).__name__ and any(p.requires_grad for p in m.parameters()) for _, m in modules)
        merged = any("TrainableTokensLayer" in kind for kind, _ in kinds) * bytes_of([embedding])
        return cls(
            weights=bytes_of(parameters),
            trained=bytes_of(p for p in parameters if p.requires_grad),
            layers=layers,
            width=width,
            heads=heads,
            kv_width=(_number(config, "num_key_value_heads") or heads)
            * (_number(config, "head_dim") or width // heads),
            inner=_number(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * width,
            vocab=embedding.shape[0],
            size=embedding.element_size(),
            norms=round(wide) * (3 if rms else 2) + round(narrow) * 2,
            mlp=4 if gated else 5 if any(isinstance(module, NewGELUActivation) for _, module in modules) else 2,
            eager=getattr(config, "_attn_implementation", None) in (None, "eager"),
            dropout=bool(_number(config, "resid_pdrop", "hidden_dropout", "resid_dropout", "dropout")),
            attention_dropout=bool(_number(config, "attn_pdrop", "attention_dropout")),
            head=head,
            tied=sum(p.shape == embedding.shape for p in parameters) < 2,
            reached=is_one_product(output),
            merged=merged,
            rotary=any("Rotary" in kind for kind, _ in kinds),
        )


@dataclass(frozen=True)
class Load:
    """What of a run its memory depends on.

    Attributes:
        batch: samples of a micro-batch.
        prompt, completion: tokens, of the longest; reward tokens count to the prompt.
        explored: completions sampled at a time.
        reference: bytes of a reference of its own; 0 where there is none, or it is the policy without its adapter.
        kl: the reference is read while learning.
        tempered: the NLL has a temperature, and so a softmax of its own.
        optimizer: the name in `transformers`.
        accumulates: gradients are kept from one micro-batch to the next.
        checkpointed: gradient checkpointing.
        mixed: numbers of 2 bytes in the passes, by autocast.
        guided: each completion is read twice.
        by_reference: the second time by the reference, in passes of its own.
        nucleus: tokens are drawn from one.
        processes: that learn together.
        samples: in the pool at the end.
        cpu: all is in main memory.
    """

    batch: int
    prompt: int
    completion: int
    explored: int
    reference: int = 0
    kl: bool = True
    tempered: bool = False
    optimizer: str = "adamw_torch"
    accumulates: bool = False
    checkpointed: bool = False
    mixed: bool = False
    guided: bool = False
    by_reference: bool = False
    nucleus: bool = False
    processes: int = 1
    samples: int = 0
    cpu: bool = True


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what they are for, and the two peaks.

    `exploring` and `learning` are not sums of all: gradients come as activations go, and a cache is only for exploring.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    cache: int
    sampling: int
    pool: int
    exploring: int
    learning: int

    @property
    def total(self) -> int:
        return max(self.exploring, self.learning)

    def __str__(self) -> str:
        names = ("weights", "reference", "gradients", "optimizer", "activations", "loss", "cache", "sampling", "pool")
        sizes = {name: gigabytes(getattr(self, name)) for name in names}
        parts = ", ".join(f"{name} {size}" for name, size in sizes.items() if float(size))
        peaks = f"exploring {gigabytes(self.exploring)}, learning {gigabytes(self.learning)}"
        return f"about {gigabytes(self.total)} GB ({peaks}; {parts})"


def estimate(model: Anatomy, load: Load) -> Estimate:
    """The memory of a run, in bytes.

    Args:
        model: the policy.
        load: what is done with it.
    """

    def room(size: float, piece: float, slack: float = _CPU_SLACK) -> float:
        return size * slack if load.cpu and piece < _GIVEN_BACK else size

    table = model.vocab * model.width * model.size
    gradients, states = model.trained, optimizer_bytes(load.optimizer, model.trained, model.size)
    tokens = load.batch * (load.prompt + load.completion)
    activations = activation_bytes(model, load, tokens)
    kept = room(activations, tokens * model.width * model.size)
    if load.mixed and model.size == 4:  # Autocast keeps copies for the backward pass, of all but the embeddings.
        kept += (model.weights - table * (1 if model.tied else 2)) // 2
    kept += (gradients if load.accumulates else 0) + (model.merged if model.head else 0)
    slice_ = min(load.batch * load.completion, default_slice_length(model.vocab)) * model.vocab * max(4, model.size)
    loss, gradient = loss_bytes(model, load, slice_)
    comes_and_goes = max(
        kept + room(loss, slice_),
        # Backwards the gradient that the loss has kept is scaled, into a second array.
        kept + 2 * gradient + (0 if model.reached else model.head),
        # In the end, where a tied matrix has that of the layers' side in an array of its own until it is added.
        gradients + gradient + (model.head if model.tied else 0),
    )
    reduced = gradients if load.processes > 1 else 0  # The buckets in which processes exchange them.
    at_once = load.explored * (2 if load.guided else 1)
    # Keys in full and values narrowed, if positions are turned into keys in full.
    number = 3 if model.rotary and load.mixed and model.size == 4 else _narrow(model, load)
    cached = at_once * (load.prompt + load.completion) * model.kv_width * number
    cache = cached * model.layers * 2
    asked = load.prompt / (load.prompt + load.completion)  # The share of the cache that reading the prompts makes.
    reading = _reading_bytes(model, load, load.explored if load.by_reference else at_once)
    chosen = load.explored * model.vocab * 4
    choice = chosen * (_GUIDED_ARRAYS if load.guided else _SAMPLING_ARRAYS[load.nucleus])
    begins = room(cache * asked, cached * asked) + sum(room(size, piece) for size, piece in reading)
    slack = _BF16_SLACK if load.mixed else _CPU_SLACK
    goes_on = room(cache, cached * asked, slack) + room(choice, chosen, slack)  # Its pieces were smaller at first.
    cast = 0
    if load.mixed and model.size == 4:  # By autocast, kept for a batch.
        cast = (model.weights - (0 if model.tied else table)) // 2
        if load.by_reference:  # Half of it in 4 bytes, none in 2.
            cast += max(load.reference - model.weights // 2, 0)
    pool = load.samples * (4 * (load.prompt + load.completion) + 30)
    always = model.weights + load.reference + states + reduced + (pool if load.cpu else 0)
    return Estimate(
        weights=model.weights,
        reference=load.reference,
        gradients=gradients,
        optimizer=states,
        activations=activations,
        loss=loss,
        cache=cache,
        sampling=max(sum(size for size, _ in reading), choice),
        pool=pool,
        exploring=int(always + cast + max(begins, goes_on) + model.merged),
        learning=int(always + comes_and_goes),
    )


def activation_bytes(model: Anatomy, load: Load, tokens: int) -> int:
    """What a forward pass over so many tokens keeps for the backward pass, without logits.

    A layer keeps, for each token: what goes into and comes out of its norms; query, key, value, and what attention
    gives; its feed-forward part; if attention is eager, a score for each other token, thrice where some are dropped.
    """
    length = load.prompt + load.completion
    narrow, wide = _narrow(model, load), max(4, model.size) if load.mixed else model.size
    mask = 4 if load.cpu else 1  # torch draws a dropout's mask as numbers on a CPU, as bits elsewhere.
    # Attention with dropout has no kernel on a CPU.
    scores = model.eager or (load.cpu and model.attention_dropout)
    layer: float = 2 * model.width * (wide - narrow)  # The residual stream is not narrowed.
    layer += narrow * (model.norms * model.width + 4 * model.width + model.mlp * model.inner)
    layer += 2 * model.width * mask if model.dropout else 0
    if scores:
        layer += model.heads * length * (narrow + ((narrow + mask) if model.attention_dropout else 0))
        layer += model.heads * length * 4 if load.mixed else 0  # The softmax is taken in full.
    if load.checkpointed:
        return int(tokens * (model.layers * model.width * wide + layer))
    return int(tokens * model.layers * layer)


def loss_bytes(model: Anatomy, load: Load, array: int) -> tuple[int, int]:
    """What the loss takes at its peak, and what of it stays for the backward pass: a gradient (loss.py).

    A slice has arrays of positions x vocabulary, of so many bytes: log-probabilities, probabilities, and the gradient,
    which comes in the logits' place if they were made here; and the reference's log-probabilities for the KL.
    """
    places, wide = load.batch * load.completion, max(4, model.size)
    arrays = (3 + load.kl + 2 * load.tempered) * array
    if not model.reached:
        logits = places * model.vocab * (wide if load.mixed else model.size)  # What autocast gives is widened.
        gradient = places * model.vocab * wide
        return (1 + load.kl) * logits + gradient + arrays, gradient
    head, narrow = model.head // model.size, _narrow(model, load)
    gradient = (head + places * model.width) * wide  # In the output matrix and in what goes into it.
    casts = (1 + load.kl) * model.vocab * model.width * narrow if load.mixed else 0
    if narrow < wide:  # Products in less precision, then widened: a slice's logits, pieces of the matrix's gradient.
        arrays += array * narrow // wide + min(head, GRADIENT_CHUNK_ELEMENTS) * (narrow + wide)
    return gradient + casts + arrays, gradient


def optimizer_bytes(name: str, trained: int, size: int = 4) -> int:
    """What an optimizer of `transformers` keeps for so many bytes of trained parameters, of `size` bytes each.

    One that is not known counts as AdamW, with two arrays; Adafactor's rows and columns count as nothing.
    """
    kind = next((kind for kind in _STATES if name.removeprefix("paged_").startswith(kind)), "adamw")
    each = 1 if "8bit" in name else 0.5 if "4bit" in name else size
    return int(trained // size * _STATES[kind] * each)


def _reading_bytes(model: Anatomy, load: Load, rows: int) -> list[tuple[int, int]]:
    """What reading the prompts takes beside the cache, one layer at a time, and the pieces it comes in.

    The residual stream as it comes into the model, the layer, and its feed-forward part, normed, and what attention
    gave; what the feed-forward part makes; a mask for each text, as bits and as numbers, and scores if they are kept.
    """
    narrow, wide, tokens = _narrow(model, load), max(4, model.size) if load.mixed else model.size, rows * load.prompt
    width, inner = tokens * model.width, tokens * model.inner * narrow
    scores = tokens * load.prompt * (model.heads * (narrow + 8) if model.eager else 5)
    return [(width * (4 * wide + narrow), width * wide), (inner * max(2, model.mlp - 1), inner), (scores, scores)]


def _narrow(model: Anatomy, load: Load) -> int:
    return 2 if load.mixed else model.size


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _number(config: Any, *names: str) -> Any:
    """The first of a config's entries that is a number; 0 where none is."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int | float)), 0)


def _first_size(module: torch.nn.Module) -> int:
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, torch.Tensor) and weight.ndim == 1 else 0


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 9.95e9 else f"{size / 1e9:.0f}"
