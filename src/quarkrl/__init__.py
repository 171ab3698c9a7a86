"""quarkrl: teach a language model what not to do, with Quark."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quarkrl.conditioning import Conditioning
    from quarkrl.config import QuarkConfig
    from quarkrl.errors import UserError
    from quarkrl.generation import QuarkGenerator
    from quarkrl.loss import quark_loss
    from quarkrl.pool import DataPool
    from quarkrl.prompts import Prompts, load_prompts
    from quarkrl.trainer import QuarkTrainer

__version__ = "0.1.0"

_HOMES = {
    "Conditioning": "conditioning",
    "DataPool": "pool",
    "Prompts": "prompts",
    "QuarkConfig": "config",
    "QuarkGenerator": "generation",
    "QuarkTrainer": "trainer",
    "UserError": "errors",
    "load_prompts": "prompts",
    "quark_loss": "loss",
}
__all__ = [
    "Conditioning",
    "DataPool",
    "Prompts",
    "QuarkConfig",
    "QuarkGenerator",
    "QuarkTrainer",
    "UserError",
    "load_prompts",
    "quark_loss",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import quarkrl` and `quarkrl --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'quarkrl' has no attribute {name!r}")
    return getattr(import_module(f"quarkrl.{_HOMES[name]}"), name)
