"""β and α, the weights of the loss's KL and entropy terms: fixed, or adapted towards a target."""

from dataclasses import dataclass

# The largest relative distance from a target that counts.
MAX_CHANGE = 0.2


@dataclass
class Coefficients:
    """β and α; a coefficient that has a target adapts after every optimizer step.

    A step on n samples multiplies a coefficient by

        1 ± clip(measured / target - 1, -0.2, 0.2) * n / horizon

    with + for β, which grows while the KL is above its target, and - for α, which grows while the entropy is below its
    target. The coefficients stay positive if the horizon is greater than 0.2 n.

    Attributes:
        kl_coef, entropy_coef: the current β and α.
        kl_target: the desired KL of a completion (the sum over its tokens), in nats; None keeps β fixed.
        entropy_target: the desired entropy of a completion (the sum over its tokens), in nats; None keeps α fixed.
        horizon: the number of samples over which a coefficient adapts. A larger horizon adapts more slowly.

    Source: the controllers of the official Quark code, after Ziegler et al. 2019 (arXiv 1909.08593).
    """

    kl_coef: float
    entropy_coef: float
    kl_target: float | None = None
    entropy_target: float | None = None
    horizon: int = 2500

    @property
    def current(self) -> dict[str, float]:
        """The current β and α, under the names of their options."""
        return {"kl_coef": self.kl_coef, "entropy_coef": self.entropy_coef}

    @property
    def adaptive(self) -> bool:
        """Whether at least one coefficient has a target."""
        return self.kl_target is not None or self.entropy_target is not None

    def adapt(self, kl: float, entropy: float, samples: int) -> None:
        """Move each coefficient that has a target, after one optimizer step.

        Args:
            kl: the step's mean KL per completion, in nats.
            entropy: the step's mean entropy per completion, in nats.
            samples: the number of samples in the step.
        """
        if self.kl_target is not None:
            self.kl_coef *= 1 + _clip(kl / self.kl_target - 1) * samples / self.horizon
        if self.entropy_target is not None:
            self.entropy_coef *= 1 - _clip(entropy / self.entropy_target - 1) * samples / self.horizon


def _clip(error: float) -> float:
    return min(max(error, -MAX_CHANGE), MAX_CHANGE)
