"""The trainer as its users meet it: real runs of a tiny model, and what they leave behind."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.eight_letters import EOS_ID, PROMPTS, TOKENIZER, VOCAB
from helpers.runs import (
    LORA,
    assert_same_pool,
    assert_same_weights,
    distinct_rewards,
    figures_of,
    logs_of,
    model_of,
    share_of_a,
    share_of_a_to_d,
    small_trainer,
    still_model,
    watch,
    weights_of,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from quarkrl import QuarkConfig, QuarkTrainer
from quarkrl.algorithm.loss import quark_loss_plain
from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError
from quarkrl.models.completion_logits import completion_logits
from quarkrl.models.conditioning import reward_token
from quarkrl.sampling.generator import QuarkGenerator
from quarkrl.sampling.sampler import sample as complete_batch
from quarkrl.sampling.strategy import Sampling

# Explore


def test_the_reference_samples_first_and_then_the_policy_on_the_best_token(tmp_path):
    trainer = small_trainer(tmp_path, num_iterations=3)
    calls = watch(trainer)
    trainer.train()
    phases = [(who, what) for who, what, _, _ in calls if what == "sample" or who == "policy"]
    order = [phase for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase]
    learn = ("policy", "learn")
    assert order == [("reference", "sample"), learn, ("policy", "sample"), learn, ("policy", "sample"), learn]
    best = trainer.conditioning.prefixes[0][-1][0]
    for who, what, _, ids in calls:
        if what == "sample" and ids.shape[1] > 1:  # Reading the prompts; what follows comes token by token.
            rewards = [[i for i in row.tolist() if i >= VOCAB] for row in ids]
            assert rewards == [[best] if who == "policy" else []] * len(ids)


def test_what_is_learned_from_has_its_quantiles_token_and_the_reference_sees_none(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.explore(0)
    trainer.quantize(0)
    numbers = range(8)
    batch = trainer.collate(numbers)
    for row, plain, number in zip(batch["input_ids"], batch["ref_input_ids"], numbers, strict=True):
        sample = trainer.pool[int(trainer.draws[number])]
        ids = [*sample.prompt_ids.tolist(), *sample.completion_ids.tolist()]
        token = trainer.conditioning.prefixes[0][sample.quantiles[0]][0]
        assert row.tolist()[: len(ids) + 1] == [token, *ids]
        assert plain.tolist()[: len(ids)] == ids
    targets = batch["labels"][batch["labels"] != -100]
    assert targets.tolist() == batch["ref_labels"][batch["ref_labels"] != -100].tolist()


def test_the_pool_holds_what_was_sampled_token_for_token(tmp_path):
    """Official Quark decodes, strips EOS and tokenises again."""
    seen: list[tuple[list[int], str]] = []

    def reward(prompts, completions, completion_ids, **_):
        assert completions == ["".join(" " + "abcdefgh"[i] for i in ids if i < 8) for ids in completion_ids]
        seen.extend(zip(map(list, completion_ids), prompts, strict=True))
        return distinct_rewards(completion_ids)

    trainer = small_trainer(tmp_path, reward, samples_per_prompt=3)
    trainer.train()
    pool = trainer.pool
    assert len(seen) == len(pool) == 2 * 3 * len(PROMPTS)
    assert [(s.completion_ids.tolist(), TOKENIZER.decode(s.prompt_ids)) for s in pool] == seen
    assert pool.rewards[:, 0].tolist() == distinct_rewards([ids for ids, _ in seen])
    ended = [ids for ids, _ in seen if EOS_ID in ids]
    assert 0 < len(ended) < len(seen) and all(ids.index(EOS_ID) == len(ids) - 1 for ids in ended)
    assert all(i < VOCAB for ids, _ in seen for i in ids)


def test_the_pool_grows_by_each_iteration_and_is_cut_anew(tmp_path):
    sizes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            pool = trainer.pool
            sizes.append(len(pool))
            fresh = DataPool(4)
            fresh.add([[0]] * len(pool), [[0]] * len(pool), pool.rewards, iteration=0)
            fresh.quantize()
            assert pool.quantiles.tolist() == fresh.quantiles.tolist()

    trainer = small_trainer(
        tmp_path, distinct_rewards, prompts_per_iteration=4, num_iterations=3, num_quantiles=4, callbacks=[Watch()]
    )
    trainer.train()
    assert sizes == [4] * 3 + [8] * 3 + [12] * 3
    assert trainer.pool.iterations.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    on_disk = DataPool.load(tmp_path / "pool", 4, ("reward",))
    on_disk.quantize()
    assert_same_pool(on_disk, trainer.pool)
    assert figures_of(tmp_path, "pool_size") == [4, 8, 12]


def test_a_completion_does_not_depend_on_the_batches_around_it(tmp_path):
    runs = []
    for size in (3, 8):
        trainer = small_trainer(tmp_path / str(size), generation_batch_size=size)
        trainer.explore(0)
        trainer.quantize(0)
        runs.append(trainer.pool)
    assert_same_pool(*runs)


# Draws and seeds


def test_draws_are_a_function_of_seed_and_iteration_alone(tmp_path):
    trainer = small_trainer(tmp_path, distinct_rewards)
    trainer.explore(0)
    trainer.quantize(0)
    first = trainer.draws
    np.random.seed(7)
    torch.manual_seed(7)
    trainer.quantize(1)
    assert len(first) == trainer.args.draws_per_iteration == 24
    assert trainer.draws.tolist() != first.tolist()
    trainer.quantize(0)
    assert trainer.draws.tolist() == first.tolist()
    trainer.args.seed = 1
    trainer.quantize(0)
    assert trainer.draws.tolist() != first.tolist()


def test_balanced_draws_take_a_rare_quantile_as_often_as_the_others(tmp_path):
    def one_is_worse(completion_ids, **_):
        return [float(i > 0) for i in range(len(completion_ids))]

    options = {"num_quantiles": 2, "steps_per_iteration": 50}
    shares = []
    for draw in ("uniform", "balanced"):
        trainer = small_trainer(tmp_path / draw, one_is_worse, draw=draw, **options)
        trainer.explore(0)
        trainer.quantize(0)
        shares.append(float(np.mean(trainer.pool.rewards[trainer.draws] == 0)))
    assert shares == [pytest.approx(1 / 8, abs=0.05), pytest.approx(1 / 2, abs=0.08)]


def test_the_same_seed_gives_the_same_weights(tmp_path):
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        trainer = small_trainer(tmp_path / name, distinct_rewards, model=model_of(), seed=seed)  # With dropout.
        trainer.train()
        found.append(weights_of(trainer.model))
        torch.rand(5)
    assert_same_weights(found[0], found[1])
    assert not torch.equal(found[0]["lm_head.weight"], found[2]["lm_head.weight"])


def test_worker_processes_load_this_iterations_draws(tmp_path):
    found = []
    for count in (0, 1):
        trainer = small_trainer(tmp_path / str(count), dataloader_num_workers=count)
        trainer.train()
        found.append(weights_of(trainer.model))
    assert_same_weights(*found)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_spawned_load_this_iterations_draws(tmp_path, method):
    found = []
    for options in ({}, {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": method}):
        trainer = small_trainer(tmp_path / str(len(options)), **options)
        trainer.train()
        found.append(weights_of(trainer.model))
    assert_same_weights(*found)


# Learn

LONGER = {
    "prompts": PROMPTS * 8,
    "num_iterations": 5,
    "steps_per_iteration": 12,
    "per_device_train_batch_size": 32,
    "warmup_steps": 5,
    "entropy_coef": 0.0,
}


def test_it_learns_and_best_is_better_than_worst(tmp_path):
    trainer = small_trainer(tmp_path, share_of_a_to_d, learning_rate=1e-2, **LONGER)
    trainer.train()
    rewards = figures_of(tmp_path, "reward")
    assert len(rewards) == 5
    assert rewards[-1] > rewards[0] + 0.1
    generator = QuarkGenerator.from_pretrained(trainer.save_final())

    def mean_reward(quantile) -> float:
        texts = generator.generate(PROMPTS, quantile=quantile, num_return_sequences=20, seed=0, max_new_tokens=6)
        words = [text.split() for row in texts for text in row]
        return float(np.mean([sum(word in "abcd" for word in row) / max(len(row), 1) for row in words]))

    assert mean_reward("best") > mean_reward("worst") + 0.3


def test_it_learns_to_stop(tmp_path):
    """EOS is part of what is trained; official Quark and AlpacaFarm strip it."""

    def short(completion_ids, **_):
        return [-float(len(ids)) for ids in completion_ids]

    trainer = small_trainer(tmp_path, short, learning_rate=3e-2, **LONGER)
    trainer.train()
    ends, lengths = figures_of(tmp_path, "eos_share"), figures_of(tmp_path, "completion_length")
    assert ends[-1] > ends[0] + 0.3
    assert lengths[-1] < lengths[0] - 1


def test_eos_is_a_label(tmp_path):
    trainer = small_trainer(tmp_path, prompts=PROMPTS * 4)
    trainer.explore(0)
    trainer.quantize(0)
    batch = trainer.collate(range(24))
    with_eos = sum(EOS_ID in trainer.pool[int(i)].completion_ids for i in trainer.draws)
    assert with_eos > 0
    assert (batch["labels"] == EOS_ID).sum() == with_eos


def test_policy_and_reference_may_be_two_models(tmp_path):
    """Official Quark builds the policy from `ref_model` and the reference from `init_model`."""
    policy, reference = still_model(seed=1), still_model(seed=2)
    trainer = small_trainer(tmp_path, model=policy, ref_model=reference, prompts=PROMPTS * 2)
    assert trainer.ref_model is reference and not any(p.requires_grad for p in reference.parameters())
    trainer.explore(0)
    trainer.quantize(0)
    sampling = Sampling(6, 1, 1.0, 1.0)
    prompts = [sample.prompt_ids.tolist() for sample in trainer.pool]
    uniforms = sampling.uniforms(len(prompts), 0, 0)
    assert uniforms is not None
    alone = [
        complete_one(reference, ids, sampling, uniforms[i : i + 1]) for i, ids in enumerate(prompts)
    ]  # Iteration 0 is the reference's.
    assert [sample.completion_ids.tolist() for sample in trainer.pool] == alone

    batch = trainer.collate(range(8))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    trainer.loss_means.end_step()
    measured = trainer.loss_means.drain(trainer.accelerator)["kl"]
    kls = []
    for number in range(8):
        sample = trainer.pool[int(trainer.draws[number])]
        prompt, completion = sample.prompt_ids.tolist(), sample.completion_ids.tolist()
        conditioned = trainer.conditioning.prefix(prompt, sample.quantiles.tolist())
        with torch.no_grad():
            p = policy(torch.tensor([conditioned + completion])).logits[0, len(conditioned) - 1 : -1, :VOCAB]
            q = reference(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        p[0, EOS_ID] = q[0, EOS_ID] = -1e9  # No completion ends before its first token.
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kls += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    assert measured == pytest.approx(np.mean(kls), rel=1e-4)
    assert measured > 0.1


def complete_one(model, prompt_ids, sampling, uniforms) -> list[int]:
    """A completion by itself, from given random numbers."""
    from quarkrl.sampling.sampler import sample

    return sample(model, [prompt_ids], sampling, uniforms, end_ids=[EOS_ID], vocab_size=VOCAB)[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dropout_is_on_while_learning_and_nowhere_else(tmp_path, lora):
    """Official Quark never undoes `.eval()`; the reference must not drop out either, nor the adapter's base model."""
    trainer = small_trainer(tmp_path, model=model_of(), peft_config=LORA if lora else None)
    calls = watch(trainer)
    trainer.train()
    assert {training for _, what, training, _ in calls if what == "sample"} == {False}
    learning = [(who, training) for who, what, training, _ in calls if what == "learn"]
    reference = "policy" if lora else "reference"  # With an adapter, the reference is the policy without it.
    assert learning == [("policy", True), (reference, False)] * 6


def test_with_an_adapter_the_reference_is_the_model_as_it_was(tmp_path):
    untouched = still_model()
    trainer = small_trainer(tmp_path, peft_config=LORA, learning_rate=1e-2)
    assert trainer.ref_model is None
    trainer.train()
    ids = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad(), trainer.reference() as reference:
        torch.testing.assert_close(reference(ids).logits[..., :VOCAB], untouched(ids).logits)
    with torch.no_grad():
        changed = trainer.model.eval()(ids).logits[..., :VOCAB]
    assert not torch.allclose(changed, untouched(ids).logits, atol=1e-3)


def test_accumulation_from_smaller_batches_changes_nothing(tmp_path):
    """Completions differ in length, so that averaging per batch instead of per token would show."""
    found = []
    for size, batches in ((8, 1), (4, 2), (2, 4)):
        trainer = small_trainer(
            tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=batches, warmup_steps=1
        )
        trainer.train()
        lengths = {len(sample.completion_ids) for sample in trainer.pool}
        assert len(lengths) > 2
        found.append((weights_of(trainer.model), figures_of(tmp_path / str(size), "loss")))
    for weights, losses in found[1:]:
        assert_same_weights(weights, found[0][0], rtol=1e-4, atol=1e-5)
        assert losses == pytest.approx(found[0][1], abs=1e-4)


def test_the_logged_loss_is_the_sum_of_its_parts(tmp_path):
    small_trainer(tmp_path, kl_coef=0.3, entropy_coef=0.2).train()
    for entry in logs_of(tmp_path, "loss"):
        assert entry["loss"] == pytest.approx(entry["nll"] + 0.3 * entry["kl"] - 0.2 * entry["entropy"], abs=1e-4)
        assert entry["kl"] >= 0 and 0 < entry["entropy"] <= math.log(VOCAB)


def test_both_directions_of_the_kl_run(tmp_path):
    found = {}
    for direction in ("policy_ref", "ref_policy"):
        small_trainer(tmp_path / direction, ref_model=still_model(seed=5), kl_direction=direction).train()
        found[direction] = figures_of(tmp_path / direction, "kl")
    assert all(kl > 0 for kls in found.values() for kl in kls)
    assert found["policy_ref"][0] != pytest.approx(found["ref_policy"][0], rel=1e-3)


@pytest.mark.parametrize("given", [False, True], ids=["none", "given"])
def test_without_the_kl_term_no_reference_is_read(tmp_path, given):
    trainer = small_trainer(tmp_path, kl_coef=0.0, ref_model=still_model(seed=5) if given else None)
    assert (trainer.ref_model is None) is not given
    calls = watch(trainer)
    trainer.train()
    assert [who for who, what, _, _ in calls if what == "learn"] == ["policy"] * 6
    assert calls[0][0] == ("reference" if given else "policy")  # Who samples in iteration 0.
    assert figures_of(tmp_path, "kl") == []  # It was not computed.


def test_the_nll_may_be_taken_at_a_temperature(tmp_path):
    """Policies start alike, so that only the temperature moves the NLL, and nothing the rest."""
    figures = {}
    for temperature in (1.0, 0.5):
        trainer = small_trainer(tmp_path / str(temperature), nll_temperature=temperature)
        trainer.explore(0)
        trainer.quantize(0)
        batch = trainer.collate(range(8))
        loss = trainer.compute_loss(trainer.model.eval(), batch)
        policy, ref = (
            completion_logits(model, *(batch[prefix + name] for name in ("input_ids", "attention_mask", "labels")))
            for model, prefix in ((trainer.model, ""), (trainer.ref_model, "ref_"))
        )
        completion = batch["labels"] != -100
        labels, first = batch["labels"][completion], completion.cumsum(-1)[completion] == 1
        no_end = first.nonzero(), torch.tensor([EOS_ID])  # No completion ends before its first token.
        policy, ref = (logits.index_put(no_end, torch.tensor(-1e9)) for logits in (policy, ref))
        plain = quark_loss_plain(policy, ref[:, :VOCAB], labels, **trainer.coefs.current, nll_temperature=temperature)
        torch.testing.assert_close(loss, plain.total)
        figures[temperature] = plain
    assert figures[0.5].nll != figures[1.0].nll
    assert (figures[0.5].kl, figures[0.5].entropy) == (figures[1.0].kl, figures[1.0].entropy)


def test_the_reference_may_be_of_a_narrower_type(tmp_path):
    kl = {}
    for dtype in ("same", "bfloat16"):
        trainer = small_trainer(tmp_path / dtype, ref_dtype=dtype, num_iterations=1)
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        wanted = torch.float32 if dtype == "same" else torch.bfloat16
        assert {p.dtype for p in trainer.ref_model.parameters()} == {wanted}
        trainer.train()
        kl[dtype] = logs_of(tmp_path / dtype, "kl")[-1]["kl"]
    assert kl["bfloat16"] == pytest.approx(kl["same"], rel=0.1) and kl["bfloat16"] != kl["same"]


@pytest.mark.parametrize("options", [{"peft_config": LORA}, {"kl_coef": 0.0}])
def test_a_type_for_a_reference_that_is_not_there_is_an_error(tmp_path, options):
    with pytest.raises(UserError, match="ref_dtype bfloat16: must be same"):
        small_trainer(tmp_path, ref_dtype="bfloat16", **options)


def test_the_learning_rate_warms_up_and_decays(tmp_path):
    small_trainer(tmp_path, num_iterations=2, steps_per_iteration=5, warmup_steps=4, learning_rate=1.0e-3).train()
    expected = [0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert figures_of(tmp_path, "learning_rate") == pytest.approx([1e-3 * share for share in expected])


def test_bf16_runs_on_a_cpu(tmp_path):
    small_trainer(tmp_path, bf16=True).train()
    assert all(math.isfinite(value) for value in figures_of(tmp_path, "loss") + figures_of(tmp_path, "kl"))


class Work(TorchDispatchMode):
    """Counts, while it lasts, how often each of a model's weights is cast, and anything of a weight's shape is made.

    Attributes:
        casts: by weight.
        made: casts and copies of tables, by the shape of a matrix.
    """

    def __init__(self, model):
        super().__init__()
        self.casts = {parameter.data_ptr(): 0 for parameter in model.parameters()}
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.casts:
            self.casts[args[0].data_ptr()] += 1
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.index_copy.default):
            self.made[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter", [None, LORA])
@pytest.mark.parametrize("iteration", [0, 1])
def test_sampling_makes_each_weight_once_whether_it_is_learned_or_not(tmp_path, iteration, adapter):
    trainer = small_trainer(tmp_path, bf16=True, peft_config=adapter)
    sampled = trainer.ref_model if iteration == 0 and adapter is None else trainer.model
    before = {name: (weight.requires_grad, weight.clone()) for name, weight in sampled.named_parameters()}
    assert sampled is not trainer.ref_model or not any(learned for learned, _ in before.values())
    table, made = tuple(sampled.get_input_embeddings().weight.shape), []
    for tokens in (6, 12):
        with Work(sampled) as work, trainer.exploring_sampler(iteration) as complete:
            complete([[0, 1], [2]], Sampling(tokens, tokens, do_sample=False), None)
        assert max(work.casts.values()) == 1
        made.append(work.made[table])
    assert made[0] == made[1] > 0
    for name, weight in sampled.named_parameters():
        learned, value = before[name]
        assert weight.requires_grad == learned and torch.equal(weight, value), name


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapter"])
def test_learning_in_parts_gives_the_gradient_and_the_means_of_the_whole_batch(tmp_path, adapted):
    trainer = small_trainer(tmp_path, peft_config=replace(LORA, lora_dropout=0.0) if adapted else None)
    trainer.begin_epoch(0)
    trainer.create_optimizer()
    batch, results = trainer.collate(range(8)), []
    tokens = (batch["labels"] != -100).sum()
    for positions in (0, 3 * batch["input_ids"].shape[1]):
        trainer.part_positions = positions
        loss = trainer.training_step(trainer.model, dict(batch), tokens)
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        results.append((loss, gradients, trainer.loss_means.step))
        trainer.loss_means.drop_step()
        trainer.model.zero_grad()
    (whole_loss, whole, whole_means), (loss, parts, means) = results
    torch.testing.assert_close(loss, whole_loss)
    assert means == pytest.approx(whole_means, rel=1e-5) and whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)


def test_an_adapter_samples_what_it_does_without_its_rows_in_the_tables(tmp_path):
    trainer = small_trainer(tmp_path, peft_config=LORA)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "trainable_tokens" in name:
                weight.add_(torch.randn(weight.shape))
    policy, sampling = trainer.model, Sampling(12, 12, do_sample=False)
    with trainer.exploring_sampler(1) as complete:
        found = complete([[0, 1], [2]], sampling, None)
    prompts = [trainer.conditioning.prefix_named(ids, "best") for ids in ([0, 1], [2])]
    options = {"end_ids": trainer.end_ids, "vocab_size": trainer.conditioning.vocab_size}
    assert found == complete_batch(policy, prompts, sampling, None, **options)


@pytest.mark.parametrize(
    ("options", "name", "grows"),
    [
        ({"kl_target": 1e-6}, "kl_coef", True),
        ({"kl_target": 1e6}, "kl_coef", False),
        ({"entropy_target": 1e6}, "entropy_coef", True),
        ({"entropy_target": 1e-6}, "entropy_coef", False),
    ],
)
def test_the_weights_of_kl_and_entropy_move_towards_their_targets(tmp_path, options, name, grows):
    """AlpacaFarm parses --adaptive_kl and does nothing. Six steps of 8 samples, at most 20 % · 8 / horizon each."""
    small_trainer(tmp_path, coef_horizon=80, ref_model=still_model(seed=5), **options).train()
    start = {"kl_coef": 0.05, "entropy_coef": 0.06}
    factor = 1 + (0.2 if grows else -0.2) * 8 / 80
    expected = [start[name] * factor**step for step in range(1, 7)]
    logged = figures_of(tmp_path, name)
    assert logged == pytest.approx(expected)
    (other,) = start.keys() - {name}
    assert set(figures_of(tmp_path, other)) == {start[other]}


# Rewards


def test_missing_rewards_are_left_out_and_counted(tmp_path):
    """TRL turned such rows to 0, or failed the batch."""

    def reward(completion_ids, **_):
        return [[None, float("nan"), 0.5, 1.0][i % 4] for i, _ in enumerate(completion_ids)]

    trainer = small_trainer(tmp_path, reward, num_quantiles=2)
    trainer.train()
    assert figures_of(tmp_path, "unscored") == [4, 4]
    assert figures_of(tmp_path, "pool_size") == [4, 8]
    assert figures_of(tmp_path, "reward") == [0.75, 0.75]
    assert sorted(set(trainer.pool.rewards[:, 0])) == [0.5, 1.0]


@pytest.mark.parametrize(("share", "values"), [(0.4, [None, 1.0]), (1.0, [None, None])])
def test_too_many_missing_rewards_stop_the_run(tmp_path, share, values):
    def reward(completion_ids, **_):
        return [values[i % 2] for i, _ in enumerate(completion_ids)]

    with pytest.raises(UserError, match=rf"max_unscored_share {share}: \d of 8 rewards in iteration 1"):
        small_trainer(tmp_path, reward, max_unscored_share=share).train()


def test_rewards_may_be_async_see_other_columns_and_be_several_with_weights(tmp_path):
    async def wanted(completion_ids, wanted_id, **_):
        return [float(ids[0] == wanted) for ids, wanted in zip(completion_ids, wanted_id, strict=True)]

    def length(completion_ids, **_):
        return [len(ids) for ids in completion_ids]

    prompts = [{"prompt": prompt, "wanted_id": i} for i, prompt in enumerate(PROMPTS)]
    trainer = small_trainer(tmp_path, [wanted, length], prompts=prompts, reward_weights=[10.0, 0.5])
    trainer.train()
    assert trainer.pool.attributes == ("reward",)
    wanted_ids = {tuple(TOKENIZER(prompt)["input_ids"]): i for i, prompt in enumerate(PROMPTS)}
    for sample, (reward,) in zip(trainer.pool, trainer.pool.rewards, strict=True):
        ids = sample.completion_ids.tolist()
        assert reward == 10 * (ids[0] == wanted_ids[tuple(sample.prompt_ids.tolist())]) + 0.5 * len(ids)


def test_each_reward_may_condition_on_its_own(tmp_path):
    def few_a(completion_ids, **_):
        return [-value for value in share_of_a(completion_ids)]

    def long(completion_ids, **_):
        return [len(ids) for ids in completion_ids]

    trainer = small_trainer(tmp_path, [few_a, long], condition_on="each", num_quantiles=2, prompts=PROMPTS * 4)
    calls = watch(trainer)
    trainer.train()
    assert trainer.conditioning.prefixes == (((10,), (11,)), ((12,), (13,)))
    assert trainer.processing_class.convert_ids_to_tokens([10, 13]) == [
        reward_token("few_a", 0),
        reward_token("long", 1),
    ]
    assert trainer.pool.rewards.shape == trainer.pool.quantiles.shape == (64, 2)
    for who, what, _, ids in calls:
        if who == "policy" and ids.shape[1] > 1:
            for row in ids.tolist():
                rewards = [i for i in row if i >= VOCAB]
                assert rewards == [11, 13] if what == "sample" else rewards[0] in (10, 11) and rewards[1] in (12, 13)
    combined = {tuple(sample.quantiles.tolist()) for sample in trainer.pool}
    assert len(combined) > 2
    assert {"few_a", "long"} <= logs_of(tmp_path, "pool_size")[0].keys()
    final = AutoTokenizer.from_pretrained(trainer.save_final())
    assert final("a b")["input_ids"] == [11, 13, 0, 1]


def test_a_reward_ceiling_lets_the_best_quantile_keep_all_that_is_good_enough(tmp_path):
    trainer = small_trainer(tmp_path, distinct_rewards, reward_ceiling=-100.0)
    trainer.explore(0)
    trainer.quantize(0)
    assert set(trainer.pool.quantiles[:, 0]) == {2}


# Mistakes


def test_more_quantiles_than_samples_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"num_quantiles 3: must be at most 2,"):
        small_trainer(tmp_path, prompts=["a", "b"])
    small_trainer(tmp_path, prompts=["a", "b"], samples_per_prompt=2)


def test_no_prompts_is_an_error(tmp_path):
    for nothing in (None, []):
        with pytest.raises(UserError):
            small_trainer(tmp_path, prompts=nothing)


def test_evaluating_without_prompts_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"eval_dataset .* is missing"):
        small_trainer(tmp_path).evaluate()


def test_a_model_without_tokenizer_is_an_error(tmp_path):
    still_model().save_pretrained(tmp_path / "model")
    config = QuarkConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="has no tokenizer"):
        QuarkTrainer(str(tmp_path / "model"), share_of_a, config, PROMPTS)
    with pytest.raises(UserError, match="has no tokenizer"):
        QuarkTrainer(still_model(), share_of_a, config, PROMPTS)


def test_a_reference_of_another_vocabulary_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"ref_model .* at least 10"):
        small_trainer(tmp_path, ref_model=still_model(rows=VOCAB - 1))
    small_trainer(tmp_path, ref_model=still_model(rows=VOCAB + 6)).train()  # Rows that pad the embedding are no tokens.


def test_a_model_trained_before_is_an_error(tmp_path):
    trainer = small_trainer(tmp_path)
    final = trainer.save_final()
    with pytest.raises(UserError, match=r"<\|reward_0\|>"):
        small_trainer(
            tmp_path, model=AutoModelForCausalLM.from_pretrained(final), processing_class=trainer.processing_class
        )


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 scores for 8 completions"),
        (["good"] * 8, "returned 'good' .* must be a number or None"),
        (None, "must be a list of 8 numbers"),
    ],
)
def test_a_reward_that_returns_nonsense_is_an_error(tmp_path, returned, message):
    with pytest.raises(UserError, match=message):
        small_trainer(tmp_path, lambda **_: returned).train()
