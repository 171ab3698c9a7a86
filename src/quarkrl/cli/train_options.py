"""The options of `quarkrl train`, from flags and a YAML file or preset, checked alike."""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from quarkrl.cli.flags import Parser
from quarkrl.errors import UserError

if TYPE_CHECKING:
    from quarkrl.training.config import QuarkConfig

PRESETS = Path(__file__).parents[1] / "presets"


@dataclass
class RunArguments:
    """What `quarkrl train` needs beside `QuarkConfig`."""

    model: str | None = field(default=None, metadata={"help": "Model to train: a directory, a hub name, or builtin."})
    ref_model: str | None = field(default=None, metadata={"help": "Reference p_0; default: the model as it was."})
    prompts: str | None = field(default=None, metadata={"help": "Prompts to explore: a file, a data set, or builtin."})
    eval_prompts: str | None = field(default=None, metadata={"help": "Held-out prompts, for evaluation each epoch."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompt."})
    prompt_tokens: int | None = field(
        default=None, metadata={"help": "Cut texts to their first so many tokens, and leave out shorter ones."}
    )
    prompt_split: str = field(default="train", metadata={"help": "Split of a data set, such as train[:5000]."})
    eval_prompt_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of the data set of eval_prompts; default: test where prompts names it too, else train."
        },
    )
    reward: list[str] | None = field(
        default=None,
        metadata={
            "help": "profanity, vader, perspective, judge, …, a classifier (directory or hub name), module:function or "
            "file.py:function; with options as NAME?option=value&option=value (docs/rewards.md)."
        },
    )
    reward_label: str | None = field(
        default=None, metadata={"help": "Label of a classifier whose probability is the reward, or 'not LABEL'."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of the model: sdpa, eager (the default on a CPU), …"}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Type of the weights; auto: as the model was saved."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model and the reference."}
    )
    lora_rank: int | None = field(default=None, metadata={"help": "Train a LoRA adapter of this rank."})
    resume: bool = field(
        default=False,
        metadata={
            "help": "Go on with the run in output_dir after whatever ended it; its config.yaml says the rest unless "
            "--config does."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a better held-out reward; the best checkpoint "
            "becomes final/."
        },
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise UserError(f"early_stopping_patience {self.early_stopping_patience}: want at least 1")
        for name in ("lora_rank", "prompt_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: want at least 1")


class TrainCommand(NamedTuple):
    """What `quarkrl train` runs.

    Attributes:
        run: options of the command itself.
        config: options of the trainer.
        given: the options that differ from their defaults, for `config.yaml`.
    """

    run: RunArguments
    config: "QuarkConfig"
    given: dict[str, Any]

    def ignored(self) -> str | None:
        """Return a message about options that `QuarkConfig` ignores in a single process, or None."""
        names = [name for name in ("ddp_backend", "fsdp") if self.given.get(name) and not getattr(self.config, name)]
        if not names:
            return None
        launch = "torchrun --nproc_per_node N -m quarkrl.cli train …"
        return f"{' and '.join(names)} ignored: there is one process. To start several: {launch}"


def parse_train(argv: Sequence[str]) -> TrainCommand:
    """Flags and file of `quarkrl train` as objects, and the options given by either, for `config.yaml`.

    The file's entries become flags put before the user's own, so that both are read, checked and reported alike, and
    a flag beats the file.
    """
    from transformers import HfArgumentParser

    from quarkrl.training.config import QuarkConfig

    class TrainParser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(message)

    parser = TrainParser(
        [RunArguments, QuarkConfig],
        prog="quarkrl train",
        description="Train a model with Quark. Every field of transformers.TrainingArguments is an option too.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="PRESET|FILE", help=f"a YAML file, or one of {', '.join(preset_names())}")
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    # As parsed: an option that is true by default has a second flag, --no_NAME, whose action has another default.
    defaults = vars(parser.parse_args([]))
    pre = Parser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config")
    pre.add_argument("--output_dir", default="")
    pre.add_argument("--resume", nargs="?", const=True)
    first = pre.parse_known_args(argv)[0]
    config_name = first.config
    if first.resume and not config_name and (saved := Path(first.output_dir) / "config.yaml").exists():
        config_name = str(saved)  # A resumed run knows its own options.
    entries = load_config(config_name, known) if config_name is not None else {}
    several = [action.dest for action in parser._actions if action.nargs in ("+", "*")]
    _check_values(str(config_name), entries, several)
    parser.set_defaults(**{key: None for key, value in entries.items() if value is None})
    flags = [*_as_flags(entries), *argv]
    found, unknown = parser.parse_known_args(flags)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UserError(f"unknown option {flag}{_nearest(flag.lstrip('-'), known, '--')}")
    values = vars(found)
    values.pop("config")
    for name in ("hub_token", "push_to_hub_token"):
        if values.get(name):
            raise UserError(
                f"{name} on the command line or in a file: set HF_TOKEN in the environment, or `hf auth login`"
            )
    if values["eval_prompts"] and not any(name.split("=")[0] == "--eval_strategy" for name in flags):
        values["eval_strategy"] = "epoch"  # Held-out prompts are there to be used: after each iteration.
    _check_guards(values)
    parts = []
    for kind in (RunArguments, QuarkConfig):
        names = {f.name for f in dataclasses.fields(kind) if f.init}
        try:
            parts.append(kind(**{name: value for name, value in values.items() if name in names}))
        except UserError:
            raise
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(str(error)) from error
    if values["eval_strategy"] != "no" and not values["eval_prompts"]:
        raise UserError(f"eval_strategy {values['eval_strategy']} without eval_prompts: give --eval_prompts")
    given = {name: value for name, value in values.items() if value != defaults[name]}
    return TrainCommand(parts[0], parts[1], given)  # type: ignore[arg-type]


def _check_guards(values: dict[str, Any]) -> None:
    """Options that keep the best of a run need evaluations, and checkpoints to choose from."""
    patience = values["early_stopping_patience"] is not None
    if patience:
        values["load_best_model_at_end"] = True
        values["restore_callback_states_from_checkpoint"] = True  # A resumed run goes on counting.
    if values["load_best_model_at_end"]:
        name = "early_stopping_patience" if patience else "load_best_model_at_end"
        if not values["eval_prompts"]:
            raise UserError(f"{name} without eval_prompts: give --eval_prompts, held-out prompts to judge by")
        if values["save_strategy"] == "no":
            raise UserError(f"{name} with save_strategy no: there is no checkpoint to keep; give --save_strategy epoch")


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(name: str, known: Sequence[str]) -> dict[str, Any]:
    """A preset's or a file's entries.

    Raises:
        UserError: no such file or preset, no YAML mapping, or a key that is no option.
    """
    import yaml

    path = PRESETS / f"{name}.yaml" if name in preset_names() else Path(name)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        near = _nearest(name, preset_names())
        raise UserError(
            f"config {name!r}: no such file or preset{near}; presets: {', '.join(preset_names())}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path}: want a mapping of options to values, got {type(entries).__name__}")
    for key in entries:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{_nearest(str(key), known)}")
    return entries


def _check_values(name: str, entries: dict[str, Any], several: Sequence[str]) -> None:
    """See that each value can stand behind a flag: a word or a number, a list of them, or a mapping that is JSON."""
    for key, value in entries.items():
        if isinstance(value, list):
            if key not in several:
                raise UserError(f"{name}: {key} is a list: want one value")
            if bad := [item for item in value if isinstance(item, dict | list | None) or str(item).startswith("--")]:
                raise UserError(
                    f"{name}: {key} has {type(bad[0]).__name__} {str(bad[0])[:40]!r} in it: want plain values"
                )
        elif isinstance(value, dict):
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"{name}: {key} cannot be written as JSON ({error})") from error


def _as_flags(entries: dict[str, Any]) -> Iterator[str]:
    for key, value in entries.items():
        if value is None:
            continue
        if isinstance(value, list):
            yield from (f"--{key}", *map(str, value))
        elif key == "fsdp" and value is True:
            yield "--fsdp"  # TrainingArguments knows the bare flag, and takes a word behind it for an old option.
        else:
            yield f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"


def _nearest(word: str, known: Sequence[str], dashes: str = "") -> str:
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {dashes}{match[0]}?" if match else ""
