"""GGUF files: written for llama.cpp, steered, and read as models."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.llama_cpp import LlamaServer
from helpers.tiny_models import CHAT_TEMPLATE, SMALL_RUN, tiny_model, tiny_tokenizer
from peft import LoraConfig
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer
from quarkrl.builtin import model_path
from quarkrl.cli.main import main
from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.export import model_identity, save_steered
from quarkrl.models.gguf_writing import check_gguf, write_gguf
from quarkrl.models.loading import load_model, load_tokenizer
from quarkrl.models.words import Words
from quarkrl.storage.atomic import sha256

pytest.importorskip("gguf")
TEXTS = ["The king", "It was 1984, and", "“Don't!” she said.", "  two  spaces", "Nobody knew why the"]
IDS = torch.tensor([[2050, 3, 40, 41], [2048, 1, 5, 9]])


def save_final(directory, architecture="gpt2", chat=False, rows=None, attribute="reward", **options):
    """A steered model with the built-in tokenizer: the built-in model, or a tiny Llama."""
    tokenizer = load_tokenizer(model_path())
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ bos_token or '' }}", "")
        tokenizer.bos_token = None
    if architecture == "gpt2":
        model = load_model(model_path())
    else:
        model = tiny_model(architecture, tokenizer, rows=rows, hidden_size=32, **options)
    conditioning, tokenizer = Conditioning.add_to(tokenizer, model, 3, (attribute,))
    directory.mkdir()
    save_steered(model, conditioning.steer_tokenizer(tokenizer), conditioning, directory, {})
    return directory


def share_of_e(completions, **_):
    return [text.count("e") / (len(text) + 1) for text in completions]


def export(final, file, *options):
    assert main(["export", str(final), "--gguf", str(file), *options]) == 0
    return file


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama untied and padded"])
def exported(request, tmp_path_factory):
    """A final model and its GGUF file."""
    home = tmp_path_factory.mktemp("gguf")
    architecture, _, kind = request.param.partition(" ")
    final = save_final(
        home / "final",
        architecture,
        chat=architecture == "llama",
        rows=2100 if kind else None,
        tied=not kind,
    )
    return final, export(final, home / "model.gguf", "--gguf_type", "f32")


@torch.no_grad()
def test_a_written_file_is_read_as_the_same_model_and_saved_as_an_ordinary_one(exported, tmp_path):
    final, file = exported
    expected, model = load_model(final), load_model(file)
    assert model.get_input_embeddings().weight.shape[0] == 2051  # Rows that pad the vocabulary are left out.
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits[..., :2051], rtol=1e-4, atol=1e-4)
    assert load_tokenizer(file)(TEXTS)["input_ids"] == load_tokenizer(final)(TEXTS)["input_ids"]

    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert not {name for name in config if "quantization" in name or name == "_model_name_or_path"}
    assert model_identity(model)["name"] == str(file)


@torch.no_grad()
def test_llama_cpp_gives_the_ids_and_the_greedy_tokens_of_transformers(exported):
    final, file = exported
    model, tokenizer = load_model(final), load_tokenizer(final)
    banned_ids = list(range(2048, model.config.vocab_size))  # Random weights do not avoid reward tokens and padding.
    server = LlamaServer(file, banned_ids[:3])

    def greedy(ids):
        output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, suppress_tokens=banned_ids)
        return output[0, len(ids) :].tolist()

    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 2050 and server.ids_of(text) == ids
        assert server.complete(text, 12) == greedy(ids)
    assert server.complete([2048, text], 12) == greedy([2048, *ids[1:]])  # The worst quantile, and no BOS.
    if tokenizer.chat_template:
        for text in TEXTS:
            chat = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            rendered = server.render(text)
            assert ids[0] == 2050 and server.ids_of(rendered) == ids
            assert server.complete(rendered, 12) == greedy(ids)
            assert server.answer(text, 12) == tokenizer.decode(greedy(ids), skip_special_tokens=True)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "tolerance", "size"), [("f16", 2e-3, 0.55), ("q8_0", 3e-2, 0.35)])
def test_smaller_types_keep_the_logits_nearly(tmp_path, kind, tolerance, size):
    final = save_final(tmp_path / "final")
    file = export(final, tmp_path / "model.gguf", "--gguf_type", kind)
    expected, logits = load_model(final)(IDS).logits, load_model(file)(IDS).logits
    assert 0 < (logits - expected).norm() / expected.norm() < tolerance
    assert file.stat().st_size < size * (final / "model.safetensors").stat().st_size


@pytest.mark.parametrize("exported", ["llama"], indirect=True)
def test_the_command_reads_a_file(exported, capsys):
    assert main(["generate", str(exported[1]), "--prompt", "The king", "--raw", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The king")


@pytest.mark.slow
def test_a_run_that_starts_from_a_file_leaves_an_ordinary_model(tmp_path):
    file = export(save_final(tmp_path / "kind", "llama", attribute="kind"), tmp_path / "kind.gguf")
    config = QuarkConfig(
        output_dir=str(tmp_path / "run"), **{**SMALL_RUN, "num_iterations": 1, "save_strategy": "epoch"}
    )
    trainer = QuarkTrainer(str(file), share_of_e, config, TEXTS, peft_config=LoraConfig(target_modules="all-linear"))
    trainer.train()
    final = trainer.save_final()
    assert "quantization" not in (final / "config.json").read_text(encoding="utf-8")
    start = json.loads((final / "quark.json").read_text(encoding="utf-8"))["start"]
    assert start["name"] == str(file) and start["sha256"] == model_identity(load_model(file))["sha256"]
    for model in (final, tmp_path / "run" / "checkpoint-3"):  # The checkpoint has an adapter, and the file as its base.
        assert QuarkGenerator.from_pretrained(model).conditioning.token_names[-1] == "<|reward_1|>"


def test_the_results_of_an_evaluation_name_the_file_and_its_digest(tmp_path):
    file = export(save_final(tmp_path / "final", "llama"), tmp_path / "model.gguf")
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    options = ["--reward", "vader", "--samples", "2", "--max_new_tokens", "4", "--output", str(tmp_path / "out.json")]
    assert main(["evaluate", str(file), "--prompts", str(tmp_path / "prompts.txt"), *options]) == 0
    assert sha256(file) in (tmp_path / "out.json").read_text(encoding="utf-8")


def test_llama_cpp_adds_a_bos_that_precedes_the_reward_token(tmp_path):
    tokenizer = load_tokenizer(model_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[tokenizer.bos_token, "$A"], special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    model = tiny_model("llama", tokenizer)
    conditioning, tokenizer = Conditioning.add_to(tokenizer, model, 3)
    steered = conditioning.steer_tokenizer(tokenizer)
    assert write_gguf(model, steered, conditioning, tmp_path / "model.gguf") == "<|reward_2|>"
    server = LlamaServer(tmp_path / "model.gguf", ())
    for text in TEXTS:
        assert server.ids_of(f"<|reward_2|>{text}") == steered(text)["input_ids"]
        chat = [{"role": "user", "content": text}]
        ids = steered.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert server.ids_of(server.render(text)) == ids and ids[1] == 2050
        assert server.ids_of(server.render(text, quantile="worst")) == [ids[0], 2048, *ids[2:]]


@pytest.mark.parametrize("kind", ["text", "soft"])
@pytest.mark.parametrize("best", ["", "Polite:\n"])
def test_words_are_put_before_texts_and_chats(tmp_path, kind, best):
    tokenizer = load_tokenizer(model_path())
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ bos_token or '' }}", "")
    tokenizer.bos_token = None
    model = tiny_model("llama", tokenizer)
    words = Words.choose(kind, ["Vulgar:\n", best], ["reward"], 2)
    conditioning, tokenizer = Conditioning.add_to(tokenizer, model, 2, words=words)
    steered = conditioning.steer_tokenizer(tokenizer)
    text_prefix = write_gguf(model, steered, conditioning, tmp_path / "model.gguf")
    assert bool(text_prefix) == bool(best)
    server = LlamaServer(tmp_path / "model.gguf", ())
    for text in ("You are", "The encore on"):
        assert server.ids_of(text_prefix + text) == steered(text)["input_ids"]
        chat = [{"role": "user", "content": text}]
        ids = steered.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert server.ids_of(server.render(text)) == ids
        worst = conditioning.prefix(conditioning.strip(ids), [0])
        assert server.ids_of(server.render(text, quantile="worst")) == worst


def test_what_precedes_a_text_is_printed_where_llama_cpp_does_not_put_it(tmp_path, capsys):
    """A chat that starts with BOS has the reward token second; a file has one BOS for texts and chats."""
    tokenizer = load_tokenizer(model_path())
    tokenizer.chat_template = CHAT_TEMPLATE  # It writes BOS, which the tokenizer does not add to a text.
    model = tiny_model("llama", tokenizer)
    conditioning, tokenizer = Conditioning.add_to(tokenizer, model, 3)
    save_steered(model, conditioning.steer_tokenizer(tokenizer), conditioning, tmp_path, {})
    export(tmp_path, tmp_path / "model.gguf")
    assert "start each text with <|reward_2|>" in capsys.readouterr().err


def test_what_gguf_cannot_express_is_one_line():
    tokenizer = load_tokenizer(model_path())
    with pytest.raises(UserError, match=r"model type 'gpt_neox' must be one of llama, gpt2\. Convert final/ with conv"):
        check_gguf(tiny_model("gpt_neox", tokenizer), tokenizer)
    with pytest.raises(UserError, match="attention_bias True must be False"):
        check_gguf(tiny_model("llama", tokenizer, attention_bias=True), tokenizer)
    with pytest.raises(UserError, match="rope_type 'linear' must be 'default'"):
        rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        check_gguf(tiny_model("llama", tokenizer, rope_parameters=rope), tokenizer)
    words = tiny_tokenizer(words=["a", "b"])
    with pytest.raises(UserError, match="must be byte-level BPE"):
        check_gguf(tiny_model("llama", words), words)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="must be byte-level BPE"):
        check_gguf(tiny_model("llama", tokenizer), tokenizer)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, but not really")
    assert main(["generate", str(tmp_path / "bad.gguf"), "--prompt", "a"]) == 2
    assert main(["generate", str(tmp_path / "absent.gguf"), "--prompt", "a"]) == 2
    monkeypatch.setattr("quarkrl.models.gguf_reading.is_gguf_available", lambda: False)
    assert main(["generate", str(tmp_path / "bad.gguf"), "--prompt", "a"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "must be an existing" in lines[1] and 'pip install "quarkrl[gguf]"' in lines[2]
