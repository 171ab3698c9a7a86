"""The plan of a run, and the estimate of its remaining time."""

from __future__ import annotations

import io
from functools import partial
from types import SimpleNamespace

import pytest
from rich.console import Console

from quarkrl import QuarkConfig
from quarkrl.errors import format_seconds
from quarkrl.training import progress as progress_module
from quarkrl.training import time_left
from quarkrl.training.config import at_iteration
from quarkrl.training.progress import Progress
from quarkrl.training.sizing import Speed
from quarkrl.training.time_left import Plan, TimeLeft, TimePlan


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time_left.time, "perf_counter", lambda: clock.now)
    return clock


def options(**changes):
    values = {"steps_per_iteration": 10, "num_iterations": 3, "world_size": 1, "conditioning": "tokens"}
    values["explore_guidance_scale"] = [1.0, 1.3]
    values |= changes
    values["exploring_scale"] = partial(at_iteration, values["explore_guidance_scale"])
    return SimpleNamespace(**values, total_iterations=values["num_iterations"])


def measured(clock, args, iteration=0, steps=5, seconds_sample=4.0):
    estimate = TimeLeft()
    estimate.explored(args, {"iteration": iteration, "seconds_sample": seconds_sample, "seconds_score": 2.0})
    for _ in range(steps):
        estimate.begin_step()
        clock.now += 0.5
        estimate.end_step()
        clock.now += 100.0  # Between steps there may be an evaluation, which does not count.
    return estimate


def test_later_explorations_are_guided_and_take_two_passes(clock):
    # Two more explorations of 2 x 4 s, and 25 steps of 0.5 s.
    assert measured(clock, options()).seconds(options(), step=5) == 16 + 12.5


def test_a_guided_exploration_is_not_counted_twice(clock):
    args = options()
    estimate = measured(clock, args, iteration=1, steps=10, seconds_sample=8.0)
    assert estimate.seconds(args, step=20) == 8 + 5


def test_processes_explore_at_the_same_time(clock):
    args = options(world_size=2, explore_guidance_scale=[1.0])
    assert measured(clock, args).seconds(args, step=10) == 2 * 2 + 20 * 0.5


def test_without_measurements_there_is_no_estimate(clock):
    assert TimeLeft().seconds(options(), step=0) is None
    assert measured(clock, options(), steps=0).seconds(options(), step=0) is None


def test_progress_says_once_how_long_a_run_takes_and_then_after_each_iteration(clock):
    console = Console(file=io.StringIO(), width=200)
    progress, args = Progress(console=console), options(num_iterations=2)
    for step in range(10):
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        if step == 0:
            logs = {"iteration": 0, "reward": 0.5, "unscored": 0, "seconds_sample": 60.0, "seconds_score": 1.0}
            progress.on_log(args, state, None, logs=logs)
        progress.on_step_begin(args, state, None)
        clock.now += 1.0
        state.global_step += 1
        progress.on_step_end(args, state, None)
    progress.on_epoch_end(args, state, None)
    # After 5 steps: one exploration of 120 s and 15 steps of 1 s. After 10: the exploration and 10 steps.
    lines = ["time: about 2 min left, without evaluations", "iteration 1/2  reward 0.500  unscored 0  left 2 min"]
    assert console.file.getvalue().splitlines() == lines


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5_399, "90 min"), (7_800, "2 h 10 min")]
)
def test_durations_have_the_unit_that_suits_them(seconds, text):
    assert format_seconds(seconds) == text


def test_the_plan_counts_completions_and_draws(tmp_path):
    args = QuarkConfig(
        output_dir=str(tmp_path),
        num_iterations=26,
        prompts_per_iteration=1500,
        samples_per_prompt=2,
        steps_per_iteration=50,
        per_device_train_batch_size=72,
    )
    assert Plan(args, num_prompts=20_000).describe() == (
        "plan: 26 iterations. Each samples and scores 3,000 completions (2 for each of 1,500 prompts), and learns in "
        f"50 steps of 72. In all 78,000 completions, each drawn 1.2 times, into {tmp_path}"
    )


def test_a_plan_that_draws_too_often_warns(tmp_path):
    plan = {"output_dir": str(tmp_path), "per_device_train_batch_size": 100, "samples_per_prompt": 2}
    assert (
        Plan(QuarkConfig(steps_per_iteration=8, **plan), num_prompts=200).describe_overdraw() is None
    )  # 800 of 400: twice.
    warning = Plan(QuarkConfig(steps_per_iteration=12, **plan), num_prompts=200).describe_overdraw()
    assert warning.startswith("warning: each completion is drawn 3.0 times") and "--steps_per_iteration 8" in warning


@pytest.mark.parametrize(
    ("iterations", "evaluated", "text"),
    [
        # 4 x 30 x 0.1 s, and 4 x 40 x 0.2 s.
        (4, 0, "time: about 44 s (sampling 12, learning 32), and the time of the rewards"),
        # 10 iterations; 200 completions of 0.1 s, each read in 0.2 / 4 s, and 5 s of the report.
        (
            10,
            200,
            "time: about 2.4 min (sampling 0.5, learning 1.3, evaluation and report 0.6), and the time of the rewards",
        ),
    ],
)
def test_the_time_of_a_plan_is_the_sum_of_its_parts(tmp_path, iterations, evaluated, text):
    args = QuarkConfig(
        output_dir=str(tmp_path), num_iterations=iterations, steps_per_iteration=5, per_device_train_batch_size=8
    )
    assert Plan(args, 30).time(Speed(per_completion=0.1, per_draw=0.2), evaluated).describe() == text


def test_the_time_of_a_plan_counts_guided_sampling_twice_and_distillation(tmp_path):
    args = QuarkConfig(
        output_dir=str(tmp_path),
        num_iterations=2,
        explore_guidance_scale=[1, 2],
        distill_guidance_scale=[2],
        distill_iterations=1,
        steps_per_iteration=5,
        per_device_train_batch_size=8,
    )
    # Passes of 30 x 0.1 s: one, and two in the guided iteration and in the one of distillation.
    text = Plan(args, 30).time(Speed(per_completion=0.1, per_draw=0.2)).describe()
    assert text == "time: about 39 s (sampling 15, learning 24), and the time of the rewards"


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        (3.0, None),  # 20 completions of two passes in 3 s: less than 1.5 times as slow as planned.
        (40.0, "time: about 15 min, by the first 20 completions"),  # ten times as slow
        (2.8, None),
        (1.9, None),  # Too short to say anything.
    ],
)
def test_the_first_completions_correct_a_plan_that_is_far_off(clock, monkeypatch, seconds, line):
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock.now)
    progress = Progress(console=Console(file=io.StringIO(), width=200))
    progress.plan = TimePlan(Speed(per_completion=0.1, per_draw=0.2), {"sampling": 30.0, "learning": 60.0})
    with progress.sampling("held out", 20):  # No exploration.
        clock.now += 100.0
        progress.advance_sampling(20)
    with progress.sampling("iteration 1", 60, passes=2):
        clock.now += seconds
        progress.advance_sampling(20)
        clock.now += 1000.0
        progress.advance_sampling(20) if line else None
    lines = [text for text in progress.console.file.getvalue().splitlines() if "time:" in text]
    assert lines == ([line] if line else [])
