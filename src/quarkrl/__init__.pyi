from .algorithm.loss import quark_loss as quark_loss
from .algorithm.pool import DataPool as DataPool
from .data.prompts import Prompts as Prompts
from .data.prompts import load_prompts as load_prompts
from .errors import UserError as UserError
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.options import EvaluationOptions as EvaluationOptions
from .models.conditioning import Conditioning as Conditioning
from .rewards.registry import resolve as resolve
from .rewards.scorer import Scorer as Scorer
from .runs.interrupts import Stopped as Stopped
from .sampling.generator import QuarkGenerator as QuarkGenerator
from .sampling.guidance import Guidance as Guidance
from .training.config import QuarkConfig as QuarkConfig
from .training.sizing import size_defaults as size_defaults
from .training.trainer import QuarkTrainer as QuarkTrainer

__version__: str
