"""A run that starts from scored samples: what it learns from, whether it explores, and how it resumes."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from helpers.eight_letters import PROMPTS, TOKENIZER
from helpers.runs import (
    KillBefore,
    assert_same_pool,
    assert_same_weights,
    distinct_rewards,
    logs_of,
    share_of_a,
    small_trainer,
    weights_of,
)
from helpers.tiny_models import make_home
from transformers import TrainerCallback

from quarkrl import QuarkConfig, QuarkTrainer, load_prompts
from quarkrl.builtin import model_path, prompts_path
from quarkrl.cli.main import main
from quarkrl.data.encoding import decode_completions
from quarkrl.errors import UserError

ROWS = [
    {"prompt": prompt, "completion": f" {first} {last}", "reward": number + 0.1 * len(prompt)}
    for number, (first, last) in enumerate(("ab", "cd", "ef"))
    for prompt in PROMPTS
]


def forbidden(completions):
    raise AssertionError("a reward was called")


def offline_trainer(directory, rewards=None, rows=ROWS, **options):
    return small_trainer(directory, rewards, prompts=None, scored_data=rows, **options)


class Draws(TrainerCallback):
    """The quantiles and draws at each step, in a trainer that is set afterwards."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **_):
        self.seen.append((self.trainer.pool.quantiles[:, 0].tolist(), self.trainer.draws.tolist()))


def test_scored_samples_become_the_pool_of_a_run_that_explored_the_same(tmp_path):
    """The samples of an exploration, as text, have the same ids, quantiles and draws as they had as ids."""
    options = {"num_iterations": 1, "num_quantiles": 3, "steps_per_iteration": 2, "per_device_train_batch_size": 8}
    options |= {"max_completion_length": 12, "disable_tqdm": True, "use_cpu": True}
    prompts = load_prompts(prompts_path("train")).prompts[:64]
    config = QuarkConfig(tmp_path / "explored", **options)
    explored = QuarkTrainer(model_path(), distinct_rewards, config, prompts)
    explored.explore(0)
    explored.quantize(0)
    rows = pq.read_table(tmp_path / "explored" / "pool" / "iteration-000000.parquet").to_pylist()
    texts = [{name: row[name] for name in ("prompt", "completion", "reward")} for row in rows]
    offline = QuarkTrainer(model_path(), None, QuarkConfig(tmp_path / "offline", **options), scored_data=texts)
    offline.explore(0)
    offline.quantize(0)
    assert offline.pool.rewards.tolist() == explored.pool.rewards.tolist()
    assert offline.pool.quantiles.tolist() == explored.pool.quantiles.tolist()
    equal, tokenizer = 0, explored.plain_tokenizer
    for row, sample in zip(rows, offline.pool, strict=True):
        prompt, ids = row["prompt_ids"], sample.completion_ids.tolist()
        assert sample.prompt_ids.tolist() == prompt
        assert decode_completions(tokenizer, [prompt], [ids]) == [row["completion"]]
        whole = [i for i in [*prompt, *row["completion_ids"]] if i not in explored.end_ids]
        if tokenizer(row["prompt"] + row["completion"])["input_ids"] == whole:  # A model may split words otherwise.
            assert ids == row["completion_ids"]
            equal += 1
    assert equal >= 0.9 * len(rows)


def test_a_run_without_prompts_calls_no_reward_and_draws_anew_in_each_iteration(tmp_path):
    draws = Draws()
    trainer = draws.trainer = offline_trainer(tmp_path, forbidden, callbacks=[draws])
    trainer.train()
    assert len(trainer.pool) == len(ROWS) and set(trainer.pool.iterations.tolist()) == {0}
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["iteration-000000.parquet"]
    steps = [quantiles for quantiles, _ in draws.seen]
    assert all(quantiles == steps[0] for quantiles in steps) and set(steps[0]) == {0, 1, 2}
    first, second = draws.seen[0][1], draws.seen[3][1]
    assert first != second and len(first) == 3 * 8
    explored, unexplored = logs_of(tmp_path, "iteration")
    assert explored["reward"] == pytest.approx(sum(row["reward"] for row in ROWS) / len(ROWS))
    assert unexplored["pool_size"] == len(ROWS) and "reward" not in unexplored
    assert "plan: 2 iterations learn from 24 scored samples" in " ".join(trainer_notes(tmp_path))


def trainer_notes(directory):
    return offline_trainer(directory / "again").progress.start_notes


def test_a_run_with_prompts_explores_from_its_second_iteration_on(tmp_path):
    calls = []

    def counted(completion_ids, **_):
        calls.append(len(completion_ids))
        return share_of_a(completion_ids)

    trainer = small_trainer(tmp_path, counted, scored_data=ROWS, num_iterations=3)
    assert any("The first learns from 24 scored samples instead. In all 16 completions" in note
               for note in trainer.progress.start_notes)  # fmt: skip
    trainer.train()
    assert [list(trainer.pool.iterations).count(i) for i in range(3)] == [len(ROWS), len(PROMPTS), len(PROMPTS)]
    assert sum(calls) == 2 * len(PROMPTS)
    expected = small_trainer(tmp_path / "pool-only", share_of_a, scored_data=ROWS)
    expected.explore(0)
    assert trainer.pool.rewards[: len(ROWS), 0].tolist() == expected.pool.rewards[:, 0].tolist()


@pytest.mark.parametrize("prompts", [None, PROMPTS], ids=["offline", "exploring"])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_stopped_run_resumes_to_the_bit(tmp_path, step, prompts):
    options = {"save_strategy": "steps", "save_steps": 1, "scored_data": ROWS, "prompts": prompts}
    whole = small_trainer(tmp_path / "whole", share_of_a, **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path / "stopped", share_of_a, callbacks=[KillBefore(step)], **options).train()
    resumed = small_trainer(tmp_path / "stopped", share_of_a, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_pool(resumed.pool, whole.pool)
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))


def test_a_resumed_run_refuses_other_data_and_other_prompts(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    offline_trainer(tmp_path, **options).train()
    with pytest.raises(UserError, match="other scored data"):
        offline_trainer(tmp_path, rows=ROWS[:-1], **options).train(resume_from_checkpoint=True)
    changed = [{**ROWS[0], "reward": 7.0}, *ROWS[1:]]
    with pytest.raises(UserError, match="other scored data"):
        offline_trainer(tmp_path, rows=changed, **options).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="other prompts"):
        small_trainer(tmp_path, share_of_a, scored_data=ROWS, **options).train(resume_from_checkpoint=True)


def test_a_run_on_data_alone_can_end_by_distilling_guidance(tmp_path):
    options = {"distill_guidance_scale": 2.0, "distill_iterations": 1, "save_strategy": "steps", "save_steps": 1}
    whole = offline_trainer(tmp_path / "whole", **options)
    whole.train()
    assert len(whole.pool) == len(ROWS) and logs_of(tmp_path / "whole", "distill_guidance_scale")
    with pytest.raises(KeyboardInterrupt):
        offline_trainer(tmp_path / "stopped", callbacks=[KillBefore(7)], **options).train()
    resumed = offline_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))


def test_each_of_several_rewards_has_a_column(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["completion"], "x": i, "y": -i} for i, row in enumerate(ROWS)]
    options = {"condition_on": "each", "num_iterations": 1}
    trainer = offline_trainer(tmp_path, rows=Dataset.from_list(rows), reward_columns=["y", "x"], **options)
    trainer.train()
    assert trainer.pool.attributes == ("y", "x")
    assert trainer.pool.rewards[5].tolist() == [-5, 5]
    with pytest.raises(UserError, match=r"reward_columns is missing: must name the rewards"):
        offline_trainer(tmp_path, rows=rows, **options)
    with pytest.raises(
        UserError, match=r"reward_columns x: must be 2 columns, one for each of share_of_a, distinct_rewards"
    ):
        rewards = [share_of_a, distinct_rewards]
        small_trainer(tmp_path, rewards, scored_data=rows, reward_columns=["x"], **options)
    with pytest.raises(UserError, match=r"reward_columns x y: must be one column with condition_on sum"):
        offline_trainer(tmp_path, rows=rows, reward_columns=["x", "y"])


def test_what_a_run_on_data_alone_cannot_do_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"reward_funcs \(--reward\) is missing"):
        small_trainer(tmp_path, None, scored_data=ROWS)
    with pytest.raises(UserError, match=r"reward_funcs \(--reward\) is missing"):
        offline_trainer(tmp_path, eval_dataset=PROMPTS)
    with pytest.raises(UserError, match=r"num_quantiles 3: must be at most 2, the samples of scored_data"):
        offline_trainer(tmp_path, rows=ROWS[:2])
    with pytest.raises(UserError, match="only samples of scored_data have scores"):
        offline_trainer(tmp_path).evaluate(PROMPTS)


# The command

TRAIN = ["train", "--config", "run.yaml", "--output_dir", "run", "--save_strategy", "epoch", "--disable_tqdm", "false"]
REWARDS = "def good(completions):\n    return [len(text) for text in completions]\n"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(make_home(tmp_path, TOKENIZER, PROMPTS, REWARDS, prompts=None))
    write("scored.jsonl", ROWS)
    return tmp_path


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_command_trains_on_a_file_alone_and_resumes(home, capsys):
    assert main([*TRAIN, "--scored_data", "scored.jsonl"]) == 0
    err = capsys.readouterr().err
    assert "scored data: 24 samples of 8 prompts" in err
    facts = json.loads((home / "run" / "final" / "quark.json").read_text(encoding="utf-8"))
    assert facts["scored_data"] == {"source": "scored.jsonl", "samples": 24}
    card = (home / "run" / "final" / "README.md").read_text(encoding="utf-8")
    assert "24 scored samples of `scored.jsonl`" in card and "the model's own" not in card
    assert main(["train", "--resume", "run", "--num_iterations", "3"]) == 0
    write("scored.jsonl", ROWS[1:])
    assert main(["train", "--resume", "run", "--num_iterations", "4"]) == 2
    assert "other scored data" in capsys.readouterr().err
    assert main(["samples", "run", "--limit", "1"]) == 0 and main(["report", "run"]) == 0


def test_a_dry_run_says_how_many_samples_there_are(home, capsys):
    assert main([*TRAIN, "--scored_data", "scored.jsonl", "--dry_run"]) == 0
    err = capsys.readouterr().err
    assert "learn from 24 scored samples" in err and not (home / "run").exists()
    assert "4 iterations" not in err  # run.yaml sets the number.


def test_a_reward_measures_a_run_on_data_on_prompts_that_are_held_out_of_it(home, capsys):
    rows = [{**row, "prompt": f"{prompt} {row['prompt']}"} for prompt in "abcdefgh" for row in ROWS]
    write("scored.jsonl", rows)
    arguments = ["--scored_data", "scored.jsonl", "--reward", "rewards.py:good", "--held_out", "4"]
    assert main([*TRAIN, *arguments, "--result_samples", "1"]) == 0
    out, err = capsys.readouterr()
    assert "the samples of 4 prompts are held out" in err and f"{len(rows) - 12} samples" in err
    assert "before" in out


def test_other_commands_write_files_that_a_run_reads(home, capsys):
    assert main(["generate", "model", "--prompts", "prompts.txt", "--json", "--num_return_sequences", "2"]) == 0
    (home / "generated.jsonl").write_text(capsys.readouterr().out, encoding="utf-8")
    for suffix in ("jsonl", "csv", "parquet"):
        scored = f"scored.{suffix}"
        assert main(["score", "generated.jsonl", "--reward", "rewards.py:good", "--output", scored]) == 0
        assert main([*TRAIN, "--scored_data", scored, "--dry_run"]) == 0
        assert "samples of 8 prompts" in capsys.readouterr().err
    assert main([*TRAIN, "--scored_data", "scored.csv"]) == 0
    capsys.readouterr()
    assert main(["samples", "run", "--json", "--limit", "0"]) == 0
    (home / "samples.jsonl").write_text(capsys.readouterr().out, encoding="utf-8")
    for source in ("samples.jsonl", "run/pool/iteration-000000.parquet", "run/pool"):
        assert main([*TRAIN, "--output_dir", "other", "--scored_data", source, "--dry_run"]) == 0
        assert "samples of 8 prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", (), "scored.jsonl: the file is empty."),
        ('{"prompt": "a", "completion": "b"}', (), "scored_data: must have a column 'reward' beside the prompt"),
        ('{"prompt": "a", "text": "b", "reward": 1}', (), "scored_data: must have a column 'completion'"),
        ('{"text": "b", "reward": 1}', (), "there is no column 'prompt'"),
        ('{"prompt": "a", "completion": " b", "reward": "x"}', (), "scored.jsonl:1: reward is 'x'. Use a number"),
        ('{"prompt": "a", "completion": " b", "reward": 1}', (), "num_quantiles 2: must be at most 1"),
        ("{}", ("--scored_data", "missing.jsonl"), "missing.jsonl: no such file."),
        ("{}", ("--stream_prompts",), "stream_prompts True: must be left out of a run without prompts."),
        ("{}", ("--prompt_tokens", "3"), "prompt_tokens 3: must be left out of a run without prompts."),
        ("{}", ("--eval_prompts", "prompts.txt"), "reward is missing"),
        ("{}", ("--prompts", "prompts.txt"), "reward is missing"),
    ],
)
def test_a_mistake_is_one_line(home, capsys, content, arguments, message):
    (home / "scored.jsonl").write_text(content, encoding="utf-8")
    assert main([*TRAIN, "--scored_data", "scored.jsonl", *arguments]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and message in err[0], err
    assert not (home / "run").exists()
