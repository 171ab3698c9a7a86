"""`Subject`: what the page plays with: a model, the same model before training, its reward, and prompts to try."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedModel

from quarkrl.errors import UserError
from quarkrl.models.adapters import find_adapter
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.device import default_device
from quarkrl.models.loading import load_adapted, load_tokenizer
from quarkrl.models.quark_json import reference_name, start_name
from quarkrl.rewards.scorer import Scorer
from quarkrl.runs.directory import model_of_run
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.guidance import GuidanceOptions

RESULTS_FILE = "results.parquet"  # The table before/after at the end of a run.

ModelContext = Callable[[], AbstractContextManager[PreTrainedModel]]


@dataclass(frozen=True)
class Subject:
    """A model to play with.

    Attributes:
        name: of the model or run, for the title.
        generator: the model.
        reference: gives the model before training, within a context; None if there is none.
        scorer: the reward; None if it is unknown.
        examples: prompts to try.
        keep_special_tokens: whether the reward reads special tokens.
        defaults: of the page's settings, such as the completion length of training.
        notes: what the user should know, one line each.
    """

    name: str
    generator: QuarkGenerator
    reference: ModelContext | None
    scorer: Scorer | None = None
    examples: Sequence[str] = ()
    keep_special_tokens: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes whose quantile can be chosen; none for a model that Quark did not train."""
        conditioning = self.generator.conditioning
        return conditioning.attributes if conditioning else ()

    @property
    def num_quantiles(self) -> int:
        """K; 0 for a model that Quark did not train."""
        conditioning = self.generator.conditioning
        return conditioning.num_quantiles if conditioning else 0


def load_models(name: str, path: str, trust_remote_code: bool = False) -> Subject:
    """Load a model and its reference. An adapter and its reference share one model in memory.

    Args:
        name: what the user calls the model: a directory, the directory of a run, or a name on the hub.
        path: where its weights are, for example `final/` of the run.
        trust_remote_code: run the Python code in the model's repository.

    Raises:
        UserError: the model cannot be loaded.
    """
    path = adapter_of_run(name) or path
    if start_name(path) == reference_name(path) and (adapted := load_adapted(path, trust_remote_code)):
        model = adapted.to(default_device()).eval()
        tokenizer, conditioning = load_tokenizer(path, trust_remote_code), Conditioning.load(path)
        default = GuidanceOptions.load(path)
        generator = QuarkGenerator(model, tokenizer, conditioning, reference_name(path), trust_remote_code, default)
        return Subject(name, generator, partial(_without_adapter, model))
    generator = QuarkGenerator.from_pretrained(path, trust_remote_code=trust_remote_code)
    if generator.conditioning is None:
        return Subject(name, generator, None)
    try:
        return Subject(name, generator, partial(_always, generator.reference))
    except UserError as error:
        return Subject(name, generator, None, notes=[f"no column before training: {error}"])


def adapter_of_run(name: str) -> str | None:
    """Return the checkpoint of a run whose `final/` is a merged adapter; None if there is none."""
    try:
        checkpoint = model_of_run(name, "checkpoint")
    except UserError:
        return None
    return checkpoint if checkpoint != name and find_adapter(checkpoint) else None


@contextmanager
def _without_adapter(model: Any) -> Iterator[PreTrainedModel]:
    with model.disable_adapter():
        yield model


@contextmanager
def _always(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    yield model


def telling_prompts(name: str, count: int) -> list[str]:
    """Return the held-out prompts of a run whose completions before training scored lowest; [] without results."""
    for directory in (Path(name), Path(name).resolve().parent):
        try:
            table = pq.read_table(directory / RESULTS_FILE, columns=["prompt", "row", "reward"]).to_pylist()
        except (OSError, pa.ArrowException):
            continue
        before = [line for line in table if line["row"] == "reference" and line["reward"] is not None]
        prompts = dict.fromkeys(line["prompt"] for line in sorted(before, key=lambda line: line["reward"]))
        return [] if any(prompt.startswith("[{") for prompt in prompts) else [*prompts][:count]  # Chats as JSON.
    return []
