"""Quark: explore, quantize, learn (Lu et al., NeurIPS 2022, arXiv 2205.13636).

Given a reference p_0, prompts x and any reward r(x, y), the policy p_θ starts as p_0 with K reward tokens r_k added.
An iteration is an epoch of `transformers.Trainer`; `on_epoch_begin` explores and quantizes, the epoch's batches learn:

    explore     y ~ p_θ( . | best, x), scored and added to the pool D      (iteration 0: y ~ p_0( . | x))
    quantize    D, whole, cut by reward into K quantiles; each sample (x, y) gets its r_k anew
    learn       (x, y) drawn uniformly from D;  minimise, per completion token,
                    -log p_θ(y | x, r_k)  +  β KL(p_θ || p_0)  -  α H(p_θ)

The policy sees r_k, the reference does not. `loss.py` says over which vocabulary each term is taken.

Deviations (docs/algorithm.md lists them all, with sources). From the paper, each an option: KL(p_θ || p_0), not
KL(p_0 || p_θ), and the entropy bonus, as in the code that made the published figures; draws uniform over samples, not
over quantiles, the same where rewards do not tie. From the official code: completions stay token ids from sampling to
training, EOS is trained, reward tokens are never sampled, exactly K are added, equal rewards share a quantile, dropout
is on while learning.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from quarkrl.algorithm.coefficients import Coefficients
from quarkrl.algorithm.loss import quark_loss
from quarkrl.algorithm.pool import DataPool
from quarkrl.algorithm.schedule import bucket_by_length, schedule_prompts
from quarkrl.data.encoding import decode_completions
from quarkrl.data.prompts import Prompts, load_prompts
from quarkrl.errors import UserError
from quarkrl.models.batching import build_batch
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.export import model_identity, save_steered
from quarkrl.models.head_access import HeadAccess, completion_projection, decide_head_access
from quarkrl.models.loading import context_length, eos_ids, load_model, load_tokenizer
from quarkrl.rewards.scorer import Scorer, Scores
from quarkrl.runs.directory import identity
from quarkrl.runs.durable_trainer import ResumableTrainer, Resumption
from quarkrl.sampling.autocast_cache import prepare_weights_once
from quarkrl.sampling.guidance import GuidanceOptions
from quarkrl.sampling.sampler import eval_mode, sample, sample_best
from quarkrl.sampling.strategy import Sampling
from quarkrl.storage.atomic import atomic_directory
from quarkrl.training.config import QuarkConfig
from quarkrl.training.exploration import FinishedBatches, Rollout, score
from quarkrl.training.facts import run_facts
from quarkrl.training.health import Health, HealthCallback
from quarkrl.training.held_out import held_out_metrics
from quarkrl.training.memory import plan_memory
from quarkrl.training.metrics_log import LossMeans, MetricsFile
from quarkrl.training.progress import Progress
from quarkrl.training.runtime_tuning import MallocTrimCallback, limit_onednn_caches

logger = logging.getLogger(__name__)

Rewards: TypeAlias = Callable | str | Sequence[Callable | str]
PromptSource: TypeAlias = Prompts | Dataset | Sequence | str

# Sampling for evaluation is seeded as an iteration that never comes.
_EVALUATION = 2**31 - 1


class QuarkTrainer(ResumableTrainer):
    """Trains a causal language model with Quark.

    Args:
        model: a model, or the name or directory of one. It is changed in place: rows for the reward tokens are added.
        reward_funcs: one or several of: a callable with TRL's signature, sync or async; a name from `rewards`; a
            Hugging Face sequence classifier; `module:function`; `file.py:function`. Higher is better.
        args: the options; `QuarkConfig()` if left out.
        train_dataset: prompts to explore: a `Prompts`, a `datasets.Dataset`, a list of texts or dicts, or a path.
        eval_dataset: held-out prompts, the same; `evaluate` samples them on the best token.
        processing_class: the tokenizer; that of `model` if left out.
        ref_model: the reference p_0; a frozen copy of `model` if left out.
        peft_config: an adapter of `peft` to train in place of all weights; p_0 is then the model without it.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        UserError: arguments that cannot work together; the message says what was given and what is wanted.
    """

    args: QuarkConfig

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike,
        reward_funcs: Rewards | Scorer,
        args: QuarkConfig | None = None,
        train_dataset: PromptSource | None = None,
        eval_dataset: PromptSource | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ):
        self.args = args = args or QuarkConfig()
        model = model if isinstance(model, PreTrainedModel) else load_model(model)
        self.plain_tokenizer = tokenizer = processing_class or load_tokenizer(model.config._name_or_path)
        if not isinstance(reward_funcs, Scorer):
            reward_funcs = Scorer(
                reward_funcs, args.reward_weights, args.condition_on, args.score_cache, args.reward_timeout
            )
        self.scorer = reward_funcs
        self.end_ids = eos_ids(model, tokenizer)
        self.reference_identity = model_identity(ref_model or model)
        begins_as = self.reference_identity if ref_model is None else model_identity(model)
        self.max_prompt_length = context_length(model) - args.max_completion_length - len(self.scorer.attributes)
        self.prompts = self._encoded(train_dataset)
        self.eval_prompts = None if eval_dataset is None else self._encoded(eval_dataset)
        shas = begins_as["sha256"], self.reference_identity["sha256"]
        self.identity = identity(args, *shas, self.prompts.ids, self.scorer, peft_config)
        explored = min(args.prompts_per_iteration or len(self.prompts), len(self.prompts)) * args.samples_per_prompt
        if explored < args.num_quantiles:
            raise UserError(f"num_quantiles {args.num_quantiles}: an iteration has {explored} samples; explore more")

        # The reference is p_0 as given; the policy is p_0 with reward tokens.
        self.ref_model = ref_model
        if ref_model is None and peft_config is None and (args.kl_coef or args.guidance_from == "reference"):
            self.ref_model = copy.deepcopy(model)
        if args.ref_dtype != "same":
            if self.ref_model is None:
                raise UserError(f"ref_dtype {args.ref_dtype}: no reference of its own (adapter, or kl_coef 0); drop it")
            self.ref_model.to(getattr(torch, args.ref_dtype))
        self.conditioning, extended = Conditioning.add_to(
            tokenizer, model, args.num_quantiles, self.scorer.attributes, seed=args.seed
        )
        if ref_model is not None and ref_model.get_input_embeddings().weight.shape[0] < self.conditioning.vocab_size:
            raise UserError("ref_model has fewer tokens than model: want one of the same tokenizer")
        if peft_config is not None:
            torch.manual_seed(args.seed)  # The adapter's first weights are random.
            model = self.conditioning.add_adapter(model, peft_config)
        self.pool_directory = Path(args.output_dir) / "pool"
        self.pool = DataPool(args.num_quantiles, self.scorer.attributes)
        self.drawn: np.ndarray = np.zeros(0, dtype=np.int64)
        self.coefs = Coefficients(
            args.kl_coef, args.entropy_coef, args.kl_target, args.entropy_target, args.coef_horizon
        )
        self._heads: tuple[HeadAccess, HeadAccess] | None = None
        self._learned = LossMeans()
        self.progress = Progress(enabled=not args.disable_tqdm and args.process_index == 0)
        self.metrics_file = MetricsFile(args.output_dir)
        limit_onednn_caches()
        lengths, eval_lengths = (
            [len(ids) + len(self.scorer.attributes) for ids in (prompts.ids if prompts is not None else ())]
            for prompts in (self.prompts, self.eval_prompts)
        )
        self.memory_plan = plan_memory(model, args, lengths, eval_lengths, self.ref_model)
        keepers = _Iterations(self), Resumption(self), MallocTrimCallback(), self.metrics_file, self.progress

        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=cast(Any, range(args.draws_per_iteration)),  # The draws, by number.
            eval_dataset=cast(Any, self.eval_prompts),
            processing_class=self.conditioning.steer_tokenizer(extended),
            callbacks=[*keepers, *(callbacks or [])],
            optimizers=optimizers,
        )
        # The loss is a sum over tokens divided by those of the whole step, so that accumulation does not change it.
        self.model_accepts_loss_kwargs = True
        self.health = Health(
            self.accelerator,
            self._learned,
            partial(tokenizer.decode, skip_special_tokens=True),
            self.log,
            on_bad_numbers=args.on_bad_numbers,
            on_collapse=args.on_collapse,
            reward_ceiling=args.reward_ceiling,
        )
        self.add_callback(HealthCallback(self.health))
        for replaced in (ProgressCallback, PrinterCallback):
            self.remove_callback(replaced)
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False).eval().to("cpu" if self.is_fsdp_enabled else self.args.device)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `ResumableTrainer.train` says what it adds."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.close()

    # Explore.

    def explore(self, iteration: int) -> None:
        """Sample a completion for each of the iteration's prompts, score it, add it to the pool.

        What was interrupted goes on at its first batch that is not on disk.

        Raises:
            UserError: more rewards than `max_unscored_share` allows are missing or not finite.
        """
        args, each = self.args, self.args.samples_per_prompt
        finished = FinishedBatches(self.pool_directory / f"partial-{iteration:06d}")
        figures, seconds = self.recalled(self.pool_directory, iteration), {}
        if figures is None:
            rows = schedule_prompts(self.prompts.ids, iteration, args.prompts_per_iteration, each, args.seed)
            with self.progress.sampling(f"iteration {iteration}", len(rows)):
                sampling = args.sampling(iteration)
                found = self.rollout(
                    self.prompts, rows, sampling, iteration, self.memory_plan.generation_batch_size, finished
                )
            scored = found.scored_enough(args.max_unscored_share, iteration)
            self.pool.add(
                [self.prompts.ids[found.rows[i]] for i in scored],
                [found.completions[i] for i in scored],
                found.rewards[scored],
                iteration=iteration,
                terms={name: values[scored] for name, values in found.terms.items()},
            )
            figures = found.figures(self.scorer.attributes, self.end_ids)
            seconds = {"seconds_sample": found.seconds_sample, "seconds_score": found.seconds_score}
            if self.is_world_process_zero():
                self.pool.save(self.pool_directory, {iteration: figures})
        if self.is_world_process_zero():
            finished.clear()
        self.log({"iteration": iteration, **figures, "pool_size": len(self.pool), **seconds})

    def rollout(
        self,
        prompts: Prompts,
        rows: list[int],
        sampling: Sampling,
        iteration: int,
        batch_size: int,
        finished: FinishedBatches | None = None,
    ) -> Rollout:
        """Sample and score a completion for each of the given prompts; each process takes its share of the batches.

        Every completion has random numbers of its own, so that it does not depend on the batches around it.
        """
        args = self.args
        uniforms = sampling.uniforms(len(rows), args.seed, iteration)

        def sampled(batch: slice) -> list[list[int]]:
            with self.sampler(iteration) as complete:
                numbers = None if uniforms is None else uniforms[batch]
                completions = complete([prompts.ids[row] for row in rows[batch]], sampling, numbers)
            self.progress.sampled(len(completions))
            return completions

        def asked(these: list[int], completions: list[list[int]]) -> Scores:
            texts = decode_completions(self.plain_tokenizer, completions)
            scores = score(self.scorer, prompts, these, texts, completions, self.end_ids)
            self.progress.scored(scores.rewards)
            return scores

        return self.in_batches(sampled, asked, rows, batch_size, finished)

    @contextmanager
    def sampler(self, iteration: int) -> Iterator[Callable[..., list[list[int]]]]:
        """What completes plain prompts: p_0 in iteration 0, then the policy on the best token, guided if so asked."""
        args, tokens, policy = self.args, self.conditioning, self.accelerator.unwrap_model(self.model)
        scales = [args.eval_guidance_scale] if iteration == _EVALUATION else args.explore_guidance_scale
        with self.accelerator.autocast(), prepare_weights_once(policy, self.ref_model):
            if iteration == 0:
                with self.reference() as reference:
                    yield partial(sample, reference, end_ids=self.end_ids, vocab_size=tokens.vocab_size)
            else:
                guidance = GuidanceOptions(scales[: iteration + 1][-1], args.guidance_from, self.reference)
                yield partial(sample_best, policy, tokens, guidance, end_ids=self.end_ids)

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The frozen p_0: a model of its own, or the policy with its adapter switched off.

        Without either (β = 0) nothing needs it but iteration 0, before which the policy is p_0 itself.
        """
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            yield self.ref_model
        elif hasattr(policy, "disable_adapter"):
            with policy.disable_adapter(), eval_mode(policy):  # p_0 drops nothing out, whatever the policy does.
                yield policy
        else:
            yield policy

    # Quantize.

    def quantize(self, iteration: int) -> None:
        """Cut the pool anew and draw the samples that this iteration learns from."""
        args = self.args
        self.pool.quantize(args.reward_ceiling)
        rng = np.random.default_rng((args.seed, iteration, 1))
        drawn = self.pool.draw(args.draws_per_iteration, rng, balanced=args.draw == "balanced")
        self.drawn = bucket_by_length(drawn, self.pool.lengths_of(drawn), args.draws_per_step, rng)

    # Learn.

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """A batch of draws: for the policy behind their reward tokens, for the reference without them.

        Returns:
            `input_ids`, `attention_mask`, `labels`, each `(batch, length)`, right-padded, labels -100 outside the
            completion; and the same with `ref_` before the name, for the reference.
        """
        samples = [self.pool[int(self.drawn[number])] for number in numbers]
        prompts = [sample.prompt_ids.tolist() for sample in samples]
        completions = [sample.completion_ids.tolist() for sample in samples]
        asked = [sample.quantiles.tolist() for sample in samples]
        conditioned = [self.conditioning.prefix(ids, quantiles) for ids, quantiles in zip(prompts, asked, strict=True)]
        batch = build_batch(conditioned, completions)
        if self.args.kl_coef:
            batch |= {f"ref_{name}": tensor for name, tensor in build_batch(prompts, completions).items()}
        return batch

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Quark's loss over the batch's completion tokens, scaled to the tokens of the whole optimizer step."""
        args, labels = self.args, inputs["labels"]
        policy_head, ref_head = self.decide_heads()
        policy = completion_projection(model, inputs["input_ids"], inputs["attention_mask"], labels, policy_head)
        ref = None
        if args.kl_coef:
            with torch.no_grad(), self.reference() as reference, self.accelerator.autocast():
                names = ("ref_input_ids", "ref_attention_mask", "ref_labels")
                ref = completion_projection(reference, *(inputs[name] for name in names), ref_head)
            ref = ref.limit_vocab(self.conditioning.vocab_size)
        settings = {**self.coefs.current, "kl_direction": args.kl_direction, "nll_temperature": args.nll_temperature}
        ends = labels, args.min_completion_length, self.end_ids
        with self.accelerator.autocast():
            loss = quark_loss(
                policy.suppress_early_eos(*ends),
                ref and ref.suppress_early_eos(*ends),
                labels[labels != -100],
                **settings,
            )
        tokens = policy.shape[0]
        if self.model.training:
            self._learned.add(torch.stack((loss.nll, loss.kl, loss.entropy)) * tokens, tokens, len(labels))
        total = loss.total
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, so each counts its own tokens times their number.
            total = total * tokens / num_items_in_batch * args.world_size
        return (total, {}) if return_outputs else total

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

    def adapt(self) -> None:
        """Move β and α towards their targets, if they have any, by what the last step measured."""
        if self.coefs.adaptive and self._learned.step["tokens"]:
            kl, entropy = self._learned.last_per_completion(self.accelerator)
            self.coefs.adapt(kl, entropy, samples=self.args.draws_per_step)
        self._learned.end_step()

    # What Trainer asks for.

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Any, self.train_dataset))  # The draws are random already.

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean reward and shape of completions sampled on the best token for held-out prompts.

        Returns:
            `eval_reward` and its like; also logged, and open to `metric_for_best_model="reward"`.
        """
        prompts = self.eval_prompts if eval_dataset is None else self._encoded(eval_dataset)
        if prompts is None:
            raise UserError("eval_dataset is missing: want held-out prompts (--eval_prompts)")
        args = self.args
        sampling = args.eval_sampling()
        rows = [row for row in range(len(prompts)) for _ in range(args.eval_samples_per_prompt)]
        with self.progress.sampling("held out", len(rows)):
            found = self.rollout(prompts, rows, sampling, _EVALUATION, args.per_device_eval_batch_size)
        figures = found.figures(self.scorer.attributes, self.end_ids)
        metrics = held_out_metrics(figures, self.scorer.attributes, metric_key_prefix)
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; what was learned since the last time goes with the loss."""
        if "loss" in logs:
            logs = {**logs, **self._learned.drain(self.accelerator), **self.coefs.current}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.conditioning.save(Path(output_dir or self.args.output_dir), **self.facts())

    def save_final(self, directory: str | os.PathLike | None = None) -> Path:
        """Write a checkpoint that is steered by default (`export.save_steered`) to `output_dir/final`; says where."""
        directory = Path(directory or Path(self.args.output_dir) / "final")
        weights = self.whole_weights()
        if self.is_world_process_zero():
            policy = self.accelerator.unwrap_model(self.model)
            with atomic_directory(directory) as made:
                save_steered(policy, self.processing_class, self.conditioning, made, self.facts(), weights)
        return directory

    def facts(self) -> dict[str, Any]:
        """What belongs with the weights: quantile edges, options, and who scored and who was the reference."""
        args, state = self.args, self.state
        ended_with_best = args.load_best_model_at_end and not self.is_in_train
        best = state.best_model_checkpoint if ended_with_best else None
        identities = self.scorer.identity, self.reference_identity
        return run_facts(args, state.global_step, self.pool, self.coefs, *identities, best_checkpoint=best)

    def _encoded(self, source: PromptSource | None) -> Prompts:
        skip_bad = self.args.skip_bad_prompts
        prompts = source if isinstance(source, Prompts) else load_prompts(source, skip_bad=skip_bad)
        return prompts.encode(self.plain_tokenizer, max_length=self.max_prompt_length, skip_bad=skip_bad)


class _Iterations(TrainerCallback):
    """Hangs explore and quantize before each epoch, and the controllers after each step."""

    def __init__(self, trainer: QuarkTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        if self.trainer.memory_plan.message and state.is_world_process_zero:
            logger.info(self.trainer.memory_plan.message)
            if self.trainer.progress.enabled:
                self.trainer.progress.note(self.trainer.memory_plan.message)
        self.trainer.decide_heads()

    def on_epoch_begin(self, args, state, control, **_):
        trainer, iteration = self.trainer, state.global_step // args.steps_per_iteration
        if control.should_training_stop:
            return  # A run that has stopped early, and was interrupted before its end.
        if not (trainer.pool.iterations == iteration).any():
            trainer.explore(iteration)
        trainer.quantize(iteration)
        trainer.health.check_exploration(trainer.pool, iteration)

    def on_step_end(self, args, state, control, **_):
        self.trainer.adapt()
