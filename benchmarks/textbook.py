"""Quark as a textbook has it: the comparator of iteration.py, which uses nothing of quarkrl.

    python benchmarks/textbook.py --shape quick

Written from the paper (Lu et al. 2022, arXiv 2205.13636) in the manner of its official code (GXimingLu/Quark):

- prompts are padded on the right, completions appended behind the padding, and both padded apart when learning;
- every position's logits are computed, of prompts and padding too, and the whole of them kept in float32;
- negative log-likelihood, entropy and KL each take softmaxes of their own, and autograd the gradient of all;
- a sampled token costs a sort of the vocabulary (top-p), a softmax and a multinomial draw;
- completions become text when sampled, and tokens again when learned from; the reference is a deep copy.

Left out, in the textbook's favour: the log-probabilities that the official sampler takes and nobody reads, and the KL
that it computes a second time for its log. Mended, so that both minimise the same: exactly K reward tokens, never
sampled, and the entropy taken over the original vocabulary.
"""

import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Batch:
    """Samples to learn from: quantiles (batch,), then ids and masks of prompts and of completions (batch, length)."""

    quantiles: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor


class Textbook:
    """A policy, its reference, and the pool of samples it learns from.

    Args:
        directory: of the model and its tokenizer.
        num_quantiles: K.
        length: tokens of a completion; EOS never comes, so that all are of this length.
        top_p: nucleus of exploring.
        kl_coef, entropy_coef: β and α.
        device: "cpu" or "cuda".
        autocast: compute in bfloat16 where torch thinks it safe; the official code does not.
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
        self.explored = 0  # iterations

    # Explore.

    def explore(self, prompts: Sequence[str], batch_size: int, reward: Callable[..., list[float]]) -> None:
        """Complete the prompts, by p_0 at first and then by the policy on its best token; score; add to the pool."""
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            completions = self.sample(batch, best=self.explored > 0)
            self.pool += zip(reward(batch, completions), batch, completions, strict=True)
        self.explored += 1

    @torch.no_grad()
    def sample(self, prompts: list[str], best: bool, greedy: bool = False) -> list[str]:
        """A completion for each prompt, as text."""
        ids, mask = self._tokens(prompts)
        if best:
            ids, mask = self._behind(torch.full((len(prompts),), self.num_quantiles - 1), ids, mask)
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
        """The logits without those of tokens outside the most likely that have `top_p` together."""
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
        """Samples of the pool, uniformly."""
        drawn = random.choices(range(len(self.pool)), k=batch_size)
        return self.collate([(self.quantiles[i], *self.pool[i][1:]) for i in drawn])

    def collate(self, samples: Sequence[tuple[int, str, str]]) -> Batch:
        """Quantile, prompt and completion of each sample as tensors."""
        quantiles, prompts, completions = zip(*samples, strict=True)
        return Batch(torch.tensor(quantiles), *self._tokens(list(prompts)), *self._tokens(list(completions)))

    def step(self, batch: Batch) -> float:
        """One step of Adam; gives the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """NLL + β KL(policy || reference) - α entropy, the mean over completion tokens."""
        conditioned = self._behind(batch.quantiles, batch.prompt_ids, batch.prompt_mask)
        logits = self._completion_logits(self.policy, *conditioned, batch)  # (batch, length, V + K)
        with torch.no_grad():
            ref_logits = self._completion_logits(self.reference, batch.prompt_ids, batch.prompt_mask, batch)
        nll = -F.log_softmax(logits, dim=-1).gather(-1, batch.completion_ids[..., None])[..., 0]
        original = logits[..., : self.vocab_size]
        entropy = torch.distributions.Categorical(logits=original).entropy()
        kl = F.kl_div(F.log_softmax(ref_logits, dim=-1), F.softmax(original, dim=-1), reduction="none").sum(-1)
        losses = nll + self.kl_coef * kl - self.entropy_coef * entropy
        return (losses * batch.completion_mask).sum() / batch.completion_mask.sum()

    def _completion_logits(self, model: torch.nn.Module, ids: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """Those that predict the completions' tokens: a prompt's last one, then the completion's but its last."""
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

    def _behind(self, quantiles: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts behind their reward tokens."""
        tokens = (self.vocab_size + quantiles[:, None]).to(ids)
        return torch.cat((tokens, ids), dim=1), torch.cat((torch.ones_like(tokens), mask), dim=1)


def main() -> None:
    """Some iterations of a model of random weights, or of the one that is given."""
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=measure.SHAPES, default="quick")
    parser.add_argument("--model", type=Path, help="a model's directory, in place of random weights of --shape")
    parser.add_argument("--prompts", type=Path, help="a file with one a line; in place of random ones")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        shape = measure.SHAPES[options.shape]
        if options.model is None:
            measure.make_model(Path(made), shape)
        textbook = Textbook(options.model or made, device=options.device)
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
            took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in clock.seconds.items())
            print(f"iteration {iteration}: loss {loss:.3f}, {took} for {options.batch_size} samples")


if __name__ == "__main__":
    main()
