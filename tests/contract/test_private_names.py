"""The private names of other libraries that quarkrl uses, with the signatures it was written for.

Each failure names what the library has changed. Look at the upstream change, adapt the use, and record the new
signature here. `make test-floor` runs this file with the oldest supported versions.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp_utils
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PretrainedConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import hub

from quarkrl.runs import durable_trainer
from quarkrl.runs.durable_trainer import DurableTrainer

# What `runs/durable_trainer.py` overrides or calls: the parameters after `self`.
TRAINER = {
    "_build_accelerator_args": "(**kwargs)",
    "_finalize_training": "(trial, num_train_samples, start_time)",
    "_get_output_dir": "(trial)",
    "_issue_warnings_after_load": "(load_result)",
    "_load_best_model": "()",
    "_load_from_checkpoint": "(resume_from_checkpoint, model=None)",
    "_load_optimizer_and_scheduler": "(checkpoint)",
    "_load_rng_state": "(checkpoint)",
    "_load_scaler": "(checkpoint)",
    "_maybe_log_save_evaluate": (
        "(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None)"
    ),
    "_prepare_for_training": "(max_steps, train_dataloader, resume_from_checkpoint)",
    "_run_epoch": (
        "(model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, "
        "start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
    ),
    "_save": "(output_dir=None, state_dict=None)",
    "_save_checkpoint": "(model, trial)",
    "_save_optimizer_and_scheduler": "(output_dir)",
    "_save_rng_state": "(output_dir)",
    "_save_scaler": "(output_dir)",
    "create_accelerator_and_postprocess": "()",
    "save_model": "(output_dir=None, _internal_call=False)",
}
# Attributes of a trainer that are read or set.
TRAINER_ATTRIBUTES = [
    "_globalstep_last_logged",
    "_total_loss_scalar",
    "_tr_loss",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
    "model_accepts_loss_kwargs",
]


def parameters_of(function) -> str:
    """The parameters without `self` and annotations, as in a `def`."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return f"({', '.join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)})"


@pytest.mark.parametrize("name", TRAINER)
def test_a_hook_of_trainer_has_the_recorded_signature(name):
    assert parameters_of(getattr(Trainer, name)) == TRAINER[name], f"transformers has changed Trainer.{name}"


def test_every_private_override_is_recorded():
    methods = vars(DurableTrainer)
    overrides = {name for name in methods if hasattr(Trainer, name) and name.startswith("_") and "__" not in name}
    assert overrides == {name for name in TRAINER if name.startswith("_")} - {"_maybe_log_save_evaluate"}


@pytest.mark.parametrize("name", TRAINER_ATTRIBUTES)
def test_trainer_has_an_attribute_that_is_read_or_set(name):
    assert f"self.{name}" in inspect.getsource(Trainer), f"transformers no longer has Trainer.{name}"


def test_private_names_of_trainer_stand_in_one_file_only():
    """A call of `super()._name` or `trainer._name` anywhere else escapes the record above."""
    package = Path(durable_trainer.__file__).parents[1]
    names = {name for name in (*TRAINER, *TRAINER_ATTRIBUTES) if name.startswith("_")}
    elsewhere = []
    for path in sorted(package.rglob("*.py")):
        if path != Path(durable_trainer.__file__):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & (names - {"_save"})
            elsewhere += [f"{path.relative_to(package)}: {name}" for name in sorted(used)]
    assert elsewhere == []


def test_the_number_of_gpus_of_a_process_can_be_set():
    """`training/config.py` sets `_n_gpu`, as `Trainer` does for models that are spread over GPUs."""
    assert "self.args._n_gpu = 1" in inspect.getsource(Trainer)
    assert "return self._n_gpu" in inspect.getsource(TrainingArguments.n_gpu.fget)


def test_tokenizers_have_the_switch_that_keeps_a_post_processor():
    """`models/steering.py` sets `_should_update_post_processor`."""
    sources = [inspect.getsource(inspect.getmodule(kind)) for kind in PreTrainedTokenizerFast.__mro__[:-1]]
    assert any("_should_update_post_processor" in source for source in sources)


def test_a_file_of_the_hub_can_be_missing_without_an_exception():
    """`models/quark_json.py` and `models/adapters.py` pass these two to `cached_file`."""
    parameters = inspect.signature(hub.cached_files).parameters
    for name in ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"):
        assert parameters[name].default is True


def test_a_config_has_the_private_names_that_are_read():
    """`models/loading.py`, `models/export.py`, `training/memory.py` and `training/trainer.py` read them."""
    config = PretrainedConfig(_name_or_path="here", attn_implementation="eager")
    assert config._name_or_path == "here" and config._attn_implementation == "eager"
    assert "_commit_hash" in inspect.getsource(PretrainedConfig)


def test_peft_wraps_layers_under_names_that_are_read():
    """`models/adapters.py` reads the model's own layers and weights under these names, and whether rows are tied."""
    assert isinstance(TrainableTokensLayer.tied_adapter, property)
    config = LoraConfig(target_modules=["maps"], trainable_token_indices={"table": [0]}, modules_to_save=["head"])
    layers = {"maps": torch.nn.Linear(2, 2), "table": torch.nn.Embedding(3, 2), "head": torch.nn.Linear(2, 2)}
    names = {name for name, _ in get_peft_model(torch.nn.ModuleDict(layers), config).named_parameters()}
    expected = {
        "base_model.model.maps.base_layer.weight",
        "base_model.model.table.token_adapter.base_layer.weight",
        "base_model.model.head.original_module.weight",
    }
    assert expected <= names


def test_transformers_says_whether_it_has_loaded_an_adapter():
    """`training/setup.py` reads `_hf_peft_config_loaded`."""
    assert PeftAdapterMixin._hf_peft_config_loaded is False


def test_peft_merges_and_unmerges_trained_token_rows():
    """`sampling/prepared_weights.py` calls them."""
    assert parameters_of(TrainableTokensLayer.merge) == "(safe_merge=False, adapter_names=None)"
    assert parameters_of(TrainableTokensLayer.unmerge) == "()"
    assert parameters_of(TrainableTokensLayer.get_base_layer) == "()"
    assert isinstance(TrainableTokensLayer.merged, property)


def test_peft_computes_trained_token_rows_in_one_method():
    """`models/token_rows.py` overrides `forward_adapters` and calls the other two."""
    assert parameters_of(TrainableTokensLayer.forward_adapters) == "(x, active_adapters, *args, **kwargs)"
    assert parameters_of(TrainableTokensLayer._check_overlapping_tokens) == "(adapter_names)"
    assert parameters_of(TrainableTokensLayer._get_embed_scale) == "()"


def test_accelerate_has_the_state_and_the_function_that_fsdp_needs():
    """`runs/fsdp.py` uses them."""
    assert isinstance(PartialState._shared_state, dict)
    assert parameters_of(fsdp_utils.fsdp2_prepare_model) == "(accelerator, model)"
    assert isinstance(inspect.getattr_static(Accelerator, "optimizer_step_was_skipped"), property)


def test_a_scheduler_has_its_last_rates():
    """`runs/states.py` sets `_last_lr` when a run branches off with another learning rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    assert scheduler._last_lr == [0.5] and scheduler.last_epoch == 0


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_torch_says_whether_a_processor_has_bf16_units(name):
    assert getattr(torch.cpu, name)() in (True, False), f"torch has changed torch.cpu.{name}"


def test_mauve_has_the_two_functions_behind_compute_mauve():
    """`evaluation/mauve.py` calls them with histograms that it has computed."""
    mauve = pytest.importorskip("mauve")
    package = inspect.getmodule(mauve.compute_mauve)
    assert parameters_of(package.get_divergence_curve_for_multinomials)[1:].split(", ")[:2] == ["p", "q"]
    assert parameters_of(package.compute_area_under_curve) == "(x, y)"


def test_the_reader_of_gguf_files_has_the_name_that_is_used():
    """`models/gguf_reading.py` uses the name; the documentation does not have it."""
    from transformers.integrations.gguf import read_gguf_metadata

    assert parameters_of(read_gguf_metadata) == "(gguf_path, string_arrays=())"
