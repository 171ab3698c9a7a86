"""Options of the adapter that a command trains. This module imports no torch, so `--help` is fast."""

from dataclasses import dataclass

from quarkrl.errors import UserError
from quarkrl.options import option


@dataclass
class AdapterOptions:
    """Which adapter to train, under the names of `peft` and TRL; `adapters.lora_config` makes its configuration."""

    lora_rank: int | None = option(
        None,
        "Train a LoRA adapter of this rank; 0 trains all weights.",
        at_least=0,
        group="model",
        fitted=True,
    )
    lora_alpha: int | None = option(
        None, "Scale of the adapter, divided by the rank. The default is twice the rank.", at_least=1, group="model"
    )
    lora_dropout: float = option(
        0.0, "Dropout of the adapter's input.", at_least=0, at_most=1, group="model", rare=True
    )
    lora_target_modules: list[str] = option(
        default_factory=lambda: ["all-linear"],
        help="Names of the layers to adapt, or all-linear. A name matches the end of a layer's full name.",
        metavar="NAME",
        group="model",
    )
    use_rslora: bool = option(
        False, "Rank-stabilised LoRA. It divides lora_alpha by the square root of the rank.", group="model", rare=True
    )
    use_dora: bool = option(
        False, "DoRA: the adapter also trains the norm of each weight. Slower than LoRA.", group="model"
    )

    load_in_4bit: bool = option(
        False, "QLoRA: load the model in 4 bits (NF4) and train an adapter on it. Needs bitsandbytes.", group="model"
    )

    def check_adapter(self) -> None:
        """Check that there is an adapter if one of its options is set.

        Raises:
            UserError: there is none.
        """
        names = ("lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "use_dora", "load_in_4bit")
        defaults = AdapterOptions()
        name = next((name for name in names if getattr(self, name) != getattr(defaults, name)), None)
        if name and not self.lora_rank:
            value = getattr(self, name)
            words = " ".join(value) if isinstance(value, list) else value
            raise UserError(f"{name} {words}: must come with a LoRA adapter. Set --lora_rank, such as --lora_rank 16.")
