"""Quark: explore, quantize, learn (Lu et al., NeurIPS 2022, arXiv 2205.13636).

Given a reference p_0, prompts x and any reward r(x, y), the policy p_θ starts as p_0 with K reward tokens r_k added.
One iteration is one epoch of `transformers.Trainer`: `begin_epoch` explores and quantizes, and the epoch's steps
learn:

    explore     y ~ p_θ( . | best, x), scored and added to the pool D      (iteration 0: y ~ p_0( . | x))
    quantize    D, all of it, cut by reward into K quantiles; each sample (x, y) gets its r_k again
    learn       (x, y) drawn uniformly from D;  minimise, per completion token,
                    -log p_θ(y | x, r_k)  +  β KL(p_θ || p_0)  -  α H(p_θ)
                and with `dpo_coef`, per sample, the DPO term of y and another completion of x (algorithm/pairs.py)

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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
from quarkrl.algorithm.pairs import dpo_loss, find_pairs
from quarkrl.algorithm.pool import DataPool
from quarkrl.algorithm.schedule import bucket_by_length
from quarkrl.algorithm.sliced_loss import log_likelihoods
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.models.batching import join_batches, split_by_length
from quarkrl.models.completion_logits import Projection
from quarkrl.models.eval_mode import eval_mode
from quarkrl.models.export import save_steered, try_saving
from quarkrl.models.head_access import HeadAccess, completion_projection, decide_head_access
from quarkrl.models.hub import END_OF_TRAINING, create_repository, push_directory
from quarkrl.models.model_card import write_model_card
from quarkrl.rewards.scorer import Scorer
from quarkrl.runs.durable_trainer import DurableTrainer
from quarkrl.runs.fsdp import shard_frozen_model
from quarkrl.sampling.engine import Complete
from quarkrl.sampling.strategy import Sampling
from quarkrl.storage.atomic import atomic_directory
from quarkrl.training import resumption
from quarkrl.training.checks import check_sharded
from quarkrl.training.collation import PAIR, Collator
from quarkrl.training.completion_log import CompletionLog
from quarkrl.training.config import QuarkConfig, at_iteration
from quarkrl.training.distillation import Stage, Teacher, draw_completions, find_teacher
from quarkrl.training.engine import make_engine
from quarkrl.training.exploration import CompletionScorer, Explorer, Processes, Sampler, Task
from quarkrl.training.facts import describe_origin, run_facts
from quarkrl.training.guided_targets import reference_logits, teacher_logits
from quarkrl.training.health import Health, HealthCallback
from quarkrl.training.held_out import held_out_metrics, held_out_task
from quarkrl.training.metrics_log import LogEachIteration, LossMeans, MetricsFile
from quarkrl.training.prefix_rate import scale_rate_of_rows
from quarkrl.training.progress import Progress
from quarkrl.training.prompt_supply import encode_prompts_of
from quarkrl.training.rollout import FinishedBatches, Rollout
from quarkrl.training.runtime_tuning import MallocTrimCallback, limit_onednn_caches, positions_of_parts
from quarkrl.training.scored_data import Rewards
from quarkrl.training.setup import load_models, prepare_start
from quarkrl.training.time_left import passes_of

PromptSource: TypeAlias = Prompts | Dataset | Sequence | str


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
        loaded = load_models(model, processing_class, ref_model, peft_config, args)
        start = prepare_start(args, loaded, reward_funcs, train_dataset, eval_dataset, scored_data)
        models = start.models
        self.ref_model, self.conditioning, self.identities = models.reference, models.conditioning, models.identities
        self.plain_tokenizer, self.chat_date, self.end_ids = start.tokenizer, start.chat_date, start.end_ids
        self.scorer, self.explores, self.supply, self.scored = start.scorer, start.explores, start.supply, start.scored
        self.prompts, self.eval_prompts, self._encode = start.supply.first, start.eval_prompts, start.encode
        self.plan, self.memory_plan = start.plan, start.memory_plan
        names = (source if isinstance(source, str) else None for source in (train_dataset, scored_data))
        self.prompts_source, self.scored_source = names  # For the model card.

        self.pool = DataPool(args.num_quantiles, self.scorer.attributes)
        self.pool_directory = Path(args.output_dir) / "pool"
        self.collate = Collator(self.conditioning)
        self.coefs = Coefficients(
            args.kl_coef, args.entropy_coef, args.kl_target, args.entropy_target, args.coef_horizon
        )
        self.loss_means = LossMeans(bool(args.dpo_coef))
        self.progress = Progress(enabled=not args.disable_tqdm and args.process_index == 0)
        self.metrics_file, self.part_positions = MetricsFile(args.output_dir), positions_of_parts(args)
        limit_onednn_caches()
        self.progress.start_notes += start.notes
        # Trainer shuffles by default. The draws are random already, and a resumed run must repeat their order.
        args.train_sampling_strategy = "sequential"
        # Callbacks run in this order, after the trainer's own hooks, which explore and quantize.
        loggers = [LogEachIteration(), self.metrics_file, self.progress, CompletionLog(self.progress)]

        super().__init__(
            identity=start.identity,
            steps_per_epoch=args.steps_per_iteration,
            model=models.policy,
            args=args,
            data_collator=self.collate,
            train_dataset=cast(Any, range(args.draws_per_iteration)),  # The numbers of the draws.
            eval_dataset=cast(Any, self.eval_prompts),
            processing_class=models.steered_tokenizer,
            callbacks=[MallocTrimCallback(), *loggers, *(callbacks or [])],
            optimizers=optimizers,
        )
        check_sharded(args, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        # The loss is a sum over tokens divided by the tokens of the whole step: accumulation does not change it.
        self.model_accepts_loss_kwargs = True
        self.health = Health(self.accelerator, self.loss_means, self.plain_tokenizer, self.log, args)
        self.add_callback(HealthCallback(self.health))
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False).eval().to("cpu" if self.is_fsdp_enabled else self.args.device)
        self.engine = make_engine(
            start,
            policy_model=lambda: self.accelerator.unwrap_model(self.model),
            reference_model=self.reference,
            autocast=self.accelerator.autocast,
            note=self.progress.note,
            stop_if_requested=self.stop_if_requested,
        )
        self.explorer = Explorer(
            CompletionScorer(
                self.scorer, self.plain_tokenizer, self.end_ids, lambda: self.state, args.keep_special_tokens
            ),
            self.progress,
            Processes(args.process_index, args.world_size, sharded=self.is_fsdp_enabled),
            args.max_unscored_share,
            stop_requested=self.interrupts.pending,
            stop_if_requested=self.stop_if_requested,
        )
        if self.is_world_process_zero():
            try_saving(models.policy, models.steered_tokenizer, self.conditioning, self.facts())

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
        metrics, seconds = resumption.recall_iteration(self.pool, self.pool_directory, iteration, args.world_size), {}
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
        task = self._plan_task(iteration, self.args.sampling(iteration), partial(self.exploring_sampler, iteration))
        prompts = task.prompts
        if prompts.skipped and iteration and self.supply.streamed and self.is_world_process_zero():
            self.progress.note(f"iteration {iteration + 1}: prompts skipped: {prompts.skipped_in_words}")
        self.engine.synchronize()
        with self.progress.sampling(f"iteration {iteration + 1}", len(task.rows), passes_of(self.args, iteration)):
            return prompts, self.explorer.roll_out(task, finished)

    def _plan_task(self, iteration: int, sampling: Sampling, sampler: Sampler) -> Task:
        """Return what an iteration samples, of the prompts that are due."""
        prompts, rows = self.supply.schedule(iteration)
        batch_size = self.memory_plan.generation_batch_size
        return Task(prompts, rows, sampling, sampler, seed=(self.args.seed, iteration), batch_size=batch_size)

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
        pairs = find_pairs(self.pool, draws) if args.dpo_coef else None
        self.collate.set_iteration(self.pool, draws, bool(args.kl_coef), contrast, pairs)

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
        targets, prefixes = labels[labels != -100], ("", *PAIR) if "better_labels" in inputs else ("",)
        # One forward pass, because each one casts the frozen weights under autocast, and keeps the result.
        policy = completion_projection(model, *join_batches(inputs, prefixes), policy_head)
        policy, of_pairs = policy.split(len(targets))
        ref = self.compared_with(inputs, ref_head)
        settings: dict[str, Any] = {"kl_direction": args.kl_direction, "nll_temperature": args.nll_temperature}
        settings |= self.coefs.current
        with self.accelerator.autocast():
            policy_logits = self.without_early_eos(policy, labels)
            ref_logits = ref and self.without_early_eos(ref, labels)
            if self.distils and ref_logits:
                loss = distillation_loss(policy_logits.logits(), ref_logits.logits(), targets)
            else:
                loss = quark_loss(policy_logits, ref_logits, targets, **settings)
        tokens, total = len(targets), loss.total
        sums = [loss.nll * tokens, loss.kl * tokens, loss.entropy * tokens]
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, so each counts its own tokens times their number.
            total = total * tokens / num_items_in_batch * args.world_size
        if args.dpo_coef:
            dpo = torch.zeros_like(loss.nll) if self.distils else self.dpo_losses(of_pairs, inputs, ref_head).sum()
            pairs = len(labels) if num_items_in_batch is None else args.draws_per_step / args.world_size
            total, sums = total + args.dpo_coef * dpo / pairs, [*sums, dpo.detach()]
        if self.model.training:
            self.loss_means.add(torch.stack(sums), tokens, len(labels))
        return (total, {}) if return_outputs else total

    def dpo_losses(self, policy: Projection, inputs: dict[str, Tensor], ref_head: HeadAccess) -> Tensor:
        """Return the DPO term of each pair of a batch, `(batch,)` (`algorithm.pairs`).

        Args:
            policy: the logits of the better completions, followed by those of the worse ones.
            inputs: a batch of `Collator` with pairs.
            ref_head: how the logits of p_0 are computed.
        """
        labels = join_batches(inputs, PAIR)[-1]
        with self.accelerator.autocast():
            with torch.no_grad(), self.reference() as p_0:
                ids, mask, ref_labels = join_batches(inputs, [f"ref_{name}" for name in PAIR])
                ref = completion_projection(p_0, ids, mask, ref_labels, ref_head)
                ref = self.without_early_eos(ref.limit_vocab(self.conditioning.vocab_size), ref_labels)
                expected = log_likelihoods(ref, ref_labels)
            better, worse = (log_likelihoods(self.without_early_eos(policy, labels), labels) - expected).chunk(2)
        return dpo_loss(better, worse, self.args.dpo_beta)

    def without_early_eos(self, projection: Projection, labels: Tensor) -> Projection:
        """Return logits that rule out EOS where sampling does."""
        return projection.suppress_early_eos(labels, self.args.min_completion_length, self.end_ids)

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
                    if self.args.compares_with_reference and (reference is not policy or policy_head.sliced):
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

    # Distil: after the last iteration of Quark, if `distill_guidance_scale` is set (distillation.py).

    @property
    def distils(self) -> bool:
        """Whether the current iteration distils guidance."""
        return self.teacher is not None

    def distil(self, iteration: int) -> None:
        """Sample with the teacher's guidance; the steps of the epoch then learn it on the best quantile."""
        args, policy = self.args, self.accelerator.unwrap_model(self.model)
        stage = Stage.at(iteration, args)
        if self.teacher is None or self.teacher.stage != stage:
            begins = self.state.global_step == stage.first_iteration * args.steps_per_iteration
            self.teacher = find_teacher(policy, stage, Path(args.output_dir), begins, self.is_world_process_zero())
        sampler = partial(self.engine.policy, stage.guidance_scale, args.distill_guidance_rule)
        task = self._plan_task(iteration, stage.sampling(args.sampling(iteration)), sampler)
        start = time.perf_counter()
        with self.progress.sampling(f"iteration {iteration + 1}", len(task.rows)), self.teacher.within(policy):
            self.engine.synchronize()
            completions = self.explorer.sample(task)
        seconds = time.perf_counter() - start
        self.learn_from_teacher(iteration, [task.prompts.ids[row] for row in task.rows], completions)
        self.log({"iteration": iteration, **stage.metrics(completions, self.end_ids), "seconds_sample": seconds})

    def learn_from_teacher(self, iteration: int, prompts: list[list[int]], completions: list[list[int]]) -> None:
        """Draw what an iteration of distillation learns from."""
        conditioning, source = self.conditioning, self.args.guidance_from
        contrast = None if source == "reference" else partial(conditioning.prefix_named, quantile=source)
        samples, draws = draw_completions(prompts, completions, conditioning.best, iteration, self.args)
        self.collate.set_iteration(samples, draws, source == "reference", contrast)

    # Evaluate and log.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample held-out prompts on the best quantile and score the completions.

        Returns:
            `eval_reward` and the other metrics of a rollout. They are logged, and `metric_for_best_model` can name one.
        """
        args, prompts = self.args, self.eval_prompts
        if eval_dataset is not None:
            prompts = encode_prompts_of("eval_dataset", eval_dataset, self._encode, args.skip_bad_prompts)
        if prompts is None:
            raise UserError("eval_dataset (--eval_prompts) is missing: evaluation needs held-out prompts.")
        task = held_out_task(prompts, partial(self.engine.policy, args.eval_guidance_scale, args.guidance_rule), args)
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
        return resumption.collect_state(self.loss_means, self.coefs, self.health, self.metrics_file.size)

    def restore_run_state(self, state: dict[str, Any], notes: list[str]) -> None:
        """Restore the pool, its quantiles and draws, the sums of the loss, β and α, and `metrics.jsonl`."""
        step = self.state.global_step
        self.loss_means.drop_step()  # An error may have ended this trainer's last run within a step.
        self.teacher = None
        if self.is_world_process_zero():
            self.metrics_file.truncate(state.get("metrics_bytes", 0), self.state.log_history)
        iteration_count, explored_count = resumption.count_iterations(step, self.explores, self.args)
        self.pool = resumption.load_pool(self.pool, self.pool_directory, explored_count)
        if iteration_count:
            self.quantize(iteration_count - 1)
        if self.is_world_process_zero():
            line = resumption.describe(self.args, step, self.pool, self.pool_directory, self.scorer.cache_size)
            self.progress.note("; ".join([line, *notes]))
        if state:
            self.coefs = resumption.restore_state(state, self.loss_means, self.coefs, self.health, self.changed_options)

    def merge_run_states(self, states: list[dict[str, Any]], is_first: bool) -> dict[str, Any]:
        """Return a process's state where another number of processes saved it: the first takes over their sums."""
        return resumption.merge_states(states, is_first)

    def save_run_files(self, output_dir: Path) -> None:
        """Write `quark.json` and the model card beside the weights."""
        self.conditioning.save(output_dir, **self.facts())
        write_model_card(output_dir)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Keep the card of Quark where `Trainer` would write its own."""
        if self.is_world_process_zero():
            write_model_card(self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository at the start (`Trainer.init_hf_repo`), so that a refusal comes before the run."""
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = create_repository(self.args.hub_name, private, token or self.args.hub_token)

    def push_to_hub(
        self,
        commit_message: str | None = END_OF_TRAINING,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **_: Any,
    ) -> str | None:
        """Save the final model and upload it: what `save_final` writes, without samples, metrics and checkpoints.

        Args:
            commit_message: of the commit.
            blocking: must be True.
            token, private: see `models.hub.push_directory`.
            revision: the branch.

        Returns:
            The address of the commit in the first process, else None.

        Raises:
            UserError: the hub cannot be reached, or refuses.
        """
        if not blocking:
            raise UserError("blocking: must be True, as the final model is uploaded as one commit. Leave it out.")
        final = self.save_final()
        if not self.is_world_process_zero():
            return None
        private = self.args.hub_private_repo if private is None else private
        revision, token = revision or self.args.hub_revision, token or self.args.hub_token
        return push_directory(final, self.args.hub_name, private, revision, commit_message or END_OF_TRAINING, token)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload no checkpoint: its tokenizer asks for no quantile."""

    def set_aside_run_files(self, step: int, aside: Path) -> None:
        """Set aside the samples, metrics and final model of the timeline that a run leaves when it branches off."""
        resumption.set_aside_later_files(Path(self.args.output_dir), step, self.args.steps_per_iteration, aside)

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
            with self.errors_say_how_to_resume(), atomic_directory(directory) as stage:
                save_steered(policy, self.processing_class, self.conditioning, stage, self.facts(), weights)
        return directory

    def facts(self) -> dict[str, Any]:
        """Return what belongs with the weights: quantile edges, options, rewards, and the reference."""
        ended_with_best = self.args.load_best_model_at_end and not self.is_in_train
        best = self.state.best_model_checkpoint if ended_with_best else None
        sources = self.prompts_source, self.scored_source
        origin = describe_origin(
            self.identities, self.scorer.identity, self.prompts, self.explores, self.scored, sources
        )
        return run_facts(self._recorded_options, self.state.global_step, self.pool, self.coefs, origin, best)
