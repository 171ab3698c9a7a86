"""The tokenizer of eight letters that most small runs use, and prompts for it."""

from __future__ import annotations

from helpers.tiny_models import tiny_tokenizer

# Ids: a to h are 0 to 7, <unk> 8, <eos> 9; then the reward tokens.
TOKENIZER = tiny_tokenizer(words=[*"abcdefgh"])
EOS_ID, VOCAB = 9, 10
PROMPTS = ["a b", "c", "d e f g h", "h h", "b a c", "e e e e", "f", "g a"]
