"""Models and runs that are damaged, and what is said of them. See test_bad_input.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from helpers.bad_sources import GENERATE, PROMPT, RESUME, TRAIN, Case, Spoil
from safetensors.torch import load_file, save_file

CASES: dict[str, Case | Spoil] = {}


# Models: what is done to the directory, what is said.


def model(change: Callable[[Path], object], said: str, command: list[str] | None = None) -> Spoil:
    def spoil(home: Path) -> Case:
        change(home / "run" / "final")
        return command or [*GENERATE, *PROMPT], said

    return spoil


def writes(name: str, content: bytes | str | dict | list) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        text = content if isinstance(content, bytes | str) else json.dumps(content)
        (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def merges(name: str, **values: object) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        known = json.loads((directory / name).read_text(encoding="utf-8"))
        (directory / name).write_text(json.dumps({**known, **values}), encoding="utf-8")

    return change


def drops(*names: str) -> Callable[[Path], object]:
    return lambda directory: [(directory / name).unlink() for name in names]


def cuts(name: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return spoil


def fills(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights["transformer.ln_f.weight"].fill_(value)


CANNOT = "run/final' cannot be loaded"
CASES |= {
    f"model: {name}": model(change, said)
    for name, change, said in [
        ("nothing", lambda directory: (shutil.rmtree(directory), directory.mkdir()), CANNOT),
        ("no config", drops("config.json"), CANNOT),
        ("config is empty", writes("config.json", ""), CANNOT),
        ("config cut short", cuts("config.json"), CANNOT),
        ("config is a list", writes("config.json", []), CANNOT),
        ("config of nothing", writes("config.json", {}), CANNOT),
        ("config of zeros", writes("config.json", b"\0" * 9), CANNOT),
        ("config in UTF-16", writes("config.json", '{"model_type": "gpt2"}'.encode("utf-16")), CANNOT),
        ("an unknown kind", merges("config.json", model_type="nothing"), CANNOT),
        ("a kind that is no word", merges("config.json", model_type=3), CANNOT),
        ("a kind that writes no text", merges("config.json", model_type="vit"), CANNOT),
        ("negative width", merges("config.json", n_embd=-16), CANNOT),
        ("heads that do not divide", merges("config.json", n_head=3), CANNOT),
        ("no heads", merges("config.json", n_head=0), CANNOT),
        ("a word for a width", merges("config.json", n_embd="wide"), CANNOT),
        ("another width", merges("config.json", n_embd=32), CANNOT),
        ("another vocabulary", merges("config.json", vocab_size=5), CANNOT),
        ("more layers than weights", merges("config.json", n_layer=3), CANNOT),
        ("an unknown activation", merges("config.json", activation_function="nothing"), CANNOT),
        ("no weights", drops("model.safetensors"), CANNOT),
        ("weights are empty", writes("model.safetensors", b""), CANNOT),
        ("weights cut short", cuts("model.safetensors"), CANNOT),
        ("weights of text", writes("model.safetensors", "no weights at all"), CANNOT),
        ("weights of a huge header", writes("model.safetensors", b"\xff" * 64), CANNOT),
        ("weights without one", tensors(lambda weights: weights.pop("transformer.ln_f.weight")), CANNOT),
        (
            "weights of another shape",
            tensors(lambda weights: weights.update(**{"transformer.ln_f.weight": torch.ones(3)})),
            CANNOT,
        ),
        ("weights of NaN", tensors(fills(float("nan"))), "the model's logits are not finite"),
        ("weights of infinity", tensors(fills(float("inf"))), "the model's logits are not finite"),
        ("no tokenizer", drops("tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
        ("tokenizer is empty", writes("tokenizer.json", ""), "no tokenizer that can be loaded"),
        ("tokenizer cut short", cuts("tokenizer.json"), "no tokenizer that can be loaded"),
        ("tokenizer of nothing", writes("tokenizer.json", {}), "no tokenizer that can be loaded"),
        ("tokenizer is a list", writes("tokenizer.json", []), "no tokenizer that can be loaded"),
        ("tokenizer's config is a list", writes("tokenizer_config.json", []), "no tokenizer that can be loaded"),
        ("tokenizer's config cut short", cuts("tokenizer_config.json"), "no tokenizer that can be loaded"),
        ("generation config is a list", writes("generation_config.json", []), CANNOT),
        ("quark.json is empty", writes("quark.json", ""), "quark.json is damaged"),
        ("quark.json cut short", cuts("quark.json"), "quark.json is damaged"),
        ("quark.json is a list", writes("quark.json", []), "quark.json is damaged"),
        ("quark.json is a word", writes("quark.json", '"a"'), "quark.json is damaged"),
        ("quark.json of nothing", writes("quark.json", {}), "quark.json is damaged"),
        ("quark.json in Latin-1", writes("quark.json", '{"é": 1}'.encode("latin-1")), "quark.json is damaged"),
        ("quark.json is deep", writes("quark.json", "[" * 100_000), "quark.json is damaged"),
        ("the reference is a list", merges("quark.json", reference=[1]), "quark.json is damaged"),
        ("the reference is a word", merges("quark.json", reference="gpt2"), "quark.json is damaged"),
        ("the reference's name is a number", merges("quark.json", reference={"name": 3}), "quark.json is damaged"),
    ]
}


def conditioning(**values: object) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        facts = json.loads((directory / "quark.json").read_text(encoding="utf-8"))
        facts["conditioning"] |= values
        (directory / "quark.json").write_text(json.dumps(facts), encoding="utf-8")

    return change


CASES |= {
    f"reward tokens: {name}": model(conditioning(**values), "quark.json is damaged")
    for name, values in {
        "none": {"prefixes": []},
        "of no quantile": {"prefixes": [[]]},
        "of one quantile": {"prefixes": [[[10]]]},
        "no list": {"prefixes": 10},
        "null": {"prefixes": None},
        "words": {"prefixes": [[["a"], ["b"]]]},
        "beyond the model": {"prefixes": [[[10], [5000]]]},
        "below zero": {"prefixes": [[[-1], [10]]]},
        "twice the same": {"prefixes": [[[10], [10]]]},
        "a word of the vocabulary": {"prefixes": [[[0], [1]]]},
        "more than attributes": {"prefixes": [[[10], [11]], [[10], [11]]]},
        "attributes without tokens": {"attributes": ["a", "b"]},
        "no attributes": {"attributes": [], "prefixes": []},
        "attributes that are numbers": {"attributes": [3]},
        "attributes that are a word": {"attributes": "a"},
        "a vocabulary of nothing": {"vocab_size": 0},
        "a negative vocabulary": {"vocab_size": -1},
        "a vocabulary beyond the model": {"vocab_size": 10**6},
        "a vocabulary that is a word": {"vocab_size": "ten"},
        "a vocabulary that is null": {"vocab_size": None},
        "a beginning that is a word": {"start_ids": "<bos>"},
    }.items()
}


# Runs to go on with: what is done to the run's directory, what is said.


def run(change: Callable[[Path], object], said: str, *flags: str) -> Spoil:
    def spoil(home: Path) -> Case:
        change(home / "run")
        return [*RESUME, "--num_iterations", "3", *flags], said

    return spoil


def last(directory: Path) -> Path:
    return directory / "checkpoint-2"


def in_last(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """The same to both checkpoints, so that none is left to go on from."""

    def spoil(directory: Path) -> None:
        for checkpoint in directory.glob("checkpoint-*"):
            change(checkpoint)

    return spoil


def in_pool(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda directory: change(directory / "pool")


FIRST = "iteration-000000.parquet"
NONE_GOOD = "every checkpoint is damaged"
CASES |= {
    f"run: {name}": run(change, said)
    for name, change, said in [
        (
            "nothing",
            lambda directory: (shutil.rmtree(directory), directory.mkdir()),
            "must be the directory of a run to resume, and holds none",
        ),
        ("run.json is missing", drops("run.json"), "run.json is missing"),
        ("run.json is empty", writes("run.json", ""), "run.json is damaged"),
        ("run.json cut short", cuts("run.json"), "run.json is damaged"),
        ("run.json is a list", writes("run.json", []), "run.json is damaged"),
        ("run.json of nothing", writes("run.json", {}), "run.json is damaged"),
        ("run.json of null", writes("run.json", "null"), "run.json is damaged"),
        ("run.json is deep", writes("run.json", "[" * 100_000), "run.json is damaged"),
        ("options are a list", merges("run.json", options=["steps_per_iteration"]), "run.json is damaged"),
        ("rewards are a number", merges("run.json", rewards=3), "run.json is damaged"),
        ("rewards are words", merges("run.json", rewards=["a"]), "run.json is damaged"),
        ("versions are a list", merges("run.json", versions=[]), "run.json is damaged"),
        ("another model", merges("run.json", model="0"), "other model"),
        (
            "another length of iterations",
            lambda directory: merges(
                "run.json",
                options={**json.loads((directory / "run.json").read_text())["options"], "steps_per_iteration": 9},
            )(directory),
            "steps_per_iteration was 9, is 1",
        ),
        ("no manifests", in_last(drops("manifest.json")), NONE_GOOD),
        ("manifests are empty", in_last(writes("manifest.json", "")), NONE_GOOD),
        ("manifests are lists", in_last(writes("manifest.json", [])), NONE_GOOD),
        ("manifests of lists", in_last(writes("manifest.json", {"files": []})), NONE_GOOD),
        ("manifests of nothing", in_last(writes("manifest.json", {"files": {}})), "damaged"),
        ("manifests are deep", in_last(writes("manifest.json", "[" * 100_000)), NONE_GOOD),
        ("weights cut short", in_last(cuts("model.safetensors")), NONE_GOOD),
        ("weights are missing", in_last(drops("model.safetensors")), NONE_GOOD),
        ("states cut short", in_last(cuts("training/optimizer.safetensors")), NONE_GOOD),
        ("the state is missing", in_last(drops("trainer_state.json")), NONE_GOOD),
        (
            "a byte is another",
            in_last(lambda c: (c / "config.json").write_text((c / "config.json").read_text().replace("g", "h", 1))),
            NONE_GOOD,
        ),
        ("a sample file is missing", in_pool(drops(FIRST)), "iteration-000000.parquet is missing"),
        ("a sample file is empty", in_pool(writes(FIRST, "")), FIRST),
        ("a sample file cut short", in_pool(cuts(FIRST)), FIRST),
        ("a sample file of text", in_pool(writes(FIRST, "no samples")), FIRST),
        (
            "a sample file of another program",
            in_pool(lambda pool: pq.write_table(pa.table({"x": [1]}), pool / FIRST)),
            FIRST,
        ),
        ("a sample file without number", in_pool(writes("iteration-x.parquet", "")), "iteration-x.parquet"),
        (
            "no samples at all",
            lambda directory: shutil.rmtree(directory / "pool"),
            "iteration-000000.parquet is missing",
        ),
    ]
}
CASES |= {
    "run: a new one where one is": ([*TRAIN[:-1], "run"], "output_dir 'run': must not hold a run already"),
    "run: from a file": ([*RESUME[:-1], "--resume_from_checkpoint", "prompts.txt"], "prompts.txt"),
    "run: from a model": ([*RESUME[:-1], "--resume_from_checkpoint", "run/final"], "run/final"),
    "run: from nowhere": ([*RESUME[:-1], "--resume_from_checkpoint", "run/checkpoint-9"], "run/checkpoint-9"),
    "run: nowhere": (
        ["train", "--resume", "--output_dir", "nowhere"],
        "'nowhere': must be the directory of a run to resume",
    ),
    "run: other quantiles": ([*RESUME, "--num_quantiles", "3"], "num_quantiles was 2, is 3"),
    "run: other prompts": ([*RESUME, "--prompts", "rewards.py"], "rewards.py"),
}


def no_config(home: Path) -> Case:
    (home / "run" / "config.yaml").unlink()
    return ["train", "--resume", "--output_dir", "run"], "config.yaml"


def bad_config(home: Path) -> Case:
    (home / "run" / "config.yaml").write_bytes(b"\xff\0:")
    return ["train", "--resume", "--output_dir", "run"], "config.yaml"


CASES |= {"run: no config.yaml": no_config, "run: a bad config.yaml": bad_config}
