"""A run that is stopped anywhere and resumed ends as one that was not: to the bit, on a CPU, in one process.

The runs are processes of their own (`killed_runs.py`). They end themselves by SIGKILL at a call of a function of one
phase of the run, so that a test states the place of the kill and not a time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers.eight_letters import TOKENIZER
from helpers.files import files_of
from helpers.killed_runs import (
    AMID,
    PROMPTS,
    RUN,
    SHORT,
    Trap,
    assert_same_run,
    command,
    in_a_process,
    metrics_of,
    run,
    short_run,
    started,
    trainer_of,
)
from helpers.runs import distinct_rewards, model_of, small_trainer
from helpers.tiny_models import make_home, tiny_model
from transformers import TrainerCallback

from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.runs.checkpoints import seal
from quarkrl.runs.interrupts import Stopped
from quarkrl.runs.states import load_state

SCORE, TABLE, STATE = (
    "quarkrl.training.exploration:CompletionScorer.score",
    "quarkrl.storage.parquet:pq.write_table",
    "quarkrl.runs.states:save_file",
)
LOG = "quarkrl.training.metrics_log:MetricsFile.on_log"

# Each is one kill in one go of the same run, in the order in which they come; a call counts from the go's beginning.
HARD = [
    (Trap(SCORE, "before", 2), "nothing restored: it is the first go"),
    (Trap(TABLE, "amid", 3), "from the beginning (no checkpoint yet), pool 0 samples, 1 batch of"),  # The pool's file.
    (Trap("quarkrl.storage.atomic:os.replace", "before", 2), "pool 0 samples, 3 batches of the next iteration on disk"),
    (
        Trap("quarkrl.algorithm.pool:DataPool.save", "after", 1),
        "pool 0 samples, 3 batches",
    ),  # Between pool and checkpoint.
    (Trap(STATE, "amid", 2), "pool 0 samples, 1 later iteration on disk"),
    (
        Trap("quarkrl.storage.atomic:os.rename", "before", 1),
        "pool 0 samples, 1 later iteration on disk",
    ),  # The checkpoint's.
    (Trap("quarkrl.storage.atomic:os.rename", "after", 1), "pool 0 samples, 1 later iteration on disk"),
    (Trap("quarkrl.training.trainer:QuarkTrainer.evaluate", "after", 1), "iteration 1/3, step 3/12, pool 10 samples"),
    (Trap(LOG, "amid", 3), "iteration 1/3, step 3/12, pool 10 samples"),
    (
        Trap("quarkrl.training.trainer:QuarkTrainer.compute_loss", "before", 4),
        "iteration 1/3, step 3/12, pool 10 samples, 1 later",
    ),
    (Trap("quarkrl.runs.checkpoints:remove_directory", "before", 1), "iteration 2/3, step 6/12, pool 20 samples"),
    (Trap("quarkrl.training.trainer:save_steered", "after", 1), "iteration 3/3, step 9/12, pool 31 samples"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    code, said = in_a_process(run, directory)
    assert code == 0, said
    return directory


def test_a_run_killed_at_every_hard_place_ends_as_one_that_was_not(tmp_path, whole):
    directory = tmp_path / "run"
    for go, (trap, restored) in enumerate(HARD):
        code, said = in_a_process(run, directory, go > 0, trap)
        assert code == -signal.SIGKILL, f"{trap.at} was not called {trap.call} times: {said}"
        assert go == 0 or restored in said, said
    code, said = in_a_process(run, directory, True)
    assert code == 0, said
    assert_same_run(directory, whole)
    # Scored twice is at most the batch at hand: in the first exploration one of 5, 5 and 2, in the second none.
    asked, once = (Path(f"{place}.scored").read_text(encoding="utf-8").splitlines() for place in (directory, whole))
    evaluations = 3 * 3
    assert len(once) == 36 + evaluations
    assert len(asked) <= len(once) + 5 + 2 * evaluations


SWEEPS = {
    "steps": ({}, 20),
    "epochs, the best": ({"save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}, 12),
    "accumulation": (
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "save_steps": 2, "save_total_limit": 1}
        | {"eval_strategy": "steps", "eval_steps": 2, "logging_strategy": "epoch", "generation_batch_size": 12},
        8,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "count"), SWEEPS.values(), ids=SWEEPS)
def test_a_run_killed_anywhere_ends_as_one_that_was_not(tmp_path, options, count):
    code, said = in_a_process(run, tmp_path / "whole", False, None, options)
    assert code == 0, said
    calls = json.loads((tmp_path / "whole.calls").read_text())
    assert set(Trap.places) - set(calls) <= {"quarkrl.runs.checkpoints:remove_directory"}  # Every phase has its turn.
    chance = random.Random(len(options))
    places = chance.sample(sorted(calls), min(count, len(calls)))
    places += chance.choices(sorted(calls), k=count - len(places))
    for place in places:
        trap = Trap(place, chance.choice(["before", "after", *["amid"] * 2 * (place in AMID)]), call=0)
        trap.call = chance.randint(1, calls[place])
        directory = tmp_path / "cut"
        assert in_a_process(run, directory, False, trap, options)[0] == -signal.SIGKILL
        code, said = in_a_process(run, directory, True, None, options)
        assert code == 0, (vars(trap), said)
        assert_same_run(directory, tmp_path / "whole")
        shutil.rmtree(directory)


# Signals


REWARDS = """
import os, signal, time
from helpers.killed_runs import reward

def own(completion_ids):
    return reward(completion_ids)

calls = 0

def hangs(completion_ids):
    global calls
    calls += 1
    if calls == 1:  # Before the run.
        return reward(completion_ids)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(100_000)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What `quarkrl train` needs for the same run: a model, prompts, a reward, options."""
    directory = tmp_path_factory.mktemp("command")
    (directory / "held_out.txt").write_text("\n".join(PROMPTS[:3]), encoding="utf-8")
    named = {"eval_prompts": str(directory / "held_out.txt"), "reward": f"{directory / 'rewards.py'}:own"}
    return make_home(directory, TOKENIZER, PROMPTS, REWARDS, **named, **RUN)


def test_a_signal_ends_the_command_after_the_batch_and_its_message_resumes_the_run(tmp_path, home):
    train = ["train", "--config", home / "run.yaml", "--output_dir"]
    code, said = in_a_process(command, tmp_path / "whole", [*train, tmp_path / "whole"])
    assert code == 0, said
    directory = tmp_path / "run"
    argv = [*train, directory]
    # While exploring; while learning; at an iteration's last step, before its evaluation; amid that; at the very last.
    goes = [
        (Trap(SCORE, "before", 2, signal.SIGINT), 130, "Ctrl-C in iteration 1 after step 0"),
        (
            Trap("quarkrl.training.trainer:QuarkTrainer.compute_loss", "after", 2, signal.SIGTERM),
            143,
            "SIGTERM in iteration 1 ",
        ),
        (
            Trap("quarkrl.training.trainer:QuarkTrainer.compute_loss", "before", 2, signal.SIGTERM),
            143,
            "2 after step 4",
        ),
        (
            Trap("quarkrl.training.trainer:QuarkTrainer.evaluate", "before", 1, signal.SIGINT),
            130,
            "iteration 2 after step 4",
        ),
        (Trap(SCORE, "after", 2, signal.SIGTERM), 143, "iteration 2 after step 4"),
        (Trap("quarkrl.training.trainer:QuarkTrainer.compute_loss", "before", 8, signal.SIGTERM), 143, "after step 12"),
    ]
    for trap, expected, line in goes:
        code, said = in_a_process(command, directory, argv, trap)
        assert code == expected, said
        last = said.splitlines()[-1]
        assert line in last and last.endswith(f"Resume with: quarkrl train --resume {directory}")
        assert "Traceback" not in said
        argv = last.partition(": quarkrl ")[2].split()
    code, said = in_a_process(command, directory, argv)
    assert code == 0, said
    # Checkpoints were saved where the signals came, which the other run has none of: the last is of both.
    for path in [*directory.glob("checkpoint-*"), *(tmp_path / "whole").glob("checkpoint-*")]:
        if path.name != "checkpoint-12":
            shutil.rmtree(path)
    (directory / "config.yaml").write_bytes((tmp_path / "whole/config.yaml").read_bytes())
    assert_same_run(directory, tmp_path / "whole")


def test_a_second_ctrl_c_ends_at_once_a_reward_that_hangs(tmp_path, home):
    flags = ["--output_dir", tmp_path / "run", "--reward", f"{home}/rewards.py:hangs"]
    code, said = in_a_process(command, tmp_path / "run", ["train", "--config", home / "run.yaml", *flags])
    assert code == 130 and said.splitlines()[-1] == "stopped at once"


def test_in_python_a_signal_is_an_exception_once_all_is_saved(tmp_path):
    signals = [signal.SIGTERM]

    def scorer(completions):
        if signals:
            os.kill(os.getpid(), signals.pop())
            time.sleep(1)  # Ten times as long as sampling takes to look for a signal, and to cancel what waits.
        return SOME[: len(completions)]

    trainer = trainer_of(tmp_path / "run", scorer=scorer)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM in iteration 1 after step 0") as stopped:
        trainer.train()
    assert isinstance(stopped.value, KeyboardInterrupt) and stopped.value.code == 143
    assert str(stopped.value).endswith("is saved. Resume with: trainer.train(resume_from_checkpoint=True)")
    assert signal.getsignal(signal.SIGTERM) == handler
    assert trainer.evaluate()["eval_unscored"] == 0  # The signal is forgotten.
    # The batch that was scored is kept. The others had been sampled, and their scoring had not begun.
    assert [path.name for path in (tmp_path / "run/pool/partial-000000").iterdir()] == ["000000000.parquet"]


SOME = [0.1, 0.5, 0.2, 0.9, 0.3]


@pytest.mark.parametrize(("calls", "is_saved"), [(1, False), (2, True)])
def test_an_error_says_how_the_run_is_resumed_if_something_is_saved(tmp_path, calls, is_saved):
    rest = [calls]

    def scorer(completions):
        rest[0] -= 1
        if rest[0] <= 0:
            raise KeyError("topic")
        return SOME[: len(completions)]

    with pytest.raises(UserError, match=r"reward 'scorer' raised KeyError: 'topic'") as caught:
        trainer_of(tmp_path / "run", scorer=scorer).train()
    words = "Finished samples and checkpoints are saved. Resume with: trainer.train(resume_from_checkpoint=True)"
    assert str(caught.value).endswith(f"). {words}") == is_saved and ("Resume" in str(caught.value)) == is_saved
    assert (tmp_path / "run" / "pool").exists() == is_saved


def test_a_run_of_a_script_is_resumed_by_its_script(copied, capsys):
    (copied / "config.yaml").unlink(missing_ok=True)
    call = "trainer.train(resume_from_checkpoint=True)"
    assert main(["train", "--resume", str(copied)]) == 2
    line = f"must hold config.yaml to resume. For a run of a script, call {call} there; otherwise set --config."
    assert capsys.readouterr().err.endswith(f"{line}\n")
    with pytest.raises(UserError, match=r"must not hold a run already") as caught:
        again(copied, resume=False)
    assert str(caught.value).endswith(f"or resume the run: {call}")


# What is restored, and what is refused


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    return short_run(tmp_path_factory.mktemp("begun") / "run")


def again(directory: Path, **options) -> None:
    resume = options.pop("resume", True)
    trainer_of(directory, **{**SHORT, **options}).train(resume_from_checkpoint=resume)


@pytest.fixture
def copied(tmp_path, begun) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


OTHERS = {
    "options": (
        {"kl_coef": 0.5, "top_p": 0.5},
        r"holds another \(kl_coef was 0.05, is 0.5; top_p was 1.0, is 0.5\)",
    ),
    "training options": ({"learning_rate": 1.0}, "learning_rate was 0.001, is 1.0"),
    "batch": ({"per_device_train_batch_size": 8}, "draws_per_step was 4, is 8"),
    "model": ({"model": tiny_model("gpt2", TOKENIZER, seed=1)}, "other model"),
    "prompts": ({"prompts": PROMPTS[::-1]}, "other prompts"),
    "reward": ({"scorer": "profanity"}, "rewards were .*listed.*, are .*profanity"),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_another_run_is_refused_with_the_reason_and_nothing_is_touched(copied, options, message):
    before = {name: (copied / name).read_bytes() for name in files_of(copied)}
    with pytest.raises(UserError, match=message) as refused:
        again(copied, **options)
    assert len(str(refused.value).splitlines()) == 1
    assert {name: (copied / name).read_bytes() for name in files_of(copied)} == before


def test_what_changes_no_result_is_no_obstacle(copied, capsys):
    harmless = {"report_to": ["none"], "logging_steps": 7, "logging_first_step": True, "save_total_limit": 9}
    harmless |= {"disable_tqdm": True, "generation_batch_size": 3, "save_strategy": "steps", "run_name": "other"}
    harmless |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_unscored_share": 0.9}
    again(copied, **harmless)
    assert f"resumed {copied} from iteration 2/2, step 4/4, pool 20 samples" in " ".join(
        capsys.readouterr().err.split()
    )


def test_it_says_how_many_scores_are_in_the_cache(tmp_path, capsys):
    class Own:
        identity = {"version": 1}  # noqa: RUF012 (what a Scorer reads)
        reads = ("completions",)

        def __call__(self, completions):
            return [float(len(text)) + text.count("a") / 7 for text in completions]

    options = {"num_iterations": 1, "eval_strategy": "no", "score_cache": str(tmp_path / "scores.sqlite")}
    first = trainer_of(tmp_path / "run", scorer=Own(), **{**SHORT, **options})
    first.train()
    again(tmp_path / "run", scorer=Own(), **options)
    said = " ".join(capsys.readouterr().err.split())
    assert f"pool 12 samples, {first.scorer.cache_size} scores in cache" in said and first.scorer.cache_size > 5


def test_a_resumed_run_may_be_longer_and_says_so(copied, capsys):
    before = metrics_of(copied)[:-1]  # The last row is that of the end.
    again(copied, num_iterations=3)
    said = " ".join(capsys.readouterr().err.split())
    assert "num_iterations was 2, is 3: the learning rate follows the new length" in said
    assert metrics_of(copied)[: len(before)] == before
    assert [row["step"] for row in metrics_of(copied) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert (copied / "pool/iteration-000002.parquet").exists()


def test_a_run_with_other_options_may_branch_off_from_a_checkpoint_one_names(copied, capsys):
    checkpoint = str(copied / "checkpoint-2")
    with pytest.raises(UserError, match="num_quantiles was 3, is 2"):  # Which the samples' tokens depend on.
        again(copied, num_quantiles=2, resume=checkpoint)
    again(copied, learning_rate=1e-4, resume=checkpoint)
    assert f"from here on learning_rate was 0.001, is 0.0001; later files were moved to {copied}/aside-1" in " ".join(
        capsys.readouterr().err.split()
    )
    left = {"checkpoint-4", "final", "iteration-000001.parquet", "metrics.jsonl", "run.json"}
    assert left == {path.name for path in (copied / "aside-1").iterdir()}
    # One step of warming up, then linear to 0: 0, 3/3, 2/3 and 1/3 of the peak.
    rates = [row["learning_rate"] for row in metrics_of(copied) if "loss" in row]
    assert rates == pytest.approx([0, 1e-3, 2e-4 / 3, 1e-4 / 3])


def test_a_branch_keeps_the_metrics_and_the_final_model_of_the_timeline_that_it_leaves(copied):
    metrics, weights = (copied / "metrics.jsonl").read_bytes(), (copied / "final/model.safetensors").read_bytes()
    again(copied, learning_rate=1e-4, resume=str(copied / "checkpoint-2"))
    assert (copied / "aside-1/metrics.jsonl").read_bytes() == metrics != (copied / "metrics.jsonl").read_bytes()
    assert (copied / "aside-1/final/model.safetensors").read_bytes() == weights and not (copied / "final").exists()
    assert json.loads((copied / "aside-1/run.json").read_text())["options"]["learning_rate"] == 1e-3


def test_a_branch_with_another_optimizer_starts_its_states_anew(copied):
    again(copied, optim="adafactor", resume=str(copied / "checkpoint-2"))
    state = load_state(copied / "checkpoint-4/training/optimizer.safetensors")["state"]
    assert {values["step"] for values in state.values()} == {2}


COEFFICIENTS = {
    "a changed coefficient": ({"kl_coef": 0.5}, 0.5),
    "a changed coefficient and a target": ({"kl_coef": 0.5, "kl_target": 1e-3}, 0.5),
    "a dropped target": ({"kl_target": None}, 0.05),
    "another option": ({"learning_rate": 1e-4}, None),
}


@pytest.mark.parametrize(("options", "expected"), COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_a_branch_starts_from_its_own_coefficients_unless_they_have_adapted(copied, options, expected):
    """None: the coefficient that the checkpoint's run had reached, which is not the option's 0.05."""
    trainer = trainer_of(copied, **SHORT, **options)
    trainer.coefs.adapt = lambda *_args, **_kwargs: None
    saved = load_state(copied / "checkpoint-2/training/process-0.safetensors")["run"]["coefs"][0]
    trainer.add_callback(seen := FirstCoefficients(trainer))
    trainer.train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    assert saved > 0.05 and seen.kl_coef == (saved if expected is None else expected)


class FirstCoefficients(TrainerCallback):
    """Notes β before the first step of a trainer."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        self.kl_coef = self.trainer.coefs.kl_coef


@pytest.mark.parametrize("name", ["checkpoint-2", "copy-of-2"])
def test_a_checkpoint_of_another_directory_is_refused(tmp_path, copied, name):
    parent = tmp_path / "elsewhere" if name == "checkpoint-2" else copied
    shutil.copytree(copied / "checkpoint-2", parent / name)
    with pytest.raises(UserError, match=rf"resume_from_checkpoint '{parent / name}': must be a checkpoint of the run"):
        again(copied, resume=str(parent / name))


def test_one_process_resumes_from_a_checkpoint_with_the_states_of_two(copied):
    """Both states are equal here, and no sum spans the checkpoint, so the rest of the run is the same."""
    rows, states = metrics_of(copied), copied / "checkpoint-2/training"
    shutil.rmtree(copied / "checkpoint-4")
    shutil.copy(states / "process-0.safetensors", states / "process-1.safetensors")
    seal(copied / "checkpoint-2")
    again(copied)
    assert metrics_of(copied) == rows


def test_a_checkpoint_may_be_named_by_a_path_object(copied, capsys):
    again(copied, resume=copied / "checkpoint-2")
    assert f"resumed {copied} from iteration 2/2, step 2/4" in " ".join(capsys.readouterr().err.split())


def test_the_returned_loss_of_a_resumed_run_is_that_of_the_whole_run(copied):
    (logged,) = (row["train_loss"] for row in metrics_of(copied) if "train_loss" in row)
    shutil.rmtree(copied / "checkpoint-4")
    output = trainer_of(copied, **SHORT).train(resume_from_checkpoint=True)
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(logged)


def test_other_held_out_prompts_are_refused_where_they_choose_the_best_checkpoint(tmp_path):
    def train(held_out, **options):
        options = {**SHORT, **options, "steps_per_iteration": 1, "eval_dataset": held_out}
        resume = (tmp_path / "run").exists()
        small_trainer(tmp_path / "run", distinct_rewards, model_of(), PROMPTS, **RUN | options).train(resume)

    train(PROMPTS[:2], load_best_model_at_end=True)
    with pytest.raises(UserError, match=r"holds another \(other held-out prompts\)"):
        train(PROMPTS[2:4], load_best_model_at_end=True)
    train(PROMPTS[:2], load_best_model_at_end=True)


def test_a_trainer_that_has_learned_does_not_start_again_from_the_beginning(tmp_path):
    options = {**SHORT, "save_strategy": "no", "eval_strategy": "no"}
    trainer = trainer_of(tmp_path / "run", **options)
    trainer.train()
    with pytest.raises(UserError, match=r"already made 4 steps. Create a new trainer"):
        trainer.train(resume_from_checkpoint=True)
    again(tmp_path / "run", **options)


def test_nothing_to_resume_is_an_error_and_so_is_a_new_run_on_an_old_one(tmp_path, copied):
    with pytest.raises(UserError, match=r"nowhere': must be the directory of a run to resume, and holds none"):
        again(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"output_dir .*: must not hold a run already"):
        again(copied, resume=False)
    with pytest.raises(UserError, match=r"must not hold a run already"):
        again(copied, resume=None)
    (copied / "run.json").unlink()
    with pytest.raises(UserError, match=r"run.json is missing, so the run cannot be identified"):
        again(copied)


def test_scores_are_retried_where_all_were_missing_whatever_share_may_be(tmp_path):
    is_down = [True]

    def reward(completion_ids):
        return [None if is_down else float(sum(ids)) for ids in completion_ids]

    options = {"num_iterations": 1, "steps_per_iteration": 1, "eval_strategy": "no", "save_strategy": "no"}
    with pytest.raises(UserError, match="12 of 12 rewards in iteration 1 are None"):
        trainer_of(tmp_path / "run", scorer=reward, max_unscored_share=1.0, **options).train()
    is_down.clear()
    resumed = trainer_of(tmp_path / "run", scorer=reward, max_unscored_share=1.0, **options)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.pool) == 12


def test_missing_scores_of_a_refused_exploration_are_retried(tmp_path):
    asked: list[int] = []

    def down(completion_ids, log_metric):  # From the second batch on.
        asked.append(len(completion_ids))
        log_metric("calls", 1)
        return [sum(ids) / len(ids) if len(asked) < 2 else None for ids in completion_ids]

    options = {"num_iterations": 1, "steps_per_iteration": 2, "eval_strategy": "no", "save_strategy": "no"}
    with pytest.raises(UserError, match="7 of 12 rewards in iteration 1 are None"):
        trainer_of(tmp_path / "run", scorer=down, **options).train()
    assert asked == [5, 5, 2]

    def down(completion_ids, log_metric):  # The same name, because a run is identified by it.
        asked.append(len(completion_ids))
        log_metric("calls", 3)
        return [sum(ids) / len(ids) for ids in completion_ids]

    resumed = trainer_of(tmp_path / "run", scorer=down, **options)
    resumed.train(resume_from_checkpoint=True)
    assert asked == [5, 5, 2, 5, 2] and len(resumed.pool) == 12
    (explored,) = [row for row in metrics_of(tmp_path / "run") if "pool_size" in row]
    assert explored["metric.calls"] == (3 * 1 + 2 * 3) / 5  # Of three calls, and of two retries.

    whole = trainer_of(tmp_path / "whole", scorer=down, **options)
    whole.train()
    assert whole.pool.rewards.tolist() == resumed.pool.rewards.tolist()


# Two at a time


def _waits(directory: Path) -> None:
    def slow(completion_ids):
        Path(f"{directory}.begun").touch()
        time.sleep(60)

    trainer_of(directory, scorer=slow).train()


def test_a_directory_has_one_run_and_a_dead_one_does_not_hold_it(tmp_path):
    other = started(_waits, tmp_path / "run")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run.begun").exists():
        assert other.is_alive() and time.monotonic() < deadline, Path(other.log).read_text(encoding="utf-8")
        time.sleep(0.02)
    for resume in (False, True):
        with pytest.raises(UserError, match="run' is in use by another run"):
            trainer_of(tmp_path / "run").train(resume_from_checkpoint=resume)
    other.kill()
    other.join()

    def slow(completion_ids):
        return [float(sum(ids)) for ids in completion_ids]

    options = {"num_iterations": 1, "steps_per_iteration": 1, "kl_target": 1e-3}
    with pytest.raises(UserError, match="steps_per_iteration was 4, is 1"):  # It is asked who it is: the lock is free.
        trainer_of(tmp_path / "run", scorer=slow, **options).train(resume_from_checkpoint=True)
