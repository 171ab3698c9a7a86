"""Quark: explore, quantize, learn (Lu et al., NeurIPS 2022, arXiv 2205.13636).

Given a reference p_0, prompts x and any reward r(x, y), the policy p_θ starts as p_0 with K reward tokens r_k added.
One iteration is one epoch of `transformers.Trainer`: `begin_epoch` explores and quantizes, and the epoch's steps
learn:

    explore     y ~ p_θ( . | best, x), scored and added to the pool D      (iteration 0: y ~ p_0( . | x))
    quantize    D, all of it, cut by reward into K quantiles; each sample (x, y) gets its r_k again
    learn       (x, y) drawn uniformly from D;  minimise, per completion token,
                    -log p_θ(y | x, r_k)  +  β KL(p_θ || p_0)  -  α H(p_θ)

The policy sees r_k, the reference does not. `algorithm/loss.py` says over which vocabulary each term is taken.

Deviations (docs/algorithm.md lists all, with sources).

From the paper, as options:
- KL(p_θ || p_0) instead of KL(p_0 || p_θ), and the entropy bonus, as in the code that produced the published figures
- draws uniform over samples instead of quantiles, which is the same if rewards do not tie

From the official code:
- completions stay token ids from sampling to training, and EOS is trained
- reward tokens are never sampled, and exactly K are added
- equal rewards share a quantile, and dropout is on while learning
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from quarkrl.algorithm.coefficients import Coefficients
from quarkrl.algorithm.loss import distillation_loss, quark_loss
from quarkrl.algorithm.pool import DataPool
from quarkrl.algorithm.schedule import bucket_by_length
from quarkrl.data.chat_defaults import with_chat_defaults
from quarkrl.data.chats import with_fixed_date
from quarkrl.data.prompts import Prompts
from quarkrl.data.scored import distinct_prompts
from quarkrl.errors import UserError
from quarkrl.models.batching import split_by_length
from quarkrl.models.completion_logits import Projection
from quarkrl.models.conditioning import bos_of_chats, new_token_names
from quarkrl.models.eval_mode import eval_mode
from quarkrl.models.export import save_steered, try_saving
from quarkrl.models.head_access import HeadAccess, completion_projection, decide_head_access
from quarkrl.models.loading import eos_ids, longest_prompt
from quarkrl.models.model_card import write_model_card
from quarkrl.models.precision import coarse_weights_note, slow_bf16_note
from quarkrl.models.words import Words
from quarkrl.rewards.scorer import Scorer
from quarkrl.runs.durable_trainer import DurableTrainer
from quarkrl.runs.fsdp import shard_frozen_model
from quarkrl.sampling.engine import BuiltinEngine, Complete, SamplingEngine
from quarkrl.sampling.options import check_attributes
from quarkrl.storage.atomic import atomic_directory
from quarkrl.training.collation import Collator
from quarkrl.training.completion_log import CompletionLog
from quarkrl.training.config import QuarkConfig, at_iteration
from quarkrl.training.distillation import Stage, Teacher, draw_completions, find_teacher
from quarkrl.training.engine import make_engine
from quarkrl.training.exploration import CompletionScorer, Explorer, Processes, Task
from quarkrl.training.facts import run_facts
from quarkrl.training.guided_targets import reference_logits, teacher_logits
from quarkrl.training.health import Health, HealthCallback
from quarkrl.training.held_out import check_metric, held_out_metrics
from quarkrl.training.identity import chat_date_note, find_chat_date, run_identity
from quarkrl.training.memory import plan_memory
from quarkrl.training.metrics_log import LogEachIteration, LossMeans, MetricsFile
from quarkrl.training.prefix_rate import scale_rate_of_rows
from quarkrl.training.progress import Progress
from quarkrl.training.prompt_supply import PromptSupply, encode_prompts_of
from quarkrl.training.resumption import (
    count_begun_iterations,
    describe_resumption,
    load_pool,
    recall_iteration,
    set_aside_later_files,
)
from quarkrl.training.rollout import FinishedBatches, Rollout
from quarkrl.training.runtime_tuning import MallocTrimCallback, limit_onednn_caches, positions_of_parts
from quarkrl.training.scored_data import Rewards, encode_scored, load_scored, make_scorer
from quarkrl.training.served import check_served_ids
from quarkrl.training.setup import load_reference, load_start, prepare_models
from quarkrl.training.time_left import Plan, passes_of

PromptSource: TypeAlias = Prompts | Dataset | Sequence | str

# Evaluation samples with this seed in the place of an iteration's number, which is always smaller.
_EVALUATION_SEED = 2**31 - 1


class QuarkTrainer(DurableTrainer):
    """Trains a causal or encoder–decoder language model with Quark.

    Args:
        model: a model, or the name or directory of one, which is loaded in float32. It is changed in place:
            reward-token rows are added. A `PeftModel` is merged, and a new adapter like its own is trained.
        reward_funcs: one or several of: a callable with TRL's signature, sync or async; the name of a reward; a
            Hugging Face sequence classifier; `module:function`; `file.py:function`. Higher is better. None if all
            samples are in `scored_data`.
        args: the options; `QuarkConfig()` by default.
        train_dataset: prompts to explore: `Prompts`, a `datasets.Dataset`, a list of texts or dicts, or a path. Or a
            `datasets.IterableDataset`, of which each iteration takes the next `prompts_per_iteration` prompts. None
            explores nothing: the run learns from `scored_data` alone.
        eval_dataset: held-out prompts of the same types, except a stream. `evaluate` samples them on the best quantile.
        processing_class: the tokenizer; that of `model` by default.
        ref_model: the reference p_0, of the same types as `model`; a frozen copy of `model` by default.
        peft_config: a `peft` adapter to train instead of all weights. p_0 is then the model without it.
        callbacks, optimizers: as in `transformers.Trainer`.
        scored_data: samples with columns prompt, completion and reward, of the same types as `eval_dataset`. They take
            the place of the first exploration (docs/offline.md).

    Raises:
        UserError: the arguments do not work together.
    """

    args: QuarkConfig
    teacher: Teacher | None = None  # In iterations that distil guidance.
    _heads: tuple[HeadAccess, HeadAccess] | None = None

    def __init__(  # noqa: PLR0913 - Trainer's own arguments
        self,
        model: Any,
        reward_funcs: Rewards | Scorer | None,
        args: QuarkConfig | None = None,
        train_dataset: PromptSource | IterableDataset | None = None,
        eval_dataset: PromptSource | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: Any | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        scored_data: PromptSource | None = None,
    ):
        self.args = args = args or QuarkConfig()
        self._recorded_options = args.recorded_options()  # DurableTrainer clears save_total_limit while it saves.
        model, tokenizer, peft_config = load_start(model, processing_class, peft_config)
        tokenizer = with_chat_defaults(tokenizer, args.system_prompt, args.chat_template_kwargs)
        ref_model = load_reference(ref_model)
        self.chat_date = find_chat_date(tokenizer, Path(args.output_dir), args.world_size)
        self.plain_tokenizer = with_fixed_date(tokenizer, self.chat_date) if self.chat_date else tokenizer
        self.explores = train_dataset is not None or scored_data is None
        self.scorer = make_scorer(reward_funcs, args, calls_rewards=self.explores or eval_dataset is not None)
        _check_names(args, self.scorer)
        words = Words.choose(args.conditioning, args.words, self.scorer.attribute_rewards, args.num_quantiles)
        self._prefix_length = words.max_length(self.plain_tokenizer)
        self.max_prompt_length = longest_prompt(model, args.max_completion_length) - self._prefix_length
        self._encode = self._make_encoder(words)
        scored = None if scored_data is None else load_scored(scored_data, args, self.scorer.attributes, self._encode)
        self.supply = PromptSupply(
            distinct_prompts(scored) if scored and not self.explores else train_dataset, self._encode, args
        )
        self.prompts = self.supply.first
        # For the model card.
        self.prompts_source, self.scored_source = map(_name_of_source, (train_dataset, scored_data))
        self.eval_prompts = None if eval_dataset is None else self._load_held_out(eval_dataset)
        _check_quantiles(args, len(self.prompts), self.explores)
        models = prepare_models(model, tokenizer, ref_model, peft_config, args, self.scorer.attributes, words)
        self.ref_model, self.conditioning = models.reference, models.conditioning
        self.identities = {"start": models.start_identity, "reference": models.reference_identity}
        self.end_ids = eos_ids(model, self.plain_tokenizer, self.conditioning.vocab_size)
        self.scored = None if scored is None else encode_scored(scored, self.plain_tokenizer, self.end_ids, args)
        steered_tokenizer = check_served_ids(
            self.plain_tokenizer,
            models.steered_tokenizer,
            self.conditioning,
            model.config,
            self._prompts_to_read,
            self.chat_date,
        )

        self.pool = DataPool(args.num_quantiles, self.scorer.attributes)
        self.pool_directory = Path(args.output_dir) / "pool"
        self.collate = Collator(self.conditioning)
        self.coefs = Coefficients(
            args.kl_coef, args.entropy_coef, args.kl_target, args.entropy_target, args.coef_horizon
        )
        self.loss_means = LossMeans()
        self.progress = Progress(enabled=not args.disable_tqdm and args.process_index == 0)
        self.metrics_file, self.part_positions = MetricsFile(args.output_dir), positions_of_parts(args)
        limit_onednn_caches()
        lengths = self._conditioned_lengths(self._prompts_to_read), self._conditioned_lengths(self.eval_prompts)
        self.memory_plan = plan_memory(models.policy, args, *lengths, self.ref_model)
        notes = [
            self.scored.note if self.scored else None,
            self.plan.describe(),
            self.plan.describe_overdraw(),
            self.memory_plan.message,
            slow_bf16_note() if args.bf16 else None,
            chat_date_note(self.chat_date, self.prompts.as_encoded),
            coarse_weights_note(models.policy),
        ]
        self.progress.start_notes += filter(None, notes)
        # Trainer shuffles by default. The draws are random already, and a resumed run must repeat their order.
        args.train_sampling_strategy = "sequential"

        super().__init__(
            identity=run_identity(
                args,
                models.start_identity["sha256"],
                models.reference_identity["sha256"],
                self.prompts.ids,
                None if self.eval_prompts is None else self.eval_prompts.ids,
                self.scorer.identity,
                peft_config,
                self.chat_date,
                kind_of_prompts="stream" if self.supply.streamed else "" if self.explores else "unexplored",
                scored=self.scored,
            ),
            steps_per_epoch=args.steps_per_iteration,
            model=models.policy,
            args=args,
            data_collator=self.collate,
            train_dataset=cast(Any, range(args.draws_per_iteration)),  # The numbers of the draws.
            eval_dataset=cast(Any, self.eval_prompts),
            processing_class=steered_tokenizer,
            # Callbacks run in this order, after the trainer's own hooks, which explore and quantize.
            callbacks=[
                MallocTrimCallback(),
                LogEachIteration(),
                self.metrics_file,
                self.progress,
                CompletionLog(self.progress),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        check_sharded(args, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        # The loss is a sum over tokens divided by the tokens of the whole step: accumulation does not change it.
        self.model_accepts_loss_kwargs = True
        self.health = self._make_health()
        self.add_callback(HealthCallback(self.health))
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False).eval().to("cpu" if self.is_fsdp_enabled else self.args.device)
        self.engine, self.explorer = self._make_engine(lengths), self._make_explorer()
        if self.is_world_process_zero():
            try_saving(models.policy, steered_tokenizer, self.conditioning, self.facts())

    @property
    def plan(self) -> Plan:
        """What the run will do."""
        return Plan(self.args, len(self.prompts), len(self.scored or ()), self.explores)

    @property
    def _prompts_to_read(self) -> Prompts:
        """The prompts to explore, those of later groups of a stream excluded, and the prompts of scored samples."""
        return Prompts.join([self.prompts, *([self.scored.prompts] if self.scored else [])])

    def _make_encoder(self, words: Words) -> Callable[..., Prompts]:
        bos_id = bos_of_chats(self.plain_tokenizer)
        return partial(
            Prompts.encode,
            tokenizer=self.plain_tokenizer,
            max_length=self.max_prompt_length,
            skip_bad=self.args.skip_bad_prompts,
            reserved=new_token_names(self.plain_tokenizer, self.scorer.attributes, words),
            is_bad_start=lambda ids: ids[0] == bos_id,
            last_assistant_turn=self.args.last_assistant_turn,
            in_template=self.args.raw is False,
        )

    def _make_health(self) -> Health:
        args = self.args
        return Health(
            self.accelerator,
            self.loss_means,
            partial(self.plain_tokenizer.decode, skip_special_tokens=True),
            self.log,
            on_bad_numbers=args.on_bad_numbers,
            on_collapse=args.on_collapse,
            reward_ceiling=args.reward_ceiling,
            max_length=args.max_completion_length,
        )

    def _make_engine(self, prompt_lengths: Sequence[Sequence[int]]) -> SamplingEngine:
        args, identities = self.args, self.identities
        builtin = BuiltinEngine(
            policy_model=lambda: self.accelerator.unwrap_model(self.model),
            ref_model=self.ref_model,
            reference_model=self.reference,
            conditioning=self.conditioning,
            end_ids=self.end_ids,
            guidance_from=args.guidance_from,
            autocast=self.accelerator.autocast,
            merges_adapters=self.memory_plan.merges_adapters,
        )
        longest = max(self.max_prompt_length if self.supply.streamed else 0, *map(max, filter(None, prompt_lengths)))
        return make_engine(
            args,
            builtin,
            shares_start=identities["start"]["sha256"] == identities["reference"]["sha256"],
            prompts=self.prompts.ids,
            longest=longest + args.max_completion_length,
            batch_size=max(self.memory_plan.generation_batch_size, args.per_device_eval_batch_size),
            tokenizer=cast(Any, self.processing_class),
            note=self.progress.note,
            stop_if_requested=self.stop_if_requested,
        )

    def _make_explorer(self) -> Explorer:
        args = self.args
        return Explorer(
            CompletionScorer(
                self.scorer, self.plain_tokenizer, self.end_ids, lambda: self.state, args.keep_special_tokens
            ),
            progress=self.progress,
            processes=Processes(args.process_index, args.world_size, sharded=self.is_fsdp_enabled),
            max_unscored_share=args.max_unscored_share,
            stop_requested=self.interrupts.pending,
            stop_if_requested=self.stop_if_requested,
        )

    # The outer loop: an epoch of Trainer is an iteration of Quark. Trainer calls `begin_epoch`. Then, for each of the
    # epoch's `steps_per_iteration` optimizer steps, `collate`, `compute_loss` and `end_step`.

    def begin_epoch(self, iteration: int) -> None:
        """Explore and quantize. The steps of the epoch then learn."""
        if iteration >= self.args.num_iterations:
            self.distil(iteration)
            return
        explores = self.explores or not iteration  # In iteration 0, scored data counts as explored.
        if explores and not (self.pool.iterations == iteration).any():
            self.explore(iteration)
        self.quantize(iteration)
        if explores:
            self.health.check_exploration(self.pool, iteration)
        else:
            self.log({"iteration": iteration, "pool_size": len(self.pool)})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `DurableTrainer.train`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.close()

    # Explore.

    def explore(self, iteration: int) -> None:
        """Sample a completion for each of the iteration's prompts, score it, and add it to the pool.

        An interrupted exploration resumes with the first batch that is not on disk. In iteration 0, scored data takes
        the place of an exploration.

        Raises:
            UserError: more rewards are missing or not finite than `max_unscored_share` allows.
        """
        args, attributes = self.args, self.scorer.attributes
        finished = FinishedBatches(self.pool_directory / f"partial-{iteration:06d}")
        metrics, seconds = recall_iteration(self.pool, self.pool_directory, iteration, args.world_size), {}
        if metrics is None:
            if self.scored and not iteration:
                prompts, rollout = self.scored.prompts, Rollout.of_data(self.scored.completions, self.scored.rewards)
            else:
                prompts, rollout = self._roll_out(iteration, finished)
            scored = rollout.scored_indices(args.max_unscored_share, iteration)
            self.pool.add(
                [prompts.ids[rollout.rows[i]] for i in scored],
                [rollout.completions[i] for i in scored],
                rollout.rewards[scored],
                iteration=iteration,
                terms={name: values[scored] for name, values in rollout.terms.items()},
            )
            metrics = rollout.metrics(attributes, self.end_ids)
            if not (self.scored and self.explores and not iteration):  # Otherwise it is no estimate for the next ones.
                seconds = {"seconds_sample": rollout.seconds_sample, "seconds_score": rollout.seconds_score}
            if self.is_world_process_zero():
                texts = self.explorer.texts_of(prompts, rollout, scored)
                self.pool.save(self.pool_directory, {iteration: metrics}, {iteration: texts})
        if self.is_world_process_zero():
            finished.clear()
        self.log({"iteration": iteration, **metrics, "pool_size": len(self.pool), **seconds})

    def _roll_out(self, iteration: int, finished: FinishedBatches) -> tuple[Prompts, Rollout]:
        """Sample and score completions of an iteration's prompts."""
        args = self.args
        prompts, rows = self.supply.schedule(iteration)
        if prompts.skipped and iteration and self.supply.streamed and self.is_world_process_zero():
            self.progress.note(f"iteration {iteration + 1}: prompts skipped: {prompts.skipped_in_words}")
        task = Task(
            prompts=prompts,
            rows=rows,
            sampling=args.sampling(iteration),
            sampler=partial(self.exploring_sampler, iteration),
            seed=(args.seed, iteration),
            batch_size=self.memory_plan.generation_batch_size,
        )
        self.engine.synchronize()
        with self.progress.sampling(f"iteration {iteration + 1}", len(task.rows), passes_of(args, iteration)):
            return prompts, self.explorer.roll_out(task, finished)

    def exploring_sampler(self, iteration: int) -> AbstractContextManager[Complete]:
        """Return the context of what completes plain prompts: the policy asked for the best quantile.

        With reward tokens, iteration 0 samples p_0, because they have no meaning yet.
        """
        if not iteration and self.args.conditioning == "tokens":
            return self.engine.reference()
        return self.engine.policy(self.args.exploring_scale(iteration), self.args.guidance_rule)

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """Yield the frozen p_0: a model of its own, or the policy with its adapter switched off.

        A run without either (β = 0) needs p_0 in iteration 0 only, when the policy still is p_0.
        """
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            yield self.ref_model
        elif hasattr(policy, "disable_adapter"):
            with policy.disable_adapter(), eval_mode(policy):  # p_0 has no dropout, whatever the policy's mode.
                yield policy
        else:
            yield policy

    # Distil: after the last iteration of Quark, if `distill_guidance_scale` is set (distillation.py).

    def distil(self, iteration: int) -> None:
        """Sample with the teacher's guidance; the steps of the epoch then learn it on the best quantile."""
        args, policy = self.args, self.accelerator.unwrap_model(self.model)
        stage = Stage.at(iteration, args)
        if self.teacher is None or self.teacher.stage != stage:
            begins = self.state.global_step == stage.first_iteration * args.steps_per_iteration
            writes = self.is_world_process_zero()
            self.teacher = find_teacher(policy, stage, Path(args.output_dir), begins, writes)
        prompts, rows = self.supply.schedule(iteration)
        task = Task(
            prompts=prompts,
            rows=rows,
            sampling=stage.sampling(args.sampling(iteration)),
            sampler=partial(self.engine.policy, stage.guidance_scale, args.distill_guidance_rule),
            seed=(args.seed, iteration),
            batch_size=self.memory_plan.generation_batch_size,
        )
        start = time.perf_counter()
        with self.progress.sampling(f"iteration {iteration + 1}", len(rows)), self.teacher.within(policy):
            self.engine.synchronize()
            completions = self.explorer.sample(task)
        seconds = time.perf_counter() - start
        self.learn_from_teacher(iteration, [prompts.ids[row] for row in rows], completions)
        self.log(
            {
                "iteration": iteration,
                "distill_guidance_scale": stage.guidance_scale,
                "completion_length": float(np.mean([len(ids) for ids in completions])),
                "eos_share": float(np.mean([ids[-1] in self.end_ids for ids in completions])),
                "seconds_sample": seconds,
            }
        )

    @property
    def distils(self) -> bool:
        """Whether the current iteration distils guidance."""
        return self.teacher is not None

    def learn_from_teacher(self, iteration: int, prompts: list[list[int]], completions: list[list[int]]) -> None:
        """Draw what an iteration of distillation learns from."""
        args, rng = self.args, np.random.default_rng((self.args.seed, iteration, 1))
        best = self.conditioning.best
        samples, draws = draw_completions(prompts, completions, best, args.draws_per_iteration, rng)
        lengths = np.array([len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples])
        from_reference = args.guidance_from == "reference"
        contrast = None if from_reference else partial(self.conditioning.prefix_named, quantile=args.guidance_from)
        draws = bucket_by_length(draws, lengths[draws], args.draws_per_step, rng)
        self.collate.set_iteration(samples, draws, from_reference, contrast)

    # Quantize.

    def quantize(self, iteration: int) -> None:
        """Cut the whole pool into quantiles, and draw the samples that this iteration learns from."""
        args, contrast = self.args, None
        self.pool.quantize(args.reward_ceiling)
        self._iteration = iteration
        rng = np.random.default_rng((args.seed, iteration, 1))
        draws = self.pool.draw(args.draws_per_iteration, rng, balanced=args.draw == "balanced")
        draws = bucket_by_length(draws, self.pool.lengths_of(draws), args.draws_per_step, rng)
        if args.kl_coef and at_iteration(args.kl_guidance_scale, iteration) != 1:
            contrast = partial(self.conditioning.in_words.prefix_named, quantile="worst")
        self.collate.set_iteration(self.pool, draws, bool(args.kl_coef), contrast)

    # Learn.

    @property
    def draws(self) -> np.ndarray:
        """`(n,)`, indices into the pool: the samples that the current iteration learns from, in order."""
        return self.collate.draws

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradient of a batch. On a CPU, parts of similar length follow each other: less padding and memory."""
        step = super().training_step
        if not self.part_positions or num_items_in_batch is None:  # Only their common divisor makes parts exact.
            return step(model, inputs, num_items_in_batch)
        parts = split_by_length(inputs, self.part_positions)
        return torch.stack([step(model, part, num_items_in_batch) for part in parts]).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return Quark's loss over the batch's completion tokens, scaled to the tokens of the whole optimizer step."""
        args, labels = self.args, inputs["labels"]
        policy_head, ref_head = self.decide_heads()
        policy = completion_projection(model, inputs["input_ids"], inputs["attention_mask"], labels, policy_head)
        ref = self.compared_with(inputs, ref_head)
        settings: dict[str, Any] = {
            **self.coefs.current,
            "kl_direction": args.kl_direction,
            "nll_temperature": args.nll_temperature,
        }
        ends = labels, args.min_completion_length, self.end_ids
        with self.accelerator.autocast():
            policy_logits, ref_logits = policy.suppress_early_eos(*ends), ref and ref.suppress_early_eos(*ends)
            if self.distils and ref_logits:
                loss = distillation_loss(policy_logits.logits(), ref_logits.logits(), labels[labels != -100])
            else:
                loss = quark_loss(policy_logits, ref_logits, labels[labels != -100], **settings)
        tokens = policy.shape[0]
        if self.model.training:
            self.loss_means.add(torch.stack((loss.nll, loss.kl, loss.entropy)) * tokens, tokens, len(labels))
        total = loss.total
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, so each counts its own tokens times their number.
            total = total * tokens / num_items_in_batch * args.world_size
        return (total, {}) if return_outputs else total

    def compared_with(self, inputs: dict[str, Tensor], ref_head: HeadAccess) -> Projection | None:
        """Return what the policy is compared with, p_0 or the teacher, at each token; None without a KL term."""
        args, vocab_size, contrast = self.args, self.conditioning.vocab_size, self.collate.contrast
        if self.teacher is not None:
            policy, reference = self.accelerator.unwrap_model(self.model), None if contrast else self.reference
            with self.accelerator.autocast():
                rule = args.distill_guidance_rule
                return Projection(teacher_logits(policy, self.teacher, reference, inputs, rule, vocab_size))
        if not args.kl_coef:
            return None
        ref_inputs = inputs["ref_input_ids"], inputs["ref_attention_mask"], inputs["ref_labels"]
        with torch.no_grad(), self.reference() as p_0, self.accelerator.autocast():
            plain = completion_projection(p_0, *ref_inputs, ref_head).limit_vocab(vocab_size)
            if contrast is None:
                return plain
            scale = at_iteration(args.kl_guidance_scale, self._iteration)
            guided = reference_logits(p_0, plain.logits(), inputs, scale, args.guidance_rule, vocab_size)
            return Projection(guided)

    def decide_heads(self) -> tuple[HeadAccess, HeadAccess]:
        """Decide, once, whether the logits of policy and reference are computed in slices; log where they are not."""
        if self._heads is None:
            policy, prompt = self.accelerator.unwrap_model(self.model), self.prompts.ids[0]
            with self.accelerator.autocast():
                policy_head = ref_head = decide_head_access(policy, prompt)
                with self.reference() as reference:
                    if self.args.kl_coef and (reference is not policy or policy_head.sliced):
                        ref_head = decide_head_access(reference, prompt)
            self._heads = policy_head, ref_head
        return self._heads

    def end_step(self) -> None:
        """Adapt β and α, and add the step to the means of the loss."""
        self.adapt()
        self.loss_means.end_step()

    def adapt(self) -> None:
        """Move β and α towards their targets, if they have any, by what the last step measured."""
        if not self.distils and self.coefs.adaptive and self.loss_means.step["tokens"]:
            kl, entropy = self.loss_means.last_per_completion(self.accelerator)
            self.coefs.adapt(kl, entropy, samples=self.args.draws_per_step)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer; rows of new tokens get a learning rate of their own if `prefix_lr_scale` is set."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        ids, scale = self.conditioning.new_token_ids, self.args.prefix_lr_scale
        if is_new and ids and scale != 1:
            scale_rate_of_rows(optimizer, self.accelerator.unwrap_model(self.model), ids, scale)
        return optimizer

    # Evaluate and log.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample held-out prompts on the best quantile and score the completions.

        Returns:
            `eval_reward` and the other metrics of a rollout. They are logged, and `metric_for_best_model` can name one.
        """
        prompts = self.eval_prompts if eval_dataset is None else self._load_held_out(eval_dataset)
        if prompts is None:
            raise UserError("eval_dataset (--eval_prompts) is missing: evaluation needs held-out prompts.")
        args = self.args
        task = Task(
            prompts=prompts,
            rows=[row for row in range(len(prompts)) for _ in range(args.eval_samples_per_prompt)],
            sampling=args.eval_sampling(),
            sampler=partial(self.engine.policy, args.eval_guidance_scale, args.guidance_rule),
            seed=(args.seed, _EVALUATION_SEED),
            batch_size=args.per_device_eval_batch_size,
        )
        self.engine.synchronize()
        with self.progress.sampling("held out", len(task.rows)):
            rollout = self.explorer.roll_out(task)
        attributes = self.scorer.attributes
        metrics = held_out_metrics(rollout.metrics(attributes, self.end_ids), attributes, metric_key_prefix)
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer.log` does. With the loss go the means of its parts since the last time, and β and α."""
        if "loss" in logs:
            means = self.loss_means.drain(self.accelerator)
            if not (self.args.kl_coef or self.distils):
                del means["kl"]  # It was not computed.
            logs = {**logs, **means, **({} if self.distils else self.coefs.current)}
        super().log(logs, start_time)

    # Save and resume.

    def run_state(self) -> dict[str, Any]:
        """Return what a resumed run needs of this process (`DurableTrainer.run_state`)."""
        if self.is_world_process_zero():
            self.metrics_file.sync()
        return {
            "learned": self.loss_means.state,
            "coefs": (self.coefs.kl_coef, self.coefs.entropy_coef),
            "health": self.health.state,
            "metrics_bytes": self.metrics_file.size,
        }

    def restore_run_state(self, state: dict[str, Any], notes: list[str]) -> None:
        """Restore the pool, its quantiles and draws, the sums of the loss, β and α, and `metrics.jsonl`."""
        step, steps_per_iteration = self.state.global_step, self.args.steps_per_iteration
        self.loss_means.drop_step()  # An error may have ended this trainer's last run within a step.
        self.teacher = None
        if self.is_world_process_zero():
            self.metrics_file.truncate(state.get("metrics_bytes", 0), self.state.log_history)
        # Distillation explores nothing, and neither does a run on scored data alone after its first iteration.
        iteration_count = min(count_begun_iterations(step, steps_per_iteration), self.args.num_iterations)
        explored_count = iteration_count if self.explores else min(iteration_count, 1)
        self.pool = load_pool(self.pool, self.pool_directory, explored_count)
        if iteration_count:
            self.quantize(iteration_count - 1)
        if self.is_world_process_zero():
            line = describe_resumption(self.args, step, self.pool, self.pool_directory, self.scorer.cache_size)
            self.progress.note("; ".join([line, *notes]))
        if state:
            self.loss_means.state = state["learned"]
            self._restore_coefficients(*state["coefs"])
            self.health.state = state["health"]

    def _restore_coefficients(self, kl_coef: float, entropy_coef: float) -> None:
        """Restore β and α where they have adapted, except those whose option has changed since."""
        saved: dict[str, Any] = {}
        if self.coefs.kl_target is not None and "kl_coef" not in self.changed_options:
            saved["kl_coef"] = kl_coef
        if self.coefs.entropy_target is not None and "entropy_coef" not in self.changed_options:
            saved["entropy_coef"] = entropy_coef
        self.coefs = replace(self.coefs, **saved)

    def merge_run_states(self, states: list[dict[str, Any]], is_first: bool) -> dict[str, Any]:
        """Return a process's state where another number of processes saved it: the first takes over their sums."""
        learned = [sum(values) for values in zip(*(state["learned"] for state in states), strict=True)]
        entropy = sum(state["health"]["entropy"] for state in states)
        if not is_first:
            learned, entropy = [0.0] * len(learned), torch.zeros_like(entropy)
        return {**states[0], "learned": learned, "health": {**states[0]["health"], "entropy": entropy}}

    def save_run_files(self, output_dir: Path) -> None:
        """Write `quark.json` and the model card beside the weights."""
        self.conditioning.save(output_dir, **self.facts())
        write_model_card(output_dir)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Keep the card of Quark where `push_to_hub` would write that of `Trainer`."""
        if self.is_world_process_zero():
            write_model_card(self.args.output_dir)

    def set_aside_run_files(self, step: int, aside: Path) -> None:
        """Set aside the samples, metrics and final model of the timeline that a run leaves when it branches off."""
        set_aside_later_files(Path(self.args.output_dir), step, self.args.steps_per_iteration, aside)

    def on_models_ready(self) -> None:
        """Shard the reference as the policy is sharded, and decide how the loss gets the logits of both."""
        if self.is_fsdp_enabled and self.ref_model is not None:
            self.ref_model = shard_frozen_model(self.accelerator, self.ref_model)
        self.decide_heads()

    def save_final(self, directory: str | os.PathLike | None = None) -> Path:
        """Write a checkpoint that plain transformers loads and that is steered by default (`models/export.py`).

        Args:
            directory: where to; `output_dir/final` by default.

        Returns:
            The directory.
        """
        directory = Path(directory or Path(self.args.output_dir) / "final")
        weights = self.whole_weights()
        if self.is_world_process_zero():
            policy = self.accelerator.unwrap_model(self.model)
            with atomic_directory(directory) as stage:
                save_steered(policy, self.processing_class, self.conditioning, stage, self.facts(), weights)
        return directory

    def facts(self) -> dict[str, Any]:
        """Return what belongs with the weights: quantile edges, options, rewards, and the reference."""
        ended_with_best = self.args.load_best_model_at_end and not self.is_in_train
        best = self.state.best_model_checkpoint if ended_with_best else None
        return run_facts(
            self._recorded_options,
            step=self.state.global_step,
            pool=self.pool,
            coefs=self.coefs,
            rewards=self.scorer.identity,
            identities=self.identities,
            best_checkpoint=best,
            prompts={
                "source": self.prompts_source,
                "count": len(self.prompts),
                "reads": "chats" if self.prompts.are_chats else "texts",
                **({} if self.explores else {"explored": False}),
            },
            scored_data={"source": self.scored_source, "samples": len(self.scored)} if self.scored else None,
        )

    def _load_held_out(self, source: PromptSource) -> Prompts:
        return encode_prompts_of("eval_dataset", source, self._encode, self.args.skip_bad_prompts)

    def _conditioned_lengths(self, prompts: Prompts | None) -> list[int]:
        """Return the length in tokens of each prompt with the longest prefix."""
        return [] if prompts is None else [len(ids) + self._prefix_length for ids in prompts.ids]


def _check_names(args: QuarkConfig, scorer: Scorer) -> None:
    """Check the options that name rewards."""
    check_metric(args.metric_for_best_model, scorer.attributes, scorer.names)
    check_attributes(args.explore_guidance_of or 1, scorer.attributes, "explore_guidance_of")


def _name_of_source(source: Any) -> str | None:
    return source if isinstance(source, str) else None


def _check_quantiles(args: QuarkConfig, num_prompts: int, explores: bool) -> None:
    """Check that an iteration has a sample for each quantile."""
    if explores and (samples := args.explored_per_iteration(num_prompts)) < args.num_quantiles:
        raise UserError(
            f"num_quantiles {args.num_quantiles}: must be at most {samples}, the samples of an iteration. "
            "Explore more prompts, or lower --num_quantiles."
        )


def check_sharded(args: QuarkConfig, is_sharded: bool) -> None:
    """Check the options that need whole weights on each process."""
    if not is_sharded:
        return
    for name in ("distill_guidance_scale", "kl_guidance_scale", "prefix_lr_scale"):
        value = getattr(args, name)
        if {*(value if isinstance(value, list) else [value])} != {1}:
            raise UserError(f"{name} {value}: must be 1 in a run with sharded weights. Leave it out.")
