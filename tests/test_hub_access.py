"""Without a network, a name of the hub is one line at once, and what is in the hub's cache is used."""

from __future__ import annotations

import socket

import httpx
import pytest
from helpers.eight_letters import TOKENIZER
from helpers.hub_server import hub_server
from helpers.tiny_models import tiny_model
from huggingface_hub import constants

from quarkrl import QuarkConfig, QuarkTrainer, UserError, hub_access, load_prompts
from quarkrl.models.loading import load_model, load_tokenizer


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """A hub at a port that refuses connections, and an empty cache; the number of each wait between two tries."""
    waits: list[float] = []
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # Not listening.
        for module in ("huggingface_hub.constants", "transformers.utils.hub"):
            monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_access, "_latest", None)
        monkeypatch.setattr("time.sleep", waits.append)  # The client's retries wait, too.
        yield waits


def test_a_hub_that_cannot_be_reached_is_one_line_without_retries(unreachable, tmp_path):
    for load in (
        load_model,
        load_tokenizer,
        lambda name: QuarkTrainer(name, "brevity", QuarkConfig(str(tmp_path / "run")), ["a"]),
    ):
        with pytest.raises(UserError) as caught:
            load("someone/model")
        assert str(caught.value) == (
            "model 'someone/model': must be a local directory, builtin, or a model in the hub's cache, because the hub "
            "cannot be reached ([Errno 111] Connection refused). Set one of these, or connect to the network."
        )
    with pytest.raises(
        UserError, match=r"the hub cannot be reached \(\[Errno 111\] Connection refused\), and its cache"
    ):
        load_prompts("someone/prompts")
    assert unreachable == [1.0] * (hub_access.TRIES - 1)
    assert constants.HF_HUB_OFFLINE is False


def test_a_model_in_the_cache_is_loaded_without_retries(unreachable, tmp_path):
    snapshot = tmp_path / "cache" / "models--someone--model" / "snapshots" / "0123"
    tiny_model("gpt2", TOKENIZER).save_pretrained(snapshot)
    TOKENIZER.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123", encoding="utf-8")
    assert load_model("someone/model").num_parameters() and load_tokenizer("someone/model")("a")
    assert len(unreachable) == hub_access.TRIES - 1


def test_a_slow_network_is_left_to_the_client(monkeypatch, unreachable):
    class Session:
        def head(self, url, timeout):
            raise httpx.ConnectTimeout("timed out")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    assert hub_access.why_unreachable() is None and not unreachable


def test_a_hub_that_answers_is_asked(monkeypatch, unreachable):
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        with hub_access.only_cache_if_unreachable("someone/model"):
            assert constants.HF_HUB_OFFLINE is False


def test_an_almost_embedded_model_is_not_sought_on_the_hub(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network is used"))
    for name in ("builtn", "built-in", "Builtin"):
        with pytest.raises(UserError, match=r"Did you mean 'builtin'\?"):
            QuarkTrainer(name, "brevity", QuarkConfig("run"), ["a"])
    with pytest.raises(UserError, match=r"builtin-chat: no such file. Did you mean 'builtin-chats'\?"):
        load_prompts("builtin-chat")
