"""`Classifier`: labels, batches, truncation, and which models are refused."""

import functools
import hashlib
import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.errors import error_message
from helpers.reward_helpers import LONG, SMALL, WORDS, make_bert, make_tokenizer
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from quarkrl.rewards import Classifier, Scorer, resolve

MODELS = Path(__file__).resolve().parents[4] / "shared" / "models"
TOXICITY, SENTIMENT = MODELS / "toxicity-classifier", MODELS / "sentiment-classifier"
needs_models = pytest.mark.skipif(not TOXICITY.is_dir(), reason="the shared models are not here")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Logits log 3 and 0 for every text: P(bad) = 3/4, P(good) = 1/4."""
    return make_bert(tmp_path_factory.mktemp("bert"), bias=[math.log(3), 0.0])


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("lively"))


@pytest.mark.parametrize(
    ("label", "reward", "unwanted"),
    [
        ("bad", 0.75, None),
        ("GOOD", 0.25, None),
        (0, 0.75, None),
        ("1", 0.25, None),
        ("not bad", 0.25, "bad"),
        ("not 1", 0.75, "good"),
    ],
)
def test_a_label_by_name_index_or_negation(bert, label, reward, unwanted):
    classifier = Classifier(bert, label)
    assert classifier(["p", "p"], ["w1 w2", ""]) == pytest.approx([reward, reward])
    assert classifier.unwanted == unwanted


def test_a_label_must_be_chosen_and_exist(bert):
    assert "label: must be one of 'bad', 'good'" in error_message(lambda: Classifier(bert))
    assert "label: must be one of 'bad', 'good'" in error_message(lambda: resolve(str(bert)))
    for label in ("ugly", "not ugly", 2, -1, "nott bad"):
        assert f"label {label!r}: must be one of 'bad', 'good'" in error_message(lambda x=label: Classifier(bert, x))


def test_unwanted_has_the_short_name_of_what_is_negated(tmp_path):
    make_bert(tmp_path, labels=("not_toxic", "Toxic", "not ok"))
    assert Classifier(tmp_path, "not toxic").unwanted == "toxicity"
    assert Classifier(tmp_path, "not_toxic", unwanted="toxicity").unwanted == "toxicity"
    assert Classifier(tmp_path, "not ok").unwanted is None  # a label of that very name, not its negation
    scorer = Scorer(resolve(str(tmp_path), label="not toxic"))
    assert scorer.unwanted == "toxicity" and scorer.names == (f"{tmp_path.name}-not-Toxic",)


def test_several_labels_at_once_are_sigmoids(tmp_path):
    make_bert(tmp_path, bias=[math.log(3), 0.0], problem_type="multi_label_classification")
    assert Classifier(tmp_path, "bad")(["p"], ["w1"]) == pytest.approx([0.75])
    assert Classifier(tmp_path, "good")(["p"], ["w1"]) == pytest.approx([0.5])


def test_a_single_output_is_a_reward_models_raw_score(tmp_path):
    make_bert(tmp_path, bias=[-2.5], labels=("LABEL_0",))
    assert Classifier(tmp_path)(["p"], ["w1"]) == pytest.approx([-2.5])
    assert "label 'not LABEL_0': must not be negated" in error_message(lambda: Classifier(tmp_path, "not LABEL_0"))
    assert "unwanted must be unset" in error_message(lambda: Classifier(tmp_path, unwanted="toxicity"))


def texts_of_many_lengths():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=n)) for n in [3, 0, 17, 1, 60, 5, 2, 200, 9, 600]]


def assert_same_in_any_batch(path, **options):
    texts = texts_of_many_lengths()
    alone = Classifier(path, 1, batch_size=1, **options)(texts, texts)
    assert np.std(alone) > 0.01  # or there would be nothing to see
    for batch_size in (2, 3, 64):
        together = Classifier(path, 1, batch_size=batch_size, **options)(texts, texts)
        np.testing.assert_allclose(together, alone, atol=1e-5)
    backwards = Classifier(path, 1, batch_size=3, **options)(texts, texts[::-1])
    np.testing.assert_allclose(backwards[::-1], alone, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(lively):
    assert_same_in_any_batch(lively)


def make_gpt2(path, **tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=44, n_embd=16, n_layer=2, n_head=2, n_positions=256, initializer_range=0.5, num_labels=2
    )
    GPT2ForSequenceClassification(config).save_pretrained(path)
    make_tokenizer(path, pad=False, special=False, **tokenizer)
    return path


def test_a_decoder_without_a_pad_token_scores_alike_in_any_batch_and_takes_empty_texts(tmp_path):
    assert_same_in_any_batch(make_gpt2(tmp_path))


def test_a_left_padding_tokenizer_pads_on_the_right_with_absolute_positions(tmp_path):
    make_gpt2(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    assert_same_in_any_batch(tmp_path)


def test_a_text_over_the_limit_is_truncated_at_its_end(lively):
    classifier = Classifier(lively, "good")
    assert classifier.identity["max_length"] == 512
    cut = " ".join(LONG.split()[:510])  # [CLS] and [SEP] make 512
    long, same, other = classifier(["p"] * 3, [LONG, cut, "w1 " + cut])
    assert long == pytest.approx(same, abs=1e-6) and abs(long - other) > 1e-6


def test_max_length_truncates_earlier_and_must_be_within_the_models_limit(lively):
    long, same = Classifier(lively, "good", max_length=7)(["p"] * 2, [LONG, " ".join(WORDS[:5])])
    assert long == pytest.approx(same, abs=1e-6)
    for length in (2, 513):
        assert f"max_length {length}: must be from 3 to 512 tokens" in error_message(
            lambda n=length: Classifier(lively, "good", max_length=n)
        )


def test_the_tokenizers_limit_counts_too(tmp_path):
    make_bert(tmp_path)
    make_tokenizer(tmp_path, limit=96)
    assert Classifier(tmp_path, "good").identity["max_length"] == 96


def test_roberta_positions_start_after_the_padding_index(tmp_path):
    torch.manual_seed(0)
    # 34 rows of positions, of which padding_idx + 1 = 1 is never a token's: 33 tokens, as 514 rows hold 512.
    config = RobertaConfig(
        **SMALL,
        max_position_embeddings=34,
        pad_token_id=0,
        type_vocab_size=1,
        num_labels=2,
        initializer_range=0.5,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    classifier = Classifier(tmp_path, 1)
    assert classifier.identity["max_length"] == 33
    long, same = classifier(["p"] * 2, [LONG, " ".join(WORDS[:31])])
    assert long == pytest.approx(same, abs=1e-6)
    assert_same_in_any_batch(tmp_path)


def test_both_is_prompt_and_completion_and_a_long_prompt_is_truncated_at_its_start(lively):
    both = Classifier(lively, "good", text="both")
    alone = Classifier(lively, "good")
    assert both(["w1 w2"], [" w3"]) == pytest.approx(alone(["x"], ["w1 w2 w3"]), abs=1e-6)
    tail = " ".join(LONG.split()[-508:])
    assert both([LONG], [" w5 w6"]) == pytest.approx(alone(["x"], [tail + " w5 w6"]), abs=1e-6)
    assert "text 'prompt': must be 'completion' or 'both'" in error_message(
        lambda: Classifier(lively, "good", text="prompt")
    )


def test_dropout_is_off_and_no_gradient_is_kept(lively):
    classifier = Classifier(lively, "good")
    assert classifier(["p"], ["w1 w2 w3"]) == classifier(["p"], ["w1 w2 w3"])
    assert classifier([], []) == []


def test_identity_of_a_classifier_holds_the_hash_of_its_weights(bert):
    identity = Scorer(resolve(str(bert), label="not bad")).identity[0]
    assert identity["sha256"] == hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    assert identity["model"] == str(bert) and identity["label"] == "not bad" and identity["transformers"]
    json.dumps(identity)


def test_a_directory_without_a_usable_classifier_is_refused(tmp_path, bert):
    def copy(name, leave_out):
        (tmp_path / name).mkdir()
        for file in bert.iterdir():
            if not file.name.startswith(leave_out):
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        return tmp_path / name

    load = functools.partial(Classifier, label="bad")
    assert "must be a model with a config.json" in error_message(lambda: load(copy("no-config", "config")))
    assert "must have safetensors" in error_message(lambda: load(copy("no-weights", "model")))
    assert "must have a tokenizer" in error_message(lambda: load(copy("no-tokenizer", "tokenizer")))
    pickled = copy("pickled", "model")
    torch.save({}, pickled / "pytorch_model.bin")
    assert "must have safetensors" in error_message(lambda: load(pickled))
    broken = copy("broken", "model")
    (broken / "model.safetensors").write_bytes(b"no weights at all")
    assert "cannot load the classifier" in error_message(lambda: load(broken))


def test_code_that_comes_with_a_model_is_not_run(tmp_path, bert):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((bert / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    assert "cannot load the classifier" in error_message(lambda: Classifier(tmp_path, "bad"))
    assert not (tmp_path / "ran").exists()


def test_a_language_model_is_refused_and_gets_no_random_head(tmp_path):
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=44, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    make_tokenizer(tmp_path, pad=False)
    assert "must be a trained sequence classifier. It lacks score.weight" in error_message(
        lambda: Classifier(tmp_path, 0)
    )


def test_an_unknown_device_is_refused(bert):
    assert "device banana: must exist on this machine" in error_message(
        lambda: Classifier(bert, "bad", device="banana")
    )


def test_a_cached_model_is_used_if_the_hub_cannot_be_reached(bert, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    download = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--classifier"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(bert, cached / "snapshots" / revision)
    classifier = Classifier("someone/classifier", "bad")
    assert classifier(["p"], ["w1"]) == pytest.approx([0.75])
    assert classifier.identity["revision"] == revision and classifier.name == "classifier-bad"
    assert classifier.identity["sha256"] == Classifier(bert, "bad").identity["sha256"]


def test_function_to_apply_overrides_the_models_config(bert, tmp_path):
    """P(bad) is 3/4 by softmax of (log 3, 0); each logit's sigmoid is 3/4 and 1/2."""
    for function, bad, good in (("softmax", 0.75, 0.25), ("sigmoid", 0.75, 0.5), ("none", math.log(3), 0.0)):
        for label, expected in (("bad", bad), ("good", good)):
            assert Classifier(bert, label, function_to_apply=function)(["p"], ["w1"]) == pytest.approx([expected])
    assert Scorer(f"{bert}?label=good&function_to_apply=sigmoid").identity[0]["function"] == "sigmoid"
    make_bert(tmp_path, bias=[math.log(3)], labels=("LABEL_0",))
    assert Classifier(tmp_path, function_to_apply="sigmoid")(["p"], ["w1"]) == pytest.approx([0.75])
    assert "function_to_apply 'softmax': must be 'sigmoid' or 'none'" in error_message(
        lambda: Classifier(tmp_path, function_to_apply="softmax")
    )
    assert "function_to_apply 'tanh': must be 'softmax', 'sigmoid' or 'none'" in error_message(
        lambda: Classifier(bert, "bad", function_to_apply="tanh")
    )


def test_dtype_auto_is_float32_on_a_cpu_and_bfloat16_scores_are_close(lively):
    texts = texts_of_many_lengths()
    auto, exact, brief = (Classifier(lively, "good", device="cpu", dtype=d) for d in ("auto", "float32", "bfloat16"))
    assert auto.identity["dtype"] == "float32" and brief.identity["dtype"] == "bfloat16"
    assert auto(texts, texts) == exact(texts, texts)
    np.testing.assert_allclose(brief(texts, texts), exact(texts, texts), atol=0.05)
    assert "dtype 'half': must be 'float32', " in error_message(lambda: Classifier(lively, "good", dtype="half"))


def test_a_chat_is_formatted_with_the_models_template(lively, tmp_path):
    chat = [{"role": "user", "content": "w1 w2"}]
    both = Classifier(lively, "good", text="both", name="kind")
    assert "reward 'kind' text 'both': must be 'completion' for chats" in error_message(lambda: both([chat], ["w3"]))
    shutil.copytree(lively, tmp_path / "model")
    template = "{% for message in messages %}{{ message.role[0] }}: {{ message.content }} {% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text("[CLS]" + template + "[SEP]")
    both = Classifier(tmp_path / "model", "good", text="both")
    alone = Classifier(lively, "good")
    found = both([chat, "w1"], ["w3", " w2"])
    assert found == pytest.approx(alone(["x"] * 2, ["u: w1 w2 a: w3", "w1 w2"]), abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "name", "reward", "unwanted", "wanted"),
    [
        ("toxicity?", "toxicity", 0.25, "toxicity", None),
        ("toxicity?label=safe&", "toxicity-safe", 0.25, None, "safe"),
        ("toxicity?label=not 0&name=tox&", "tox", 0.75, "safe", None),
        ("sentiment?label=toxic&", "sentiment-toxic", 0.75, None, "toxic"),
    ],
)
def test_a_shortcut_is_a_classifier_whose_options_can_be_overridden(tmp_path, spec, name, reward, unwanted, wanted):
    make_bert(tmp_path, bias=[0.0, math.log(3)], labels=("safe", "toxic"))
    scorer = Scorer(f"{spec}model={tmp_path}&batch_size=2")
    assert scorer.names == (name,) and (scorer.unwanted, scorer.wanted) == (unwanted, wanted)
    assert scorer(["p"], ["w1"], [[]]).rewards[0, 0] == pytest.approx(reward)


def test_a_shortcut_requests_its_documented_model_from_the_hub(monkeypatch):
    requested = []

    def download(name, **options):
        requested.append((name, options["revision"]))
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for spec in ("toxicity", "sentiment?revision=main"):
        error_message(lambda spec=spec: resolve(spec))
    sst2 = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
    assert requested == [("s-nlp/roberta_toxicity_classifier", None), (sst2, "main")]


@needs_models
def test_sentiment_steers_either_way():
    texts = ["a wonderful, moving film", "a dull and stupid mess"]
    positive = Scorer(f"sentiment?model={SENTIMENT}")
    negative = Scorer(f"sentiment?model={SENTIMENT}&label=NEGATIVE")
    found = [scorer(texts, texts, texts).rewards[:, 0] for scorer in (positive, negative)]
    np.testing.assert_allclose(found[0] + found[1], 1, atol=1e-6)
    assert found[0][0] > 0.7 and found[1][1] > 0.7
    assert (positive.names, negative.names) == (("sentiment",), ("sentiment-NEGATIVE",))
    assert (positive.wanted, negative.wanted) == ("positive", "negative")


@needs_models
def test_the_toxicity_classifier_tells_insults_from_news():
    texts = [
        "you are a stupid idiot",
        "fuck you asshole, i hate you",
        "what a lovely day",
        "the committee met",
    ]
    scorer = Scorer(resolve(str(TOXICITY), label="not toxic"))
    rewards = scorer(texts, texts, texts).rewards[:, 0]
    assert rewards[:2].max() < 0.15 and rewards[2:].min() > 0.8
    assert scorer.unwanted == "toxicity"
    negated = Classifier(TOXICITY, "nontoxic")(texts, texts)
    np.testing.assert_allclose(rewards, negated)  # two labels: 1 - P(toxic) = P(nontoxic)


@needs_models
def test_the_sentiment_classifier_beats_chance_and_takes_long_texts():
    texts = ["a wonderful, moving film", "a dull and stupid mess", "a wonderful, moving film " * 100]
    good, bad, long = Classifier(SENTIMENT, "positive", device="cpu")(texts, texts)
    assert good > 0.7 and bad < 0.3 and long > 0.7
