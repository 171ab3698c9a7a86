"""Evaluation mode for a block, and each module's own mode afterwards."""

from __future__ import annotations

import pytest
from torch import nn

from quarkrl.models.eval_mode import eval_mode


def test_each_module_has_its_own_mode_again_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1))).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    assert modes == [True, True, False, False, False]
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        _ = 1 / 0
    assert [module.training for module in model.modules()] == modes
