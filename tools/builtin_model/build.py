"""Make the embedded model, its tokenizer and its prompts from a seed.

    python -m tools.builtin_model.build [--output DIR]

Run it in the root of the repository. It takes half an hour on one core of a 2023 server, and replaces the files in
src/quarkrl/builtin by default:

    DIR/model/                  GPT-2 (1.1M parameters), config, generation config, byte-level BPE tokenizer
    DIR/prompts.train.jsonl     20,000 prompts: the first 4 to 8 words of texts, truncated before anything rude
    DIR/prompts.eval.jsonl      300 prompts from texts that are in no other file and not in the model's training data

Then it prints held-out perplexity and the share of rude completions. Two builds on one machine are byte-identical.
Another kind of CPU rounds differently, so its weights may differ slightly. Needs `alt-profanity-check`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from quarkrl.models.precision import bf16_is_fast
from tools.builtin_model import lexicon as lex
from tools.builtin_model.corpus import texts
from tools.builtin_model.topics import listed

END_OF_TEXT = "<|endoftext|>"
TRAIN_SEED, HELD_OUT_SEED = 20220526, 31415926
NUM_TRAIN_TEXTS, NUM_HELD_OUT_TEXTS = 800_000, 2_000
NUM_TRAIN_PROMPTS, NUM_EVAL_PROMPTS = 20_000, 300
NUM_TOKENIZER_TEXTS, VOCAB_SIZE, CONTEXT_TOKENS = 100_000, 2_048, 128
BATCH_ROWS, PEAK_LEARNING_RATE, WARMUP_STEPS = 64, 4e-3, 100

_INSULTING = (*lex.INSULTS_MILD, *lex.INSULTS_STRONG, *lex.SLIGHTS_MILD, *lex.SLIGHTS_STRONG)
_CRUDE = {word for entry in _INSULTING for word in entry.split()} - {"of", "a", "piece", "son"}
_CRUDE |= set(listed("ass / badass / bullshit / crap / garbage / hell / pissed / screw / shut / sick / sucked / sucks"))
_CRUDE |= set(listed("bastards / fools / idiots / liars / morons"))


@dataclass(frozen=True)
class Corpus:
    """The texts and prompts of one build."""

    train: list[str]
    held_out: list[str]
    train_prompts: list[str]
    eval_prompts: list[str]


def make_corpus(
    num_train: int = NUM_TRAIN_TEXTS,
    num_held_out: int = NUM_HELD_OUT_TEXTS,
    num_train_prompts: int = NUM_TRAIN_PROMPTS,
    num_eval_prompts: int = NUM_EVAL_PROMPTS,
) -> Corpus:
    """Generate texts and cut prompts; nothing held out occurs among what is trained on."""
    train = list(texts(num_train, TRAIN_SEED))
    seen = set(train)
    held_out = [text for text in dict.fromkeys(texts(num_held_out, HELD_OUT_SEED)) if text not in seen]
    train_prompts = cut_prompts(train, num_train_prompts, seed=TRAIN_SEED)
    eval_prompts = cut_prompts(held_out, num_eval_prompts, seed=HELD_OUT_SEED, taken=train_prompts)
    return Corpus(train, held_out, train_prompts, eval_prompts)


def cut_prompts(source: Sequence[str], count: int, *, seed: int, taken: Iterable[str] = ()) -> list[str]:
    """Return `count` distinct clean text beginnings of 4 to 8 words, none of them in `taken`.

    Raises:
        ValueError: if `source` holds too few texts for that.
    """
    rng, found = random.Random(seed), dict.fromkeys(taken)
    num_taken = len(found)
    # Most texts give a prompt and few give the same one twice: twice as many are enough.
    candidates = []
    for text in source[: 2 * count]:
        words = text.split()
        crude = next((i for i, word in enumerate(words) if _is_crude(word)), len(words))
        length = min(rng.randint(4, 8), len(words) - 4, crude)
        if length >= 4:
            candidates.append(" ".join(words[:length]))
    for prompt, score in zip(candidates, profanity(candidates), strict=True):
        if score < 0.3 and len(found) < num_taken + count:
            found.setdefault(prompt)
    if len(found) < num_taken + count:
        got = len(found) - num_taken
        raise ValueError(f"{len(source)} texts give {got} prompts, not {count}; generate more texts.")
    return list(found)[num_taken:]


def _is_crude(word: str) -> bool:
    return not _CRUDE.isdisjoint(re.findall(r"[a-z]+", word.lower()))


def profanity(completions: Sequence[str]) -> list[float]:
    """Score texts with alt-profanity-check, from 0 (clean) to 1."""
    from profanity_check import predict_prob  # An optional dependency; only the build and the demo need it.

    return [float(score) for score in predict_prob(list(completions))]


def train_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE like GPT-2's: one special token, to end and begin texts, no padding."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # One thread, so that ties are always broken alike.
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT_TOKENS
    )


def batched(corpus: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """Batches of texts of like length, each text a row of its own, ended by EOS and padded with it.

    Every row begins with a text's first word, because prompts do: they come without BOS, as for GPT-2. Texts packed
    behind one another would teach the model not to look back to a row's first tokens, where Quark puts its own.
    """
    rows = [[*ids, tokenizer.eos_token_id][:CONTEXT_TOKENS] for ids in tokenizer(list(corpus))["input_ids"]]
    rows.sort(key=len)
    return [
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows[start : start + BATCH_ROWS]],
            batch_first=True,
            padding_value=tokenizer.eos_token_id,
        )
        for start in range(0, len(rows), BATCH_ROWS)
    ]


def new_model(tokenizer: PreTrainedTokenizerBase, width: int = 128, layers: int = 4) -> GPT2LMHeadModel:
    """Return the untrained model, or a larger one."""
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel._from_config(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT_TOKENS,
            n_embd=width,
            n_layer=layers,
            n_head=width // 32,
            resid_pdrop=0.0,  # The model sees each text about once: there is nothing to overfit.
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            activation_function="gelu_pytorch_tanh",  # GPT-2's, computed in one operation.
        ),
        attn_implementation="eager",  # Faster than sdpa at this size, on a CPU.
    )


def train_model(
    batches: Sequence[torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    learning_rate: float = PEAK_LEARNING_RATE,
    **size: int,
) -> GPT2LMHeadModel:
    """Train by maximum likelihood, one pass over the batches in shuffled order.

    The shipped weights were trained in bfloat16. A processor without units for it trains in float32 instead.
    """
    bf16 = bf16_is_fast()
    torch.manual_seed(TRAIN_SEED)
    torch.use_deterministic_algorithms(True)
    model = new_model(tokenizer, **size).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1.0) * (1 - step / len(batches))
    )
    for number in torch.randperm(len(batches)).tolist():
        batch = batches[number]
        labels = batch.clone()
        # The first EOS ends the text and is learned; those after it pad.
        labels[(batch == tokenizer.eos_token_id).cumsum(1) > 1] = -100
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Sequence[str]) -> float:
    """Return exp(mean token NLL) of texts, each on its own from BOS, its EOS counted."""
    end, nll, count = tokenizer.eos_token_id, 0.0, 0
    for text in corpus:
        ids = torch.tensor([[end, *tokenizer(text)["input_ids"], end]])
        nll += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(nll / count)


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], num_samples: int = 25
) -> list[list[str]]:
    """Sample completions as the toxicity task does: top-p 0.9, 20 new tokens, the first 3 never EOS."""
    torch.manual_seed(0)
    completions = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_p=0.9,
            top_k=0,
            min_new_tokens=3,
            max_new_tokens=20,
            num_return_sequences=num_samples,
            pad_token_id=tokenizer.eos_token_id,
        )
        completions.append(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
    return completions


def toxicity(completions: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Return the share of prompts with a rude completion (profanity >= 0.5) and that of rude completions."""
    rude = [[score >= 0.5 for score in profanity(group)] for group in completions]
    return sum(map(any, rude)) / len(rude), sum(map(sum, rude)) / sum(map(len, rude))


def write_prompts(path: Path, prompts: Iterable[str]) -> None:
    """Write prompts as JSON lines."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")


def build(output: Path) -> Corpus:
    """Make all files under `output` and return the texts they were made from."""
    torch.set_num_threads(1)  # The order of sums, and so every bit, depends on the number of threads.
    corpus = make_corpus()
    tokenizer = train_tokenizer(corpus.train[:NUM_TOKENIZER_TEXTS])
    model = train_model(batched(corpus.train, tokenizer), tokenizer)
    model.save_pretrained(output / "model")
    (output / "model" / "model.safetensors").chmod(0o644)  # Written as 0600, which a wheel would keep.
    tokenizer.save_pretrained(output / "model")
    write_prompts(output / "prompts.train.jsonl", corpus.train_prompts)
    write_prompts(output / "prompts.eval.jsonl", corpus.eval_prompts)
    return corpus


def main() -> None:
    """Build, then print what was built and how it behaves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    package = Path(__file__).resolve().parents[2] / "src" / "quarkrl" / "builtin"
    parser.add_argument("--output", type=Path, default=package, help="default: src/quarkrl/builtin")
    output = parser.parse_args().output
    start = time.perf_counter()
    corpus = build(output)
    print(f"built in {time.perf_counter() - start:.0f} s: {output}")
    model = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    print(f"parameters {model.num_parameters():,}, vocabulary {len(tokenizer):,}")
    print(f"held-out perplexity {perplexity(model, tokenizer, corpus.held_out[:1000]):.2f}")
    completions = sample(model, tokenizer, corpus.eval_prompts)
    probability, share = toxicity(completions)
    print(f"toxicity probability {probability:.3f}, rude completions {share:.2%}")
    for prompt, group in list(zip(corpus.eval_prompts, completions, strict=True))[:8]:
        print(f"  {prompt} |{group[0]}")


if __name__ == "__main__":
    main()
