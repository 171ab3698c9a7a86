"""Prompts, options, rewards and caches that cannot be used, and what is said of them. See test_bad_input.py."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

Case = tuple[list[str], str]
Spoil = Callable[[Path], Case]

TRAIN = ["train", "--config", "run.yaml", "--output_dir", "new"]
RESUME = ["train", "--config", "run.yaml", "--output_dir", "run", "--resume"]
GENERATE = ["generate", "run/final", "--max_new_tokens", "3"]
PROMPT = ["--prompt", "a"]
REWARD = ["--reward", "rewards.py:good"]
EVALUATE = ["evaluate", "run/final", "--prompts", "prompts.txt", *REWARD, "--samples", "2", "--resamples", "10"]
SCORE = ["score", "prompts.txt"]

CASES: dict[str, Case | Spoil] = {}


# Prompts: a file's name, its content, what is said.

PROMPT_FILES: list[tuple[str, bytes | str, str]] = [
    ("cut.jsonl", '{"prompt": "a"}\n{"prompt": "b', "cut.jsonl:2: malformed JSON"),
    ("array.jsonl", '["a", "b"]\n', "not a JSON object"),
    ("number.jsonl", "3\n", "not a JSON object"),
    ("null.jsonl", "null\n", "not a JSON object"),
    ("no-object.jsonl", '"a"\n', "not a JSON object"),
    ("empty-object.jsonl", "{}\n", "no 'prompt' among none"),
    ("null-prompt.jsonl", '{"prompt": null}\n', "the prompt is null"),
    ("number-prompt.jsonl", '{"prompt": 3}\n', "the prompt is 3"),
    ("true-prompt.jsonl", '{"prompt": true}\n', "the prompt is True"),
    ("empty-list.jsonl", '{"prompt": []}\n', "malformed chat messages"),
    ("list-of-numbers.jsonl", '{"prompt": [1, 2]}\n', "malformed chat messages"),
    ("no-role.jsonl", '{"messages": [{"content": "a"}]}\n', "malformed chat messages"),
    ("no-content.jsonl", '{"messages": [{"role": "user", "content": null}]}\n', "malformed chat messages"),
    ("no-template.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "template"),
    ("nested.jsonl", '{"prompt": {"toxicity": 0.5}}\n', "a prompt object without 'text'"),
    ("nested-null.jsonl", '{"prompt": {"text": null}}\n', "the prompt is null"),
    ("empty-prompt.jsonl", '{"prompt": ""}\n', "the prompt is empty"),
    ("blank-prompt.jsonl", '{"prompt": " \\n\\t"}\n', "the prompt is empty"),
    ("surrogate.jsonl", '{"prompt": "a\\ud800"}\n', "half a character"),
    ("deep.jsonl", '{"prompt":' + "[" * 100_000 + "\n", "malformed JSON"),
    ("digits.jsonl", '{"prompt": ' + "1" * 10_000 + "}\n", "malformed JSON"),
    ("two.jsonl", '{"prompt": "a"} {"prompt": "b"}\n', "malformed JSON"),
    ("comma.jsonl", '{"prompt": "a",}\n', "malformed JSON"),
    ("quotes.jsonl", "{'prompt': 'a'}\n", "malformed JSON"),
    ("comma.json", '[\n  {"prompt": "a"}\n  {"prompt": "b"}\n]\n', "comma.json:3: malformed JSON"),
    ("latin-1.json", '[\n"é"]\n'.encode("latin-1"), "latin-1.json:2: byte 0xe9 is not UTF-8"),
    ("numbers.json", "[1]\n", "row 1 of numbers.json: the row is 1"),
    ("one.json", '{\n  "data": []\n}\n', "no column 'prompt'; must be one of 'data'"),
    ("utf-16.jsonl", b"\xff\xfea", "the file is damaged UTF-16"),
    ("utf-16.txt", "a\nb\n".encode("utf-16-le"), "utf-16.txt:1: there is a NUL character"),
    ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-20], "cut.jsonl.gz: cannot be read"),
    ("no.jsonl.gz", '{"prompt": "a"}\n', "no.jsonl.gz: cannot be read"),
    ("bad.jsonl.gz", gzip.compress(b'{"prompt": "a"}\nb\n'), "bad.jsonl.gz:2: malformed JSON"),
    ("prompts.parquet.gz", gzip.compress(b"PAR1"), "prompts.parquet.gz: "),
    ("ragged.tsv", "prompt\tx\na\n", "Quote text that contains tabs"),
    ("semicolons.csv", "prompt;x\na\n", "Quote text that contains semicolons"),
    ("latin-1.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "byte 0xe9 is not UTF-8"),
    ("empty.jsonl", "", "the file is empty"),
    ("lines.jsonl", "\n\n\n", "there are no rows in it"),
    ("mark.jsonl", b"\xef\xbb\xbf", "there are no rows in it"),
    ("zeros.jsonl", b"\0" * 64, "there is a NUL character"),
    (
        "other-column.jsonl",
        '{"text": "a"}\n',
        "must be one of 'text'. Set --prompt_column text (in Python: load_prompts(",
    ),
    ("mixed.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "mixed.jsonl:2: no 'prompt' among"),
    ("long.jsonl", json.dumps({"prompt": "a " * 500}) + "\n", "501 tokens"),
    ("header.csv", "prompt\n", "there are no rows in it"),
    ("other.csv", "text\na\n", "no column 'prompt'"),
    ("ragged.csv", "prompt,x\na\n", "1 fields where the header has 2"),
    ("open.csv", 'prompt\n"a\n', "malformed CSV"),
    ("twice.csv", "prompt,prompt\na,b\n", "two columns have the same name"),
    ("empty.csv", "", "the file is empty"),
    ("null.csv", "prompt,x\n,1\n", "the prompt is empty"),
    ("latin-1.csv", "prompt\né\n".encode("latin-1"), "is not UTF-8"),
    ("garbage.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "cannot be read"),
    ("text.parquet", "a\n", "cannot be read"),
    ("empty.parquet", "", "the file is empty"),
    ("empty.txt", "", "the file is empty"),
    ("blank.txt", "\n \n", "blank.txt:1: the prompt is empty"),
    ("bytes.txt", b"a\n\xff\xfe\n", "bytes.txt:2: byte 0xff is not UTF-8"),
    ("prompts.xml", "<a/>", "unknown suffix '.xml'"),
    ("prompts", "a\n", "unknown suffix ''"),
    ("prompts.pkl", b"\x80\x04N.", "unknown suffix '.pkl'"),
]


def prompt_file(name: str, content: bytes | str) -> Spoil:
    def spoil(home: Path) -> Case:
        (home / name).write_bytes(content.encode() if isinstance(content, str) else content)
        said = next(said for known, _, said in PROMPT_FILES if known == name)
        return [*GENERATE, "--prompts", name], said

    return spoil


CASES |= {f"prompts {name}": prompt_file(name, content) for name, content, _ in PROMPT_FILES}


def parquet(columns: dict, said: str) -> Spoil:
    def spoil(home: Path) -> Case:
        pq.write_table(pa.table(columns), home / "p.parquet")
        return [*TRAIN, "--prompts", "p.parquet"], said

    return spoil


def cut_parquet(home: Path) -> Case:
    pq.write_table(pa.table({"prompt": ["a", "b"] * 100}), home / "p.parquet")
    content = (home / "p.parquet").read_bytes()
    (home / "p.parquet").write_bytes(content[: len(content) // 2])
    return [*TRAIN, "--prompts", "p.parquet"], "p.parquet: cannot be read"


def folder_of_prompts(files: dict[str, str], said: str) -> Spoil:
    def spoil(home: Path) -> Case:
        (home / "set").mkdir()
        for name, content in files.items():
            (home / "set" / name).write_text(content, encoding="utf-8")
        return [*TRAIN, "--prompts", "set"], said

    return spoil


CASES |= {
    "parquet of numbers": parquet({"prompt": [1, 2]}, "the prompt is 1"),
    "parquet of other columns": parquet({"text": ["a"]}, "no column 'prompt'"),
    "parquet of nulls": parquet({"prompt": pa.array([None, None], pa.string())}, "the prompt is null"),
    "parquet without rows": parquet({"prompt": pa.array([], pa.string())}, "there are no rows in it"),
    "parquet cut short": cut_parquet,
    "an empty folder": folder_of_prompts({}, "has no split 'train'"),
    "a folder of something else": folder_of_prompts({"a.bin": "x"}, "has no split 'train'"),
    "a damaged data set": folder_of_prompts(
        {"state.json": "{", "dataset_info.json": "{}"}, "the directory has no split 'train'"
    ),
    "a data set of nothing": folder_of_prompts({"dataset_dict.json": '{"splits": []}'}, "no split 'train'"),
    "a name on the hub": (
        [*TRAIN, "--prompts", "nobody/nothing"],
        "there is no such file, the hub cannot be reached (HF_HUB_OFFLINE is set)",
    ),
    "another split": ([*TRAIN, "--prompts", "nobody/nothing", "--prompt_split", "dev"], "no split 'dev'"),
    "too few prompts are left": (
        [*TRAIN, "--num_quantiles", "5"],
        "num_quantiles 5: must be at most 4, the samples of an iteration",
    ),
    "bad held-out prompts": (
        [*TRAIN, "--eval_prompts", "model/config.json"],
        "config.json: there is no column 'prompt'",
    ),
    "a folder that is no data set": ([*GENERATE, "--prompts", "model"], "the directory has no split"),
}


# Configurations: their YAML, what is said.

CONFIGS: dict[str, tuple[bytes | str, str]] = {
    "nothing": ("", "type NoneType"),
    "a word": ("toxicity\n", "type str"),
    "a number": ("3\n", "must map options to values"),
    "a list": ("- model: a\n", "must map options to values"),
    "two documents": ("model: a\n---\nmodel: b\n", "must be valid YAML"),
    "a tab": ("model:\n\t- a\n", "must be valid YAML"),
    "an open bracket": ("reward: [a\n", "must be valid YAML"),
    "an open quote": ('model: "a\n', "must be valid YAML"),
    "no UTF-8": (b"model: \xff\xfe\n", "must be valid YAML"),
    "zeros": (b"\0\0\0\0", "must be valid YAML"),
    "an unknown alias": ("model: *nobody\n", "must be valid YAML"),
    "a tag": ("model: !!python/name:os.system\n", "must be valid YAML"),
    "a list as key": ("[a, b]: 1\n", "must be valid YAML"),
    "a number as key": ("1: 2\n", "unknown key 1"),
    "null as key": ("null: 2\n", "unknown key None"),
    "a list in itself": ("reward: &a [*a]\n", "reward"),
    "a mapping in itself": ("lr_scheduler_kwargs: &a {b: *a}\n", "lr_scheduler_kwargs"),
    "a bomb of aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{k}: &{k} [{','.join([f'*{j}'] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True))
        + "reward: *i\n",
        "unknown key 'a'",
    ),
    "a bomb in an option": (
        "reward:\n- &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"- &{k} [{','.join([f'*{j}'] * 9)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True)),
        "reward",
    ),
    "a key that is a flag's": ("--model: a\n", "unknown key '--model'"),
    "a key of another case": ("Model: a\n", "Did you mean 'model'?"),
    "resume in a file of another": ("config: toxicity\n", "unknown key 'config'"),
    "a mapping for a word": ("model: {a: b}\n", "model"),
    "a list for a word": ("model: [a, b]\n", "model"),
    "a list for a number": ("num_quantiles: [1, 2]\n", "num_quantiles"),
    "a mapping for a number": ("num_quantiles: {a: 1}\n", "num_quantiles"),
    "a fraction for a whole number": ("num_quantiles: 2.5\n", "num_quantiles '2.5'"),
    "a word for a number": ("num_iterations: many\n", "num_iterations 'many'"),
    "a truth for a number": ("num_iterations: true\n", "num_iterations 'True'"),
    "a date for a number": ("learning_rate: 2020-01-01\n", "learning_rate '2020-01-01'"),
    "a word for a truth": ("do_sample: maybe\n", "maybe"),
    "a number for a choice": ("draw: 3\n", "draw"),
    "an empty word for a number": ("learning_rate: ''\n", "learning_rate ''"),
    "an empty list of rewards": ("reward: []\n", "reward"),
    "a null in a list": ("reward: [null]\n", "reward"),
    "no quantiles": ("num_quantiles: 0\n", "num_quantiles 0: must be"),
    "less than no iterations": ("num_iterations: -1\n", "num_iterations -1: must be"),
    "no steps": ("steps_per_iteration: 0\n", "steps_per_iteration 0: must be"),
    "no samples": ("samples_per_prompt: 0\n", "samples_per_prompt 0"),
    "no tokens": ("max_completion_length: 0\n", "max_completion_length 0"),
    "more tokens than fit": ("max_completion_length: 128\n", "prompt length limit -1: must be at least 1"),
    "more at least than at most": ("min_completion_length: 9\n", "min_completion_length 9: must be"),
    "no temperature": ("temperature: 0\n", "temperature 0.0: must be"),
    "no number for a temperature": ("temperature: .nan\n", "temperature nan"),
    "an infinite temperature": ("temperature: .inf\n", "temperature inf"),
    "no nucleus": ("top_p: 0\n", "top_p 0.0"),
    "no number for a nucleus": ("top_p: .nan\n", "top_p nan"),
    "a negative beta": ("kl_coef: -0.1\n", "kl_coef -0.1: must be"),
    "an infinite beta": ("kl_coef: .inf\n", "kl_coef inf"),
    "no number for alpha": ("entropy_coef: .nan\n", "entropy_coef nan"),
    "an infinite learning rate": ("learning_rate: .inf\n", "learning_rate inf"),
    "no number for a learning rate": ("learning_rate: .nan\n", "learning_rate nan"),
    "no number for a ceiling": ("reward_ceiling: .nan\n", "reward_ceiling nan"),
    "no number for a target": ("kl_target: .nan\n", "kl_target nan"),
    "a share above one": ("max_unscored_share: 1.5\n", "max_unscored_share 1.5"),
    "no number for a share": ("max_unscored_share: .nan\n", "max_unscored_share nan"),
    "no number for guidance": ("explore_guidance_scale: [1, .nan]\n", "explore_guidance_scale"),
    "no guidance at all": ("explore_guidance_scale: []\n", "explore_guidance_scale"),
    "guidance from nothing": ("guidance_from: best\n", "guidance_from 'best'"),
    "a seed that is none": ("seed: -1\n", "seed -1: must be"),
    "a seed too large": ("seed: 4294967296\n", "seed 4294967296"),
    "no batch": ("per_device_train_batch_size: 0\n", "per_device_train_batch_size 0"),
    "no accumulation": ("gradient_accumulation_steps: 0\n", "gradient_accumulation_steps 0"),
    "no logging": ("logging_steps: 0\nlogging_strategy: steps\n", "logging"),
    "an unknown optimizer": ("optim: sgdd\n", "sgdd"),
    "an unknown schedule": ("lr_scheduler_type: zig\n", "zig"),
    "a tracker that is not there": ("report_to: nowhere\n", "nowhere"),
    "a schedule's options that are none": ("lr_scheduler_kwargs: '{'\n", "Expecting property name"),
    "weights of another number": (
        "reward_weights: [1, 2]\n",
        "reward_weights [1.0, 2.0]: must be one number per reward",
    ),
    "weights that are none": ("reward_weights: [x]\n", "reward_weights 'x'"),
    "an infinite weight": ("reward_weights: [.inf]\n", "reward_weights inf: must be finite"),
    "two precisions": ("fp16: true\nbf16: true\n", "At most one of fp16 and bf16"),
    "saving nothing to choose from": ("load_best_model_at_end: true\n", "load_best_model_at_end True"),
    "a rank below nothing": ("lora_rank: -1\n", "lora_rank -1: must be"),
    "patience of nothing": ("early_stopping_patience: 0\n", "early_stopping_patience 0"),
    "an unknown metric": ("metric_for_best_model: joy\n", "metric_for_best_model 'joy': must be one of"),
}


def config_file(content: bytes | str, said: str) -> Spoil:
    def spoil(home: Path) -> Case:
        own = content.encode() if isinstance(content, str) else content
        keys = yaml.safe_load((home / "run.yaml").read_text(encoding="utf-8"))
        rest = {name: value for name, value in keys.items() if not re.search(rf"^{name}:".encode(), own, re.MULTILINE)}
        flags = [word for name, value in rest.items() for word in (f"--{name}", str(value))]
        (home / "bad.yaml").write_bytes(own)
        return ["train", "--config", "bad.yaml", "--output_dir", "new", *flags], said

    return spoil


CASES |= {f"config: {name}": config_file(*case) for name, case in CONFIGS.items()}
CASES |= {
    "config is a folder": (["train", "--config", "model"], "config 'model'"),
    "config is a model": (["train", "--config", "model/model.safetensors"], "must be valid YAML"),
    "config is empty": (["train", "--config", ""], "config ''"),
    "config is missing": (["train", "--config"], "must have a value"),
    "config climbs out of the presets": (["train", "--config", "../presets/toxicity"], "config '../presets/toxicity'"),
}


# Flags.

CASES |= {
    f"{command[0]} {' '.join(map(str, flags))}": ([*command, *flags], said)
    for command, flags, said in [
        ([*GENERATE, *PROMPT], ["--temperature", "nan"], "temperature nan"),
        ([*GENERATE, *PROMPT], ["--temperature", "inf"], "temperature inf"),
        ([*GENERATE, *PROMPT], ["--temperature", "-1"], "temperature -1.0"),
        ([*GENERATE, *PROMPT], ["--temperature", "hot"], "temperature 'hot'"),
        ([*GENERATE, *PROMPT], ["--top_p", "0"], "top_p 0.0"),
        ([*GENERATE, *PROMPT], ["--top_p", "nan"], "top_p nan"),
        ([*GENERATE, *PROMPT], ["--max_new_tokens", "-3"], "max_new_tokens -3"),
        ([*GENERATE, *PROMPT], ["--max_new_tokens", "1000"], "max_new_tokens 1000: must be at most"),
        ([*GENERATE, *PROMPT], ["--min_new_tokens", "9"], "min_new_tokens 9: must be between 0 and max_new_tokens"),
        ([*GENERATE, *PROMPT], ["--min_new_tokens", "-1"], "min_new_tokens -1"),
        ([*GENERATE, *PROMPT], ["--seed", "1.5"], "seed '1.5'"),
        ([*GENERATE, *PROMPT], ["--seed", "²"], "seed '²'"),
        ([*GENERATE, *PROMPT], ["--batch_size", "0"], "batch_size 0"),
        ([*GENERATE, *PROMPT], ["--num_return_sequences", "-1"], "num_return_sequences -1"),
        ([*GENERATE, *PROMPT], ["--quantile", ""], "quantile ''"),
        ([*GENERATE, *PROMPT], ["--quantile", "-1"], "quantile '-1'"),
        ([*GENERATE, *PROMPT], ["--quantile", "²"], "quantile '²'"),
        ([*GENERATE, *PROMPT], ["--guidance_scale", "nan"], "guidance_scale nan"),
        ([*GENERATE, *PROMPT], ["--guidance_scale", "inf"], "guidance_scale inf"),
        ([*GENERATE, *PROMPT], ["--guidance_scale", "2", "--guidance_from", "nobody"], "nobody"),
        ([*GENERATE, *PROMPT], ["--guidance_scale", "2", "--guidance_from", "best"], "guidance_from 'best'"),
        (GENERATE, ["--prompt", " "], "the prompt is empty"),
        (GENERATE, ["--prompt"], "must have a value"),
        (GENERATE, ["--prompt", "a", "--prompts", "prompts.txt"], "prompt must not be set together with --prompts"),
        (GENERATE, ["--prompt", "a", "b"], "'b': must not be set together with --prompt"),
        (["generate"], ["", "--prompt", "a"], "cannot be loaded"),
        (EVALUATE, ["--samples", "0"], "samples 0: must be at least 1"),
        (EVALUATE, ["--limit", "0"], "limit 0: must be at least 1"),
        (EVALUATE, ["--threshold", "2"], "threshold 2.0: must be at least 0 and at most 1"),
        (EVALUATE, ["--threshold", "nan"], "threshold nan: must be at least 0 and at most 1"),
        (EVALUATE, ["--resamples", "0"], "resamples 0: must be at least 1"),
        (EVALUATE, ["--quantiles", "7"], "quantile '7'"),
        (EVALUATE, ["--guidance_scales", "nan"], "nan"),
        (EVALUATE, ["--guidance_scales", "x"], "guidance_scales 'x'"),
        (EVALUATE, ["--guidance_scales", "2", "--guidance_from", "9"], "'9'"),
        (EVALUATE, ["--judges", "nobody/nothing"], "nobody/nothing"),
        (EVALUATE, ["--judges", "rewards.py:nobody"], "has no 'nobody'"),
        (EVALUATE, ["--reference", "rewards.py"], "rewards.py"),
        (EVALUATE, ["--perplexity_model", "nowhere/at/all"], "perplexity_model 'nowhere/at/all': must be"),
        (EVALUATE, ["--output", "x.parquet"], "output 'x.parquet': must end in .json"),
        (EVALUATE, ["--output", "rewards.py/x.json"], "rewards.py"),
        (EVALUATE, ["--plot", "x.json"], "x.json"),
        (EVALUATE, ["--plot", "x.png"], "plot: "),
        (EVALUATE, ["--corpus", "nowhere.txt"], "nowhere.txt: no such file"),
        (EVALUATE, ["--corpus", "model/config.json"], "config.json"),
        (EVALUATE, ["--max_new_tokens", "128"], "limit"),
        (SCORE, ["--reward"], "must have a value"),
        (SCORE, [*REWARD, "--column", "nothing", "more"], "'more': must be the value of an option"),
        (["score", "run/pool"], REWARD, "run/pool"),
        (["score"], REWARD, "file is missing"),
        (TRAIN, ["--model", "prompts.txt"], "prompts.txt"),
        (TRAIN, ["--ref_model", "nowhere/at/all"], "nowhere/at/all"),
        (TRAIN, ["--num_quantiles"], "must have a value"),
        (TRAIN, ["extra"], "'extra': must be the value of an option"),
        (TRAIN, ["--output_dir", "prompts.txt/run"], "prompts.txt/run"),
        (TRAIN, ["--score_cache", "cache.sqlite"], "good cannot be cached"),
        (TRAIN, ["--reward_timeout", "0"], "reward_timeout 0.0: "),
        (TRAIN, ["--hub_token", "secret"], "hub_token"),
    ]
}


# Rewards: a spec, what is said.

LOCAL = "http://127.0.0.1:9/v1"
SPECS: list[tuple[str, str]] = [
    ("", "reward '': must be one of brevity, judge, perspective, "),
    (" ", "reward ' ': must be one of brevity, judge, perspective, "),
    ("rewards.py", "must name a function"),
    ("rewards.py:", "must name a function"),
    (":good", "must name a function"),
    ("rewards.py:good:bad", "reward module 'rewards.py:good'"),
    ("rewards.py:.", "has no '.'"),
    ("rewards.py:god", "Did you mean 'good'?"),
    ("rewards.py:NUMBER", "not of type int"),
    ("rewards.py:Kind", "not a class"),
    ("nowhere.py:good", "reward 'nowhere.py': must be an existing file"),
    ("no.such.module:good", "reward module 'no': must be installed"),
    ("os:nothing", "os has no 'nothing'"),
    ("..rewards:good", "..rewards"),
    ("syntax.py:f", "reward file syntax.py: cannot import it: SyntaxError"),
    ("bytes.py:f", "reward file bytes.py: cannot import it"),
    ("imports.py:f", "reward file imports.py: cannot import it: ModuleNotFoundError"),
    ("exits.py:f", "reward file exits.py: cannot import it: SystemExit"),
    ("recurses.py:f", "reward file recurses.py: cannot import it: RecursionError"),
    ("rewards.py:raises", "reward 'raises' raised ValueError: first line second ("),
    ("rewards.py:recurses", "reward 'recurses' raised RecursionError"),
    ("rewards.py:leaves", "reward 'leaves' raised SystemExit: 0"),
    ("rewards.py:asserts", "reward 'asserts' raised AssertionError ("),
    ("rewards.py:iterates", "must be a list of 4 numbers"),
    ("rewards.py:nothing", "reward 'nothing' returned None"),
    ("rewards.py:text", "returned 'abcd' (type str): must be a list of 4 numbers"),
    ("rewards.py:table", "(type dict): must be a list of 4 numbers"),
    ("rewards.py:number", "returned 1.0 (type float): must be a list of 4 numbers"),
    ("rewards.py:too_many", "returned 5 scores for 4 completions"),
    ("rewards.py:nested", "returned [1.0] (type list) at index 0"),
    ("rewards.py:words", "returned 'good' (type str) at index 0"),
    ("rewards.py:complex_numbers", "returned 1j (type complex) at index 0"),
    ("rewards.py:wants", "which have no further column. Add a column 'toxicity' to the prompts, give the parameter a"),
    ("rewards.py:takes_nothing", "returned 0 scores for 4 completions"),
    ("rewards.py:fails_later", "reward 'fails_later' raised OSError: [Errno 28] No space left on device ("),
    ("rewards.py:returns_later", "reward 'returns_later' returned 'abcd'"),
    ("rewards.py:BROKEN", "raised TypeError"),
    ("rewards.py:limited", "limit"),
    ("rewards.py:limited?limit=x", "limit 'x': must be an integer"),
    ("rewards.py:limited?limit=1&strict=maybe", "strict 'maybe': must be true or false"),
    ("rewards.py:limited?limt=1", "Did you mean 'limit'?"),
    ("rewards.py:good?x", "options 'x': must be option=value"),
    ("rewards.py:good?x=1&x=2", "option 'x': must not be repeated"),
    ("profanty", "Did you mean 'profanity'"),
    ("nobody/nothing", "nobody/nothing"),
    ("./nowhere", "reward './nowhere': must be an existing directory"),
    ("model", "must be a trained sequence classifier"),
    ("run", "must be a model with a config.json"),
    ("perspective", "PERSPECTIVE_API_KEY: must be set"),
    (f"perspective?endpoint={LOCAL}&attribute=", "attribute '': must be"),
    ("perspective?endpoint=nowhere", "endpoint: must be http://"),
    ("perspective?endpoint=ftp://127.0.0.1/", "endpoint: must be http://"),
    ("perspective?endpoint=http://127.0.0.1:99999/", "endpoint: must be http://"),
    ("perspective?endpoint=http://me:secret@127.0.0.1/", "must have no query and no password"),
    (f"perspective?endpoint={LOCAL}&timeout=0", "timeout 0.0: must be a finite number above 0"),
    (f"perspective?endpoint={LOCAL}&concurrency=-1", "concurrency -1: must be a finite number above 0"),
    (f"perspective?endpoint={LOCAL}&api_key=secret", "option 'api_key'"),
    (f"perspective?endpoint={LOCAL}&give_up_after=0.01&timeout=1", "gave no usable answer"),
    ("judge", "options endpoint, model, rubric: must be set"),
    (f"judge?endpoint={LOCAL}&model=m&rubric=nowhere.md", "rubric 'nowhere.md': must be an existing file"),
    (f"judge?endpoint={LOCAL}&model=m&rubric=+", "rubric: must not be empty"),
    (f"judge?endpoint={LOCAL}&model=m&rubric=r&scale=9-1", "scale '9-1'"),
    (f"judge?endpoint={LOCAL}&model=+&rubric=r", "model ' ': must be"),
    (f"judge?endpoint={LOCAL}&model=m&rubric=r&text=prompt", "text 'prompt'"),
    (f"judge?endpoint={LOCAL}&model=m&rubric=r&max_tokens=0", "max_tokens 0"),
    ("repetition?unit=letters", "unit 'letters'"),
    ("repetition?min_units=-1", "min_units"),
]
MODULES = {
    "syntax.py": "def f(:\n",
    "bytes.py": b"\xff\xfe\x00",
    "imports.py": "import nothing_of_this_name\n",
    "exits.py": "import sys\nsys.exit(0)\n",
    "recurses.py": "def f(): f()\nf()\n",
}


def spec(text: str, said: str) -> Spoil:
    def spoil(home: Path) -> Case:
        for name, content in MODULES.items():
            (home / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return [*SCORE, "--reward", text], said

    return spoil


CASES |= {f"reward {text!r}": spec(text, said) for text, said in SPECS}
CASES |= {
    "every reward NaN": (
        [*TRAIN, "--reward", "rewards.py:nan"],
        "4 of 4 rewards in iteration 1 are None or not finite",
    ),
    "every reward None": ([*TRAIN, "--reward", "rewards.py:none"], "4 of 4 rewards in iteration 1 are None or not"),
    "every reward too large": ([*TRAIN, "--reward", "rewards.py:huge"], "4 of 4 rewards in iteration 1 are None or"),
    "every reward NaN, evaluating": (
        [*EVALUATE, "--reward", "rewards.py:nan"],
        "none of the 8 completions has a reward",
    ),
    "every reward the same": (
        [*TRAIN, "--reward", "rewards.py:limited?limit=1"],
        "all 4 samples of the pool have reward 1",
    ),
    "label of no classifier": ([*SCORE, *REWARD, "--reward_label", "x"], "label 'x': must be unset"),
    "a judge that raises": ([*EVALUATE, "--judges", "rewards.py:raises"], "reward 'raises' raised ValueError"),
}


# Score caches.


def cache(content: bytes | None, said: str, name: str = "cache.sqlite") -> Spoil:
    def spoil(home: Path) -> Case:
        pytest.importorskip("vaderSentiment")
        if content is None:
            (home / name).mkdir()
        else:
            (home / name).write_bytes(content)
        return [*SCORE, "--reward", "vader", "--score_cache", name], said

    return spoil


def foreign_cache(statements: list[str], said: str) -> Spoil:
    def spoil(home: Path) -> Case:
        pytest.importorskip("vaderSentiment")
        with sqlite3.connect(home / "cache.sqlite") as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()
        return [*SCORE, "--reward", "vader", "--score_cache", "cache.sqlite"], said

    return spoil


OURS = f"PRAGMA application_id = {int.from_bytes(b'QRKs', 'big')}"
CASES |= {
    "cache of text": cache(b"a,b,c\n" * 100, "must be an undamaged score cache"),
    "cache of a header": cache(b"SQLite format 3\0" + b"\0" * 50, "cache"),
    "cache cut short": cache(b"SQLite format 3\0" + b"\xff" * 4000, "must be an undamaged score cache"),
    "cache is a folder": cache(None, "must be a file, not a directory"),
    "cache in a file": (
        [*SCORE, "--reward", "vader", "--score_cache", "prompts.txt/cache"],
        "cannot create its folder",
    ),
    "cache of another program": foreign_cache(["CREATE TABLE t (x)"], "must be a score cache"),
    "cache of another version": foreign_cache(
        ["CREATE TABLE scores (x)", OURS, "PRAGMA user_version = 99"], "must be of this version of quarkrl"
    ),
    "cache without tables": foreign_cache([OURS, "PRAGMA user_version = 1"], "cache"),
    "cache with other tables": foreign_cache(
        ["CREATE TABLE scorers (x)", "CREATE TABLE scores (x)", OURS, "PRAGMA user_version = 1"], "cache"
    ),
    "cache of nothing": ([*SCORE, *REWARD, "--score_cache", "c"], "good cannot be cached"),
}
