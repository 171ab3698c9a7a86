"""Any Hugging Face sequence classifier as a reward: P(label), 1 - P(label), or a reward model's raw logit."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_type_hints

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from quarkrl.errors import UserError
from quarkrl.rewards.custom import describe
from quarkrl.storage.atomic import sha256


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
        text: score the "completion" alone, or "both", prompt and completion, cut at the start; of a chat, what the
            model's chat template makes of it.
        dtype: what the model computes in; in float32 scores do not depend on the batch (to 1e-5). "auto" is bfloat16
            on an accelerator, twice as fast there or more, and float32 on a CPU.
        function_to_apply: how logits become probabilities, "softmax" over the labels or "sigmoid" of each, or "none",
            the logit as it is. By default what the model's `problem_type` asks for, and "none" for a single output.
        revision: of a model on the hub: a commit, branch or tag.
        name: what the reward is called; the model's name and the label by default.

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
        function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None,
        revision: str | None = None,
        name: str | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: at least 1 is wanted")
        if text not in ("completion", "both"):
            raise UserError(f"text is {text!r}: 'completion' or 'both' is wanted")
        if function_to_apply not in (None, "softmax", "sigmoid", "none"):
            raise UserError(f"function_to_apply is {function_to_apply!r}: 'softmax', 'sigmoid' or 'none' is wanted")
        path = os.path.expanduser(os.fspath(model))
        if device is None:
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = device or "cpu"
        if dtype == "auto":
            dtype = "float32" if torch.device(device).type == "cpu" else "bfloat16"
        self._model, self._tokenizer, source = _load(path, dtype, revision)
        try:
            self._model.to(device)
        except (RuntimeError, AssertionError) as error:  # what torch raises for a device that is not there
            raise UserError(f"classifier {path!r} cannot run on device {device!s}: {describe(error)}") from error
        self._model.eval()
        self._batch_size = batch_size
        self._text = text
        self.reads = ("completions",) if text == "completion" else ("prompts", "completions")

        config = self._model.config
        # One output and no other word about it: a reward model's score, with no bounds.
        single = config.num_labels == 1 and config.problem_type != "multi_label_classification"
        by_config = "sigmoid" if config.problem_type == "multi_label_classification" else "softmax"
        by_config = "none" if single or config.problem_type == "regression" else by_config
        self._function = function_to_apply or by_config
        if self._function == "softmax" and config.num_labels == 1:
            raise UserError(f"classifier {path!r} has a single output, whose softmax is 1: take 'sigmoid' or 'none'")
        self._index, self._negated = _choose_label(path, config, label)
        label_name = str(config.id2label[self._index])
        if self._function == "none" and (self._negated or unwanted is not None):
            raise UserError(f"classifier {path!r} gives no probability: 'not …' and unwanted mean nothing there")
        if self._negated and unwanted is None:
            unwanted = "toxicity" if label_name.lower() == "toxic" else label_name.lower()
        self.unwanted = unwanted
        self.wanted = label_name.lower() if self._function != "none" and unwanted is None else None
        described = None if label is None else f"not {label_name}" if self._negated else label_name

        limit = _length_limit(self._model, self._tokenizer)
        shortest = self._tokenizer.num_special_tokens_to_add() + 1
        if max_length is not None and not shortest <= max_length <= (limit or max_length):
            raise UserError(f"max_length is {max_length}: classifier {path!r} takes {shortest} to {limit} tokens")
        self._max_length = max_length or limit
        self._tokenizer.truncation_side = "left" if text == "both" else "right"
        _prepare_padding(self._model, self._tokenizer)

        base = os.path.basename(os.path.abspath(path))
        self.name = name or (base if described is None else f"{base}-{described}")
        self.identity = {
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
        """One score per completion: a probability, or a logit where that is what is asked for.

        Raises:
            UserError: chats are to be read, and the model has no chat template.
        """
        if not completions:
            return []
        if self._text == "completion":
            rows = self._encode(completions)
        else:
            rows = [self._both(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
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

    def _encode(self, texts: Any, **options: Any) -> Any:
        cut = {"truncation": self._max_length is not None, "max_length": self._max_length}
        return self._tokenizer(texts, **cut, **options)["input_ids"]

    def _both(self, prompt: str | list[dict], completion: str) -> list[int]:
        if isinstance(prompt, str):
            return self._encode(prompt + completion)
        if self._tokenizer.chat_template is None:
            raise UserError(
                f"reward {self.name!r} cannot read chats, as its model has no chat template: take text=completion"
            )
        messages = [*prompt, {"role": "assistant", "content": completion}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return self._encode(text, add_special_tokens=False)  # The template has written them.

    @torch.inference_mode()
    def _score(self, rows: list[list[int]]) -> torch.Tensor:
        inputs = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self._model.device)
        logits = self._model(**inputs).logits.cpu().double()  # (batch, labels)
        if self._function == "none":
            return logits[:, self._index]
        probabilities = logits.sigmoid() if self._function == "sigmoid" else logits.softmax(dim=-1)
        wanted = probabilities[:, self._index]
        return 1 - wanted if self._negated else wanted


def shortcut(name: str, model: str, label: str) -> Callable[..., Classifier]:
    """`Classifier` under a name of its own, with these defaults; each of its arguments may be given all the same."""

    def make(**options: Any) -> Classifier:
        chosen = options.get("label", label)
        called = name if chosen == label else f"{name}-{chosen}"
        return Classifier(**{"model": model, "label": label, "name": called, **options})

    defaults = {"model": model, "label": label}
    signature = inspect.signature(Classifier)
    parameters = [p.replace(default=defaults.get(p.name, p.default)) for p in signature.parameters.values()]
    # Read where a reward's options come as text.
    make.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    make.__annotations__ = get_type_hints(Classifier.__init__)
    return make


# 125M parameters, trained on Jigsaw's comments (Logacheva et al. 2022, ParaDetox); labels neutral, toxic.
toxicity = shortcut("toxicity", "s-nlp/roberta_toxicity_classifier", label="not toxic")
# 66M parameters, trained on film reviews (SST-2), the paper's scorer of sentiment; labels NEGATIVE, POSITIVE.
sentiment = shortcut("sentiment", "distilbert/distilbert-base-uncased-finetuned-sst-2-english", label="POSITIVE")


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


def _load(path: str, dtype: str, revision: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and what says which weights they are."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {dtype!r}: 'float32', 'bfloat16', 'float16' or 'auto' is wanted")
    folder, source = (Path(path), {}) if os.path.isdir(path) else _download(path, revision)
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
    return model, tokenizer, {**source, "sha256": sha256(*sorted(folder.glob("*.safetensors")))}


def _download(name: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    """The model's files, from the hub or, where that is out of reach, from its cache.

    Not left to `from_pretrained`, which asks for file after file, and retries each for half a minute.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
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
