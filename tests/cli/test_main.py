"""The command as its users type it: what it does, and one line for each of their mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import yaml
from helpers.eight_letters import TOKENIZER
from helpers.tiny_models import make_home, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import quarkrl
from quarkrl.builtin import prompts_path
from quarkrl.cli.demo import free_directory
from quarkrl.cli.main import COMMANDS, main
from quarkrl.cli.run_prompts import held_out_prompts, train_prompts
from quarkrl.cli.train_options import RunOptions, parse_train
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.runs.checkpoints import seal
from quarkrl.runs.states import save_state, states_path
from quarkrl.training.config import QuarkConfig
from quarkrl.training.options import QuarkOptions

REWARDS = """
def few_a(completions, **_):
    return [-text.split().count("a") for text in completions]

def broken(completions, **_):
    raise RuntimeError("no\\nway")

def too_few(completions, **_):
    return [1.0]

def words(completions, **_):
    return [None if not text.strip() else float(len(text.split())) for text in completions]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory with a model, prompts, rewards and options."""
    directory = tmp_path_factory.mktemp("home")
    tiny_model("gpt2", TOKENIZER).save_pretrained(directory / "no_tokenizer")
    (directory / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b c"}\n', encoding="utf-8")
    (directory / "long.txt").write_text("a b\n" + "a " * 200 + "\nc\nd\n", encoding="utf-8")
    return make_home(
        directory,
        TOKENIZER,
        ["a b", "c", "d e f", "h g"],
        REWARDS,
        reward=str(directory / "rewards.py:few_a"),
        num_iterations=1,
        steps_per_iteration=2,
        max_completion_length=5,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        save_total_limit=None,
        on_collapse="warn",  # So short a run may never sample an "a".
    )


@pytest.fixture(scope="module")
def run(home) -> Path:
    """A finished run."""
    output_dir = home / "run"
    options = [
        "--output_dir",
        str(output_dir),
        "--steps_per_iteration=3",
        "--entropy_coef",
        "0",
        "--num_iterations",
        "2",
    ]
    assert main(["train", "--config", str(home / "run.yaml"), *options]) == 0
    return output_dir


def command(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "quarkrl.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **options,
    )


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def said(capsys, *arguments: str | Path) -> str:
    """What a command that succeeds writes to standard output."""
    capsys.readouterr()
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


# What it does


def test_training_leaves_a_whole_run(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "pool", "metrics.jsonl", "final"}
    assert {path.name for path in (run / "pool").iterdir()} == {f"iteration-{i:06d}.parquet" for i in range(2)}
    assert AutoTokenizer.from_pretrained(run / "final")("a b")["input_ids"] == [11, 0, 1]
    assert AutoModelForCausalLM.from_pretrained(run / "final").config.vocab_size == 12


def test_a_flag_beats_the_file_and_what_was_given_is_kept(run, home):
    kept = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    given = yaml.safe_load((home / "run.yaml").read_text(encoding="utf-8"))
    expected = {**given, "steps_per_iteration": 3, "entropy_coef": 0, "num_iterations": 2, "output_dir": str(run)}
    expected["reward"] = [given["reward"]]
    assert {name: kept.get(name) for name in expected} == expected
    facts = json.loads((run / "final" / "quark.json").read_text(encoding="utf-8"))
    assert (facts["config"]["steps_per_iteration"], facts["config"]["max_completion_length"]) == (3, 5)
    assert facts["config"]["save_total_limit"] is None


def test_a_runs_config_repeats_it(run, home, tmp_path):
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    for name in ("final/model.safetensors", "pool/iteration-000001.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()


def test_generate_writes_prompt_and_completion(run, home, capsys):
    final = run / "final"
    out = said(
        capsys, "generate", final, "--prompt", "a b", "--prompt", "c", "--num_return_sequences", "2", "--seed", "1"
    )
    lines = out.splitlines()
    assert len(lines) == 4
    assert [line.startswith(prompt) for line, prompt in zip(lines, ["a b", "a b", "c", "c"], strict=True)] == [True] * 4
    generate = ["generate", final, "--prompts", home / "prompts.txt", "--json", "--max_new_tokens", "4", "--quantile"]
    for quantile in ("worst", "best", "0"):
        rows = [json.loads(line) for line in said(capsys, *generate, quantile).splitlines()]
        assert [row["prompt"] for row in rows] == ["a b", "c", "d e f", "h g"]
        assert all(len(row["completions"]) == 1 and len(row["completions"][0].split()) <= 4 for row in rows)
    assert said(capsys, *generate, "0") == said(capsys, *generate, "worst") != said(capsys, *generate, "best")
    texts = said(capsys, "generate", "--quantile", "worst", final, "a b", "--seed", "1", "c")
    assert [line[0] for line in texts.splitlines()] == ["a", "c"]
    greedy = said(capsys, "generate", final, "--prompt", "a b", "--greedy", "--seed", "1")
    assert greedy == said(capsys, "generate", final, "--prompt", "a b", "--greedy", "--seed", "2")


def test_a_run_stands_for_its_final_model(run, home, capsys):
    arguments = ("--prompt", "a b", "--seed", "3")
    assert said(capsys, "generate", run, *arguments) == said(capsys, "generate", run / "final", *arguments)


def test_a_checkpoint_in_the_place_of_the_final_model_is_named(run, tmp_path, capsys):
    checkpoint = shutil.copytree(run / "final", tmp_path / "stopped" / "checkpoint-6")
    (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
    save_state(states_path(checkpoint, "optimizer"), {})
    seal(checkpoint)
    assert main(["generate", str(tmp_path / "stopped"), "a b"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"model: {tmp_path}/stopped/checkpoint-6, because {tmp_path}/stopped has no final/ yet"


def test_generate_reads_a_column_of_a_split_and_the_embedded_prompts(home, capsys, tmp_path):
    rows = {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in {"train": "a", "test": "b"}.items()}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
    generate = ["generate", home / "model", "--json", "--max_new_tokens", "1", "--prompts"]
    out = said(capsys, *generate, tmp_path / "set", "--prompt_column", "text", "--prompt_split", "test")
    assert json.loads(out)["prompt"] == "b"
    builtin = ["generate", "builtin", "--json", "--max_new_tokens", "1", "--batch_size", "2000", "--prompts", "builtin"]
    assert len(said(capsys, *builtin).splitlines()) == len(load_prompts(prompts_path("eval")))


def test_evaluate_prints_a_table_and_writes_json(run, home, capsys, tmp_path):
    evaluate = ["evaluate", run / "final", "--prompts", home / "prompts.txt", "--reward", home / "rewards.py:few_a"]
    out = said(capsys, *evaluate, "--samples", "3", "--limit", "2", "--output", tmp_path / "results.json")
    header, *rows = out.splitlines()
    assert [word for word in header.split() if word != "quantile"] == ["reference", "best", "worst"]
    assert any(row.startswith("reward") for row in rows) and any(row.startswith("perplexity") for row in rows)
    assert "2 prompts, 3 samples per prompt" in rows[-1]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["completions"] == "results.parquet" and results["protocol"]["samples_per_prompt"] == 3
    out = said(capsys, *evaluate, "--samples", "2", "--reference", "none", "--quantiles", "1", "0")
    assert [word for word in out.splitlines()[0].split() if word != "quantile"] == ["1", "0"]


def test_generate_can_leave_bad_prompts_out(home, capsys):
    command = ["generate", home / "model", "--prompts", home / "bad.jsonl", "--json"]
    assert main([str(argument) for argument in command]) == 2
    assert "--skip_bad_prompts" in capsys.readouterr().err
    assert main([*map(str, command), "--skip_bad_prompts"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["a", "b c"]
    assert "prompts skipped: 1 empty prompt" in err


@pytest.mark.parametrize("spelt", [["--do_sample", "false"], ["--no_do_sample"], ["--config", "{file}"]])
def test_what_is_switched_off_is_among_the_options_given(tmp_path, spelt):
    (tmp_path / "own.yaml").write_text("do_sample: false\n", encoding="utf-8")
    _, config, given, _ = parse_train(
        [*(flag.format(file=tmp_path / "own.yaml") for flag in spelt), "--output_dir", "o"]
    )
    assert given == {"do_sample": False, "output_dir": "o", "held_out": 64} and config.do_sample is False
    # As a run writes it, and reads it when it is resumed.
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    assert parse_train(["--resume", "--output_dir", str(tmp_path)])[1].do_sample is False


@pytest.mark.parametrize(
    ("named", "split", "wanted"),
    [("same", (), "held out"), ("other", (), "trained on"), ("other", ("--eval_prompt_split", "test"), "held out")],
)
def test_a_data_set_s_test_split_is_held_out_of_itself(tmp_path, named, split, wanted):
    texts = {"train": "trained on", "test": "held out"}
    rows = {name: datasets.Dataset.from_dict({"prompt": [text]}) for name, text in texts.items()}
    for directory in ("same", "other"):
        datasets.DatasetDict(rows).save_to_disk(tmp_path / directory)
    command = ["--model", "m", "--prompts", str(tmp_path / "same"), "--reward", "vader", "--output_dir", "o"]
    parsed, *_ = parse_train([*command, "--eval_prompts", str(tmp_path / named), *split])
    assert held_out_prompts(parsed, False).prompts == [wanted]


def test_bad_prompts_are_skipped_with_skip_bad_prompts(home, capsys, tmp_path):
    train = ["train", "--config", home / "run.yaml", "--prompts", home / "bad.jsonl", "--output_dir", tmp_path / "run"]
    said(capsys, *train, "--skip_bad_prompts", "true")
    assert main([*map(str, train[:-1]), str(tmp_path / "other"), "--skip_bad_prompts"]) == 0
    assert "prompts skipped: 1 " in capsys.readouterr().err


def test_a_run_resumes_from_its_checkpoint(home, capsys, tmp_path):
    train = ["train", "--config", home / "run.yaml", "--output_dir", tmp_path / "run", "--save_strategy", "epoch"]
    said(capsys, *train)
    said(capsys, *train, "--num_iterations", "2", "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-2")
    facts = json.loads((tmp_path / "run" / "final" / "quark.json").read_text(encoding="utf-8"))
    assert facts["iterations"] == 2 and facts["pool_size"] == 8


def test_training_an_adapter(home, capsys, tmp_path):
    said(capsys, "train", "--config", home / "run.yaml", "--output_dir", tmp_path / "run", "--lora_rank", "2")
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


# Mistakes

TRAIN = ("train", "--config", "{home}/run.yaml", "--output_dir", "{new}")
GENERATE = ("generate", "{run}/final", "--prompt", "a")
EVALUATE = ("evaluate", "{run}/final", "--prompts", "{home}/prompts.txt", "--reward", "{home}/rewards.py:few_a")
MISTAKES = {
    "unknown command": (
        ("tran",),
        "COMMAND 'tran': must be one of demo, presets, train, generate",
    ),
    "output_dir in use": (("train", "--config", "{home}/run.yaml", "--output_dir", "{run}"), "output_dir '{run}'"),
    "output_dir is a file": (
        (*TRAIN[:-1], "{home}/prompts.txt"),
        "prompts.txt': must be a directory that can be created",
    ),
    "output_dir of a dry run": (
        (*TRAIN[:-1], "/proc/x", "--dry_run"),
        "output_dir '/proc/x': must be a directory that can be created (no such file or directory). Set another",
    ),
    "a file that is like no other": (
        (*TRAIN, "--prompts", "{home}/nothere.txt"),
        "nothere.txt: no such file. Provide an existing file.",
    ),
    "a file with another suffix": ((*TRAIN, "--prompts", "{home}/prompt.jsonl"), "Did you mean '{home}/prompts.txt'?"),
    "a limit of prompts": (
        (*GENERATE, "--limit", "3"),
        "unknown option --limit. Give the first lines, such as those of",
    ),
    "almost builtin": (
        ("generate", "builtn", "a"),
        "model 'builtn': must be an existing directory or file, builtin, or",
    ),
    "almost built-in prompts": ((*GENERATE[:2], "--prompts", "built-in"), "no such file. Did you mean 'builtin'?"),
    "the paper's K": ((*TRAIN, "--K", "3"), "unknown option --K. Did you mean '--num_quantiles'?"),
    "unknown flag": ((*TRAIN, "--kl_coeff", "1"), "unknown option --kl_coeff. Did you mean '--kl_coef'?"),
    "another tool's name of a flag": ((*TRAIN, "--lr", "1"), "unknown option --lr. Did you mean '--learning_rate'?"),
    "and another": ((*GENERATE, "--gamma=2"), "unknown option --gamma. Did you mean '--guidance_scale'?"),
    "what train calls it, to generate": (
        (*GENERATE, "--num_samples", "2"),
        "unknown option --num_samples. Did you mean '--num_return_sequences'?",
    ),
    "what generate calls it, to train": (
        (*TRAIN, "--max_new_tokens", "2"),
        "unknown option --max_new_tokens. Did you mean '--max_completion_length'?",
    ),
    "another tool's name of a command": (("eval",), "Did you mean 'evaluate'?"),
    "nothing to resume": (("train", "--resume", "{home}/nowhere"), "resume '{home}/nowhere': must be the directory of"),
    "unknown flag with value": (
        (*TRAIN, "--num_itrations=1"),
        "unknown option --num_itrations. Did you mean '--num_it",
    ),
    "abbreviated flag": ((*TRAIN, "--kl_c", "1"), "unknown option --kl_c"),
    "wrong type": ((*TRAIN, "--num_quantiles", "many"), "num_quantiles 'many': must be an integer"),
    "not a choice": ((*TRAIN, "--draw", "best"), "draw"),
    "impossible value": ((*TRAIN, "--num_quantiles", "1"), "num_quantiles 1: must be at least 2"),
    "impossible top_p": ((*TRAIN, "--top_p", "1.5"), "top_p 1.5: must be greater than 0 and at most 1"),
    "impossible learning rate": ((*TRAIN, "--learning_rate", "-1"), "learning_rate -1.0: must be at least 0"),
    "impossible lora_rank": ((*TRAIN, "--lora_rank", "-1"), "lora_rank -1: must be at least 0"),
    "an adapter's option without adapter": (
        (*TRAIN, "--use_dora"),
        "use_dora True: must come with a LoRA adapter. Set --lora_rank",
    ),
    "an adapter on no layer": (
        (*TRAIN, "--lora_rank", "2", "--lora_target_modules", "nowhere"),
        "nowhere",
    ),
    "impossible dtype": ((*TRAIN, "--dtype", "float33"), "float33"),
    "impossible attention": ((*TRAIN, "--attn_implementation", "fast"), "fast"),
    "impossible scheduler": ((*TRAIN, "--lr_scheduler_type", "zigzag"), "zigzag"),
    "option of TrainingArguments that does nothing": (
        (*TRAIN, "--num_train_epochs", "4"),
        "num_train_epochs 4.0",
    ),
    "inconsistent TrainingArguments": (
        (*TRAIN, "--load_best_model_at_end=1", "--save_strategy=steps", "--eval_prompts={home}/prompts.txt"),
        "strateg",
    ),
    "no checkpoint": ((*TRAIN, "--resume_from_checkpoint", "{new}/checkpoint-9"), "resume_from_checkpoint"),
    "no such config": (("train", "--config", "toxcity"), "config 'toxcity'"),
    "unknown key": (
        ("train", "--config", "{home}/typo.yaml"),
        "typo.yaml': unknown key 'kl_coeff'. Did you mean 'kl_coef'?",
    ),
    "config of a config": (("train", "--config", "{home}/nested.yaml"), "nested.yaml': unknown key 'config'"),
    "not YAML": (("train", "--config", "{home}/broken.yaml"), "broken.yaml': must be valid YAML"),
    "not a mapping": (("train", "--config", "{home}/list.yaml"), "list.yaml': must map options to values"),
    "wrong type in the file": (("train", "--config", "{home}/type.yaml"), "num_iterations 'often': must be an integer"),
    "null in the file": (("train", "--config", "{home}/null.yaml"), "null.yaml: must not be null. Set a value, or"),
    "null of transformers": (("train", "--config", "{home}/rate.yaml"), "learning_rate in "),
    "no model": (("train", "--prompts", "x", "--reward", "vader"), "model is missing"),
    "no such model": ((*TRAIN, "--model", "{home}/nowhere"), "nowhere': must be an existing directory or file"),
    "no tokenizer": ((*TRAIN, "--model", "{home}/no_tokenizer"), "has no tokenizer"),
    "trained before": ((*TRAIN, "--model", "{run}/final"), "already has the reward token"),
    "no such prompts": ((*TRAIN, "--prompts", "{home}/nowhere.txt"), "nowhere.txt"),
    "no such column": ((*TRAIN, "--prompts", "{home}/bad.jsonl", "--prompt_column", "promt"), "promt"),
    "bad prompt": ((*TRAIN, "--prompts", "{home}/bad.jsonl"), "bad.jsonl:2"),
    "long prompt": ((*TRAIN, "--prompts", "{home}/long.txt"), "long.txt:2"),
    "too few prompts": ((*TRAIN, "--num_quantiles", "9"), "num_quantiles 9"),
    "no such reward": ((*TRAIN, "--reward", "profanty"), "Did you mean 'profanity'"),
    "no such reward file": ((*TRAIN, "--reward", "{home}/nowhere.py:few_a"), "nowhere.py"),
    "no such reward function": ((*TRAIN, "--reward", "{home}/rewards.py:few_b"), "few_b"),
    "reward that raises": (
        (*TRAIN, "--reward", "{home}/rewards.py:broken"),
        "reward 'broken' raised RuntimeError: no way",
    ),
    "reward of another length": ((*TRAIN, "--reward", "{home}/rewards.py:too_few"), "1 scores for 4 completions"),
    "label without classifier": ((*TRAIN, "--reward_label", "toxic"), "label 'toxic': must be unset"),
    "weights of another length": ((*TRAIN, "--reward_weights", "1", "2"), "reward_weights [1.0, 2.0]"),
    "unknown quantile": ((*GENERATE, "--quantile", "9"), "quantile '9': must be"),
    "quantile of a plain model": (("generate", "{home}/model", "--prompt", "a", "--quantile", "0"), "has no quantiles"),
    "no prompt": (("generate", "{run}/final"), "--prompt"),
    "empty prompt": (("generate", "{run}/final", "--prompt", ""), "prompt"),
    "prompt over the context": (("generate", "{run}/final", "--prompts", "{home}/long.txt"), "tokens"),
    "no such model to generate": (("generate", "{home}/nowhere", "--prompt", "a"), "nowhere"),
    "impossible temperature": ((*GENERATE, "--temperature", "0"), "temperature 0.0: must be greater than 0"),
    "impossible length": ((*GENERATE, "--max_new_tokens", "0"), "max_new_tokens 0: must be at least 1"),
    "impossible seed": ((*GENERATE, "--seed", "-1"), "seed -1: must be at least 0"),
    "impossible count": ((*GENERATE, "--num_return_sequences", "0"), "num_return_sequences 0: must be at least 1"),
    "no number": ((*GENERATE, "--num_return_sequences", "two"), "num_return_sequences 'two': must be an integer"),
    "no such reference": ((*EVALUATE, "--reference", "{home}/nowhere"), "reference '{home}/nowhere'"),
    "unknown quantile to evaluate": ((*EVALUATE, "--quantiles", "best", "top"), "quantile 'top'"),
    "no prompts to evaluate": (("evaluate", "{run}/final", "--reward", "vader"), "--prompts"),
    "output in a directory": ((*EVALUATE, "--output", "{home}"), "output '{home}'"),
    "evaluation without prompts": ((*TRAIN, "--eval_strategy", "epoch"), "Set --eval_prompts"),
    "no texts": (("score", "{home}/nowhere.txt", "--reward", "vader"), "nowhere.txt"),
    "no reward": (("score", "{home}/prompts.txt"), "--reward"),
    "no such column to score": (
        ("score", "{home}/bad.jsonl", "--column", "text", "--reward", "vader"),
        "bad.jsonl: there is no column 'text'; must be one of 'prompt'. Set --column prompt (in Python: ",
    ),
}


@pytest.fixture(scope="module")
def configs(home) -> None:
    (home / "typo.yaml").write_text("kl_coeff: 1\n", encoding="utf-8")
    (home / "null.yaml").write_text("num_quantiles: null\n", encoding="utf-8")
    (home / "rate.yaml").write_text("learning_rate: null\n", encoding="utf-8")
    (home / "nested.yaml").write_text("config: toxicity\n", encoding="utf-8")
    (home / "broken.yaml").write_text("a: [1\nb: 2\n", encoding="utf-8")
    (home / "list.yaml").write_text("- a\n", encoding="utf-8")
    (home / "type.yaml").write_text("num_iterations: often\n", encoding="utf-8")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, home, run, configs, tmp_path, capsys):
    arguments, message = MISTAKES[mistake]
    places = {"home": home, "run": run, "new": tmp_path / "new"}
    capsys.readouterr()
    code = main([argument.format(**places) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message.format(**places) in line


@pytest.mark.slow
def test_a_process_ends_as_main_does(home):
    """Three real ones: no traceback, no warning of a library beside the line."""
    for arguments, message in (
        (["train", "--config", home / "run.yaml", "--kl_coeff", "1"], "unknown option --kl_coeff"),
        (["generate", home / "nowhere", "--prompt", "a"], "must be an existing directory"),
    ):
        done = command(*arguments, cwd=home)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and message in line


@pytest.mark.slow
def test_training_as_a_process_shows_no_warnings(home, tmp_path):
    done = command("train", "--config", home / "run.yaml", "--output_dir", tmp_path / "run", "--disable_tqdm", "false")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert "iteration 1/1" in done.stderr and "reward" in done.stderr
    last = done.stderr.splitlines()[-3:]
    assert any("final" in line for line in last) and last[-1].endswith("report.html")


def test_help_and_version_do_not_load_torch():
    code = (
        "import sys\nfrom quarkrl.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    "
    )
    code += "assert not end.code\nassert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'slow'\n"
    commands = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    for arguments in commands:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "quarkrl" in done.stdout


def test_ctrl_c_while_the_command_is_imported_leaves_no_traceback():
    code = (
        "import os, signal, sys\nfrom quarkrl.cli.__main__ import command\nclass Finder:\n"
        "    def find_spec(self, name, *_):\n        if name == 'quarkrl.cli.parser':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\nsys.meta_path.insert(0, Finder())\ncommand()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_train_help_fits_in_100_lines_and_lists_every_own_option_that_is_not_rare(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 100
    flags = re.findall(r"^  --(\w+)", out, re.M)
    own = {field for options in (QuarkOptions, RunOptions) for field in fields(options)}
    assert {field.name for field in own} - {*flags} == {field.name for field in own if field.metadata["rare"]}
    assert {"config", "help_all", "output_dir", "seed", "bf16"} <= {*flags}
    assert "(default 20)" in out and "(default fitted)" in out and out.count("\n  quarkrl train ") == 2


def test_train_help_all_lists_the_options_of_transformers_too(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help_all"])
    assert end.value.code == 0
    flags = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)
    assert {field.name for options in (QuarkConfig, RunOptions) for field in fields(options)} <= {*flags}


def test_hyphens_in_flags_are_underscores(tmp_path):
    options = ["--output-dir", str(tmp_path), "--num-quantiles=7", "--gradient-accumulation-steps", "2"]
    config = parse_train([*options, "--no-do-sample"]).config
    assert (config.num_quantiles, config.gradient_accumulation_steps, config.do_sample) == (7, 2, False)


@pytest.mark.parametrize("flag", ["--eval_strategy=steps", "--eval-strategy=steps"])
def test_held_out_prompts_are_evaluated_after_each_iteration_unless_a_flag_says_otherwise(tmp_path, flag):
    options = ["--output_dir", str(tmp_path), "--eval_prompts", "x.txt"]
    assert parse_train(options).config.eval_strategy == "epoch"
    assert parse_train([*options, flag, "--eval_steps=2"]).config.eval_strategy == "steps"
    assert parse_train(options[:2]).config.eval_strategy == "no"


def test_only_resume_true_reads_the_config_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text("num_quantiles: 7\n", encoding="utf-8")
    options = ["--output_dir", str(tmp_path), "--resume"]
    found = {value: parse_train([*options, *value]).config.num_quantiles for value in ((), ("true",), ("false",))}
    assert found == {(): 7, ("true",): 7, ("false",): 5}


def test_no_command_prints_the_overview(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name} " in overview for name in COMMANDS)


def test_threads_soon_stop_waiting_actively_unless_the_user_says_otherwise(monkeypatch):
    for own, expected in (({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.setenv(name, own.get(name, ""))  # So that it is restored after the test.
            if name not in own:
                monkeypatch.delenv(name)
        assert main(["presets"]) == 0
        assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_both_modules_are_the_command():
    for module in ("quarkrl", "quarkrl.cli"):
        done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"quarkrl {quarkrl.__version__}\n"), done.stderr


def test_a_second_demo_takes_the_next_free_directory(tmp_path):
    wanted = str(tmp_path / "demo")
    assert free_directory(wanted) == wanted
    (tmp_path / "demo" / "pool").mkdir(parents=True)
    (tmp_path / "demo-2" / "final").mkdir(parents=True)
    (tmp_path / "demo-3").mkdir()  # Empty: it holds no run.
    assert free_directory(wanted) == f"{wanted}-3"


def test_prompts_are_streamed_on_demand(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    options = {"prompts": str(tmp_path / "p.jsonl"), "prompt_column": "text", "stream_prompts": True}
    stream = train_prompts(RunOptions(**options), skip_bad=False)
    assert isinstance(stream, datasets.IterableDataset) and [*stream] == [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(UserError, match="prompt_tokens 3: must be left out of a run with --stream_prompts"):
        train_prompts(RunOptions(**options, prompt_tokens=3), skip_bad=False)
