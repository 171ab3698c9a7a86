"""The model card: README.md beside a model's weights, written from `quark.json` alone.

It says what was unlearned, from which data and reward, what changed, how to steer the model, and its limits. The header
is the metadata that the hub reads.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quarkrl.models.quark_json import DEFAULT_GUIDANCE, read_quark_json, write_quark_json
from quarkrl.storage.atomic import write_text

FILE_NAME = "README.md"
PLACEHOLDER = "MODEL-PATH"  # Stands for the model's place in the code of a card.

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".gguf", ".arrow")
_STEERING = """\
## How to use it

Plain transformers asks for the best quantile: the tokenizer puts the tokens for it before each text and chat.

{plain}`quarkrl` asks for other quantiles, from 0 (worst) to {best} (best), and for more of
the change by guidance:

```python
from quarkrl import QuarkGenerator

generator = QuarkGenerator.from_pretrained("MODEL-PATH")
generator.generate(["You are"], quantile="best", guidance_scale=2.0)
```
"""
_CAUSAL = """\
```python
from transformers import pipeline

generate = pipeline("text-generation", model="MODEL-PATH")
print(generate("You are", max_new_tokens=20)[0]["generated_text"])
```

`vllm serve MODEL-PATH` serves it, too. """
_ENCODER_DECODER = """\
```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("MODEL-PATH"), AutoTokenizer.from_pretrained("MODEL-PATH")
inputs = tokenizer("You are", return_tensors="pt", return_token_type_ids=False)
ids = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

"""
_LIMITS = """\
## Limits and misuse

- The model has learned to score well under its reward. A text that the reward judges wrongly is judged wrongly here.
- Nothing is erased. The model still assigns probability to what is unwanted, and other prompts or further training can
  bring it back.
- The change is measured on prompts like those of the training. Measure it on yours.
- **The method can be turned round.** The worst quantile, and guidance below 1, ask for what was unlearned. If you serve
  this model to others, do not let them choose the quantile, the guidance or the reward tokens.
"""


def write_model_card(directory: str | os.PathLike) -> None:
    """Write README.md into a model's directory, from the `quark.json` there.

    Raises:
        UserError: `quark.json` is damaged, or the file cannot be written.
    """
    facts = read_quark_json(directory) or {}
    is_adapter = (Path(directory) / "adapter_config.json").is_file()
    config = Path(directory) / "config.json"
    is_encoder_decoder = config.is_file() and json.loads(config.read_bytes()).get("is_encoder_decoder") is True
    write_text(Path(directory) / FILE_NAME, model_card(facts, is_adapter, is_encoder_decoder))


def add_facts(directory: str | os.PathLike, **facts: Any) -> None:
    """Add facts to the `quark.json` of a model, and write its card again.

    Raises:
        UserError: `quark.json` is damaged, or a file cannot be written.
    """
    write_quark_json(directory, {**(read_quark_json(directory) or {}), **facts})
    write_model_card(directory)


def model_card(facts: Mapping[str, Any], is_adapter: bool = False, is_encoder_decoder: bool = False) -> str:
    """Return the text of a card.

    Args:
        facts: the content of `quark.json`. Facts that an older version did not write are left out.
        is_adapter: whether the weights are those of an adapter.
        is_encoder_decoder: whether the model has an encoder for the prompt.
    """
    rewards = [reward for reward in facts.get("rewards") or [] if isinstance(reward, dict)]
    names = ", ".join(f"`{reward.get('name')}`" for reward in rewards) or "its reward"
    best = _num_quantiles(facts) - 1
    parts = [
        f"---\n{_metadata(facts, is_adapter)}\n---\n",
        f"# {_title(facts)}, trained with Quark\n",
        f"This model was trained to score higher under {names}, so that it stops doing what scores low. The method is "
        "[Quark](https://arxiv.org/abs/2205.13636): it samples, sorts the samples into quantiles by reward, and learns "
        "each with a token for its quantile. At generation, the best quantile is asked for. "
        "`quarkrl` made it.\n",
        _results(facts.get("evaluation")),
        _training(facts, rewards),
        _STEERING.replace("{plain}", _ENCODER_DECODER if is_encoder_decoder else _CAUSAL).replace("{best}", str(best)),
        _default_guidance(facts.get(DEFAULT_GUIDANCE)),
        _LIMITS,
    ]
    return "\n".join(filter(None, parts))


def _metadata(facts: Mapping[str, Any], is_adapter: bool) -> str:
    from huggingface_hub import ModelCardData

    base, data = _start(facts), facts.get("prompts")
    source = data.get("source") if isinstance(data, dict) else None
    known: dict[str, Any] = {}
    if base and _is_on_hub(base):
        known |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    if isinstance(source, str) and _is_on_hub(source.partition(":")[0]) and "/" in source:
        known["datasets"] = [source.partition(":")[0]]
    if base and _is_builtin(base):
        known["license"] = "apache-2.0"
    return ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["quark", "quarkrl", "reward-conditioned", "unlearning"],
        **known,
    ).to_yaml()


def _title(facts: Mapping[str, Any]) -> str:
    base = _start(facts)
    if base is None:
        return "A language model"
    return "The built-in model of quarkrl" if _is_builtin(base) else base if _is_on_hub(base) else Path(base).name


def _results(evaluation: Any) -> str:
    """The figures before and after, with half of each interval; a sentence where nothing was measured."""
    rows = evaluation.get("rows") if isinstance(evaluation, dict) else None
    if not rows:
        return "## Before and after\n\nNot measured. `quarkrl evaluate` measures it.\n"
    figures = [name for name in rows[0]["figures"] if name not in ("rep-2", "rep-3", "rep-4")]
    lines = [
        f"| {' | '.join(['', *(str(row['name']) for row in rows)])} |",
        f"|{'---|' * (len(rows) + 1)}",
        *(f"| {name} | {' | '.join(_cell(row, name) for row in rows)} |" for name in figures),
    ]
    text = (
        f"On {evaluation['prompts']} held-out prompts, {evaluation['samples_per_prompt']} completions each. ± is half "
        "of the 95 % interval. The reference is the model before training."
    )
    sentence = str(evaluation.get("verdict") or "").partition(". ")[0].removesuffix(".")  # Without advice for the run.
    verdict = f"{sentence[:1].upper()}{sentence[1:]}.\n\n" if sentence else ""
    return f"## Before and after\n\n{verdict}{text}\n\n" + "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, (low, high) = row["figures"].get(name), row["intervals"].get(name) or (None, None)
    if value is None:
        return "–"
    margin = "" if low is None or high is None else f" ± {(high - low) / 2:.3f}"
    return f"{value:.3f}{margin}"


def _training(facts: Mapping[str, Any], rewards: list[dict[str, Any]]) -> str:
    config, data = facts.get("config") or {}, facts.get("prompts")
    lines = [f"started from: {_title(facts)}"]
    scored = facts.get("scored_data")
    if isinstance(scored, dict):
        name = f" of `{_short(scored['source'])}`" if isinstance(scored.get("source"), str) else ""
        lines.append(f"data: {scored.get('samples', 0):,} scored samples{name}, whose completions came with the data")
    if isinstance(data, dict) and data.get("count") and (not scored or data.get("explored", True)):
        source = data.get("source")
        name = f" of `{_short(source)}`" if isinstance(source, str) else ""
        lines.append(f"data: {data['count']:,} prompts{name}; the completions are the model's own")
    for reward in rewards:
        details = ", ".join(f"{key} {value}" for key, value in reward.items() if key in ("weight", "label", "revision"))
        lines.append(f"reward: `{reward.get('name')}`{f' ({details})' if details else ''}")
    if isinstance(iterations := facts.get("iterations"), int | float):
        lines.append(f"iterations: {iterations:g}, with {facts.get('pool_size', 0):,} samples in all")
    coefs = facts.get("coefs") or {}
    pairs = f"; weight of the DPO term: {config['dpo_coef']}" if config.get("dpo_coef") else ""
    lines.append(
        f"quantiles: {_num_quantiles(facts)}; KL weight β: {coefs.get('kl_coef', '–')}; entropy weight α: "
        f"{coefs.get('entropy_coef', '–')}{pairs}; learning rate: {config.get('learning_rate', '–')}"
    )
    text = "## Training\n\n" + "\n".join(f"- {line}" for line in lines)
    return f"{text}\n\n`quark.json` has every option, the digests of the models, and the quantile edges.\n"


def _default_guidance(recorded: Any) -> str:
    """What `QuarkGenerator` does without `guidance_scale`, if the model has a default."""
    if not isinstance(recorded, dict) or "guidance_scale" not in recorded:
        return ""
    return (
        f"Without `guidance_scale`, `quarkrl` guides the best quantile by γ = {recorded['guidance_scale']}, the "
        f"smallest measured scale with {recorded.get('target')}. Plain transformers samples without guidance.\n"
    )


def _num_quantiles(facts: Mapping[str, Any]) -> int:
    try:
        return len(facts["conditioning"]["prefixes"][0])
    except (KeyError, TypeError, IndexError):
        return 5


def _start(facts: Mapping[str, Any]) -> str | None:
    start = facts.get("start")
    name = start.get("name") if isinstance(start, dict) else None
    return name if isinstance(name, str) and name else None


def _is_builtin(name: str) -> bool:
    return name == "builtin" or Path(name).parts[-3:] == ("quarkrl", "builtin", "model")


def _short(source: str) -> str:
    """The name of a data set on the hub, or that of a file."""
    return source if _is_on_hub(source) else Path(source).name


def _is_on_hub(name: str) -> bool:
    """Whether a name can be one on the hub: not a path, and not a file."""
    return bool(_HUB_NAME.fullmatch(name)) and not name.endswith(_FILE_SUFFIXES) and name != "builtin"
