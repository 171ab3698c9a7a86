"""Any Hugging Face sequence classifier as a reward: P(label), 1 - P(label), or a reward model's raw logit."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from quarkrl.errors import UserError
from quarkrl.rewards.functions import describe


class Classifier:
    """The probability of a label, or a single logit as it is, of each completion.

    Args:
        model: a directory, or a name on the hub. Only safetensors are read; none of its code is run.
        label: a label's name (case does not matter) or index, whose probability is the reward, or "not LABEL"
            for 1 - P(LABEL). None where the model has a single output.
        batch_size: texts per forward pass; does not change the scores.
        device: where the model runs; the accelerator by default, if there is one.
        max_length: tokens a text is cut to, special tokens included; the model's limit by default.
        unwanted: the name of what 1 - reward measures; found by itself for "not LABEL".
        text: score the "completion" alone, or "both", prompt and completion, cut at the start.
        dtype: what the model computes in; in float32 scores do not depend on the batch (to 1e-5).

    Raises:
        UserError: the model, its weights, tokenizer or trained head is missing, or an option does not fit it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        label: str | int | None = None,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        max_length: int | None = None,
        unwanted: str | None = None,
        text: Literal["completion", "both"] = "completion",
        dtype: str = "float32",
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: at least 1 is wanted")
        if text not in ("completion", "both"):
            raise UserError(f"text is {text!r}: 'completion' or 'both' is wanted")
        path = os.path.expanduser(os.fspath(model))
        self._model, self._tokenizer, source = _load(path, dtype)
        if device is None:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = device or "cpu"
        try:
            self._model.to(device)
        except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there
            raise UserError(f"classifier {path!r} cannot run on device {device!s}: {describe(error)}") from error
        self._model.eval()
        self._batch_size = batch_size
        self._text = text

        config = self._model.config
        # One output and no other word about it: a reward model's score, with no bounds.
        single = config.num_labels == 1 and config.problem_type != "multi_label_classification"
        self._raw = single or config.problem_type == "regression"
        self._sigmoid = config.problem_type == "multi_label_classification"
        self._index, self._negated = _choose_label(path, config, label)
        label_name = str(config.id2label[self._index])
        if self._raw and (self._negated or unwanted is not None):
            raise UserError(f"classifier {path!r} gives no probability: 'not …' and unwanted mean nothing there")
        if self._negated and unwanted is None:
            unwanted = "toxicity" if label_name.lower() == "toxic" else label_name.lower()
        self.unwanted = unwanted
        described = None if label is None else f"not {label_name}" if self._negated else label_name

        limit = _length_limit(self._model, self._tokenizer)
        shortest = self._tokenizer.num_special_tokens_to_add() + 1
        if max_length is not None and not shortest <= max_length <= (limit or max_length):
            raise UserError(f"max_length is {max_length}: classifier {path!r} takes {shortest} to {limit} tokens")
        self._max_length = max_length or limit
        self._tokenizer.truncation_side = "left" if text == "both" else "right"
        _prepare_padding(self._model, self._tokenizer)

        name = os.path.basename(os.path.abspath(path))
        self.name = name if described is None else f"{name}-{described}"
        self.identity = {
            "name": self.name,
            "model": path,
            **source,
            "label": described,
            "text": text,
            "max_length": self._max_length,
            "dtype": dtype,
            "transformers": transformers.__version__,
        }

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """One score per completion: in [0, 1], unless the model gives a single logit."""
        if self._text == "both":
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        else:
            texts = list(completions)
        if not texts:
            return []
        cut = {"truncation": self._max_length is not None, "max_length": self._max_length}
        rows = self._tokenizer(texts, **cut)["input_ids"]
        # Some tokenizers add nothing to an empty text, and no model takes zero tokens.
        filler = self._tokenizer.eos_token_id
        filler = self._tokenizer.pad_token_id if filler is None else filler
        rows = [row or [filler] for row in rows]
        scores = torch.empty(len(rows), dtype=torch.float64)
        # By length, so that little is padded; the longest first, so that memory runs out at once or never.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            scores[batch] = self._score([rows[i] for i in batch])
        return scores.tolist()

    @torch.inference_mode()
    def _score(self, rows: list[list[int]]) -> torch.Tensor:
        inputs = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self._model.device)
        logits = self._model(**inputs).logits.cpu().double()  # (batch, labels)
        if self._raw:
            return logits[:, self._index]
        probabilities = logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)
        wanted = probabilities[:, self._index]
        return 1 - wanted if self._negated else wanted


def _choose_label(path: str, config: Any, label: str | int | None) -> tuple[int, bool]:
    """The label's index, and whether the reward is 1 - its probability."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    listed = ", ".join(repr(name) for name in names)
    if label is None:
        if len(names) == 1:
            return 0, False
        raise UserError(f"classifier {path!r} has labels {listed}: say which by label=…, or 'not {names[0]}'")
    wanted = str(label).strip().lower()
    known = {str(i): i for i in range(len(names))} | {name.lower(): i for i, name in enumerate(names)}
    if wanted in known:  # before "not …", which may be a label's own name
        return known[wanted], False
    if wanted.startswith("not ") and wanted[4:].strip() in known:
        return known[wanted[4:].strip()], True
    raise UserError(f"classifier {path!r} has no label {label!r}: it has {listed}")


def _length_limit(model: Any, tokenizer: Any) -> int | None:
    """The most tokens the model takes, or None where nothing limits them."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from padding_idx + 1: 514 rows hold 512 tokens.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    # A tokenizer that does not know its limit says 1e30; relative positions say -1 or nothing.
    return min((limit for limit in limits if limit is not None and 0 < limit < 10**9), default=None)


def _prepare_padding(model: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        pad = next((i for i in (model.config.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders read at the last token that is not this one
    if model.config.model_type != "xlnet":  # which reads its summary at a row's end
        tokenizer.padding_side = "right"  # absolute positions start at the text


def _load(path: str, dtype: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and what says which weights they are."""
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"dtype is {dtype!r}: 'float32', 'bfloat16' or 'float16' is wanted")
    folder, source = (Path(path), {}) if os.path.isdir(path) else _download(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{path!r} holds no model: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        # Pickled weights run code when they are read, so they are not.
        raise UserError(f"{path!r} holds no safetensors: load it and save_pretrained(…) to a directory")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        with _quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, dtype=getattr(torch, dtype), output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        raise UserError(f"cannot load the classifier {path!r}: {describe(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
        raise UserError(f"{path!r} is no trained sequence classifier: it lacks {', '.join(missing[:3])}")
    # Without its files, transformers makes a tokenizer of the special tokens alone, and says nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"classifier {path!r} has no tokenizer: save it there by tokenizer.save_pretrained(…)")
    return model, tokenizer, {**source, "sha256": _sha256(folder)}


def _download(name: str) -> tuple[Path, dict[str, Any]]:
    """The model's files, from the hub or, where that is out of reach, from its cache.

    Not left to `from_pretrained`, which asks for file after file, and retries each for half a minute.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.json", "*.txt", "*.model", "*.codes", "*.safetensors"],
            ignore_patterns=["*/*"],
        )
    except GatedRepoError as error:
        raise UserError(f"model {name!r} is gated: ask for access on its page, then `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"reward {name!r} is no known name, no directory and no model on the Hugging Face hub "
            "(or a private one: `hf auth login`)"
        ) from error
    except Exception as error:
        raise UserError(
            f"reward {name!r} is no known name and no directory, and cannot be had from the Hugging Face hub "
            f"({describe(error.__cause__ or error)})"
        ) from error
    return Path(folder), {"revision": os.path.basename(folder)}


def _sha256(path: Path) -> str:
    """Of the weights: of one file, what `sha256sum model.safetensors` prints."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no table of missing weights: they become an error of one line here."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
