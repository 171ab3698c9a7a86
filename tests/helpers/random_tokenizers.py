"""Tokenizers built at random from the parts that real ones are made of."""

from __future__ import annotations

import random
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghij .,é北🙂\n▁"
NAMED = {
    "bos_token": ["<s>", "<bos>", "<|begin:of$text|>", "[CLS]"],
    "eos_token": ["</s>", "<eos>", "<|endoftext|>", "[SEP]"],
    "pad_token": ["<pad>", "[PAD]"],
    "unk_token": ["<unk>", "[UNK]"],
}
OTHERS = ["[gMASK]", "<sop>", "<|im_start|>", "<|im_end|>", "$x", "a:0", "<mask>"]


def random_tokenizer(seed: str) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Build a tokenizer at random; return it with texts that try its parts.

    Args:
        seed: determines the result.
    """
    rng = random.Random(seed)
    named = {name: rng.choice(choices) for name, choices in NAMED.items() if rng.random() < 0.6}
    others = rng.sample(OTHERS, rng.randint(0, 4))
    backend, unknown = rng.choice([_bpe, _word_level, _unigram, _word_piece])(rng, named, others)
    if unknown is None:
        named.pop("unk_token", None)
    backend.normalizer = _normalizer(rng)
    specials = [*(token for name, token in named.items()), *others]
    rng.shuffle(specials)
    flags = {token: {flag: rng.random() < 0.25 for flag in ("lstrip", "rstrip", "single_word")} for token in specials}
    backend.add_special_tokens([AddedToken(token, normalized=False, **flags[token]) for token in specials])
    has_gaps = backend.get_vocab_size() <= max(backend.get_vocab().values())
    for word in [] if has_gaps else rng.sample(["foo", "a b", "bar"], rng.randint(0, 2)):
        flags_of_word = {flag: rng.random() < 0.3 for flag in ("lstrip", "rstrip", "single_word", "normalized")}
        backend.add_tokens([AddedToken(word, **flags_of_word)])
    backend.post_processor = _post_processor(rng, backend, specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    return tokenizer, _texts(rng, specials)


def _texts(rng: random.Random, specials: list[str]) -> list[str]:
    pieces = [*CHARACTERS, " ", "  ", "foo", "a b", "bar", "hello", *specials]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(12)]
    return [*texts, *specials, *(token * 2 + " a" for token in specials)]


def _vocabulary(rng: random.Random, tokens: list[str], specials: list[str], unknown: str | None) -> dict[str, int]:
    """Number tokens; one in three vocabularies has gaps. Special tokens are among them, or get the ids behind them."""
    step = rng.choice([1, 1, 3])
    # The tokenizers library numbers added tokens by counting, so that they would collide with a vocabulary with gaps.
    inside = specials if step > 1 or rng.random() < 0.5 else []
    front = rng.random() < 0.5
    tokens = [*(inside if front else []), *tokens, *([unknown] if unknown else []), *inside]
    return {token: i * step for i, token in enumerate(dict.fromkeys(tokens))}


def _bpe(rng: random.Random, named: dict[str, str], others: list[str]) -> tuple[Tokenizer, str | None]:
    kind = rng.choice(["byte level", "byte fallback", "characters"])
    unknown = named.get("unk_token") if kind != "byte level" else None
    if kind == "byte level":
        tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokens = rng.choice([list("ACGT"), list(CHARACTERS.replace(" ", ""))])
        tokens += [f"<0x{byte:02X}>" for byte in range(256)] if kind == "byte fallback" else []
    pairs = [("a", "b"), ("ab", "c"), ("A", "C"), ("▁", "a"), ("Ġ", "a")]
    merges = [pair for pair in pairs if all(part in tokens or part == "ab" for part in pair)]
    tokens += ["".join(pair) for pair in merges]
    vocabulary = _vocabulary(rng, tokens, [*named.values(), *others], unknown)
    options = {"unk_token": unknown, "fuse_unk": rng.random() < 0.5} if unknown else {}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=kind == "byte fallback", **options))
    if kind == "byte level":
        first = rng.random() < 0.5
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=first, use_regex=rng.random() < 0.5)
        backend.decoder = decoders.ByteLevel()
    else:
        _add_metaspace(rng, backend)
    return backend, unknown


def _word_level(rng: random.Random, named: dict[str, str], others: list[str]) -> tuple[Tokenizer, str | None]:
    unknown = named.get("unk_token")
    words = [*"abcdefghij", "foo", "hello", "é", "北", "."]
    backend = Tokenizer(
        models.WordLevel(
            vocab=_vocabulary(rng, words, [*named.values(), *others], unknown), unk_token=unknown or "<none>"
        )
    )
    splits: list[Callable] = [
        pre_tokenizers.WhitespaceSplit,
        pre_tokenizers.Whitespace,
        pre_tokenizers.BertPreTokenizer,
        lambda: pre_tokenizers.Split("", "isolated"),
    ]
    backend.pre_tokenizer = rng.choice(splits)()
    return backend, unknown


def _unigram(rng: random.Random, named: dict[str, str], others: list[str]) -> tuple[Tokenizer, str | None]:
    unknown = named.get("unk_token")
    pieces = [unknown or "<unk-piece>", *CHARACTERS.replace(" ", ""), "▁a", "▁ab", "hello", "ab"]
    scores = [(piece, -1.0 - rng.random()) for piece in dict.fromkeys(pieces)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0 if unknown else None))
    _add_metaspace(rng, backend)
    return backend, unknown


def _word_piece(rng: random.Random, named: dict[str, str], others: list[str]) -> tuple[Tokenizer, str | None]:
    unknown = named.setdefault("unk_token", "[UNK]")  # The model needs one.
    letters = "abcdefghijélo北."
    vocabulary = _vocabulary(
        rng, [*letters, *(f"##{letter}" for letter in letters), "hello"], [*named.values(), *others], unknown
    )
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend, unknown


def _add_metaspace(rng: random.Random, backend: Tokenizer) -> None:
    scheme = rng.choice(["first", "always", "never"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=rng.random() < 0.7)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)


def _normalizer(rng: random.Random) -> normalizers.Normalizer | None:
    choices: list[Callable] = [
        normalizers.NFC,
        normalizers.NFKC,
        normalizers.Lowercase,
        normalizers.Strip,
        normalizers.StripAccents,
        lambda: normalizers.Prepend("▁"),
        lambda: normalizers.Replace(Regex(" {2,}"), " "),
        lambda: normalizers.Replace(" ", "▁"),
        normalizers.BertNormalizer,
    ]
    chosen = [make() for make in rng.sample(choices, rng.randint(0, 2))]
    return normalizers.Sequence(chosen) if chosen else None


def _post_processor(rng: random.Random, backend: Tokenizer, specials: list[str]) -> processors.PostProcessor | None:
    """0 to 3 special tokens before and 0 to 2 after, as any of the types that there are."""
    usable = [token for token in specials if not set(token) & set(":$")] if rng.random() < 0.5 else specials
    if not usable or rng.random() < 0.15:
        return rng.choice([None, processors.ByteLevel(trim_offsets=False)])
    id_of = {token: backend.token_to_id(token) for token in usable}
    if rng.random() < 0.25:
        ends = [(token, id_of[token]) for token in rng.choices(usable, k=2)]
        return rng.choice([processors.BertProcessing, processors.RobertaProcessing])(*ends)
    names = {token: f"T{i}" for i, token in enumerate(usable)}
    before, after = (rng.choices(usable, k=rng.randint(0, most)) for most in (3, 2))
    single = [*(names[token] for token in before), "$A", *(names[token] for token in after)]
    template = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B:1"],
        special_tokens=[{"id": name, "ids": [id_of[token]], "tokens": [token]} for token, name in names.items()],
    )
    return processors.Sequence([processors.ByteLevel(), template]) if rng.random() < 0.3 else template
