"""Teach a language model what not to do, with Quark.

    from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer

    QuarkTrainer("builtin", "profanity", QuarkConfig(output_dir="runs/x"), train_dataset="builtin").train()
    QuarkGenerator.from_pretrained("runs/x/checkpoint-500").generate("You are", quantile="worst")

Train:     QuarkTrainer, QuarkConfig, size_defaults, Stopped
Prompts:   load_prompts, Prompts
Rewards:   resolve, Scorer
Generate:  QuarkGenerator, Guidance
Measure:   evaluate, EvaluationOptions
Parts:     quark_loss, DataPool, Conditioning
Errors:    UserError

Each name is imported on first use, so that `import quarkrl` and `quarkrl --help` do not wait for torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
