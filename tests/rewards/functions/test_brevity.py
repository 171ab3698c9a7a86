"""`Brevity`: scores of a few texts, by hand."""

from helpers.errors import error_message

from quarkrl.rewards import resolve


def test_a_score_is_the_share_of_unused_words():
    texts = ["One two.", 'He said "Yes!" ', "cut off", "", " \n", " ".join(["word"] * 50) + "."]
    assert resolve("brevity?max_words=8")(texts) == [0.75, 0.625, 0.5, 0.0, 0.0, 0.0]
    assert resolve("brevity").identity == {"name": "brevity", "max_words": 80}
    error_message(lambda: resolve("brevity?max_words=0"), "must be at least 1")
