"""What README.md and docs/ tell readers to type works: commands, options, Python and YAML blocks, names of tests."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import unittest
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import quarkrl
from quarkrl import QuarkConfig, QuarkTrainer
from quarkrl.cli.main import COMMANDS, main, parser_of
from quarkrl.cli.train_options import parse_train, preset_names
from quarkrl.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_NAME = {"ids": lambda page: page.relative_to(ROOT).as_posix()}


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The options of each command, as its help lists them."""
    options = {}
    for command in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
            main([command, "--help_all" if command == "train" else "--help"])
        options[command] = set(re.findall(r"--\w+", output.getvalue()))
    return options


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """The commands in the shell blocks of a page: names and arguments. Those with an ellipsis are left out."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
    lines = [line.split("  #")[0] for line in blocks.replace("\\\n", " ").splitlines() if "…" not in line]
    # A command ends where its output is piped, redirected, or another one follows.
    pattern = re.compile(r"(?<!from )quarkrl(?:\.cli)? (\w+)((?:'[^']*'|\"[^\"]*\"|[^|>&;'\"])*)")
    return [(name, shlex.split(rest, comments=True)) for line in lines for name, rest in pattern.findall(line)]


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_commands_on_the_page_are_understood(page):
    for name, arguments in commands_of(page):
        try:
            if name == "train":
                check_train_arguments(arguments)
            else:
                parser_of(name).parse(arguments)
        except (UserError, SystemExit) as error:
            pytest.fail(f"quarkrl {name} {shlex.join(arguments)}: {error}")


def check_train_arguments(arguments: list[str]) -> None:
    """Parse the arguments of `quarkrl train`, with a preset where the page has a file of the reader."""
    if "--resume" in arguments:
        return  # It reads config.yaml of the run.
    names = {*preset_names(), "my.yaml"}
    for i, word in enumerate(arguments):
        if word == "--config":
            name = arguments[i + 1]
            assert name in names or name.startswith("runs/") or (ROOT / name).is_file(), name
            arguments[i + 1] = name if name in preset_names() else str(ROOT / name)
            if not os.path.isfile(arguments[i + 1]):
                arguments[i + 1] = "tiny-toxicity"
    try:
        parse_train(arguments)
    except UserError as error:
        if not re.search("must be installed|deepspeed.* was not found", str(error)):
            raise


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_options_named_in_the_text_exist(page, flags):
    known = set.union(*flags.values())
    assert set(re.findall(r"`(--\w+)", page.read_text(encoding="utf-8"))) <= known


# Python and YAML blocks


def check_config(example) -> None:
    """Parse a YAML block as `quarkrl train --config` parses it, so that a wrong key or value fails."""
    Path("block.yaml").write_text(example.parsed, encoding="utf-8")
    parse_train(["--config", "block.yaml"])


def test_the_block_as_in_the_paper_trains_as_in_the_paper(tmp_path):
    """No default is left that the command would fit to the size of the model, such as that of the DPO term."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/reproduce.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "block.yaml").write_text(block, encoding="utf-8")
    command, _ = parse_train(["--config", str(tmp_path / "block.yaml")]).with_defaults(124_000_000, num_prompts=85_000)
    config = command.config
    assert (config.kl_direction, config.entropy_coef, config.draw) == ("ref_policy", 0, "balanced")
    assert (config.kl_coef, config.learning_rate, command.run.lora_rank) == (0.05, 1e-5, None)
    assert (config.dpo_coef, config.samples_per_prompt, config.prompts_per_iteration) == (0, 1, None)
    amounts = config.num_iterations, config.steps_per_iteration, config.per_device_train_batch_size
    assert amounts == (47, 500, 128)


BLOCKS = Sybil([PythonCodeBlockParser(), CodeBlockParser(language="yaml", evaluator=check_config), SkipParser()])
PAGES_WITH_BLOCKS = [page for page in PAGES if re.search(r"^```(python|yaml)", page.read_text(encoding="utf-8"), re.M)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working directory with what the pages name: models, prompts, texts, and a finished run."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = tiny_tokenizer(bos=True)
    tiny_model("gpt2", tokenizer, max_position_embeddings=1024).save_pretrained(home / "gpt2")
    tokenizer.save_pretrained(home / "gpt2")
    row = '{"prompt": "Once upon a time", "continuation": " there was a king"}\n'
    for name in ("prompts.jsonl", "held_out.jsonl"):
        (home / name).write_text(row * 4, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        trainer = QuarkTrainer("gpt2", "repetition", small_config("runs/x"), train_dataset="prompts.jsonl")
        trainer.train()
        shutil.copytree(trainer.save_final(), "runs/kind/final")
    return home


def small_config(output_dir: str, **options) -> QuarkConfig:
    """`QuarkConfig` for a run of one second, whatever the page asks for."""
    options |= {"num_iterations": 1, "steps_per_iteration": 1, "per_device_train_batch_size": 2}
    options |= {"num_quantiles": 2, "max_completion_length": 4, "use_cpu": True, "report_to": []}
    options |= {"on_collapse": "warn"}
    return QuarkConfig(output_dir, **options)


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS, **BY_NAME)
def test_python_and_yaml_blocks_run(page, home, monkeypatch):
    """The blocks of a page run in order and share their names. `gpt2` is a tiny model, and runs take one step."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(quarkrl, "QuarkConfig", small_config)
    for example in BLOCKS.parse(page).examples():
        torch.manual_seed(0)
        with contextlib.suppress(unittest.SkipTest):
            example.evaluate()


@pytest.mark.parametrize("page", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda page: page.name)
def test_an_example_names_models_and_data_that_a_user_can_have(page):
    run, _, typed, _ = parse_train(["--config", str(page)])
    assert run.model and run.prompts and run.reward
    assert typed["output_dir"].startswith("runs/")
    assert not any(".." in str(name) for name in (run.model, run.prompts, *run.reward))


@pytest.mark.parametrize("page", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda page: page.name)
def test_an_example_trains_what_it_says(page):
    """Its figures hold for one objective and one amount, so the size of the model changes neither."""
    example = parse_train(["--config", str(page)])
    fitted, _ = example.with_defaults(6_000_000, num_prompts=8_000)
    names = ("dpo_coef", "samples_per_prompt", "prompts_per_iteration", "num_iterations", "steps_per_iteration")
    assert all(getattr(fitted.config, name) == getattr(example.config, name) for name in names)


@pytest.mark.parametrize("page", PAGES, **BY_NAME)
def test_pages_import_public_names_only(page):
    blocks = "\n".join(re.findall(r"```\w+\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
    for module, names in re.findall(r"from (quarkrl[.\w]*) import ([\w, ]+)", blocks):
        assert module == "quarkrl"
        assert set(names.replace(" ", "").split(",")) <= set(quarkrl.__all__)


# References


@pytest.fixture(scope="module")
def tests_of() -> dict[str, set[str]]:
    """The test functions of each test file, by path from the root."""
    return {
        path.relative_to(ROOT).as_posix(): set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M))
        for path in (ROOT / "tests").rglob("test_*.py")
    }


@pytest.mark.parametrize("page", [*PAGES, ROOT / "AGENTS.md"], **BY_NAME)
def test_a_test_that_the_page_names_exists(page, tests_of):
    text = page.read_text(encoding="utf-8")
    for path, keywords in re.findall(r"(tests/[\w/]+\.py)(?: -k (\w+))?", text):
        assert path in tests_of, path
        assert any(keywords in name for name in tests_of[path]), f"{path} -k {keywords}"
    for path, names in re.findall(r"`(tests/[\w/]+\.py)`(?: \(slow\))?:((?:\s+`test_\w+`,?)+)", text):
        assert set(re.findall(r"test_\w+", names)) <= tests_of[path], path
    names = set(re.findall(r"\btest_\w+(?![\w.]*\.py)\b", re.sub(r"[\w/]+\.py", "", text)))
    assert names <= set.union(*tests_of.values())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "AGENTS.md", ROOT / "CHANGELOG.md"], **BY_NAME)
def test_links_between_pages_lead_somewhere(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not heading or heading in headings_of(path), f"{target}#{heading}"


def headings_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
