"""A textbook implementation of Quark, the baseline of iteration.py. It uses nothing of quarkrl.

    python benchmarks/textbook.py --shape quick

It follows the paper (Lu et al. 2022, arXiv 2205.13636) and the structure of its official code (GXimingLu/Quark):

- Prompts are padded on the right, completions follow the padding, and learning pads both separately.
- The logits of every position are computed, those of prompts and padding included, and all are kept in float32.
- The negative log-likelihood, the entropy and the KL each compute their own softmax, and autograd their gradients.
- Sampling a token sorts the vocabulary (top-p) and takes a softmax and a multinomial draw.
- Completions are decoded when sampled and tokenized again for learning. The reference is a deep copy.

Two parts of the official code are omitted, in favour of the textbook: log-probabilities of samples that are never used,
and a second computation of the KL for the log. Three are corrected, so that both implementations minimise the same
loss: there are exactly K reward tokens, they are never sampled, and the entropy is over the original vocabulary.
"""

import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Batch:
    """A batch of samples: quantiles (batch,), then ids and masks of prompts and of completions (batch, length)."""

    quantiles: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor


class Textbook:
    """A policy, its reference, and the pool of samples that it learns from.

    Args:
        directory: the model and its tokenizer.
        num_quantiles: K.
        length: tokens per completion. EOS is suppressed, so that all completions have this length.
        top_p: the nucleus while exploring.
        kl_coef, entropy_coef: β and α.
        device: "cpu" or "cuda".
        autocast: whether PyTorch's autocast computes in bfloat16; the official code does not use it.
    """

    def __init__(
        self,
        directory: str | Path,
        num_quantiles: int = 5,
        length: int = 20,
        top_p: float = 0.9,
        kl_coef: float = 0.05,
        entropy_coef: float = 0.06,
        device: str = "cpu",
        autocast: bool = False,
    ):
        self.num_quantiles, self.length, self.top_p = num_quantiles, length, top_p
        self.kl_coef, self.entropy_coef = kl_coef, entropy_coef
        self.device, self.autocast = device, autocast
        self.tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.policy = AutoModelForCausalLM.from_pretrained(directory).to(device).eval()
        self.reference = copy.deepcopy(self.policy)
        rows = self.policy.get_input_embeddings().weight
        self.vocab_size = len(rows)
        self.tokenizer.add_tokens([f"<|reward_{k}|>" for k in range(num_quantiles)], special_tokens=True)
        drawn = rows.detach().mean(0) + rows.detach().std(0) * torch.randn(num_quantiles, rows.shape[1], device=device)
        self.policy.resize_token_embeddings(self.vocab_size + num_quantiles, mean_resizing=False)
        with torch.no_grad():
            self.policy.get_input_embeddings().weight[self.vocab_size :] = drawn
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-5, eps=1e-5)
        self.pool: list[tuple[float, str, str]] = []  # reward, prompt, completion
        self.quantiles: list[int] = []
        self.explorations = 0

    def reference_model(self) -> AbstractContextManager[torch.nn.Module]:
        """Provide the reference within a context."""
        return nullcontext(self.reference)

    # Explore.

    def explore(self, prompts: Sequence[str], batch_size: int, reward: Callable[..., list[float]]) -> None:
        """Sample and score completions, and add them to the pool. The first call samples p_0, later ones the policy."""
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            completions = self.sample(batch, best=self.explorations > 0)
            self.pool += zip(reward(batch, completions), batch, completions, strict=True)
        self.explorations += 1

    @torch.no_grad()
    def sample(self, prompts: list[str], best: bool, greedy: bool = False) -> list[str]:
        """Return a completion of each prompt as text."""
        ids, mask = self._tokens(prompts)
        if best:
            ids, mask = self._prepend_reward_tokens(torch.full((len(prompts),), self.num_quantiles - 1), ids, mask)
        model = self.policy if best else self.reference
        prompt_length, cache, inputs = ids.shape[1], None, ids
        for step in range(self.length):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                output = model(
                    inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
            cache = output.past_key_values
            last = mask.sum(-1) - 1 if step == 0 else torch.zeros(len(ids), dtype=torch.long, device=ids.device)
            logits = output.logits.float()[torch.arange(len(ids)), last]  # (batch, vocab)
            logits[:, self.vocab_size :] = -torch.inf
            logits[:, self.tokenizer.eos_token_id] = -torch.inf
            if greedy:
                inputs = logits.argmax(-1, keepdim=True)
            else:
                inputs = torch.multinomial(F.softmax(self._nucleus(logits), dim=-1), 1)
            ids, mask = torch.cat((ids, inputs), dim=-1), torch.cat((mask, torch.ones_like(inputs)), dim=-1)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids[:, prompt_length:]]

    def _nucleus(self, logits: Tensor) -> Tensor:
        """Return the logits with those of tokens outside the nucleus set to -inf."""
        ordered, order = logits.sort(descending=True)
        probabilities = F.softmax(ordered, dim=-1)
        beyond = probabilities.cumsum(-1) - probabilities > self.top_p
        return logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)

    # Quantize.

    def quantize(self) -> None:
        """Sort the pool and cut it into K parts; 0 is the worst."""
        self.pool.sort(key=lambda sample: sample[0])
        self.quantiles = [rank * self.num_quantiles // len(self.pool) for rank in range(len(self.pool))]

    # Learn.

    def draw(self, batch_size: int) -> Batch:
        """Draw samples uniformly from the pool."""
        drawn = random.choices(range(len(self.pool)), k=batch_size)
        return self.collate([(self.quantiles[i], *self.pool[i][1:]) for i in drawn])

    def collate(self, samples: Sequence[tuple[int, str, str]]) -> Batch:
        """Return the quantiles, prompts and completions of samples as tensors."""
        quantiles, prompts, completions = zip(*samples, strict=True)
        return Batch(torch.tensor(quantiles), *self._tokens(list(prompts)), *self._tokens(list(completions)))

    def step(self, batch: Batch) -> float:
        """Make one step of Adam. Return the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """Return NLL + β KL(policy || reference) - α entropy, averaged over completion tokens."""
        conditioned = self._prepend_reward_tokens(batch.quantiles, batch.prompt_ids, batch.prompt_mask)
        logits = self._completion_logits(self.policy, *conditioned, batch)  # (batch, length, V + K)
        with torch.no_grad(), self.reference_model() as reference:
            ref_logits = self._completion_logits(reference, batch.prompt_ids, batch.prompt_mask, batch)
        nll = -F.log_softmax(logits, dim=-1).gather(-1, batch.completion_ids[..., None])[..., 0]
        original = logits[..., : self.vocab_size]
        ref_logits = ref_logits[..., : self.vocab_size]
        entropy = torch.distributions.Categorical(logits=original).entropy()
        kl = F.kl_div(F.log_softmax(ref_logits, dim=-1), F.softmax(original, dim=-1), reduction="none").sum(-1)
        losses = nll + self.kl_coef * kl - self.entropy_coef * entropy
        return (losses * batch.completion_mask).sum() / batch.completion_mask.sum()

    def _completion_logits(self, model: torch.nn.Module, ids: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """Return the logits that predict completion tokens, which are one position before them."""
        whole = torch.cat((mask, batch.completion_mask), dim=-1)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            logits = model(
                torch.cat((ids, batch.completion_ids), dim=-1),
                attention_mask=whole,
                position_ids=(whole.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
            ).logits.float()
        first = logits[torch.arange(len(ids)), mask.sum(-1) - 1]
        return torch.cat((first[:, None], logits[:, ids.shape[1] : -1]), dim=1)

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)

    def _prepend_reward_tokens(self, quantiles: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend the reward tokens to the prompts."""
        tokens = (self.vocab_size + quantiles[:, None]).to(ids)
        return torch.cat((tokens, ids), dim=1), torch.cat((torch.ones_like(tokens), mask), dim=1)


def main() -> None:
    """Run a few iterations of a model with random weights, or of --model."""
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=measure.SHAPES, default="quick")
    parser.add_argument("--model", type=Path, help="directory of a model; default: random weights of --shape")
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line; default: random tokens")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        shape = measure.SHAPES[options.shape]
        if options.model is None:
            measure.make_model(Path(directory), shape)
        textbook = Textbook(options.model or directory, device=options.device)
        prompts = measure.make_prompts(options.batch_size, shape)
        if options.prompts is not None:
            prompts = options.prompts.read_text(encoding="utf-8").splitlines()[: options.batch_size]
        for iteration in range(options.iterations):
            clock = measure.Clock(options.device)
            with clock("sampling"):
                textbook.explore(prompts, options.batch_size, lambda _, texts: [float(len(text)) for text in texts])
            textbook.quantize()
            with clock("learning"):
                loss = textbook.step(textbook.draw(options.batch_size))
            times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in clock.seconds.items())
            print(f"iteration {iteration}: loss {loss:.3f}, {times} for {options.batch_size} samples")


if __name__ == "__main__":
    main()
