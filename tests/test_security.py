"""Nothing is let in: no code from a model's, checkpoint's or prompt's files, no pickle; and no key gets out."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers.server import Server
from helpers.tiny_models import make_home, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from quarkrl import QuarkGenerator
from quarkrl.cli.main import main
from quarkrl.cli.play import PlayOptions, load_subject
from quarkrl.errors import UserError
from quarkrl.models.loading import load_model

WORDS = [*map(str, range(10, 40))]
TOKENIZER = tiny_tokenizer(words=WORDS)
PERSPECTIVE_KEY, OPENAI_KEY, HUB_TOKEN = "planted-Perspective-8f3a", "planted-OpenAI-77d1", "hf_plantedHub51c0"
PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
REWARD = "def total(completions):\n    return [sum(map(int, text.split())) for text in completions]\n"


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def code(mark: Path) -> str:
    """Python that leaves a file when it is imported."""
    return f"open({str(mark)!r}, 'w').close()\n"


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that is there once something has run."""
    return tmp_path / "ran"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A directory with a model, prompts and a reward."""
    directory = tmp_path_factory.mktemp("security")
    make_home(directory, TOKENIZER, WORDS[:8], REWARD, reward=f"{directory / 'rewards.py'}:total")
    assert main(["train", "--config", str(directory / "run.yaml"), "--output_dir", str(directory / "run")]) == 0
    return directory


@pytest.fixture
def home(base, tmp_path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(base, tmp_path / "home")
    return tmp_path / "home"


def go_on(home: Path, *options: str) -> int:
    """Resume the home's run; gives the exit code."""
    return main(["train", "--config", str(home / "run.yaml"), "--output_dir", str(home / "run"), "--resume", *options])


def all_commands(home: Path, model: Path, *options: str) -> dict[str, int]:
    """The exit code of each command that reads a model, given this one."""
    reward = ["--reward", f"{home / 'rewards.py'}:total", "--prompts", str(home / "prompts.txt")]
    short = ["--samples", "2", "--max_new_tokens", "3", "--resamples", "10"]
    plain = str(home / "model")
    train = ["train", "--config", str(home / "run.yaml"), "--output_dir", str(home / "new"), *options]
    evaluate = ["evaluate", *reward, *short, *options]
    commands = {
        "train": [*train, "--model", str(model)],
        "train on a reference": [*train, "--ref_model", str(model)],
        "generate": ["generate", str(model), "--prompt", "10", "--max_new_tokens", "3", *options],
        "evaluate": [*evaluate, str(model), "--reference", "none"],
        "evaluate beside it": [*evaluate, plain, "--reference", str(model)],
        "perplexity": [*evaluate, plain, "--reference", "none", "--perplexity_model", str(model)],
    }
    found = {}
    for name, arguments in commands.items():
        shutil.rmtree(home / "new", ignore_errors=True)
        found[name] = main(arguments)
    score = ["score", str(home / "prompts.txt"), "--reward", str(model), "--reward_label", "LABEL_0"]
    return {**found, "score": main(score)}


# Pickles


def test_the_mark_would_be_left(mark):
    """What the tests below rely on."""
    pickle.loads(pickle.dumps(Evil(mark))).close()
    assert mark.exists()
    mark.unlink()
    exec(code(mark))
    assert mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_weights_that_are_pickled_are_refused_by_every_command(home, mark, name, capsys):
    model = home / "model"
    if name == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    else:
        config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "target_modules": ["c_attn"]}
        (model / "adapter_config.json").write_text(json.dumps(config))
    (model / name).write_bytes(pickle.dumps(Evil(mark)))
    other = home / "run" / "final"
    for command in (["generate", str(model)], ["evaluate", str(other), "--reference", str(model)]):
        reward = ["--reward", f"{home / 'rewards.py'}:total"] if command[0] == "evaluate" else []
        assert main([*command, "--prompts", str(home / "prompts.txt"), *reward]) == 2
        assert f"its weights are pickled ({name})" in capsys.readouterr().err
    train = ["train", "--config", str(home / "run.yaml"), "--model", str(model), "--output_dir", str(home / "new")]
    assert main(train) == 2
    assert f"its weights are pickled ({name})" in capsys.readouterr().err
    with pytest.raises(UserError, match="its weights are pickled"):
        QuarkGenerator.from_pretrained(model)
    assert not mark.exists() and not (home / "new" / "pool").exists()


def test_pickles_beside_the_weights_are_not_read(home, mark):
    model = home / "model"
    for name in PICKLES:
        (model / name).write_bytes(pickle.dumps(Evil(mark)))
    found = all_commands(home, model)
    assert found == dict.fromkeys(found, 0) | {"score": 2}  # It is no classifier.
    assert not mark.exists()


def test_no_checkpoint_holds_a_pickle_and_none_is_read_from_one(home, mark, capsys):
    checkpoint = max((home / "run").glob("checkpoint-*"))
    opened = [path for path in (home / "run").rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle")]
    assert opened == []
    for name in (*PICKLES, "scaler.pt"):
        (checkpoint / name).write_bytes(pickle.dumps(Evil(mark)))
    assert go_on(home, "--num_iterations", "3") == 0, capsys.readouterr().err
    assert not mark.exists()


# Code that comes with a model


def with_code(model: Path, mark: Path, kind: str) -> None:
    """Make a directory ask for code of its own in one of the ways that transformers knows."""
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "evil.py").write_text(code(mark) + "class C: ...\nclass M: ...\nclass T: ...\n")
    if kind == "a class of a known kind":
        config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    elif kind == "a class of a new kind":
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    elif kind == "a tokenizer":
        tokenizer |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    elif kind == "generation":
        (model / "custom_generate").mkdir()
        (model / "custom_generate" / "generate.py").write_text(code(mark) + "def generate(*_, **__): ...\n")
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("kind", ["a class of a known kind", "a class of a new kind", "a tokenizer", "generation"])
def test_code_in_a_model_directory_is_not_run_and_there_is_no_prompt(home, mark, kind, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with_code(home / "model", mark, kind)
    found = all_commands(home, home / "model")
    if kind == "a class of a new kind":
        assert set(found.values()) == {2}
    assert set(found.values()) <= {0, 2}
    assert not mark.exists()


def test_code_in_a_model_directory_is_run_with_trust_remote_code(home, mark, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(home / "modules"))
    model = home / "model"
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.OurModel"}
    config |= {"model_type": "ours-2", "auto_map": names, "architectures": ["OurModel"]}
    (model / "config.json").write_text(json.dumps(config))
    classes = """
from transformers import GPT2Config, GPT2LMHeadModel

class OurConfig(GPT2Config):
    model_type = "ours-2"

class OurModel(GPT2LMHeadModel):
    config_class = OurConfig
"""
    (model / "ours.py").write_text(code(mark) + classes)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    arguments = ["generate", str(model), "--prompt", "10", "--max_new_tokens", "3"]
    assert main(arguments) == 2 and not mark.exists()
    assert main([*arguments, "--trust_remote_code"]) == 0, capsys.readouterr().err
    assert mark.exists()


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_kernel_that_a_config_names_is_not_fetched(home, tmp_path, is_adapter):
    """Neither the config of a model, nor that of an adapter's base."""
    base = model = home / "model"
    if is_adapter:
        model, lora = tmp_path / "adapter", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        get_peft_model(load_model(base), lora).save_pretrained(model)
    config = json.loads((base / "config.json").read_text())
    for name in ("attn_implementation", "_attn_implementation"):
        (base / "config.json").write_text(json.dumps(config | {name: "somebody/evil-attention"}))
        default = "sdpa" if torch.accelerator.is_available() else "eager"
        assert load_model(model).config._attn_implementation == default
        assert load_model(model, attn_implementation="sdpa").config._attn_implementation == "sdpa"
        with pytest.raises(UserError, match="cannot be loaded: `kernels`"):  # Only the option fetches it.
            load_model(model, attn_implementation="somebody/evil-attention")


def test_what_a_model_says_of_its_rewards_and_options_is_not_carried_out(home, mark, monkeypatch):
    """quark.json names a reward function that is importable where the command is given."""
    final = home / "run" / "final"
    monkeypatch.chdir(home)
    (home / "evil.py").write_text(code(mark) + "def reward(completions): ...\n")
    facts = json.loads((final / "quark.json").read_text())
    facts["rewards"] = [{"name": "reward", "module": "evil", "qualname": "reward", "weight": 1.0}]
    facts["config"] |= {"reward": "evil.py:reward", "trust_remote_code": True, "output_dir": "../elsewhere"}
    (final / "quark.json").write_text(json.dumps(facts))
    for name in ("config.yaml", "run.yaml"):
        (final / name).write_text("reward: evil.py:reward\ntrust_remote_code: true\n")
    assert main(["generate", str(final), "--prompt", "10"]) == 0
    short = ["--prompts", "prompts.txt", "--samples", "2", "--resamples", "10"]
    assert main(["evaluate", str(final), *short]) == 0  # With the reward in config.yaml of the user's run.
    model = shutil.copytree(final, home / "downloaded")
    assert main(["evaluate", str(model), *short]) == 2
    assert load_subject(str(model), PlayOptions()).scorer is None
    reward = ["--reward", "rewards.py:total", "--samples", "2", "--resamples", "10"]
    assert main(["evaluate", str(final), "--prompts", "prompts.txt", *reward]) == 0
    assert not mark.exists() and not (home.parent / "elsewhere").exists()


def test_a_chat_template_stays_in_its_sandbox(home, mark, capsys):
    model = home / "model"
    tokenizer = tiny_tokenizer(
        words=WORDS, chat_template="{{ cycler.__init__.__globals__.os.mknod('" + str(mark) + "') }}"
    )
    tokenizer.save_pretrained(model)
    chat = {"messages": [{"role": "user", "content": "10"}]}
    (home / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    assert main(["generate", str(model), "--prompts", str(home / "chats.jsonl")]) == 2
    train = ["train", "--config", str(home / "run.yaml"), "--model", str(model), "--output_dir", str(home / "new")]
    assert main([*train, "--prompts", str(home / "chats.jsonl")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("the chat template refuses" in line for line in lines)
    assert not mark.exists()


def test_yaml_makes_no_objects(home, mark, capsys):
    for tag in ("!!python/object/apply:builtins.open", "!!python/object/new:builtins.open"):
        (home / "evil.yaml").write_text(f"model: {tag} [{mark}, w]\n")
        assert main(["train", "--config", str(home / "evil.yaml")]) == 2
        error = capsys.readouterr().err
        assert "evil.yaml" in error and "must be valid YAML" in error
    shutil.copy(home / "evil.yaml", home / "run" / "config.yaml")
    assert main(["train", "--resume", "--output_dir", str(home / "run")]) == 2
    assert not mark.exists()


def test_a_directory_of_prompts_runs_no_script(home, mark):
    prompts = home / "prompts"
    prompts.mkdir()
    (prompts / "prompts.py").write_text(code(mark))
    (prompts / "train.jsonl").write_text('{"prompt": "10"}\n' * 4)
    assert main(["generate", str(home / "model"), "--prompts", str(prompts), "--max_new_tokens", "2"]) in (0, 2)
    assert not mark.exists()


# Keys


def test_no_key_is_found_in_what_a_run_leaves_behind(base, tmp_path, monkeypatch, capfd, caplog):
    """Training, evaluation and scoring with all keys set; the server repeats what it is sent, as some proxies do."""
    keys = {"PERSPECTIVE_API_KEY": PERSPECTIVE_KEY, "OPENAI_API_KEY": OPENAI_KEY, "HF_TOKEN": HUB_TOKEN}
    for variable, key in keys.items():
        monkeypatch.setenv(variable, key)
    caplog.set_level("DEBUG")
    run, prompts = tmp_path / "run", base / "prompts.txt"
    (tmp_path / "texts.txt").write_text("text 11\ntext 12\n")
    with Server() as server:
        echo = (503, {"error": {"message": f"you sent {PERSPECTIVE_KEY}"}})
        for text in ("text 11", "text 12"):
            server.plan(text, echo, echo, (401, echo[1]))
        perspective = f"perspective?endpoint={server.perspective}&queries_per_second=none"
        judge = f"judge?endpoint={server.openai}&model=m&rubric=good&scale=0-100&text=completion"
        cache = ["--score_cache", run / "cache.sqlite"]
        train = ["train", "--config", base / "run.yaml", "--output_dir", run, "--eval_prompts", prompts, *cache]
        evaluate = ["evaluate", run / "final", "--prompts", prompts, "--reward", perspective, *cache, "--judges", judge]
        commands = [
            [*train, "--reward", perspective, judge, "--reward_weights", "1", "2", "--disable_tqdm", "false"],
            [*evaluate, "--samples", "2", "--output", run / "results.json", "--resamples", "10"],
            ["score", tmp_path / "texts.txt", "--reward", perspective],
        ]
        codes = [main([*map(str, command)]) for command in commands]
        sent = {value for headers in server.headers for value in headers.values()}
    said = "".join(capfd.readouterr()) + caplog.text
    assert codes == [0, 0, 2], said
    assert PERSPECTIVE_KEY in sent and f"Bearer {OPENAI_KEY}" in sent
    assert "you sent ***" in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "quark.json", "results.json", "cache.sqlite"} <= {p.name for p in files}
    for key in keys.values():
        assert key not in said
        assert [path for path in files if key.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token"])
def test_a_token_is_not_taken_where_it_would_be_written_down(base, tmp_path, name, capsys):
    arguments = ["train", "--config", str(base / "run.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*arguments, f"--{name}", HUB_TOKEN]) == 2
    err = capsys.readouterr().err
    assert HUB_TOKEN not in err and not (tmp_path / "run").exists()


# Paths


def test_what_a_checkpoint_says_leads_nowhere_else(home, capsys):
    """Neither reading a checkpoint nor rotating it away touches what lies outside the run's directory."""
    outside = home / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    os.symlink(outside, home / "run" / "checkpoint-1000000")
    go_on(home, "--num_iterations", "4", "--save_total_limit", "1")
    assert (outside / "precious").read_text() == "kept"


def test_attributes_of_a_damaged_file_make_no_paths(home):
    facts = json.loads((home / "run" / "final" / "quark.json").read_text())
    facts["conditioning"]["attributes"] = ["../../escaped"]
    (home / "run" / "final" / "quark.json").write_text(json.dumps(facts))
    before = set(home.parent.rglob("*"))
    main(["generate", str(home / "run" / "final"), "--prompt", "10"])
    assert set(home.parent.rglob("*")) == before


def test_no_pickle_is_loaded_anywhere_in_the_library():
    """torch.load, pickle, joblib and their like do not occur; what `Trainer` would load is replaced."""
    source = Path(torch.__file__).parent  # Only to show that the words below are found where they do occur.
    words = (
        "torch.load(",
        "pickle.load",
        "joblib.load",
        "yaml.load(",
        "yaml.unsafe_load",
        "allow_pickle=True",
        "eval(",
    )
    found = [path for path in source.glob("serialization.py") for word in words if word in path.read_text()]
    assert found
    package = Path(__file__).parents[1] / "src" / "quarkrl"
    used = [
        f"{path.name}: {word}"
        for path in package.rglob("*.py")
        for word in words
        if any(word in line and ".eval(" not in line for line in path.read_text(encoding="utf-8").splitlines())
    ]
    assert used == []
