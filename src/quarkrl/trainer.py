"""Quark: explore, quantize, learn (Lu et al., NeurIPS 2022, arXiv 2205.13636).

Given a reference p_0, prompts x and any reward r(x, y), the policy p_θ starts as p_0 with K reward tokens r_k added.
An iteration is an epoch of `transformers.Trainer`; `on_epoch_begin` explores and quantizes, the epoch's batches learn:

    explore     y ~ p_θ( . | best, x), scored and added to the pool D      (iteration 0: y ~ p_0( . | x))
    quantize    D, whole, cut by reward into K quantiles; each sample (x, y) gets its r_k anew
    learn       (x, y) drawn uniformly from D;  minimise, per completion token,
                    -log p_θ(y | x, r_k)  +  β KL(p_θ || p_0)  -  α H(p_θ)

The policy sees r_k, the reference does not. `loss.py` says over which vocabulary each term is taken.

Deviations from the paper, each an option (docs/algorithm.md has the whole list with sources):
- KL(p_θ || p_0), not KL(p_0 || p_θ), and the entropy bonus: the official code does so and made the published figures.
- Draws are uniform over samples, not over quantiles: the same without ties, and without harm with them.
From the official code: completions stay token ids from sampling to training, EOS is trained, reward tokens are never
sampled, exactly K are added, equal rewards share a quantile, dropout is on while learning.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from quarkrl.conditioning import Conditioning
from quarkrl.config import QuarkConfig
from quarkrl.errors import UserError
from quarkrl.generation import Sampling, context_length, decode, eos_ids, load_model, load_tokenizer, sample
from quarkrl.loss import completion_logits, quark_loss
from quarkrl.pool import DataPool
from quarkrl.progress import MetricsFile, Progress
from quarkrl.prompts import Prompts, load_prompts
from quarkrl.rewards import Scorer

Rewards = Callable | str | Sequence[Callable | str]
PromptSource = Prompts | Dataset | Sequence | str

# Sampling for evaluation is seeded as an iteration that never comes.
_EVALUATION = 2**31 - 1


@dataclass(frozen=True)
class Rollout:
    """A batch of sampled and scored completions."""

    number: int
    rows: list[int]
    completions: list[list[int]]
    rewards: np.ndarray  # (n, A), NaN where there is none
    seconds_sample: float
    seconds_score: float


class QuarkTrainer(Trainer):
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
        if not isinstance(model, PreTrainedModel):
            model = load_model(model)
        tokenizer = processing_class or load_tokenizer(model.config._name_or_path)
        self.scorer = (
            reward_funcs
            if isinstance(reward_funcs, Scorer)
            else Scorer(reward_funcs, weights=args.reward_weights, condition_on=args.condition_on)
        )
        self.end_ids = eos_ids(model, tokenizer)
        self.reference_name = getattr((ref_model or model).config, "_name_or_path", "") or "given in memory"

        self.plain_tokenizer = tokenizer
        # What a prompt may have of the context: the reward tokens and the completion take the rest.
        self.max_prompt_length = context_length(model) - args.max_completion_length - len(self.scorer.attributes)
        if train_dataset is None:
            raise UserError("train_dataset is missing: want prompts to explore")
        self.prompts = self._encoded(train_dataset)
        self.eval_prompts = None if eval_dataset is None else self._encoded(eval_dataset)
        explored = min(args.prompts_per_iteration or len(self.prompts), len(self.prompts)) * args.samples_per_prompt
        if explored < args.num_quantiles:
            raise UserError(
                f"num_quantiles {args.num_quantiles}: more than the {explored} samples of the first iteration; "
                "lower it or give more prompts"
            )

        # The reference is p_0 as given; the policy is p_0 with reward tokens.
        self.ref_model = ref_model
        if ref_model is None and peft_config is None and args.kl_coef:
            self.ref_model = copy.deepcopy(model)
        self.conditioning, extended = Conditioning.add_to(
            tokenizer, model, args.num_quantiles, self.scorer.attributes, seed=args.seed
        )
        if peft_config is not None:
            model = _with_adapter(model, peft_config, self.conditioning)
        self.pool_directory = Path(args.output_dir) / "pool"
        self.pool = DataPool(args.num_quantiles, self.scorer.attributes)
        self.drawn: np.ndarray = np.zeros(0, dtype=np.int64)
        self.coefs = {"kl_coef": args.kl_coef, "entropy_coef": args.entropy_coef}
        self._learned = _Means()
        self.progress = Progress(enabled=not args.disable_tqdm)

        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=_Draws(self),
            eval_dataset=cast(Any, self.eval_prompts),
            processing_class=self.conditioning.steered(extended),
            callbacks=[_Iterations(self), MetricsFile(args.output_dir), self.progress, *(callbacks or [])],
            optimizers=optimizers,
        )
        # The loss is a sum over tokens divided by those of the whole step, so that accumulation does not change it.
        self.model_accepts_loss_kwargs = True
        for replaced in (ProgressCallback, PrinterCallback):
            self.remove_callback(replaced)
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False).eval().to(self.args.device)

    # Explore.

    def explore(self, iteration: int) -> None:
        """Sample a completion for each of the iteration's prompts, score it, add it to the pool.

        Raises:
            UserError: more rewards than `max_unscored_share` allows are missing or not finite.
        """
        args = self.args
        sampling = Sampling(args.max_completion_length, args.min_completion_length, args.temperature, args.top_p)
        rows = self.prompts_of(iteration)
        with self.progress.exploring(iteration, len(rows)):
            batches = list(self.rollout(self.prompts, rows, sampling, iteration, args.generation_batch_size))
        if args.world_size > 1:
            batches = sorted(gather_object(batches), key=lambda batch: batch.number)
        self._add(iteration, batches)

    def rollout(
        self, prompts: Prompts, rows: list[int], sampling: Sampling, iteration: int, batch_size: int
    ) -> Iterator["Rollout"]:
        """Sample and score a completion for each of the given prompts, batch by batch; each process does its share.

        Iteration 0 samples p_0 plainly, later ones the policy on the best token. Every completion has random
        numbers of its own, so that it does not depend on the batches around it.
        """
        uniforms = sampling.uniforms(len(rows), self.args.seed, iteration)
        for number, start in enumerate(range(0, len(rows), batch_size)):
            if number % self.args.world_size != self.args.process_index:
                continue
            batch = rows[start : start + batch_size]
            started = time.perf_counter()
            with self.sampler(iteration) as (model, prefix):
                completions = sample(
                    model,
                    [prefix(prompts.ids[row]) for row in batch],
                    sampling,
                    None if uniforms is None else uniforms[start : start + batch_size],
                    end_ids=self.end_ids,
                    vocab_size=self.conditioning.vocab_size,
                )
            sampled = time.perf_counter()
            self.progress.sampled(len(batch))
            rewards = self.score(prompts, batch, completions)
            self.progress.scored(rewards)
            yield Rollout(number, batch, completions, rewards, sampled - started, time.perf_counter() - sampled)

    def _add(self, iteration: int, batches: list["Rollout"]) -> None:
        rows = [row for batch in batches for row in batch.rows]
        completions = [ids for batch in batches for ids in batch.completions]
        rewards = np.concatenate([batch.rewards for batch in batches])  # (n, A)
        kept = np.flatnonzero(np.isfinite(rewards).all(axis=1))
        unscored = len(rows) - len(kept)
        if unscored > self.args.max_unscored_share * len(rows) or not len(kept):
            raise UserError(
                f"{unscored} of {len(rows)} rewards of iteration {iteration} are None or not finite: more than "
                f"max_unscored_share {self.args.max_unscored_share} allows; mend the reward or raise the share"
            )
        self.pool.add(
            [self.prompts.ids[rows[i]] for i in kept],
            [completions[i] for i in kept],
            rewards[kept],
            iteration=iteration,
        )
        if self.is_world_process_zero():
            self.pool.save(self.pool_directory)
        self.log(
            {
                "iteration": iteration,
                **self._shape(rewards[kept], completions),
                "unscored": unscored,
                "pool_size": len(self.pool),
                "seconds_sample": sum(batch.seconds_sample for batch in batches),
                "seconds_score": sum(batch.seconds_score for batch in batches),
            }
        )

    def _shape(self, rewards: np.ndarray, completions: list[list[int]]) -> dict[str, float]:
        """What there is to say of some completions: their rewards, lengths, and how many ended by themselves."""
        found = {}
        for name, values in zip(self.scorer.attributes, rewards.T, strict=True):
            found |= {name: float(values.mean()), f"{name}_std": float(values.std())}
        found["completion_length"] = float(np.mean([len(ids) for ids in completions]))
        found["eos_share"] = float(np.mean([ids[-1] in self.end_ids for ids in completions]))
        return found

    def prompts_of(self, iteration: int) -> list[int]:
        """The rows of the prompts to explore, in turn through shuffled passes over all; each samples_per_prompt times.

        Within the iteration they go by length, so that a batch needs little padding.
        """
        total = len(self.prompts)
        count = min(self.args.prompts_per_iteration or total, total)
        first = iteration * count
        passes = [
            np.random.default_rng((self.args.seed, number)).permutation(total)
            for number in range(first // total, (first + count - 1) // total + 1)
        ]
        start = first - first // total * total
        rows = np.concatenate(passes)[start : start + count]
        lengths = np.array([len(self.prompts.ids[row]) for row in rows])
        return np.repeat(rows[np.argsort(lengths, kind="stable")], self.args.samples_per_prompt).tolist()

    @contextmanager
    def sampler(self, iteration: int) -> Iterator[tuple[PreTrainedModel, Callable[[list[int]], list[int]]]]:
        """Who samples, and what it is asked for: p_0 plainly in iteration 0, then the policy on the best token."""
        with self.accelerator.autocast():
            if iteration == 0:
                with self.reference() as reference:
                    yield reference, list
            else:
                policy = self.accelerator.unwrap_model(self.model)
                yield policy, lambda ids: self.conditioning.prefix(ids, self.conditioning.best)

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The frozen p_0: a model of its own, or the policy with its adapter switched off.

        Without either (β = 0) nothing needs it but iteration 0, before which the policy is p_0 itself.
        """
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            yield self.ref_model
        elif hasattr(policy, "disable_adapter"):
            with policy.disable_adapter():
                yield policy
        else:
            yield policy

    def score(self, prompts: Prompts, rows: Sequence[int], completions: list[list[int]]) -> np.ndarray:
        """`(n, A)` rewards of completions of the given prompts; NaN where there is none."""
        texts = decode(self.plain_tokenizer, completions)
        columns = {name: [values[row] for row in rows] for name, values in prompts.columns.items()}
        return self.scorer([prompts.prompts[row] for row in rows], texts, completions, columns).rewards

    # Quantize.

    def quantize(self, iteration: int) -> None:
        """Cut the pool anew and draw the samples that this iteration learns from."""
        args = self.args
        self.pool.quantize(args.reward_ceiling)
        rng = np.random.default_rng((args.seed, iteration, 1))
        drawn = self.pool.draw(self.draws_per_iteration, rng, balanced=args.draw == "balanced")
        self.drawn = _bucketed(drawn, self.pool.lengths[drawn], args.train_batch_size, rng)

    def restore_pool(self, before: int) -> None:
        """Read back what the iterations before the given one sampled."""
        args = self.args
        self.pool = DataPool.load(self.pool_directory, args.num_quantiles, self.scorer.attributes, before=before)

    @property
    def draws_per_iteration(self) -> int:
        args = self.args
        return args.steps_per_iteration * args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    # Learn.

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch of drawn samples: for the policy behind their reward tokens, for the reference without them.

        Returns:
            `input_ids`, `attention_mask`, `labels`, each `(batch, length)`, right-padded, labels -100 outside the
            completion; and the same with `ref_` before the name, for the reference.
        """
        samples = [self.pool[int(index)] for index in indices]
        prompts = [sample.prompt_ids.tolist() for sample in samples]
        completions = [sample.completion_ids.tolist() for sample in samples]
        conditioned = [
            self.conditioning.prefix(ids, sample.quantiles) for ids, sample in zip(prompts, samples, strict=True)
        ]
        batch = _padded(conditioned, completions)
        if self.args.kl_coef:
            batch |= {f"ref_{name}": tensor for name, tensor in _padded(prompts, completions).items()}
        return batch

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Quark's loss over the batch's completion tokens, scaled to the tokens of the whole optimizer step."""
        labels = inputs["labels"]
        policy_logits = completion_logits(model, inputs["input_ids"], inputs["attention_mask"], labels)
        ref_logits = None
        if self.args.kl_coef:
            with torch.no_grad(), self.reference() as reference, self.accelerator.autocast():
                names = ("ref_input_ids", "ref_attention_mask", "ref_labels")
                ref_logits = completion_logits(reference, *(inputs[name] for name in names))
            ref_logits = ref_logits[:, : self.conditioning.vocab_size]
        loss = quark_loss(
            policy_logits,
            ref_logits,
            labels[labels != -100],
            kl_coef=self.coefs["kl_coef"],
            entropy_coef=self.coefs["entropy_coef"],
            kl_direction=self.args.kl_direction,
        )
        tokens = policy_logits.shape[0]
        if self.model.training:
            parts = torch.stack((loss.total.detach(), loss.nll, loss.kl, loss.entropy))
            self._learned.add(parts * tokens, tokens, len(labels))
        total = loss.total
        if num_items_in_batch is not None:
            # Gradients are averaged over processes, so each counts its own tokens times their number.
            total = total * tokens / num_items_in_batch * self.args.world_size
        return (total, {"logits": policy_logits}) if return_outputs else total

    def adapt(self) -> None:
        """Move β and α towards their targets, if there are any, by the last step's sums per completion.

        The factor is 1 ± clip(value / target - 1, -0.2, 0.2) * n / horizon: β grows where the KL is above its
        target, α where the entropy is below (official code, `AdaptiveController`).
        """
        args = self.args
        for name, target, sign in (("kl", args.kl_target, 1), ("entropy", args.entropy_target, -1)):
            if target is not None:
                error = np.clip(self._learned.last_per_completion(name, self.accelerator) / target - 1, -0.2, 0.2)
                self.coefs[f"{name}_coef"] *= float(
                    1 + sign * error * self.draws_per_iteration / args.steps_per_iteration / args.coef_horizon
                )
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
        sampling = Sampling(args.max_completion_length, args.min_completion_length, top_p=args.eval_top_p)
        rows = [row for row in range(len(prompts)) for _ in range(args.eval_samples_per_prompt)]
        with self.progress.evaluating(len(rows)):
            batches = list(self.rollout(prompts, rows, sampling, _EVALUATION, args.per_device_eval_batch_size))
        if args.world_size > 1:
            batches = sorted(gather_object(batches), key=lambda batch: batch.number)
        rewards = np.concatenate([batch.rewards for batch in batches])
        rewards = rewards[np.isfinite(rewards).all(axis=1)]
        found = self._shape(rewards, [ids for batch in batches for ids in batch.completions])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; what was learned since the last time goes with the loss."""
        if "loss" in logs:
            logs = {**logs, **self._learned.drain(self.accelerator), **self.coefs}
            logs.pop("total", None)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            (directory / "training_args.bin").unlink(missing_ok=True)  # A pickle; config.yaml and quark.json say it.
            self.conditioning.save(directory, **self.facts())

    def save_final(self, directory: str | os.PathLike | None = None) -> Path:
        """Write the policy as an ordinary checkpoint that is steered by default.

        Its tokenizer puts the best reward token first, its generation config suppresses reward tokens, `quark.json`
        holds quantile edges, options, scorer and reference. An adapter is merged in.

        Returns:
            Where it was written: `output_dir/final` by default.
        """
        directory = Path(directory or Path(self.args.output_dir) / "final")
        model = self.accelerator.unwrap_model(self.model)
        state = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if hasattr(model, "merge_and_unload"):
            model = copy.deepcopy(model).merge_and_unload()
        if self.is_world_process_zero():
            reward_tokens = [i for row in self.conditioning.token_ids for i in row]
            model.generation_config.suppress_tokens = reward_tokens
            model.config.use_cache = True
            model.save_pretrained(directory, state_dict=state)
            cast(PreTrainedTokenizerBase, self.processing_class).save_pretrained(directory)
            self.conditioning.save(directory, **self.facts())
        return directory

    def facts(self) -> dict[str, Any]:
        """What belongs with the weights: quantile edges, options, and who scored and who was the reference."""
        own = {name: self.args.to_dict()[name] for name in QuarkConfig.__annotations__}
        return {
            "quantile_edges": [[None if np.isnan(x) else x for x in row] for row in self.pool.edges.tolist()],
            "iteration": self.state.global_step // self.args.steps_per_iteration,
            "pool_size": len(self.pool),
            "reference": self.reference_name,
            "rewards": self.scorer.identity,
            "config": json.loads(json.dumps(own, default=str)),
        }

    def _encoded(self, source: PromptSource) -> Prompts:
        prompts = source if isinstance(source, Prompts) else load_prompts(source)
        if prompts.ids:
            return prompts
        return prompts.encode(
            self.plain_tokenizer, max_length=self.max_prompt_length, skip_bad=self.args.skip_bad_prompts
        )


class _Draws(torch.utils.data.Dataset):
    """The samples an iteration learns from, by number; which they are is settled when the iteration begins."""

    def __init__(self, trainer: QuarkTrainer):
        self.trainer = trainer

    def __len__(self) -> int:
        return self.trainer.draws_per_iteration

    def __getitem__(self, number: int) -> int:
        return int(self.trainer.drawn[number])


class _Iterations(TrainerCallback):
    """Hangs explore and quantize before each epoch, and the controllers after each step."""

    def __init__(self, trainer: QuarkTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **_):
        iteration = state.global_step // args.steps_per_iteration
        if iteration and not len(self.trainer.pool):  # Resumed: what the checkpoint had seen, and not what came after.
            self.trainer.restore_pool(before=iteration + 1)
        if not (self.trainer.pool.iterations == iteration).any():
            self.trainer.explore(iteration)
        self.trainer.quantize(iteration)

    def on_step_end(self, args, state, control, **_):
        self.trainer.adapt()


class _Means:
    """Sums of the loss and its parts over tokens: since the last log, and in the current step."""

    names = ("total", "nll", "kl", "entropy")

    def __init__(self) -> None:
        self._logged = self._step = torch.zeros(6, dtype=torch.float64)

    def add(self, sums: Tensor, tokens: int, completions: int) -> None:
        row = torch.cat((sums.double().cpu(), torch.tensor([tokens, completions], dtype=torch.float64)))
        self._step = self._step + row

    def end_step(self) -> None:
        self._logged = self._logged + self._step
        self._step = torch.zeros_like(self._step)

    def last_per_completion(self, name: str, accelerator: Any) -> float:
        *sums, _tokens, completions = accelerator.reduce(self._step.to(accelerator.device)).tolist()
        return dict(zip(self.names, sums, strict=True))[name] / completions

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Means per token since the last drain, over all processes."""
        *sums, tokens, _completions = accelerator.reduce(self._logged.to(accelerator.device)).tolist()
        self._logged = torch.zeros_like(self._logged)
        return {name: value / max(tokens, 1) for name, value in zip(self.names, sums, strict=True)}


def _bucketed(drawn: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """The draws with those of like length side by side: within stretches of 50 batches, whose order stays random."""
    order = []
    for stretch in np.split(np.arange(len(drawn)), range(50 * batch_size, len(drawn), 50 * batch_size)):
        by_length = stretch[np.argsort(lengths[stretch], kind="stable")]
        batches = by_length.reshape(-1, batch_size)
        order.append(rng.permutation(batches).reshape(-1))
    return drawn[np.concatenate(order)]


def _padded(prompts: list[list[int]], completions: list[list[int]]) -> dict[str, Tensor]:
    """Prompts and completions as right-padded tensors; padding is told by the mask, never by the id."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        labels[i, len(prompt) : len(row)] = input_ids[i, len(prompt) : len(row)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _with_adapter(model: PreTrainedModel, peft_config: Any, conditioning: Conditioning) -> Any:
    """The model with an adapter, whose new token rows are trained too."""
    from peft import get_peft_model

    peft_config = copy.deepcopy(peft_config)
    if getattr(peft_config, "trainable_token_indices", False) is None and not peft_config.modules_to_save:
        peft_config.trainable_token_indices = [i for row in conditioning.token_ids for i in row]
    return get_peft_model(model, peft_config)
