"""What `help(quarkrl)` and `dir(quarkrl)` show, and the name "builtin" in Python."""

from __future__ import annotations

import re

import quarkrl
from quarkrl import QuarkGenerator, load_prompts
from quarkrl.builtin import chats_path, model_path, prompts_path


def test_help_and_dir_list_every_public_name():
    listed = set(re.findall(r"\w+", quarkrl.__doc__))
    assert set(quarkrl.__all__) - {"__version__"} <= listed & set(dir(quarkrl))


def test_builtin_names_the_embedded_model_and_its_prompts():
    generator = QuarkGenerator.from_pretrained("builtin")
    assert generator.model.config._name_or_path == str(model_path())
    assert load_prompts("builtin").prompts == load_prompts(prompts_path("train")).prompts
    assert load_prompts("builtin", split="test").prompts == load_prompts(prompts_path("eval")).prompts
    assert load_prompts("builtin-chats", split="eval").prompts == load_prompts(chats_path("eval")).prompts
