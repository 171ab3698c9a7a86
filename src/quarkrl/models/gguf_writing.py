"""Write a trained model as a GGUF file, the format of llama.cpp and Ollama, so that it asks for the best quantile.

In a chat the chat template puts the best reward tokens first, as in `final/`. Before a text llama.cpp can put one
token, the file's BOS. So the best reward token becomes the BOS if nothing else precedes a text or a chat. Otherwise
users put the reward tokens in front of each text themselves.

Supported are Llama and GPT-2 with byte-level BPE. llama.cpp's `convert_hf_to_gguf.py` knows many more architectures.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_gguf_available

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.special_tokens import surrounding_ids
from quarkrl.storage.atomic import atomic_file

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

REMEDY = "Convert final/ with convert_hf_to_gguf.py of llama.cpp"

_NFC = {"type": "NFC"}  # Qwen normalises texts so; llama.cpp expects that they are.
# How the tokenizers of Llama 3 and Qwen 2 split a text, as in their tokenizer.json.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp computes for these architectures; it has no field for another value.
_FIXED: dict[str, dict[str, tuple]] = {
    "llama": {"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}


def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model can be written as a GGUF file.

    Raises:
        UserError: the package `gguf` is missing, or the architecture or the tokenizer is not supported.
    """
    if not is_gguf_available():
        raise UserError('gguf: needs the extra. Run pip install "quarkrl[gguf]".')
    config = model.config
    if config.model_type not in _FIXED:
        raise UserError(f"gguf: model type {config.model_type!r} must be one of {', '.join(_FIXED)}. {REMEDY}.")
    for name, values in _FIXED[config.model_type].items():
        if (value := getattr(config, name, values[0])) not in values:
            raise UserError(f"gguf: {name} {value!r} must be {' or '.join(map(repr, values))}. {REMEDY}.")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type != "default":
        raise UserError(f"gguf: rope_type {rope_type!r} must be 'default'. {REMEDY}.")
    _pre_tokenizer_name(tokenizer)


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conditioning: Conditioning,
    path: Path,
    weight_type: str = "f16",
) -> str:
    """Write a GGUF file, atomically.

    Args:
        model: a causal language model without adapter.
        tokenizer: one that puts the best reward token first (`Conditioning.steer_tokenizer`).
        conditioning: the reward tokens.
        path: the file.
        weight_type: of the matrices: f32, f16 or q8_0. Vectors and position embeddings stay f32.

    Returns:
        What users must put in front of a text; "" if llama.cpp does it.

    Raises:
        UserError: the package `gguf` is missing, or the architecture or the tokenizer is not supported.
    """
    check_gguf(model, tokenizer)
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    file_type = "ALL_F32" if weight_type == "f32" else f"MOSTLY_{weight_type.upper()}"
    writer = GGUFWriter(None, arch=model.config.model_type)
    writer.add_type("model")
    writer.add_name(path.stem)
    writer.add_quantization_version(2)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_string(
        "quarkrl.conditioning", json.dumps({"kind": conditioning.kind, "prefixes": conditioning.prefixes})
    )
    tokens = _add_tokenizer(writer, tokenizer, model)
    _add_shape(writer, model, len(tokens))
    text_prefix = _add_bos(writer, tokenizer, conditioning)
    with atomic_file(path) as file:
        _write_tensors(writer, Path(file.name), model, len(tokens), GGMLQuantizationType[weight_type.upper()])
    return text_prefix


# Tokenizer


def _add_bos(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, conditioning: Conditioning) -> str:
    """Set the one token that llama.cpp puts before a text; return what else precedes a text."""
    start, _ = surrounding_ids(tokenizer)
    prefix_length = len(conditioning.ids_of(conditioning.best))
    is_best_token_alone = len(start) == prefix_length == 1
    # llama.cpp removes the BOS with which a chat template starts, because it puts BOS before chats too. A chat that
    # starts with something else than the reward token would get two.
    starts_chats = not tokenizer.chat_template or not conditioning.start_ids
    adds_bos = len(start) > prefix_length or (is_best_token_alone and starts_chats)
    bos_id = start[0] if adds_bos else tokenizer.bos_token_id
    if bos_id is not None:
        writer.add_bos_token_id(bos_id)
    writer.add_add_bos_token(adds_bos)
    return tokenizer.decode(start[1:] if adds_bos else start)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[str]:
    """Add the vocabulary, the merges, the special tokens but BOS, and the chat template; return the vocabulary."""
    from gguf import TokenType

    token_of = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for i in range(max(token_of) + 1):
        is_special = i in added and added[i].special
        kind = TokenType.UNUSED if i not in token_of else TokenType.NORMAL if i not in added else TokenType.USER_DEFINED
        tokens.append(token_of.get(i, f"[PAD{i}]"))
        types.append(TokenType.CONTROL if is_special else kind)
    if len(tokens) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise UserError(f"gguf: {len(tokens)} tokens must have as many embedding rows, not {rows}. {REMEDY}.")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for token_id, add in (
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
    return tokens


def _pre_tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of how a tokenizer splits a text before BPE.

    Raises:
        UserError: it is none that this module can name. Another one would give other ids than training.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitter = state["model"], tokenizer.backend_tokenizer.pre_tokenizer
    is_byte_level = model["type"] == "BPE" and not model["byte_fallback"] and state["normalizer"] in (None, _NFC)
    if is_byte_level and splitter is not None:
        for name, known in _splitters().items():
            # llama.cpp looks up whole words before it merges in the tokenizer of Llama 3 alone.
            if _state(splitter) == _state(known) and model["ignore_merges"] == (name == "llama-bpe"):
                return name
    raise UserError(
        f"gguf: tokenizer {type(tokenizer).__name__} ({model['type']}) must be byte-level BPE as in GPT-2, SmolLM2, "
        f"Llama 3 or Qwen 2. {REMEDY}."
    )


def _splitters() -> dict[str, Any]:
    """The pre-tokenizers that have a name in llama.cpp."""
    words, encode = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
    by_regex = {
        name: Sequence([Split(Regex(_WORDS.replace("DIGITS", digits)), "isolated"), encode])
        for name, digits in (("llama-bpe", r"\p{N}{1,3}"), ("qwen2", r"\p{N}"))
    }
    return {"gpt-2": words, "smollm": Sequence([Digits(individual_digits=True), words]), **by_regex}


def _state(splitter: Any) -> str:
    """What a pre-tokenizer does to ids; offsets of tokens do not matter."""
    return splitter.__getstate__().decode().replace('"trim_offsets":false', '"trim_offsets":true')


# Weights


def _add_shape(writer: "GGUFWriter", model: PreTrainedModel, rows: int) -> None:
    """Add the numbers that describe the architecture."""
    config = model.config
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head_size = _head_size(config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write_tensors(
    writer: "GGUFWriter", path: Path, model: PreTrainedModel, rows: int, kind: "GGMLQuantizationType"
) -> None:
    """Write the file: first the names and types of all tensors, then one tensor after the other."""
    from gguf.quants import quant_shape_to_byte_shape, quantize

    kinds = []
    for name, shape, _ in _tensors(model, rows):
        kinds.append(_kind_of(name, shape, kind))
        sizes = quant_shape_to_byte_shape(shape, kinds[-1])
        # With raw_dtype, the type of the array says only whether the shape is in bytes.
        writer.add_tensor_info(name, sizes, np.dtype(np.uint8), int(np.prod(sizes)), raw_dtype=kinds[-1])
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (_, _, read), kind_of_tensor in zip(_tensors(model, rows), kinds, strict=True):
            writer.write_tensor_data(quantize(read(), kind_of_tensor))
        writer.flush()
    finally:
        writer.close()


def _kind_of(name: str, shape: tuple[int, ...], kind: "GGMLQuantizationType") -> "GGMLQuantizationType":
    """The type in which a tensor is stored."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or name.startswith("position_embd"):
        return GGMLQuantizationType.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _tensors(model: PreTrainedModel, rows: int) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """The name in GGUF, the shape, and a function that returns the values, of each tensor.

    Embedding rows above the tokenizer's tokens, which pad a vocabulary, are left out.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = model.config
    names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", None)}
    weights = model.state_dict()
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        weights.pop("lm_head.weight", None)
    for key, weight in weights.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"gguf: tensor {key!r} must have a name in llama.cpp. {REMEDY}.")
        if name in ("token_embd.weight", "output.weight"):
            weight = weight[:rows]
        if key in transposed:
            weight = weight.T
        if key.endswith(("q_proj.weight", "k_proj.weight")):
            # transformers rotates dimension i with i + n/2, llama.cpp's Llama i with i + 1.
            count = heads[key.split(".")[-2]]
            weight = weight.unflatten(0, (count, 2, _head_size(config) // 2)).transpose(1, 2).flatten(0, 2)
        yield name, tuple(weight.shape), partial(_values, weight)


def _values(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().float().cpu().contiguous().numpy()


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
