"""Tiny tokenizers and models for the tests, built in memory: real classes of transformers, no network, no files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# Models and data that lie beside the repository; tests that read them are skipped where they do not.
SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there")

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"

# As real ones look: newlines, blocks, a generation prompt.
CHAT_TEMPLATE = """{{ bos_token or '' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
[sys]{{ message.content }}[/sys]
    {%- else %}
[{{ message.role }}] {{ message.content }}{{ eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
[assistant]{% endif %}
"""

_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_GROUPED = {**_SMALL, "num_key_value_heads": 1, "head_dim": 8}
_CONFIGS: dict[str, dict] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "llama": _GROUPED,
    "qwen3": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 64},
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0, "sliding_window": 64},
    "gpt_neox": _SMALL,
    "phi": _SMALL,  # its output layer has a bias
    "opt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    | {"word_embed_proj_dim": 16, "init_std": 0.2},
}
ARCHITECTURES = tuple(_CONFIGS)
_ENCODER_DECODERS: dict[str, dict] = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0},
    "bart": {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0, "init_std": 0.2}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    | {"max_position_embeddings": 64, "forced_eos_token_id": None},
}

# Options of a run that takes a second: 2 iterations of 3 steps of 8 samples.
SMALL_RUN = {
    "num_quantiles": 2,
    "num_iterations": 2,
    "steps_per_iteration": 3,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "min_completion_length": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": [],
}


def tiny_tokenizer(
    bos: bool = False,
    pad: Literal["eos", "own"] | None = None,
    chat_template: bool | str = False,
    words: Sequence[str] | None = None,
    eos_after: bool = False,
    **kwargs,
) -> PreTrainedTokenizerFast:
    """One token per byte (ids 0 to 255), or per word of `words`; then EOS, BOS and PAD, as asked for.

    Args:
        bos: have a BOS and put it in front of each text.
        pad: the EOS as PAD, a PAD of its own, or none.
        chat_template: `CHAT_TEMPLATE`, or the given one.
        words: a word-level vocabulary instead of bytes; an unknown word is `<unk>`.
        eos_after: put EOS behind each text.
        kwargs: for `PreTrainedTokenizerFast`.
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) if words is None else [*words, UNK]
    specials = [EOS, *([BOS] if bos else []), *([PAD] if pad == "own" else [])]
    vocab = {token: i for i, token in enumerate([*tokens, *specials])}
    if words is None:
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token=UNK))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(specials)
    around = [*([BOS] if bos else []), "$A", *([EOS] if eos_after else [])]
    backend.post_processor = TemplateProcessing(
        single=around,
        pair=[*around, *(piece.replace("$A", "$B") + ":1" for piece in around)],
        special_tokens=[(token, vocab[token]) for token in specials],
    )
    named = {"eos_token": EOS, "bos_token": BOS if bos else None, "unk_token": UNK if words else None}
    named["pad_token"] = {"eos": EOS, "own": PAD, None: None}[pad]
    named = {name: token for name, token in named.items() if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named, **kwargs)
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE if chat_template is True else chat_template
    return tokenizer


def tiny_model(
    architecture: str,
    tokenizer: PreTrainedTokenizerFast,
    tied: bool = True,
    rows: int | None = None,
    seed: int = 0,
    **config,
) -> PreTrainedModel:
    """A model of two layers and width 16 with random weights, large enough to make its outputs differ; in eval mode.

    Args:
        architecture: one of `ARCHITECTURES`.
        tokenizer: gives the vocabulary and the special tokens.
        tied: the output embedding is the input embedding.
        rows: of the embedding, where they are not as many as the tokenizer's tokens.
        seed: of the weights; the global generator is left as it was.
        config: more fields of the model's config.
    """
    fields = {
        "vocab_size": rows or len(tokenizer),
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = AutoConfig.for_model(architecture, **{**fields, **_CONFIGS[architecture], **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(made).eval()


def tiny_encoder_decoder(architecture: str, seed: int = 0, **config) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A T5 or BART of width 16 with random weights, in eval mode, and its tokenizer of eight letters.

    As the real ones, T5 puts EOS behind a text and starts its decoder with PAD. BART puts BOS and EOS around a text,
    and starts its decoder with EOS.

    Args:
        architecture: t5 or bart.
        seed: of the weights.
        config: more fields of the model's config.
    """
    tokenizer = tiny_tokenizer(bos=architecture == "bart", pad="own", words=[*"abcdefgh"], eos_after=True)
    fields = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields["decoder_start_token_id"] = fields["pad_token_id" if architecture == "t5" else "eos_token_id"]
    fields["vocab_size"] = len(tokenizer)
    made = AutoConfig.for_model(architecture, **{**fields, **_ENCODER_DECODERS[architecture], **config})
    made._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForSeq2SeqLM.from_config(made).eval(), tokenizer


def make_home(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    rewards: str = "",
    model: PreTrainedModel | None = None,
    /,
    **options,
) -> Path:
    """What a command works with, in a directory: `model`, `prompts.txt`, `rewards.py`, and `run.yaml` of a short run.

    Args:
        directory: where to; it is there.
        tokenizer: goes with the model.
        prompts: one a line.
        rewards: the Python of `rewards.py`.
        model: a tiny GPT-2 by default.
        options: more of `run.yaml`, or others.
    """
    (model or tiny_model("gpt2", tokenizer)).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    (directory / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (directory / "rewards.py").write_text(rewards, encoding="utf-8")
    given = {
        "model": str(directory / "model"),
        "prompts": str(directory / "prompts.txt"),
        "held_out": 0,  # The table before/after is tested where it is the subject.
        "num_quantiles": 2,
        "num_iterations": 2,
        "steps_per_iteration": 1,
        "samples_per_prompt": 1,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    return directory
