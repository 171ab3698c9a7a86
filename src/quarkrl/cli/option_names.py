"""What other tools call an option: what ours is called, or what to do where we have none.

The names are those of transformers (run_clm.py, generate), TRL's scripts and configurations, vLLM, lm-eval, and the
fields of our own other commands.
"""

from collections.abc import Iterable

from quarkrl.errors import did_you_mean

# By the foreign name, our names. The first of these that the command has is meant.
_OURS = {
    # Learning
    "lr": ("learning_rate",),
    "epochs": ("num_iterations",),
    "num_epochs": ("num_iterations",),
    "iterations": ("num_iterations", "iteration"),
    "steps": ("steps_per_iteration",),
    "max_train_steps": ("steps_per_iteration",),
    "batch": ("per_device_train_batch_size", "batch_size"),
    "batch_size": ("per_device_train_batch_size",),
    "train_batch_size": ("per_device_train_batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "per_device_eval_batch_size": ("batch_size",),
    "grad_accum": ("gradient_accumulation_steps",),
    "accumulate_grad_batches": ("gradient_accumulation_steps",),
    "num_warmup_steps": ("warmup_steps",),
    "warmup": ("warmup_steps",),
    "lr_scheduler": ("lr_scheduler_type",),
    "clip_grad": ("max_grad_norm",),
    "beta": ("kl_coef", "dpo_beta"),
    "dpo": ("dpo_coef",),
    "alpha": ("entropy_coef",),
    "k": ("num_quantiles",),
    "quantiles": ("num_quantiles", "quantile"),
    "quantile": ("quantiles",),
    "gamma": ("guidance_scale", "guidance_scales", "explore_guidance_scale"),
    "guidance": ("guidance_scale", "guidance_scales", "explore_guidance_scale"),
    "guidance_scale": ("guidance_scales", "explore_guidance_scale"),
    "guidance_scales": ("guidance_scale", "explore_guidance_scale"),
    # Sampling
    "max_new_tokens": ("max_completion_length",),
    "max_length": ("max_completion_length", "max_new_tokens"),
    "max_tokens": ("max_completion_length", "max_new_tokens"),
    "max_completion_length": ("max_new_tokens",),
    "min_new_tokens": ("min_completion_length",),
    "min_length": ("min_completion_length", "min_new_tokens"),
    "min_tokens": ("min_completion_length", "min_new_tokens"),
    "min_completion_length": ("min_new_tokens",),
    "num_generations": ("samples_per_prompt", "samples", "num_return_sequences"),
    "num_samples": ("samples_per_prompt", "samples", "num_return_sequences", "limit"),
    "samples_per_prompt": ("samples", "num_return_sequences"),
    "samples": ("samples_per_prompt", "num_return_sequences", "limit"),
    "n": ("num_return_sequences", "samples", "limit"),
    "temp": ("temperature",),
    "use_vllm": ("engine",),
    "vllm_server_base_url": ("engine_url",),
    "base_url": ("engine_url",),
    # Model
    "model_name_or_path": ("model",),
    "model_name": ("model",),
    "model_path": ("model",),
    "pretrained": ("model",),
    "ref_model_name_or_path": ("ref_model",),
    "reference_model": ("ref_model",),
    "torch_dtype": ("dtype",),
    "precision": ("dtype", "bf16"),
    "load_in_8bit": ("load_in_4bit",),
    "quantization": ("load_in_4bit",),
    "use_peft": ("lora_rank",),
    "use_lora": ("lora_rank",),
    "lora": ("lora_rank",),
    "lora_r": ("lora_rank",),
    "rank": ("lora_rank",),
    "chat_template": ("chat_template_kwargs",),
    "apply_chat_template": ("raw",),
    # Data and rewards
    "dataset": ("prompts",),
    "dataset_name": ("prompts",),
    "data": ("prompts",),
    "data_path": ("prompts",),
    "train_file": ("prompts",),
    "train_dataset": ("prompts",),
    "input": ("prompts",),
    "validation_file": ("eval_prompts",),
    "eval_dataset": ("eval_prompts",),
    "eval_file": ("eval_prompts",),
    "dataset_split": ("prompt_split",),
    "dataset_train_split": ("prompt_split",),
    "dataset_test_split": ("eval_prompt_split",),
    "split": ("prompt_split",),
    "dataset_streaming": ("stream_prompts",),
    "streaming": ("stream_prompts",),
    "dataset_text_field": ("prompt_column",),
    "text_column": ("prompt_column", "column"),
    "column": ("prompt_column",),
    "max_train_samples": ("prompts_per_iteration",),
    "max_eval_samples": ("held_out", "limit"),
    "rewards": ("reward",),
    "reward_model": ("reward",),
    "reward_model_name_or_path": ("reward",),
    "reward_func": ("reward",),
    "reward_funcs": ("reward",),
    # Files and places
    "output": ("output_dir",),
    "output_dir": ("output",),
    "output_path": ("output_dir", "output"),
    "out": ("output_dir", "output"),
    "run_dir": ("output_dir",),
    "save_dir": ("output_dir", "output"),
    "logger": ("report_to",),
    "wandb": ("report_to",),
    "server_port": ("port",),
}
_ON_CPU = "A GPU is used if there is one."
_OF_MODEL = "The model is the first argument: quarkrl COMMAND MODEL."
# By the foreign name, what to do. {cpu} is the option that keeps a command off the GPU.
_ADVICE = {
    **dict.fromkeys(("device", "device_map", "cuda", "gpu", "gpus", "num_gpus", "devices"), f"{_ON_CPU} {{cpu}}"),
    **dict.fromkeys(("cpu", "no_cuda"), "{cpu}"),
    **dict.fromkeys(("tokenizer", "tokenizer_name", "tokenizer_name_or_path"), "The model's own tokenizer is used."),
    **dict.fromkeys(
        ("revision", "model_revision"), "Run `hf download MODEL --revision NAME --local-dir DIR`, and give DIR."
    ),
    **dict.fromkeys(("token", "hf_token"), "Set HF_TOKEN, or run `hf auth login`."),
    "cache_dir": "Set HF_HOME.",
    **dict.fromkeys(
        ("top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams"),
        "Sampling has --temperature and --top_p, as Quark learns from what it samples.",
    ),
    **dict.fromkeys(
        ("tensor_parallel_size", "gpu_memory_utilization", "max_model_len"),
        "Start `vllm serve` with it, and set --engine_url (docs/engines.md).",
    ),
    **dict.fromkeys(("num_processes", "nproc_per_node"), "Start several processes by torchrun (docs/scaling.md)."),
    **dict.fromkeys(("verbose", "debug", "log_level"), "Set TRANSFORMERS_VERBOSITY=info for the libraries' messages."),
    "limit": "Give the first lines, such as those of `head -n 3 FILE`; of a data set, set --prompt_split 'train[:3]'.",
    **dict.fromkeys(("model", "model_name_or_path", "model_name", "model_path", "pretrained"), _OF_MODEL),
}


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown option, with a blank in front; "" without one.

    Args:
        name: what the user typed, without dashes.
        known: the options of the command.
    """
    known, name = set(known), name.replace("-", "_").lower()
    if ours := next((ours for ours in _OURS.get(name, ()) if ours in known), None):
        return f" Did you mean '--{ours}'?"
    if advice := _ADVICE.get(name):
        switch = "--use_cpu" if "use_cpu" in known else "CUDA_VISIBLE_DEVICES to an empty text"
        return " " + advice.format(cpu=f"For the CPU, set {switch}.")
    return did_you_mean(name, known, "--")
