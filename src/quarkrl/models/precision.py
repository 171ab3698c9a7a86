"""Precision: whether this machine computes in bfloat16 faster than in float32, and whether weights are too coarse."""

import torch


def bf16_is_fast() -> bool:
    """Return whether the device that a run uses has units for products of bfloat16 matrices.

    PyTorch multiplies such matrices in a plain loop on a processor without these units, some 30 times slower than
    float32 (docs/performance.md).
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def slow_bf16_note() -> str | None:
    """Return a note for a user who sets bfloat16 where it is slow, or None where it is fast."""
    if bf16_is_fast():
        return None
    return "bf16: this processor has no units for bfloat16; float32 is much faster."


def coarse_weights_note(model: torch.nn.Module) -> str | None:
    """Return a note if weights that are trained have 16 bits, or None.

    bfloat16 rounds an update below 1/256 of its weight to nothing, which is most of them at usual learning rates.
    """
    coarse = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad and p.itemsize == 2}
    if not coarse:
        return None
    return f"dtype {min(coarse)}: rounds away most updates of trained weights. Set --dtype float32 --bf16."
