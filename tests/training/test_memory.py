"""The memory estimate: by hand, compared with measured peaks, and what a trainer makes of it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.eight_letters import PROMPTS, TOKENIZER
from helpers.runs import LORA, distinct_rewards, model_of, small_trainer
from helpers.tiny_models import tiny_model, tiny_tokenizer
from peft import LoraConfig

from quarkrl.errors import UserError
from quarkrl.training import memory
from quarkrl.training.memory import (
    SAFETY_FACTOR,
    RunSize,
    choose_sampling_batch,
    estimate,
    free_and_total,
    optimizer_ratio,
    remedies,
    size_of_run,
)

GB = 10**9
# 4000 bytes of weights. A micro-batch has 2 samples; 4 completions are sampled at a time.
SMALL = RunSize(
    weights=4000, trained=4000, activations=5000, checkpointed=1000, loss=700, logits=0, cache=320, sampling=1600,
    batch=2, sampled=4,
)  # fmt: skip


# The arithmetic


def test_the_parts_and_the_peaks():
    result = estimate(SMALL)
    assert result.parts == {
        "weights": 4000, "reference": 0, "gradients": 4000, "optimizer": 8000, "other": 0,
        "activations": 2 * 5000, "loss": 700, "cache": 4 * 320, "sampling": 4 * 1600,
    }  # fmt: skip
    assert result.exploring == 12000 + int(SAFETY_FACTOR * (4 * 320 + 4 * 1600))
    assert result.learning == 12000 + int(SAFETY_FACTOR * 10000) + 700 == result.total


def test_gradients_count_where_they_are_larger_than_the_activations_that_they_replace():
    small_batch = replace(SMALL, activations=100)
    assert estimate(small_batch).learning == 12000 + 4000 + 700
    # Gradients of an earlier micro-batch are there beside the activations.
    assert estimate(replace(small_batch, accumulates=True)).learning == 12000 + int(SAFETY_FACTOR * 200) + 700 + 4000


@pytest.mark.parametrize(
    ("change", "part", "expected"),
    [
        ({"reference": 4000}, "reference", 4000),
        ({"optimizer": 0.5}, "optimizer", 2000),
        ({"trained": 40}, "optimizer", 80),
        ({"logits": 60}, "loss", 700 + 2 * 60),
        ({"sampled": 8}, "cache", 8 * 320),
    ],
)
def test_what_a_size_changes(change, part, expected):
    assert estimate(replace(SMALL, **change)).parts[part] == expected


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("adamw_torch_fused", 4, 2),
        ("adamw_torch", 2, 2),
        ("adamw_bnb_8bit", 4, 0.5),
        ("paged_adamw_8bit", 2, 1),
        ("adamw_torch_4bit", 4, 0.25),
        ("paged_ademamix_32bit", 4, 3),
        ("lion_8bit", 4, 0.25),
        ("lion_32bit", 4, 1),
        ("adafactor", 4, 0),
        ("galore_adamw", 4, 2),  # Not in the table: as AdamW.
    ],
)
def test_the_states_of_optimizers(name, number, expected):
    assert optimizer_ratio(name, number) == expected


# Models and options


def test_the_sizes_of_a_gpt2(tmp_path):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    trainer = small_trainer(tmp_path, model=tiny_model("gpt2", TOKENIZER), **options)
    run = size_of_run(trainer.model, trainer.args, prompt_length=6, num_completions=40, reference=trainer.ref_model)
    vocab = 10 + 3  # Ten words and three reward tokens.
    assert run.weights == run.trained == 4 * trainer.model.num_parameters()
    assert run.reference == 4 * trainer.ref_model.num_parameters()
    # Two layers of width 16: queries, keys, values 16 + 48, output 16 + 16, feed-forward 16 + 64 and 64 + 16. The
    # scores of two heads, three times, as PyTorch has no fused attention with dropout on a CPU. 12 tokens per sample.
    # Two norms per layer, and one behind the last.
    assert run.activations == 12 * 4 * (2 * (64 + 32 + 80 + 80 + 3 * 2 * 12 + 2 * 16) + 16)
    assert run.checkpointed == run.activations // 2 + 12 * 4 * 2 * 16
    assert run.loss == 5 * 4 * 48 * vocab + 2 * 4 * 16 * vocab and run.logits == 0
    assert run.cache == 12 * 4 * 2 * 2 * 16
    assert run.sampling == max(6 * 4 * (256 + 32 + 8), 6 * 4 * vocab)
    assert (run.batch, run.sampled, run.accumulates, run.optimizer) == (8, 40, True, 2)
    assert run.other == 2 * 40 * (4 * 12 + 30)  # The pool, after two iterations.


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"gradient_checkpointing": True}, {"activations"}),
        ({"eval_guidance_scale": 2.0}, {"cache", "sampling"}),
        ({"bf16": True}, {"activations", "checkpointed", "sampling", "other"}),
        ({"optim": "sgd"}, {"optimizer"}),
        ({"max_completion_length": 7}, {"activations", "checkpointed", "cache", "loss", "other"}),
    ],
)
def test_the_sizes_that_an_option_changes(tmp_path, options, changed):
    runs = []
    for name, settings in (("a", {}), ("b", options)):
        trainer = small_trainer(tmp_path / name, **settings)
        runs.append(vars(size_of_run(trainer.model, trainer.args, prompt_length=6, num_completions=8)))
    assert {field for field in runs[0] if runs[0][field] != runs[1][field]} == changed


def test_the_keys_of_a_model_with_grouped_queries_are_narrower(tmp_path):
    trainer = small_trainer(tmp_path, model=tiny_model("llama", TOKENIZER))
    # One head of width 8 for keys and values, two for queries; no dropout.
    run = size_of_run(trainer.model, trainer.args, prompt_length=6, num_completions=8)
    assert run.cache == 12 * 4 * 2 * 2 * 8
    assert run.activations == 12 * 4 * (2 * (2 * 32 + 2 * (16 + 8) + 2 * (16 + 32) + (32 + 16) + 2 * 16) + 16)


def test_an_adapter_has_few_trained_numbers_and_no_gradient_of_the_embedding(tmp_path):
    trainer = small_trainer(tmp_path, model=model_of(), peft_config=LORA)
    full = small_trainer(tmp_path / "full", model=model_of())
    run, plain = (size_of_run(t.model, t.args, prompt_length=6, num_completions=8) for t in (trainer, full))
    assert run.trained == sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad) < run.weights / 2
    assert run.reference == 0 and run.activations == plain.activations
    # Without an adapter, the gradient of the tied embedding is there twice while it is scaled.
    assert plain.loss - run.loss == 2 * 4 * 16 * 13


def test_an_adapted_output_layer_needs_all_logits(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    trainer = small_trainer(tmp_path, model=tiny_model("llama", TOKENIZER, tied=False), peft_config=lora)
    assert size_of_run(trainer.model, trainer.args, prompt_length=6, num_completions=8).logits == 3 * 4 * 6 * 13


def test_a_guided_reference_needs_the_logits_of_its_contrast(tmp_path):
    runs = []
    for name, scale in (("plain", 1.0), ("guided", [1.0, 2.0])):
        trainer = small_trainer(tmp_path / name, conditioning="text", words=["a", "b", "c"], kl_guidance_scale=scale)
        runs.append(size_of_run(trainer.model, trainer.args, prompt_length=6, num_completions=8))
    # Logits of the reference and of the contrast, and four arrays to combine them; six tokens, ten words.
    assert runs[0].logits == 0 and runs[1].logits == 6 * 4 * 6 * 10


# The memory of the device


def test_a_control_group_limits_main_memory(monkeypatch):
    files = {("/proc/meminfo", "MemAvailable:"): 8 * 10**6}
    monkeypatch.setattr(memory, "_kernel_number", lambda path, key="": files.get((path, key), 0))
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 4 * 10**6, "SC_PAGE_SIZE": 4096}.get)
    cpu = torch.device("cpu")
    assert free_and_total(cpu) == (8 * 10**6 * 1024, 4 * 10**6 * 4096)
    files |= {("/sys/fs/cgroup/memory.max", ""): 4 * GB, ("/sys/fs/cgroup/memory.current", ""): 3 * GB}
    files |= {("/sys/fs/cgroup/memory.stat", "inactive_file"): GB}
    assert free_and_total(cpu) == (2 * GB, 4 * GB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_and_total(cpu) == (GB, 2 * GB)
    assert free_and_total(torch.device("meta")) is None


# The sampling batch


def test_the_sampling_batch_needs_half_of_the_memory_at_most():
    assert choose_sampling_batch(SMALL, GB, 128, 10**6) == 128 and choose_sampling_batch(SMALL, GB, 512, 10**6) == 512
    assert choose_sampling_batch(SMALL, 0, 128, 10**6) == 1
    for total in (60_000, 100_000, 200_000):
        size = choose_sampling_batch(SMALL, total, 128, 10**6)
        assert 1 < size < 128 and size & (size - 1) == 0
        assert estimate(replace(SMALL, sampled=size)).exploring <= total / 2
        assert estimate(replace(SMALL, sampled=2 * size)).exploring > total / 2
    # An iteration of 5 completions never samples more.
    assert choose_sampling_batch(SMALL, 60_000, 128, 5) == 128


def test_the_samples_do_not_depend_on_the_memory(tmp_path, monkeypatch):
    samples = []
    for total, size in ((10**12, 128), (10**5, 1)):
        monkeypatch.setattr(memory, "free_and_total", lambda _, total=total: (10**12, total))
        trainer = small_trainer(tmp_path / str(total))
        assert trainer.memory_plan.generation_batch_size == size
        trainer.explore(0)
        trainer.quantize(0)
        samples.append([sample.completion_ids.tolist() for sample in trainer.pool])
    assert samples[0] == samples[1] and len(samples[0]) == len(PROMPTS)


def test_a_given_sampling_batch_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_and_total", lambda _: (10**12, 10**5))
    assert small_trainer(tmp_path, generation_batch_size=7).memory_plan.generation_batch_size == 7


def test_an_unknown_amount_of_memory_gives_a_batch_of_128(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_and_total", lambda _: None)
    trainer = small_trainer(tmp_path)
    assert trainer.memory_plan.generation_batch_size == 128 and trainer.memory_plan.message.endswith(")")


def test_processes_take_the_smallest_batch_and_are_refused_together(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr(memory, "free_and_total", lambda _: (10**12, 10**12))
    monkeypatch.setattr(memory, "gather_object", lambda own: [*own, (64, None)])
    assert memory.plan_memory(trainer.model, trainer.args, [3, 4]).generation_batch_size == 64
    monkeypatch.setattr(memory, "gather_object", lambda own: [*own, (64, "memory: too little")])
    with pytest.raises(UserError, match="memory: too little"):
        memory.plan_memory(trainer.model, trainer.args, [3, 4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}])
def test_a_gpu_samples_up_to_512_completions_at_a_time_and_trains(tmp_path, options):
    trainer = small_trainer(tmp_path, use_cpu=False, **options)
    assert trainer.args.device.type == "cuda" and trainer.memory_plan.generation_batch_size == 512
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


# Advice


def options_of(advice: list[str]) -> list[str]:
    return [text.split()[0] for text in advice]


def test_advice_names_what_helps_and_the_most_effective_first():
    learning = replace(SMALL, batch=64, sampled=64, reference=20000)
    advice = remedies(learning, {"generation_batch_size": 64})
    assert advice[0].startswith("gradient_checkpointing (0.00 GB)")
    assert advice[1].startswith("per_device_train_batch_size 16 with 4 times the gradient_accumulation_steps (")
    assert set(options_of(advice)) == {"per_device_train_batch_size", "gradient_checkpointing", "lora_rank", "kl_coef"}
    sampling = replace(SMALL, batch=1, sampled=4096, activations=1000, trained=100)
    assert options_of(remedies(sampling, {"generation_batch_size": 4096})) == ["generation_batch_size"]
    (only,) = remedies(sampling, {"generation_batch_size": 8, "per_device_eval_batch_size": 4096})
    assert only.startswith("per_device_eval_batch_size 1024 (")
    # Lowering one of them would leave the peak of the other.
    (only,) = remedies(sampling, {"generation_batch_size": 2000, "per_device_eval_batch_size": 4096})
    assert only.startswith("generation_batch_size 1024 and per_device_eval_batch_size 1024 (")
    assert remedies(replace(sampling, sampled=1, cache=0), {"generation_batch_size": 1}) == []


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "generation_batch_size 32 ("),  # Chosen automatically, by the total and not by the free memory.
        ({"generation_batch_size": 8, "eval_dataset": PROMPTS * 20}, "per_device_eval_batch_size 32 ("),
        ({"eval_dataset": PROMPTS * 5}, "generation_batch_size 32 and per_device_eval_batch_size 32 ("),
    ],
)
def test_where_exploring_does_not_fit_the_sampling_batches_are_named(options, advice, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_and_total", lambda _: (1000, 10**12))
    with pytest.raises(UserError) as error:
        small_trainer(tmp_path, per_device_train_batch_size=1, samples_per_prompt=100, **options)
    assert f"Set {advice}" in str(error.value)


def test_a_run_that_cannot_fit_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_and_total", lambda _: (1000, 10**12))
    with pytest.raises(UserError, match=r"memory: .* about .* GB, and .* GB are free") as error:
        small_trainer(tmp_path, per_device_train_batch_size=512)
    message = str(error.value)
    # A part of the batch has at most 512 positions; prompts with a reward token and completions have up to 12.
    assert "\n" not in message and "per_device_train_batch_size 10 with 52 times" in message
    assert not (tmp_path / "pool").exists()


def test_a_run_that_may_not_fit_is_warned_of(tmp_path, monkeypatch, caplog):
    trainer = small_trainer(tmp_path / "a")
    models = sum(p.nbytes for model in (trainer.model, trainer.ref_model) for p in model.parameters())
    run = size_of_run(trainer.model, trainer.args, max(map(len, trainer.prompts.ids)) + 1, 8, trainer.ref_model)
    free = int(estimate(run).total / 1.2) - models
    monkeypatch.setattr(memory, "free_and_total", lambda _: (free, 10**12))
    with caplog.at_level(logging.WARNING, "quarkrl.training.memory"):
        small_trainer(tmp_path / "b")
    assert "memory: " in caplog.text and "per_device_train_batch_size 2" in caplog.text


def test_a_run_says_at_its_start_how_much_memory_it_needs(tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, "quarkrl.training"):
        small_trainer(tmp_path / "a", num_iterations=1).train()
    assert "memory: about 0.0" in caplog.text and "memory" not in capsys.readouterr().err
    small_trainer(tmp_path / "b", num_iterations=1, disable_tqdm=False).train()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("memory: ")]
    assert line.startswith("memory: about 0.0") and "exploring" in line


# Compared with measured peaks


GPT2 = {"architecture": "gpt2", "n_layer": 6, "n_embd": 384, "n_head": 6, "vocab": 50257}
LLAMA = {"architecture": "llama", "num_hidden_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "head_dim": 64}
LLAMA |= {"num_key_value_heads": 4, "intermediate_size": 1376, "vocab": 32000, "tied": False}
# Two iterations of one step: the optimizer's states exist from the second step on.
BRIEF = {"steps_per_iteration": 1, "max_completion_length": 20, "min_completion_length": 20}
EXPLORING = {"per_device_train_batch_size": 1, "generation_batch_size": 128, "top_p": 0.9}
RUNS = {
    "gpt2": (GPT2, {"per_device_train_batch_size": 16}, 20),
    "llama in bf16": (LLAMA, {"per_device_train_batch_size": 8, "bf16": True}, 20),
    "llama with an adapter": ({**LLAMA, "adapted": "all-linear"}, {"per_device_train_batch_size": 32}, 60),
    "exploring, long prompts": (GPT2, EXPLORING, 100),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_near_the_measured_peak(name, tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1] / "benchmarks")]
    code = f"import sys; sys.path[:0] = {paths}; import test_memory; test_memory.run_and_measure()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    arguments = [sys.executable, "-c", code, name, str(tmp_path / "run")]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment, timeout=580)
    assert process.returncode == 0, process.stderr
    exploring, learning, peak = json.loads(process.stdout.splitlines()[-1])
    figures = f"{name}: estimate {max(exploring, learning) / GB:.2f} GB, peak {peak / GB:.2f} GB"
    logging.getLogger(__name__).info(figures)  # Shown with `--log-cli-level info`.
    assert 0.75 <= max(exploring, learning) / peak <= 1.25, figures
    assert (exploring > learning) == name.startswith("exploring")


def run_and_measure() -> None:
    """In a process of its own, print the estimated peaks of a run, and the measured one without the libraries."""
    from measure import held_bytes, peak_bytes

    from quarkrl.models.loading import with_fused_gelu

    shape, options, length = RUNS[sys.argv[1]]
    directory, shape, batch = Path(sys.argv[2]), dict(shape), options["per_device_train_batch_size"]
    sampled = options.get("generation_batch_size", batch)
    count = max(2 * batch, sampled)  # Prompts, all of them different, as equal ones are read once.
    # A first run loads and compiles what is needed once.
    small_trainer(directory / "first", model=tiny_model("llama", TOKENIZER), num_iterations=1).train()
    before = held_bytes("cpu")
    adapted = shape.pop("adapted", None)
    adapter = LoraConfig(r=8, target_modules=adapted, task_type="CAUSAL_LM") if adapted else None
    # With the two tokens that the tokenizer adds, the vocabulary has the size of the shape.
    tokenizer = tiny_tokenizer(words=[*"abcdefgh", *map(str, range(shape.pop("vocab") - 10))])
    trainer = small_trainer(
        directory / "run",
        distinct_rewards,
        with_fused_gelu(tiny_model(tokenizer=tokenizer, initializer_range=0.02, **shape)),
        [" ".join("abcdefgh"[(number // 8 ** (place % 4)) % 8] for place in range(length)) for number in range(count)],
        processing_class=tokenizer,
        peft_config=adapter,
        **{**BRIEF, "generation_batch_size": batch, **options},
    )
    run = size_of_run(trainer.model, trainer.args, length + 1, count, trainer.ref_model)
    result = estimate(replace(run, sampled=sampled))
    trainer.train()
    sys.stdout.write(json.dumps([result.exploring, result.learning, peak_bytes("cpu") - before]))
