"""What is trained is what is served: the saved tokenizer gives the ids of training, or the run is refused."""

from __future__ import annotations

import os

import pytest
from helpers.chat_templates import CHATML
from helpers.errors import error_message
from helpers.random_tokenizers import random_tokenizer
from helpers.reward_token_models import add_reward_tokens
from helpers.tiny_models import SMALL_RUN, tiny_model, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    GemmaTokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    XLNetTokenizer,
)

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer
from quarkrl.data.encoding import RefusedText, try_encode_prompts
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.models.special_tokens import surrounding_ids
from quarkrl.training.served import check_served_ids, find_ambiguity

SEED = os.environ.get("QUARKRL_TOKENIZER_SEED", "0")


def make_trainer(directory, tokenizer, prompts, model=None, **options):
    """A trainer of a tiny model, with a reward that does not matter."""
    return QuarkTrainer(
        model or tiny_model("gpt2", tokenizer, rows=1 + max(tokenizer.get_vocab().values())),
        lambda completions, **_: [float(len(text)) for text in completions],
        QuarkConfig(output_dir=str(directory / "run"), **{**SMALL_RUN, "num_iterations": 1, **options}),
        train_dataset=prompts,
        processing_class=tokenizer,
    )


def assert_served_as_trained(trainer, prompts) -> list[list[int]]:
    """Compare the ids of training with those of `final/`, by plain transformers and by `QuarkGenerator`."""
    trained = [trainer.conditioning.prefix(ids, trainer.conditioning.best) for ids in trainer.prompts.ids]
    trainer.explore(0)
    trainer.quantize(0)
    final = trainer.save_final()
    served = AutoTokenizer.from_pretrained(final)
    assert [served(prompt)["input_ids"] for prompt in prompts] == trained
    assert QuarkGenerator.from_pretrained(final).encode(prompts) == trained
    return trained


def tokenizer_of(model, pre_tokenizer, single: str | None, specials: list[str], **named) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(specials)
    if single:
        tokens = [(token, backend.token_to_id(token)) for token in specials]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def words(single: str | None, specials: list[str], **named) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of a, b, c and <unk>, with ids 0 to 3; the special tokens follow."""
    model = models.WordLevel({"a": 0, "b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>")
    return tokenizer_of(model, pre_tokenizers.WhitespaceSplit(), single, specials, **named)


# Position of the reward tokens


def test_bos_is_found_where_the_tokenizer_knows_no_letter_but_four(tmp_path):
    model = models.BPE(vocab={"A": 0, "C": 1, "G": 2, "T": 3}, merges=[])
    tokenizer = tokenizer_of(model, pre_tokenizers.WhitespaceSplit(), "<bos> $A", ["<bos>"], bos_token="<bos>")
    trained = assert_served_as_trained(make_trainer(tmp_path, tokenizer, ["ACGT", "TT"]), ["ACGT", "TT"])
    assert trained == [[4, 6, 0, 1, 2, 3], [4, 6, 3, 3]]


def test_cls_is_a_beginning_and_sep_is_not_in_a_prompt(tmp_path):
    tokenizer = words("[CLS] $A [SEP]", ["[CLS]", "[SEP]"], cls_token="[CLS]", sep_token="[SEP]")
    trained = assert_served_as_trained(make_trainer(tmp_path, tokenizer, ["a b c", "b"]), ["a b c", "b"])
    assert trained == [[4, 7, 0, 1, 2], [4, 7, 1]]


def test_special_tokens_without_a_name_are_a_beginning(tmp_path):
    tokenizer = words("[gMASK] <sop> $A", ["[gMASK]", "<sop>"])
    trained = assert_served_as_trained(make_trainer(tmp_path, tokenizer, ["a b", "c"]), ["a b", "c"])
    assert trained == [[4, 5, 7, 0, 1], [4, 5, 7, 2]]


@pytest.mark.parametrize(("single", "expected"), [(None, [6, 4, 0]), ("<s> $A", [4, 6, 4, 0])])
def test_a_text_that_spells_bos(tmp_path, caplog, single, expected):
    """GPT-2 names a BOS and adds none. A tokenizer that adds one gives two, and says so."""
    tokenizer = words(single, ["<s>"], bos_token="<s>")
    trained = assert_served_as_trained(make_trainer(tmp_path, tokenizer, ["<s> a", "b"]), ["<s> a", "b"])
    assert trained[0] == expected
    assert ("1 of 2 texts start with the BOS <s>, which the tokenizer adds too: they have two" in caplog.text) == bool(
        single
    )


def test_a_text_that_spells_a_bos_of_chats_alone_is_refused(tmp_path):
    tokenizer = words(None, ["<s>"], bos_token="<s>", chat_template="{{ bos_token }}{{ messages[0].content }}")
    make_trainer(tmp_path, tokenizer, ["a <s>", "b"])
    error_message(lambda: make_trainer(tmp_path, tokenizer, ["a", "<s> b"]), "row 2 of the list: ", "starts with BOS")
    trainer = make_trainer(tmp_path, tokenizer, ["a", "<s> b", "c"], skip_bad_prompts=True)
    assert trainer.prompts.skipped == {"starts with BOS": 1}
    generator = QuarkGenerator(trainer.model, trainer.processing_class, trainer.conditioning)
    error_message(lambda: generator.encode(["<s> b"]), "start with BOS")


def test_special_tokens_may_have_colons_and_dollar_signs(tmp_path):
    tokenizer = words(None, ["<|begin:of|>", "$x"])
    ids = [4, 5]
    template = {"id": "T", "ids": ids, "tokens": ["<|begin:of|>", "$x"]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=["T", "$A"], special_tokens=[template]
    )
    trained = assert_served_as_trained(make_trainer(tmp_path, tokenizer, ["a b", "c"]), ["a b", "c"])
    assert trained == [[4, 5, 7, 0, 1], [4, 5, 7, 2]]


# Reward tokens


def test_reward_tokens_get_no_id_that_is_in_use(tmp_path):
    """The tokenizers library numbers a new token by counting: here it would be 3, which is b."""
    model = models.WordLevel({"a": 0, "b": 3, "<unk>": 7}, unk_token="<unk>")
    tokenizer = tokenizer_of(model, pre_tokenizers.WhitespaceSplit(), None, [])
    trainer = make_trainer(tmp_path, tokenizer, ["a b", "b"])
    assert trainer.conditioning.new_token_ids == [8, 9] and trainer.conditioning.vocab_size == 8
    assert assert_served_as_trained(trainer, ["a b", "b"]) == [[9, 0, 3], [9, 3]]


def test_a_vocabulary_with_gaps_is_sampled_whole():
    model = models.WordLevel({"a": 0, "b": 3, "<unk>": 7}, unk_token="<unk>")
    tokenizer = tokenizer_of(model, pre_tokenizers.WhitespaceSplit(), None, [])
    assert QuarkGenerator(tiny_model("gpt2", tokenizer, rows=12), tokenizer, None).vocab_size == 8


def test_a_prompt_with_a_reward_token_is_refused_in_training_and_generation(tmp_path):
    """The tokenizer in `final/` knows the token, the one that a run starts from does not."""
    prompts = ["a", "b <|reward_1|>"]
    error_message(lambda: make_trainer(tmp_path, words(None, []), prompts), "row 2 of the list: ", "<|reward_1|>")
    trainer = make_trainer(tmp_path, words(None, []), [*prompts, "c"], skip_bad_prompts=True)
    assert trainer.prompts.prompts == ["a", "c"]
    assert trainer.prompts.skipped == {"contains a reward token": 1}
    generator = QuarkGenerator(trainer.model, trainer.processing_class, trainer.conditioning)
    error_message(lambda: generator.encode(["b <|reward_1|>"]), "must not contain reward tokens")


# EOS


def test_a_completion_ends_at_the_same_ids_everywhere(tmp_path):
    tokenizer = tiny_tokenizer()  # Its EOS is 256.
    model = tiny_model("gpt2", tokenizer)
    model.generation_config.eos_token_id = [7, 50256]  # One of them is outside the vocabulary.
    trainer = make_trainer(tmp_path, tokenizer, ["a", "b"], model, min_completion_length=2)
    assert trainer.end_ids == [7, 256]
    trainer.train()
    final = trainer.save_final()
    assert sorted(AutoModelForCausalLM.from_pretrained(final).generation_config.eos_token_id) == [7, 256]
    assert sorted(QuarkGenerator.from_pretrained(final).end_ids) == [7, 256]


def test_the_eos_of_the_tokenizer_ends_the_completions_of_the_final_model_too(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    trainer = make_trainer(tmp_path, tokenizer, ["a", "b"], model)
    trainer.explore(0)
    trainer.quantize(0)
    assert AutoModelForCausalLM.from_pretrained(trainer.save_final()).generation_config.eos_token_id == [256]


# The check


LETTERS = {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
PIECES = [("<unk>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("a", -1.0), ("b", -1.5)]
CLASSES = {
    "GPT-NeoX": lambda: GPTNeoXTokenizer(vocab={"<|endoftext|>": 0, "<|padding|>": 1, "!!": 2, **LETTERS}, merges=[]),
    "RoBERTa": lambda: RobertaTokenizer(
        vocab={"<s>": 0, "<pad>": 1, "</s>": 2, **LETTERS, "<unk>": 259, "<mask>": 260}, merges=[]
    ),
    "BERT": lambda: BertTokenizer(
        vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, "##b": 6, "b": 7}
    ),
    "Gemma": lambda: GemmaTokenizer(vocab={"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4, "b": 5}, merges=[]),
    "T5": lambda: T5Tokenizer(vocab=PIECES, extra_ids=2),
    "XLNet": lambda: XLNetTokenizer(vocab=PIECES),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_that_rebuild_their_parts_when_they_load_are_steered_too(name, tmp_path):
    tokenizer = CLASSES[name]()
    assert_served_as_trained(make_trainer(tmp_path, tokenizer, ["a b", "ab a"]), ["a b", "ab a"])


def test_a_changed_tokenizer_is_saved_as_it_is(tmp_path):
    """`LlamaTokenizer` makes another normalizer when it loads."""
    tokenizer = LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "A": 6})
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.padding_side, tokenizer.model_max_length = "left", 77
    trainer = make_trainer(tmp_path, tokenizer, ["A b", "a"])
    assert_served_as_trained(trainer, ["A b", "a"])
    served = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert (served.padding_side, served.model_max_length, served.eos_token) == ("left", 77, "</s>")


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer with code of its own, which `final/` does not have."""

    def _encode_plus(self, text, *args, **kwargs):
        text = text.upper() if isinstance(text, str) else [one.upper() for one in text]
        return super()._encode_plus(text, *args, **kwargs)


def test_a_tokenizer_that_changes_when_it_is_saved_and_loaded_is_refused_in_one_line(tmp_path):
    tokenizer = Shouting(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    message = error_message(lambda: make_trainer(tmp_path, tokenizer, ["x b", "a"]), "must give the ids of training")
    assert "'x b'" in message and "save_pretrained" in message
    assert not (tmp_path / "run" / "pool").exists()


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_sampling(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError("no vocabulary file\nat all")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    message = error_message(lambda: make_trainer(tmp_path, words(None, []), ["a", "b"]), "no vocabulary file")
    assert "at all" not in message


def test_a_tokenizer_without_unk_skips_what_it_cannot_encode(tmp_path):
    model = models.WordLevel({"a": 0, "b": 1}, unk_token="<none>")
    tokenizer = tokenizer_of(model, pre_tokenizers.WhitespaceSplit(), None, [])
    error_message(lambda: make_trainer(tmp_path, tokenizer, ["a", "a x"]), "row 2 of the list: ", "tokenizer refuses")
    trainer = make_trainer(tmp_path, tokenizer, ["a b", "a x", "b"], skip_bad_prompts=True)
    assert trainer.prompts.skipped == {"refused by the tokenizer": 1}
    assert assert_served_as_trained(trainer, ["a b", "b"]) == [[3, 0, 1], [3, 1]]


# Random tokenizers


def difference(seed: str, directory) -> str | None:
    """Steer a random tokenizer, save it and load it; describe the first text whose ids are not those of training."""
    tokenizer, texts = random_tokenizer(seed)
    used_ids = 1 + max(tokenizer.get_vocab().values())
    rows = used_ids if int(seed.split("-")[1]) % 3 else used_ids + 7
    conditioning, extended, model = add_reward_tokens(tokenizer, rows=rows)
    steered = conditioning.steer_tokenizer(extended)
    before, _ = surrounding_ids(tokenizer)
    ids = try_encode_prompts(tokenizer, texts, empty_ids=before)
    try:
        prompts = load_prompts(texts, skip_bad=True).encode(tokenizer, max_length=200, skip_bad=True)
        steered = check_served_ids(tokenizer, steered, conditioning, model.config, prompts)
    except UserError as error:
        return f"refused: {error}"
    model.config.save_pretrained(directory)
    steered.save_pretrained(directory)
    served = AutoTokenizer.from_pretrained(directory)
    for text, plain_ids in zip(texts, ids, strict=True):
        if isinstance(plain_ids, RefusedText):  # A tokenizer without UNK.
            continue
        trained = conditioning.prefix(plain_ids, conditioning.best)
        if (found := served(text)["input_ids"]) != trained:
            return f"{text!r}: trained {trained}, served {found}"
    return chat_difference(tokenizer, texts, rows)


# With and without BOS, blanks and EOS. A tokenizer without BOS or EOS leaves them out.
SHORT_TEMPLATES = (
    CHATML,
    "{{ bos_token or '' }}" + CHATML,
    " {{ bos_token or '' }} {% for m in messages %}{{ m.content }} {% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ eos_token or '' }}{% endfor %}",
)


def chat_difference(tokenizer, texts: list[str], rows: int) -> str | None:
    """Steer the chat template of a random tokenizer; describe the first chat whose ids are not those of training."""
    tokenizer.chat_template = SHORT_TEMPLATES[rows % len(SHORT_TEMPLATES)]
    conditioning, extended, _ = add_reward_tokens(tokenizer, rows=rows)
    if problem := find_ambiguity(tokenizer, conditioning):
        assert "\n" not in problem
        return None
    served = conditioning.steer_tokenizer(extended)
    chats = [[{"role": "user", "content": text}] for text in texts]
    trained = try_encode_prompts(tokenizer, chats)
    for chat, plain_ids, found in zip(chats, trained, try_encode_prompts(served, chats), strict=True):
        if isinstance(plain_ids, list) and found != conditioning.prefix(plain_ids, conditioning.best):
            return f"{chat}: plain {plain_ids}, served {found}"
    return None


@pytest.mark.parametrize(
    ("named", "single_word", "words"),
    [({"unk_token": "<s>"}, False, "must not put UNK first"), ({}, True, "added tokens that match single words only")],
)
def test_a_run_on_chats_whose_start_is_ambiguous_is_refused(tmp_path, named, single_word, words):
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    tokenizer.add_tokens([AddedToken("<s>", special=True, single_word=single_word)])
    if named:
        tokenizer.unk_token = "<s>"
        piece = {"id": "<s>", "ids": [257], "tokens": ["<s>"]}
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[piece])
    chats = [{"messages": [{"role": "user", "content": text}]} for text in ("a", "b")]
    error_message(lambda: make_trainer(tmp_path, tokenizer, chats), words, "Train on text")
    make_trainer(tmp_path, tokenizer, ["a", "b"])


def test_a_tokenizer_that_drops_unknown_characters_is_refused_for_chats():
    """BOS after a dropped text would count as the start of the chat in training, and not in the template."""
    model = models.BPE(vocab={"<s>": 0, "a": 1, "b": 2}, merges=[])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), bos_token="<s>", chat_template=CHATML)
    conditioning, _, _ = add_reward_tokens(tokenizer, rows=3)
    assert conditioning.start_ids == (0,)
    assert find_ambiguity(tokenizer, conditioning) == "drop characters that it does not know"


def check_random_tokenizers(count: int, directory) -> None:
    problems = {f"{SEED}-{i}": difference(f"{SEED}-{i}", directory / str(i)) for i in range(count)}
    problems = {seed: problem for seed, problem in problems.items() if problem}
    refused = {seed: problem for seed, problem in problems.items() if problem.startswith("refused")}
    assert problems == refused
    assert all("\n" not in problem for problem in refused.values())
    assert len(refused) <= count * 0.02, refused


def test_random_tokenizers_give_the_same_ids_when_saved_and_loaded(tmp_path):
    """`QUARKRL_TOKENIZER_SEED=1 pytest …` takes others."""
    check_random_tokenizers(60, tmp_path)


@pytest.mark.slow
def test_a_thousand_random_tokenizers_give_the_same_ids_when_saved_and_loaded(tmp_path):
    check_random_tokenizers(1000, tmp_path)
