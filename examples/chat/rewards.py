"""Rewards of the chat example: friendly answers, and answers that name a fact.

    quarkrl score answers.txt --reward examples/chat/rewards.py:friendly

A completion of a chat is a list of one message, as in TRL.
"""

import re

_FRIENDLY = re.compile(
    r"\b(thanks|thank you|happy|glad|great|wonderful|lovely|enjoy|welcome|congratulations|congrats|good luck|hope|"
    r"of course|sure|sorry to hear|feel free|let me know|take care|well done|fun|love)\b|!",
    re.IGNORECASE,
)


def friendly(completions, **_):
    """The number of different friendly words and exclamation marks, up to two, halved."""
    texts = [message["content"] for (message,) in completions]
    return [min(len({match[0].lower() for match in _FRIENDLY.finditer(text)}), 2) / 2 for text in texts]


def correct(completions, answers, **_):
    """1 if the answer contains one of the accepted answers as words of its own, else 0."""
    texts = [message["content"] for (message,) in completions]
    return [
        float(any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in accepted))
        for text, accepted in zip(texts, answers, strict=True)
    ]
