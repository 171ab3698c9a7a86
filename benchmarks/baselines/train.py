"""Train one baseline with TRL, unmodified, on the job that `benchmarks/proof` describes.

    .venv-trl/bin/python benchmarks/baselines/train.py JOB.json

A job has a model, a file of prompts, a reward, the number of completions to score, the method and its settings. The
script writes the trained model to `final/` beside the job, and what the training cost to `cost.json`.
All methods share the adapter, the completion length, and a linear schedule with warm-up. Online methods take one step
for each batch of 128 completions; offline ones, which learn from an eighth of the samples, take batches of 32.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from quarkrl.rewards.registry import resolve

BATCH = 128
OFFLINE_BATCH = 32


class Scored:
    """The training reward in TRL's calling convention, with a count of the completions that it has scored."""

    def __init__(self, spec: str) -> None:
        self.reward = resolve(spec)
        self.count = 0
        self.__name__ = spec

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """Return a reward for each completion."""
        self.count += len(completions)
        return [float(value) for value in self.reward(prompts=prompts, completions=completions)]


class Job:
    """What to train, and where the results go."""

    def __init__(self, path: Path) -> None:
        values = json.loads(path.read_text(encoding="utf-8"))
        self.directory = path.parent
        self.method: str = values["method"]
        self.settings: dict[str, Any] = values["settings"]
        self.seed: int = values["seed"]
        self.scored: int = values["scored"]
        self.length: int = values["length"]
        self.base: str = values["model"]
        self.files = {"prompts": values["prompts"], "samples": values["samples"]}
        self.reward = Scored(values["reward"])
        self.adapter = LoraConfig(
            r=values["lora_rank"],
            lora_alpha=2 * values["lora_rank"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the base's tokenizer, with EOS as PAD where it has none."""
        tokenizer = AutoTokenizer.from_pretrained(self.base, padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def prompts(self) -> Dataset:
        """Return the training prompts, in an order of the seed."""
        return load_dataset("json", data_files=self.files["prompts"], split="train").shuffle(seed=self.seed)

    def samples(self) -> list[dict[str, Any]]:
        """Return the base's scored samples: a prompt, its completions and their rewards in each row."""
        with open(self.files["samples"], encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def ranked(self) -> Iterator[tuple[str, list[tuple[float, str]]]]:
        """Yield each prompt of the samples with its completions by ascending reward; equal ones in random order."""
        order = random.Random(self.seed)
        for row in self.samples():
            pairs = list(zip(row["rewards"], row["completions"], strict=True))
            order.shuffle(pairs)
            yield row["prompt"], sorted(pairs, key=lambda pair: pair[0])

    def learner(self, dataset: Dataset) -> dict[str, Any]:
        """Return what every trainer gets: the base, its tokenizer, the adapter, and the data."""
        names = {"model": self.base, "processing_class": self.tokenizer(), "peft_config": self.adapter}
        return {**names, "train_dataset": dataset}

    def common(self, batch: int = BATCH) -> dict[str, Any]:
        """Return the training arguments that all methods share."""
        return {
            "output_dir": str(self.directory / "checkpoints"),
            "seed": self.seed,
            "use_cpu": not torch.cuda.is_available(),
            "bf16": torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 10,
            "warmup_steps": 0.05,
            "per_device_train_batch_size": batch,
            **self.settings,
        }


def train_online(job: Job) -> Any:
    """GRPO and RLOO: eight completions of each of 16 prompts per step, one step per batch."""
    import trl

    config, trainer = {
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[job.method]
    arguments = config(
        **job.common(),
        max_steps=job.scored // BATCH,
        num_generations=8,
        max_completion_length=job.length,
        # No method may learn to stop at once, which many rewards would like.
        generation_kwargs={"min_new_tokens": job.length},
    )
    return trainer(reward_funcs=job.reward, args=arguments, **job.learner(job.prompts()))


def train_dpo(job: Job) -> Any:
    """DPO on the best and the worst of a prompt's completions."""
    from trl import DPOConfig, DPOTrainer

    rows = []
    for prompt, pairs in job.ranked():
        (lowest, rejected), (highest, chosen) = pairs[0], pairs[-1]
        if lowest < highest:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    arguments = DPOConfig(**job.common(OFFLINE_BATCH), max_length=None)
    return DPOTrainer(args=arguments, **job.learner(Dataset.from_list(rows)))


def train_sft(job: Job) -> Any:
    """Supervised learning on the best of a prompt's completions."""
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": prompt, "completion": pairs[-1][1]} for prompt, pairs in job.ranked()]
    arguments = SFTConfig(**job.common(OFFLINE_BATCH), completion_only_loss=True, max_length=None)
    return SFTTrainer(args=arguments, **job.learner(Dataset.from_list(rows)))


class RewardModel(torch.nn.Module):
    """A reward function in the form that TRL's PPO wants: a backbone, and a score of each position."""

    base_model_prefix = "backbone"

    def __init__(self, reward: Scored, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        super().__init__()
        self.reward, self.tokenizer, self.length = reward, tokenizer, length

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        """Return the ids as a "hidden state", with -1 where there is padding."""
        hidden = torch.where(attention_mask.bool(), input_ids, -1)
        return type("Output", (), {"hidden_states": [hidden]})

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the reward of each text at all of its positions, (batch, positions, 1)."""
        parts = [hidden[:, : -self.length], hidden[:, -self.length :]]
        prompts, completions = ([self.tokenizer.decode(row[row >= 0]) for row in part] for part in parts)
        rewards = torch.tensor(self.reward(prompts, completions), dtype=torch.float32, device=hidden.device)
        return rewards[:, None, None].expand(*hidden.shape, 1)


def train_ppo(job: Job) -> Any:
    """PPO with a value model that starts as the base, with an adapter of its own, and TRL's four epochs per batch."""
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer, model = job.tokenizer(), AutoModelForCausalLM.from_pretrained(job.base)
    # PPOTrainer makes its own generation settings. What they leave out comes from the model.
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    dataset = job.prompts().map(
        lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns="prompt"
    )
    value_adapter = replace(job.adapter, task_type="SEQ_CLS", modules_to_save=["score"])
    value_model = AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=1)
    arguments = PPOConfig(
        **job.common(),
        total_episodes=job.scored,
        response_length=job.length,
        local_rollout_forward_batch_size=BATCH,
        num_sample_generations=0,
        temperature=1.0,
    )
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=RewardModel(job.reward, tokenizer, job.length),
        value_model=get_peft_model(value_model, value_adapter),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(BATCH)),
        peft_config=job.adapter,
    )


METHODS: dict[str, Callable[[Job], Any]] = {
    "grpo": train_online,
    "rloo": train_online,
    "dpo": train_dpo,
    "sft": train_sft,
    "ppo": train_ppo,
}


def learned(job: Job, trainer: Any) -> int:
    """Return the number of completions that went through a backward pass, each pass counted."""
    if job.method == "ppo":
        return job.scored * int(trainer.args.num_ppo_epochs)
    batch = trainer.args.per_device_train_batch_size * (2 if job.method == "dpo" else 1)
    return int(trainer.state.global_step) * batch


def main() -> None:
    """Train, merge the adapter, and write the model and its cost."""
    job = Job(Path(sys.argv[1]))
    set_seed(job.seed)
    trainer = METHODS[job.method](job)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    # PPO's model holds the policy and the value model.
    model = getattr(model, "policy", model).merge_and_unload()
    model.generation_config.suppress_tokens = None
    final = job.directory / "final"
    model.save_pretrained(final)
    AutoTokenizer.from_pretrained(job.base).save_pretrained(final)
    scored = job.reward.count or sum(len(row["rewards"]) for row in job.samples())
    cost = {"scored": scored, "learned": learned(job, trainer)}
    (job.directory / "cost.json").write_text(json.dumps(cost), encoding="utf-8")


if __name__ == "__main__":
    main()
