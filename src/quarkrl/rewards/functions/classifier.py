"""`Classifier`: a Hugging Face sequence classifier as a reward: P(label), 1 - P(label), or the raw logit.

torch and transformers are imported when a classifier is made: the registry of rewards imports this module, and most
rewards need neither.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from quarkrl.data.chats import message_text, reads_chats, with_completion
from quarkrl.data.encoding import break_special_tokens, encode_as_text
from quarkrl.errors import UserError, describe_exception, one_line
from quarkrl.models.device import default_device
from quarkrl.rewards.near_names import own_function_hint
from quarkrl.storage.atomic import weights_digest

if TYPE_CHECKING:
    import torch


class Classifier:
    """The probability of a label, or a raw logit, of each completion.

    Args:
        model: a directory, or a name on the hub. Only safetensors are read, and none of the model's code is run.
        label: the name (case-insensitive) or index of the label whose probability is the reward, or "not LABEL" for
            1 - P(LABEL). None for a model with a single output.
        batch_size: texts per forward pass; does not change the scores.
        device: where the model runs, a name or a `torch.device`. Default: the accelerator, if there is one.
        max_length: tokens to which a text is truncated, special tokens included. Default: the model's limit.
        unwanted: the name of what 1 - reward measures. Default: derived from "not LABEL".
        text: score the "completion" alone, or "both": prompt and completion, truncated at the start. Chats are
            formatted with the model's chat template.
        dtype: the model's dtype. In float32, scores do not depend on the batch (to 1e-5). With "auto" it is bfloat16 on
            an accelerator, where it is at least twice as fast, and float32 on a CPU.
        function_to_apply: turns logits into probabilities: "softmax" over the labels or "sigmoid" of each; "none" keeps
            the logit. Default: what the model's `problem_type` requires, and "none" for a single output.
        revision: of a model on the hub: a commit, branch or tag.
        name: the reward's name. Default: the model's name and the label.

    Raises:
        UserError: the model, its weights, tokenizer or trained head is missing, or an option is invalid.
    """

    completions_as_text = True

    def __init__(  # noqa: PLR0913 - the reward's public options
        self,
        model: str | os.PathLike[str],
        label: str | int | None = None,
        batch_size: int = 64,
        device: Any = None,
        max_length: int | None = None,
        unwanted: str | None = None,
        text: Literal["completion", "both"] = "completion",
        dtype: str = "float32",
        function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None,
        revision: str | None = None,
        name: str | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1.")
        if text not in ("completion", "both"):
            raise UserError(f"text {text!r}: must be 'completion' or 'both'.")
        if function_to_apply not in (None, "softmax", "sigmoid", "none"):
            raise UserError(f"function_to_apply {function_to_apply!r}: must be 'softmax', 'sigmoid' or 'none'.")
        import transformers

        path = os.path.expanduser(os.fspath(model))
        device, dtype = _device_and_dtype(device, dtype)
        self._model, self._tokenizer, source = _load(path, dtype, revision)
        try:
            self._model.to(device)
        except (RuntimeError, AssertionError) as error:  # What torch raises for a device that does not exist.
            raise UserError(f"device {device!s}: must exist on this machine ({describe_exception(error)}).") from error
        self._model.eval()
        self._batch_size = batch_size
        self._text = text
        self.reads = ("completions",) if text == "completion" else ("prompts", "completions")

        config = self._model.config
        self._function = function_to_apply or _default_function(config)
        if self._function == "softmax" and config.num_labels == 1:
            raise UserError(
                f"function_to_apply 'softmax': must be 'sigmoid' or 'none' for {path!r}, which has a single output."
            )
        self._index, self._negated = _choose_label(path, config, label)
        label_name = str(config.id2label[self._index])
        if self._function == "none" and (self._negated or unwanted is not None):
            raise UserError(f"label {label!r}: must not be negated, and unwanted must be unset, without probabilities.")
        if self._negated and unwanted is None:
            unwanted = "toxicity" if label_name.lower() == "toxic" else label_name.lower()
        self.unwanted = unwanted
        self.wanted = label_name.lower() if self._function != "none" and unwanted is None else None
        described = None if label is None else f"not {label_name}" if self._negated else label_name

        self._max_length = _checked_max_length(path, max_length, self._model, self._tokenizer)
        self._tokenizer.truncation_side = "left" if text == "both" else "right"
        self._pad_id = _pad_id_of(self._model)

        base = os.path.basename(os.path.abspath(path))
        self.name = name or (base if described is None else f"{base}-{described}")
        self.identity = {
            "version": 2,  # Of the scores: raise it when they change, or a cache would return old ones.
            "name": self.name,
            "model": path,
            **source,
            "label": described,
            "text": text,
            "max_length": self._max_length,
            "dtype": dtype,
            "function": self._function,
            "transformers": transformers.__version__,
        }

    def __call__(self, prompts: list[str] | list[str | list[dict]], completions: list[str], **_: Any) -> list[float]:
        """One score per completion: a probability, or a logit if `function_to_apply` is "none".

        Raises:
            UserError: a prompt is a chat, `text` is "both", and the model has no chat template.
        """
        if not completions:
            return []
        import torch

        if self._text == "completion":
            rows = self._encode(completions)
        else:
            rows = [self._encode_both(*pair) for pair in zip(prompts, completions, strict=True)]
        # Some tokenizers encode an empty text as no token, which no model accepts.
        filler = self._tokenizer.eos_token_id
        filler = self._tokenizer.pad_token_id if filler is None else filler
        rows = [row or [filler] for row in rows]
        scores = torch.empty(len(rows), dtype=torch.float64)
        for batch in self._batches(rows):
            with torch.inference_mode():
                scores[batch] = self._score([rows[i] for i in batch])
        return scores.tolist()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_as_text(self._tokenizer, texts, **self._truncation)

    @property
    def _truncation(self) -> dict[str, Any]:
        return {"truncation": self._max_length is not None, "max_length": self._max_length}

    def _encode_both(self, prompt: str | list[dict], completion: str) -> list[int]:
        if isinstance(prompt, str):
            return self._encode([prompt + completion])[0]
        if not reads_chats(self._tokenizer):
            raise UserError(
                f"reward {self.name!r} text 'both': must be 'completion' for chats, "
                "because the model has no chat template."
            )
        # The template's special tokens are parsed, so those in the messages are broken up.
        messages = [
            message
            if message.get("content") is None
            else {**message, "content": break_special_tokens(self._tokenizer, message_text(message))}
            for message in with_completion(prompt, completion)
        ]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return self._tokenizer(text, add_special_tokens=False, verbose=False, **self._truncation)["input_ids"]

    def _batches(self, rows: list[list[int]]) -> Iterator[list[int]]:
        """Yield the indices of rows to score together: of similar length, to pad little.

        The longest come first: if memory is too small, that shows at once.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        # BART and T5 read the last EOS, and refuse a batch whose rows have different numbers of them.
        config = self._model.config
        groups: dict[int, list[int]] = {}
        for i in order:
            ends = sum(token == config.eos_token_id for token in rows[i]) if config.is_encoder_decoder else 0
            groups.setdefault(ends, []).append(i)
        for group in groups.values():
            yield from (group[start : start + self._batch_size] for start in range(0, len(group), self._batch_size))

    def _score(self, rows: list[list[int]]) -> "torch.Tensor":
        """Score a batch as the model scores each row alone.

        A decoder reads the last token that is not its PAD. So the model's PAD pads, not the tokenizer's. A model
        without PAD gets an unused id.
        """
        import torch

        from quarkrl.models.batching import left_pad, right_pad

        pad_id = _spare_id(rows, self._model) if self._pad_id is None else self._pad_id
        if pad_id is None:
            return torch.cat([self._score([row]) for row in rows])
        pad = left_pad if self._model.config.model_type == "xlnet" else right_pad  # XLNet reads the end of a row.
        ids, mask = pad(rows, self._model.device)
        for config in (self._model.config, self._model.config.get_text_config()):
            config.pad_token_id = pad_id
        logits = self._model(input_ids=ids.masked_fill(mask == 0, pad_id), attention_mask=mask).logits.cpu().double()
        if self._function == "none":  # logits: (batch, labels)
            return logits[:, self._index]
        probabilities = logits.sigmoid() if self._function == "sigmoid" else logits.softmax(dim=-1)
        probability = probabilities[:, self._index]
        return 1 - probability if self._negated else probability


def shortcut(name: str, model: str, label: str) -> Callable[..., Classifier]:
    """Return a factory of `Classifier` with a name, and these defaults, which its caller may override."""

    def create(**options: Any) -> Classifier:
        chosen = options.get("label", label)
        full_name = name if chosen == label else f"{name}-{chosen}"
        return Classifier(**{"model": model, "label": label, "name": full_name, **options})

    defaults = {"model": model, "label": label}
    signature = inspect.signature(Classifier)
    parameters = [p.replace(default=defaults.get(p.name, p.default)) for p in signature.parameters.values()]
    # `spec.read_options` converts options by this signature.
    create.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    create.__annotations__ = get_type_hints(Classifier.__init__)
    return create


# 125M parameters, trained on Jigsaw's comments (Logacheva et al. 2022, ParaDetox); labels neutral, toxic.
toxicity = shortcut("toxicity", "s-nlp/roberta_toxicity_classifier", label="not toxic")
# 66M parameters, trained on film reviews (SST-2), the paper's scorer of sentiment; labels NEGATIVE, POSITIVE.
sentiment = shortcut("sentiment", "distilbert/distilbert-base-uncased-finetuned-sst-2-english", label="POSITIVE")


def _device_and_dtype(device: Any, dtype: str) -> tuple[Any, str]:
    """Replace the defaults: the accelerator if there is one, and the dtype that "auto" means on the device."""
    import torch

    device = device or default_device()
    if dtype == "auto":
        dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype {dtype!r}: must be 'float32', 'bfloat16', 'float16' or 'auto'.")
    return device, dtype


def _default_function(config: Any) -> str:
    """The function from logits to probabilities that the model's config requires."""
    if config.problem_type == "multi_label_classification":
        return "sigmoid"
    # A single output without a problem type is a reward model's score, which has no bounds.
    return "none" if config.num_labels == 1 or config.problem_type == "regression" else "softmax"


def _choose_label(path: str, config: Any, label: str | int | None) -> tuple[int, bool]:
    """The label's index, and whether the reward is 1 - its probability."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    listed = ", ".join(repr(name) for name in names)
    if label is None:
        if len(names) == 1:
            return 0, False
        raise UserError(f"label: must be one of {listed}, or 'not {names[0]}' and the like, for classifier {path!r}.")
    key = str(label).strip().lower()
    known = {str(i): i for i in range(len(names))} | {name.lower(): i for i, name in enumerate(names)}
    if key in known:  # Before "not …", which may be a label's own name.
        return known[key], False
    if key.startswith("not ") and key[4:].strip() in known:
        return known[key[4:].strip()], True
    raise UserError(f"label {label!r}: must be one of {listed}, or 'not LABEL', for classifier {path!r}.")


def _checked_max_length(path: str, max_length: int | None, model: Any, tokenizer: Any) -> int | None:
    """The truncation length, or None if neither the user nor the model limits it."""
    limit = _length_limit(model, tokenizer)
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if max_length is not None and not shortest <= max_length <= (limit or max_length):
        raise UserError(f"max_length {max_length}: must be from {shortest} to {limit} tokens for classifier {path!r}.")
    return max_length or limit


def _length_limit(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that the model accepts, or None without a limit."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from padding_idx + 1: 514 rows hold 512 tokens.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    # A tokenizer without a limit has 1e30; a model with relative positions has -1 or nothing.
    return min((limit for limit in limits if limit is not None and 0 < limit < 10**9), default=None)


def _pad_id_of(model: Any) -> int | None:
    """The model's PAD id; None if its config names none, or one without an embedding row, such as -1."""
    pad_id = model.config.get_text_config().pad_token_id
    return pad_id if pad_id is not None and 0 <= pad_id < model.get_input_embeddings().weight.shape[0] else None


def _spare_id(rows: list[list[int]], model: Any) -> int | None:
    """Return the smallest id that no row contains, or None if all are used. A single row needs no padding: -1."""
    if len(rows) == 1:
        return -1
    used = {i for row in rows for i in row}
    return next((i for i in range(model.get_input_embeddings().weight.shape[0]) if i not in used), None)


def _load(path: str, dtype: str, revision: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and the identity of the weights."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, source = (Path(path), {}) if os.path.isdir(path) else _download(path, revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"reward {path!r}: must be a model with a config.json.")
    if not any(folder.glob("*.safetensors")):
        # Pickled weights are not read, because reading them can run code.
        raise UserError(f"reward {path!r}: must have safetensors. Load it and save_pretrained(…) to a directory.")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        with _quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        raise UserError(f"reward {path!r}: cannot load the classifier ({describe_exception(error)}).") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
        raise UserError(f"reward {path!r}: must be a trained sequence classifier. It lacks {', '.join(missing[:3])}.")
    # If the files are missing, transformers silently creates a tokenizer of special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"reward {path!r}: must have a tokenizer. Save it there by tokenizer.save_pretrained(…).")
    return model, tokenizer, {**source, "sha256": weights_digest(folder)}


def _download(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """The model's files, from the hub, or from its cache if the hub cannot be reached.

    `from_pretrained` would request file by file, and retry each for half a minute.
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    from quarkrl.models.loading import download

    try:
        folder = download(name, revision)
    except GatedRepoError as error:
        raise UserError(f"reward {name!r}: gated model. Request access on its page, then `hf auth login`.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"reward {name!r}: must be a known name, a directory or a model on the Hugging Face hub. "
            f"For a private model, `hf auth login`.{own_function_hint(name)}"
        ) from error
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(
            f"reward {name!r}: not a known name or directory, and the Hugging Face hub cannot be reached "
            f"({type(cause).__name__}: {one_line(cause)}).{own_function_hint(name)}"
        ) from error
    return folder, {"revision": folder.name}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar and its table of missing weights, which become an error of one line."""
    from transformers.utils import logging as log

    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
