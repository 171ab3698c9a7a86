"""`quarkrl push` and `quarkrl train --push_to_hub`: what goes to the hub, and what is refused.

The hub is a local server with the few requests of its API that are needed; the client is the real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from helpers.hub_server import TOKEN, hub_server
from helpers.tiny_models import make_home, tiny_tokenizer

from quarkrl import QuarkConfig, UserError
from quarkrl.cli.main import main

WORDS = [*map(str, range(10, 40))]
REWARDS = """
def last(completion_ids):
    return [float(ids[-1]) for ids in completion_ids]
"""


@pytest.fixture
def home(tmp_path):
    return make_home(tmp_path, tiny_tokenizer(words=WORDS), WORDS, REWARDS, steps_per_iteration=2)


def test_a_run_is_uploaded_at_its_end_and_loads_by_its_name(home):
    with hub_server() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hf")}
        environment |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}

        def quarkrl(*arguments, **variables):
            command = [sys.executable, "-m", "quarkrl.cli", *map(str, arguments)]
            return subprocess.run(
                command, env=environment | variables, capture_output=True, text=True, timeout=300, check=False
            )

        train = ["train", "--config", home / "run.yaml", "--reward", f"{home / 'rewards.py'}:last", "--seed", "1"]
        train += ["--output_dir", home / "run", "--push_to_hub", "true", "--hub_model_id", "less"]
        assert quarkrl(*train, "--dry_run").returncode == 0 and hub.private == {}
        ended = quarkrl(*train)
        assert (ended.returncode, hub.messages) == (0, ["End of training"]), ended.stderr
        assert f"hub: {hub.url}/me/less/commit/" in ended.stderr
        # The final model alone, without samples, metrics and checkpoints.
        final = home / "run" / "final"
        files = hub.files["me/less", "main"]
        assert files.keys() == {path.name for path in final.iterdir()}
        assert files["model.safetensors"] == (final / "model.safetensors").read_bytes()
        assert 'model="me/less"' in files["README.md"].decode() and "PATH" not in files["README.md"].decode()
        assert str(home) not in files["quark.json"].decode()

        generate = ["--prompt", "10", "--max_new_tokens", "6", "--seed", "3", "--json"]
        here, there = (quarkrl("generate", name, *generate) for name in (final, "me/less"))
        assert here.stdout and here.stdout == there.stdout, there.stderr

        pushed = quarkrl("push", home / "run", "me/other", "--private", "--revision", "dev")
        assert (pushed.returncode, hub.private) == (0, {"me/less": False, "me/other": True}), pushed.stderr
        assert hub.files["me/other", "dev"].keys() == files.keys() and hub.files["me/other", "main"] == {}

        refused = quarkrl("push", home / "run", "third", HF_TOKEN="hf_wrong")
        assert refused.returncode == 2 and "401" in refused.stderr
        (line,) = refused.stderr.splitlines()
        assert line.startswith("error: hub 'third': ")


def test_absolute_paths_are_reduced_to_names():
    from quarkrl.models.hub import _without_places

    facts = {"start": {"name": "/home/me/model"}, "rewards": ["/home/me/r.py:f", "profanity"], "beta": 0.1}
    assert _without_places(facts) == {"start": {"name": "model"}, "rewards": ["r.py:f", "profanity"], "beta": 0.1}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "error: model 'nothing': must be a run with final/, or the directory of a model."),
        ("run", "error: model 'run': must be a run with final/, or the directory of a model."),
        ("checkpoint", "error: model 'checkpoint': must not be a checkpoint, whose tokenizer asks for no quantile."),
        ("model", "error: hub 'mine': must have a token to upload with. Set HF_TOKEN, or run `hf auth login`."),
    ],
)
def test_what_cannot_be_uploaded_is_one_line(model, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("run", "checkpoint", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({"options": {}}), encoding="utf-8")
    for name in ("checkpoint/config.json", "checkpoint/trainer_state.json", "model/config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert main(["push", model, "mine"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_checkpoints_are_not_uploaded_and_an_option_that_asks_for_them_is_refused(tmp_path):
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(UserError, match=f"^hub_strategy {strategy}: must be end, as checkpoints are not uploaded"):
            QuarkConfig(str(tmp_path), hub_strategy=strategy)
    assert QuarkConfig(str(tmp_path / "less-toxic")).hub_name == "less-toxic"
