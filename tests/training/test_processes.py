"""A run of two processes is the run of one: the same samples, losses to rounding, whatever dies and whoever goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.eight_letters import TOKENIZER
from helpers.files import files_of
from helpers.killed_runs import PROMPTS, RUN, assert_same_run, in_a_process, metrics_of
from helpers.runs import NO_DROPOUT, assert_same_pool
from helpers.tiny_models import make_home
from helpers.torchrun_jobs import (
    TWO,
    JobResult,
    final_state,
    run_job,
    scored_completions,
    shut_down_gloo_under_load,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl import QuarkGenerator
from quarkrl.algorithm.pool import DataPool

SCORE, LOSS = (
    "quarkrl.training.exploration:CompletionScorer.score",
    "quarkrl.training.trainer:QuarkTrainer.compute_loss",
)
SHARDED = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2}}
# What does not depend on how a step's samples are spread over processes, but for rounding. (total_flos does: padding.)
FIGURES = ("loss", "nll", "kl", "entropy", "grad_norm", "kl_coef", "entropy_coef", "train_loss", "learning_rate")


def fine(end: JobResult) -> JobResult:
    assert end.code == 0, end.output
    return end


def assert_like(found: Path, expected: Path) -> None:
    """The same samples, logs and weights, to rounding."""
    (found, expected) = (Path(found), Path(expected))
    pools = [DataPool.load(directory / "pool", RUN["num_quantiles"], ("reward",)) for directory in (found, expected)]
    for pool in pools:
        pool.quantize()
    assert_same_pool(*pools)
    rows, others = metrics_of(found), metrics_of(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in other.keys() - {"total_flos"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7), (name, other["step"])
    weights, others = (load_file(directory / "final/model.safetensors") for directory in (found, expected))
    assert weights.keys() == others.keys()
    for name in others:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A run of one process, without dropout."""
    directory = tmp_path_factory.mktemp("one") / "run"
    fine(run_job(directory, 1, model=NO_DROPOUT))
    return directory


@pytest.mark.slow
def test_two_processes_have_the_samples_and_losses_of_one_and_only_the_first_writes(tmp_path, one):
    directory = tmp_path / "run"
    end = fine(run_job(directory, 2, model=NO_DROPOUT, options=TWO, apart=True))
    first, second = (final_state(directory, rank) for rank in (0, 1))
    alone = final_state(one)
    for name in ("rewards", "quantiles", "completions", "drawn"):
        assert first[name] == second[name] == alone[name], name
    assert len(first["rewards"]) == 31  # Of 36 samples 5 have no reward.
    rows = [[row for row in facts["logs"] if "nll" in row] for facts in (first, second, alone)]
    assert len(rows[0]) == 3  # Steps 5 and 10, and the end of the first iteration, which has no such step.
    for mine, other, expected in zip(*rows, strict=True):
        for name in expected.keys() & set(FIGURES):
            assert mine[name] == other[name] == pytest.approx(expected[name], rel=1e-5), name
    assert first["logs"][-1]["train_loss"] == pytest.approx(alone["logs"][-1]["train_loss"], rel=1e-5)
    assert scored_completions(directory) == scored_completions(one) and len(scored_completions(one)) == 36 + 9
    assert min(first["scored"], second["scored"]) > 10
    assert files_of(tmp_path / "rank-1") == set()
    assert files_of(tmp_path / "rank-0/run") == files_of(one) | {
        f"checkpoint-{step}/training/process-1.safetensors" for step in (9, 12)
    }
    assert_like(tmp_path / "rank-0/run", one)
    assert "Traceback" not in end.output


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run of two processes, with dropout."""
    directory = tmp_path_factory.mktemp("two") / "run"
    fine(run_job(directory, 2, options=TWO))
    return directory


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_resumes_to_the_same_bits(tmp_path, two):
    directory = tmp_path / "run"
    goes = [
        ("1", [SCORE, "before", 1]),  # Exploring.
        ("0", ["quarkrl.training.rollout:FinishedBatches.keep", "after", 1]),
        ("1", [LOSS, "before", 3]),  # Learning.
        ("0", [LOSS, "after", 6]),
        ("0", ["quarkrl.runs.checkpoints:seal", "before", 1]),  # Saving.
        ("1", ["quarkrl.runs.durable_trainer:DurableTrainer._save_checkpoint", "before", 2]),
    ]
    for go, (rank, trap) in enumerate(goes):
        end = run_job(directory, 2, options=TWO, resume=go > 0, trap={rank: trap})
        assert end.code != 0, end.output
        assert f"Signal {signal.SIGKILL.value} (SIGKILL) received" in end.output, end.output
        assert f"rank      : {rank} (local_rank: {rank})" in end.output
    end = fine(run_job(directory, 2, options=TWO, resume=True))
    assert f"resumed {directory} from iteration" in end.output
    assert_same_run(directory, two)


@pytest.mark.slow
def test_what_rounding_decides_in_one_process_is_decided_in_both(tmp_path):
    directory = tmp_path / "run"
    fine(run_job(directory, 2, options={**TWO, "bf16": True, "learning_rate": 0.1}))
    first, second = (final_state(directory, rank) for rank in (0, 1))
    assert first["completions"] == second["completions"] and first["drawn"] == second["drawn"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_resumes_to_the_same_result_up_to_rounding(tmp_path, one, before, after):
    directory = tmp_path / "run"
    options = {1: {}, 2: TWO}
    end = run_job(directory, before, model=NO_DROPOUT, options=options[before], trap={"0": [LOSS, "after", 8]})
    assert end.code != 0 and (directory / "checkpoint-6").is_dir(), end.output
    end = fine(run_job(directory, after, model=NO_DROPOUT, options=options[after], resume=True))
    assert "iteration 2/3, step 6/12, pool 20 samples" in end.output
    assert_like(directory, one)
    assert final_state(directory)["completions"] == final_state(one)["completions"]


@pytest.mark.slow
def test_a_process_whose_scores_fail_ends_all_with_its_line(tmp_path):
    end = run_job(tmp_path / "run", 2, options=TWO, fails=True)
    assert end.code != 0
    assert "process 1: " in end.output and "the scorer is down" in end.output, end.output
    assert "Connection closed" not in end.output  # The other has not found out by itself.


@pytest.mark.slow
def test_sigterm_stops_all_processes_after_the_batch_and_the_job_resumes(tmp_path, two):
    directory = tmp_path / "run"
    trap = {"1": [LOSS, "after", 5, signal.SIGTERM]}  # As a scheduler sends it to each.
    end = run_job(directory, 2, options=TWO, trap=trap)
    assert end.code != 0
    assert "stopped by SIGTERM in iteration 2 after step 5; everything is saved" in end.output, end.output
    assert (directory / "checkpoint-5").is_dir()
    fine(run_job(directory, 2, options=TWO, resume=True))
    for path in directory.glob("checkpoint-*"):
        if path.name in ("checkpoint-5", "checkpoint-9"):
            shutil.rmtree(path)
    assert final_state(directory)["completions"] == final_state(two)["completions"]
    assert (directory / "final/model.safetensors").read_bytes() == (two / "final/model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_command_stops_with_one_line_and_resumes_as_one_process(tmp_path):
    directory = tmp_path / "run"
    options = {**RUN, **SHARDED, "eval_strategy": "no"}
    home = make_home(tmp_path, TOKENIZER, PROMPTS, "from helpers.killed_runs import reward", **options)
    argv = ["train", "--config", str(home / "run.yaml"), "--output_dir", str(directory)]
    argv += ["--reward", f"{home / 'rewards.py'}:reward"]
    end = run_job(directory, 2, argv=argv, trap={"1": [LOSS, "after", 5, signal.SIGTERM]})
    assert "exitcode  : 143" in end.output, end.output
    assert end.output.count("stopped by SIGTERM in iteration 2 after step 5") == 1, end.output
    resume = ["train", "--resume", "--output_dir", str(directory)]
    end = run_job(directory, 1, argv=resume)
    assert end.code == 2 and "draws_per_step was 4, is 2" in end.output, end.output
    end = fine(run_job(directory, 1, argv=[*resume, "--per_device_train_batch_size", "4"]))
    assert "ddp_backend and fsdp ignored: there is one process" in end.output, end.output
    assert "iteration 2/3, step 5/12, pool 20 samples" in end.output, end.output
    assert os.listdir(directory / "checkpoint-12/training").count("process-1.safetensors") == 0
    assert (directory / "final/model.safetensors").is_file()


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="tells of threads on Linux only")
def test_no_thread_of_gloo_holds_a_tensor_when_the_interpreter_ends(tmp_path):
    code, said = in_a_process(
        shut_down_gloo_under_load,
        tmp_path / "run",
        # It would abort the process, now and then, on a busy machine.
    )
    assert code == 0, said


# Sharded weights


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / "run"
    fine(run_job(directory, 2, model=NO_DROPOUT, options=SHARDED))
    return directory


@pytest.mark.slow
def test_fsdp2_learns_what_one_process_learns_and_leaves_an_ordinary_model(sharded, one):
    assert (
        final_state(sharded, 0)["layers"] == final_state(sharded, 1)["layers"] == ["DTensor", "DTensor"]
    )  # Policy and reference.
    assert scored_completions(sharded) == scored_completions(one)
    assert (
        final_state(sharded)["completions"] == final_state(sharded, 1)["completions"] == final_state(one)["completions"]
    )
    assert_like(sharded, one)
    suffixes = {".json", ".jsonl", ".safetensors", ".parquet", ".lock", ".md"}
    assert {Path(name).suffix for name in files_of(sharded)} <= suffixes  # No pickle.
    model = AutoModelForCausalLM.from_pretrained(sharded / "final")
    tokenizer = AutoTokenizer.from_pretrained(sharded / "final")
    assert tokenizer("a b")["input_ids"] == [12, 0, 1]  # The best of three reward tokens first.
    assert model.generate(**tokenizer("a b", return_tensors="pt"), max_new_tokens=3).shape[1] > 3
    generator, expected = (QuarkGenerator.from_pretrained(path / "final") for path in (sharded, one))
    for quantile in ("best", "worst"):
        assert generator.generate(PROMPTS, quantile, seed=1) == expected.generate(PROMPTS, quantile, seed=1)


@pytest.mark.slow
def test_fsdp2_resumes_to_the_same_bits(tmp_path, sharded):
    directory = tmp_path / "run"
    end = run_job(directory, 2, model=NO_DROPOUT, options=SHARDED, trap={"1": [LOSS, "before", 5]})
    assert end.code != 0 and "(SIGKILL) received" in end.output, end.output
    end = fine(run_job(directory, 2, model=NO_DROPOUT, options=SHARDED, resume=True))
    assert "step 3/12, pool 10 samples" in end.output
    assert_same_run(directory, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("sharded_first", [True, False])
def test_one_process_resumes_a_sharded_run_and_the_reverse(tmp_path, one, sharded_first):
    directory = tmp_path / "run"
    goes = [(2, SHARDED), (1, {})][:: 1 if sharded_first else -1]
    processes, options = goes[0]
    end = run_job(directory, processes, model=NO_DROPOUT, options=options, trap={"0": [LOSS, "before", 8]})
    assert end.code != 0 and (directory / "checkpoint-6").is_dir(), end.output
    processes, options = goes[1]
    end = fine(run_job(directory, processes, model=NO_DROPOUT, options=options, resume=True))
    assert "iteration 2/3, step 6/12" in end.output
    assert_like(directory, one)


# DeepSpeed, where it is installed


@pytest.mark.slow
def test_deepspeed_learns_what_one_process_learns_and_resumes_to_the_same_bits(tmp_path, one, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    options = {**TWO, "deepspeed": {"zero_optimization": {"stage": 2}, **auto}}
    whole, directory = tmp_path / "whole", tmp_path / "run"
    fine(run_job(whole, 2, model=NO_DROPOUT, options=options))
    assert final_state(whole)["completions"] == final_state(whole, 1)["completions"] == final_state(one)["completions"]
    assert scored_completions(whole) == scored_completions(one)
    assert_like(whole, one)
    end = run_job(directory, 2, model=NO_DROPOUT, options=options, trap={"1": [LOSS, "before", 8]})
    assert end.code != 0 and (directory / "checkpoint-6").is_dir(), end.output
    end = fine(run_job(directory, 2, model=NO_DROPOUT, options=options, resume=True))
    assert "iteration 2/3, step 6/12" in end.output
    assert metrics_of(directory) == metrics_of(whole)
    assert (directory / "final/model.safetensors").read_bytes() == (whole / "final/model.safetensors").read_bytes()
    options["deepspeed"]["zero_optimization"]["stage"] = 3
    end = run_job(tmp_path / "other", 2, model=NO_DROPOUT, options=options)
    assert end.code != 0 and "UserError: DeepSpeed's ZeRO stage 3: not supported" in end.output


@pytest.mark.slow
@pytest.mark.parametrize("two", [TWO, SHARDED], ids=["whole weights", "sharded"])
def test_the_pairs_of_two_processes_are_those_of_one(tmp_path, two):
    options, rows = {"dpo_coef": 1.0, "samples_per_prompt": 2}, []
    for count, more in ((1, {}), (2, two)):
        directory = tmp_path / f"run-{count}"
        fine(run_job(directory, count, model=NO_DROPOUT, options={**options, **more}))
        rows.append([row for row in metrics_of(directory) if "dpo" in row])
    assert len(rows[0]) == len(rows[1]) > 2
    for alone, together in zip(*rows, strict=True):
        for name in alone.keys() & {*FIGURES, "dpo"}:
            assert alone[name] == pytest.approx(together[name], rel=1e-4, abs=1e-7), name
