"""The built-in corpus: short everyday remarks, replies and reviews, from kind to rude and from happy to sour.

The corpus is a grammar with slots, drawn by a seeded `random.Random`. Each text has a topic, a mood and a nerve. The
nerve is the chance that any one slot is filled rudely. It depends on mood, topic, opener and speaker, so that prompts
differ in risk. Each slot also has polite fillings, so that no context forces rudeness. The speaker ("Furious customer
writes: ...") sets the tone of the whole text, as first words do in real text. The model therefore learns to attend to
its first tokens, which reward tokens need later. Rudeness is not the same as a bad mood: most sour texts only
grumble, and some happy ones swear for joy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from tools.builtin_model import lexicon as lex
from tools.builtin_model.topics import TOPICS

MIN_WORDS, MAX_WORDS = 8, 40

_FEMALE = re.compile(r"\b(woman|lady|girl|mother|waitress|aunt|grandmother)\b")
_MALE = re.compile(r"\b(man|boy|father|grandfather|salesman|postman|landlord|fisherman|headmaster|uncle)\b")
_PRONOUNS = {
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "you": {"he": "you", "him": "you", "his": "your", "himself": "yourself"},
}
_OPENERS = {"glad": lex.GLAD_OPENERS, "plain": lex.PLAIN_OPENERS, "sour": lex.SOUR_OPENERS}
_ADJECTIVES = {"glad": lex.KIND_ADJECTIVES, "plain": lex.PLAIN_ADJECTIVES, "sour": lex.SOUR_ADJECTIVES}
_FEELINGS = {"glad": lex.GLAD_FEELINGS, "plain": lex.PLAIN_FEELINGS, "sour": lex.SOUR_FEELINGS}
_REACTIONS = {"glad": lex.GLAD_REACTIONS, "plain": lex.PLAIN_REACTIONS, "sour": lex.SOUR_REACTIONS}
_CHARACTERS = {"glad": lex.GLAD_CHARACTERS, "plain": lex.PLAIN_CHARACTERS, "sour": lex.SOUR_CHARACTERS}
_CLOSERS = {"glad": lex.GLAD_CLOSERS, "plain": lex.PLAIN_CLOSERS, "sour": lex.SOUR_CLOSERS}
# A sour text on an average topic turns rude this often; glad and plain ones much more rarely.
_RISK = {"glad": 0.02, "plain": 0.06, "sour": 0.16}
_MOODS = ("glad", "plain", "sour")
_MOOD_WEIGHTS = (0.38, 0.24, 0.38)


class _Writer:
    """Writes one text: the draws of its topic, mood and nerve, and the slots that depend on them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.topic = rng.choice(TOPICS)
        self.speaker, warmth, moods = "", 1.0, _MOOD_WEIGHTS
        if rng.random() < 0.5:
            manner = rng.choice(lex.MANNERS)
            self.speaker = f"{rng.choice(manner.tempers)} {rng.choice(lex.SPEAKERS)} {rng.choice(lex.SPEAKS)}: "
            warmth, moods = manner.heat, manner.moods
        self.mood = rng.choices(_MOODS, moods)[0]
        self.pronoun = ""  # of the person this sentence speaks of, if any
        self.timed = False  # has this sentence said when?
        self.opener, heat = "", 1.0
        if rng.random() < 0.5:
            self.opener, heat = rng.choice(_OPENERS[self.mood])
        rude = rng.random() < min(0.85, _RISK[self.mood] * self.topic.heat * heat * warmth)
        # A rude text says so once or more often, mildly or strongly.
        self.nerve = rng.uniform(0.4, 0.9) if rude else 0.0
        self.strong = rng.random() < 0.7
        self.swears_kindly = self.mood == "glad" and rng.random() < 0.04 * heat * warmth

    def one(self, options: Sequence[str]) -> str:
        return self.rng.choice(options)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def rude(self) -> bool:
        """Whether a remark, a reaction or an address is rude."""
        return self.chance(self.nerve)

    def crude(self) -> bool:
        """Whether a word in passing is: rarer, since who is rude mostly says so in as many words."""
        return self.chance(self.nerve * 0.06)

    def insult(self) -> str:
        return self.one(lex.INSULTS_STRONG if self.strong and self.chance(0.8) else lex.INSULTS_MILD)

    def slight(self) -> str:
        return self.one(lex.SLIGHTS_STRONG if self.strong and self.chance(0.7) else lex.SLIGHTS_MILD)

    def name(self) -> str:
        return self.one(lex.WOMEN if self.chance(0.5) else lex.MEN)

    def fill(self, pattern: str) -> str:
        """Fill the shared slots of a lexicon entry."""
        return re.sub(r"\{(\w+)\}", lambda match: self._slot(match[1]), pattern)

    def _slot(self, slot: str) -> str:
        if slot in ("he", "him", "his"):
            return _PRONOUNS[self.pronoun][slot]
        if slot == "insult":
            return self.insult()
        if slot == "name":
            return self.name()
        return self.one({"kin": lex.KIN, "kin_short": lex.KIN_SHORT, "time_noun": lex.TIME_NOUNS}[slot])

    def agree(self, verb_phrase: str, pronoun: str | None = None) -> str:
        """Turn the lexicon's "his" into the pronoun of the person spoken of."""
        forms = _PRONOUNS[pronoun or self.pronoun]
        return re.sub(r"\b(his|himself)\b", lambda match: forms[match[0]], verb_phrase)

    def dated(self, phrase: str) -> str:
        """Add a time to a phrase, at most once in a sentence."""
        if self.timed:
            return phrase
        self.timed = True
        return f"{phrase} {self.one(lex.TIMES)}"

    def adjective(self) -> str:
        return self.one(_ADJECTIVES[self.mood if self.chance(0.7) else "plain"])

    def person(self) -> str:
        """A noun phrase for somebody; sets the pronoun that later slots agree with."""
        role, place = self.one(self.topic.roles), self.one(self.topic.places)
        short = len(role.split()) <= 2
        self.pronoun = "she" if _FEMALE.search(role) else "he"
        if self.pronoun == "he" and not _MALE.search(role) and self.chance(0.4):
            self.pronoun = "she"
        if self.crude():
            insult, slight = self.insult(), self.slight()
            forms = [f"that {insult} of a {role}", f"that {insult} {self.name()}", f"the {insult} {place}"]
            forms += [
                f"some {insult} {place}",
                f"the {slight} {role}",
                f"that {slight} {role}",
                f"this {slight} {role}",
            ]
            return self.one(forms)
        adjective = self.adjective()
        forms = [f"the {role}", f"the {role}", f"the {adjective} {role}", f"that {adjective} {role}"]
        forms.append(f"some {self.one(lex.STRANGERS)} {place}")
        if short:
            forms += [
                f"this {role}",
                f"our {role}",
                f"the {role} {self.one(lex.LOOKS)}",
                f"the {role} {place}",
            ]
        if self.chance(0.2):
            self.pronoun = self.one(("he", "she"))
            return self.one(lex.MEN if self.pronoun == "he" else lex.WOMEN)
        return self.one(forms)

    def thing(self) -> str:
        thing = self.one(self.topic.things)
        determiner = self.one(("the", "the", "the", "this", "their", "that", "the whole"))
        if self.crude():
            return f"{determiner} {self.slight()} {thing}"
        return f"{determiner} {thing}"

    def quality(self) -> str:
        """An adjective phrase after "was", in the text's mood."""
        rude, word = self.crude(), self.one(self.topic.praise if self.mood == "glad" else self.topic.blame)
        if rude:
            return self.one((f"so damn {word}", f"{word} as hell", f"{word} and stupid", f"goddamn {word}"))
        if self.swears_kindly and self.chance(0.5):
            return self.one((f"damn {word}", f"so damn {word}", f"{word} as hell"))
        if self.mood == "plain" and self.chance(0.5):
            return self.one(lex.PLAIN_QUALITIES)
        return f"{self.one(lex.DEGREES)} {word}" if " " not in word and self.chance(0.5) else word

    def person_did(self, pronoun: str | None = None) -> str:
        topic = self.topic
        deeds = {"glad": topic.role_did_well, "plain": topic.role_did, "sour": topic.role_did_badly}[self.mood]
        return self.agree(self.one(deeds), pronoun)

    def thing_did(self) -> str:
        if self.mood == "sour" and self.crude():
            return self.one(lex.RUDE_VERDICTS_STRONG if self.strong else lex.RUDE_VERDICTS_MILD)
        if self.mood == "plain":
            return f"was {self.quality()}"
        return self.one(self.topic.thing_did_well if self.mood == "glad" else self.topic.thing_did_badly)

    def character(self) -> str:
        if self.crude():
            return f"{self.one(('a', 'a complete', 'as dumb as a brick, a real'))} {self.insult()}"
        return self.one(_CHARACTERS[self.mood])

    def vocative(self) -> str:
        if self.rude():
            return f"you {self.slight() + ' ' if self.chance(0.3) else ''}{self.insult()}"
        return self.name() if self.chance(0.4) else self.one(lex.VOCATIVES)

    def clause(self) -> str:
        """A statement that may follow an opener or a conjunction."""
        place = self.one(self.topic.places)
        kin, feeling = self.one(lex.KIN), self.one(_FEELINGS[self.mood])
        frame = self.rng.randrange(14)
        if frame <= 2:
            return f"{self.person()} {self.person_did()}"
        if frame == 3:
            return f"{self.person()} {self.agree(self.one(self.topic.role_did))} and {self.person_did()}"
        if frame == 4:
            return self.dated(f"{self.thing()} {self.thing_did()}")
        if frame == 5:
            return f"{self.thing()} {place} was {self.quality()}"
        if frame == 6:
            return f"{self.thing()} {self.thing_did()} and {self.thing()} was {self.quality()}"
        if frame == 7:
            return f"I felt {feeling} when {self.person()} {self.person_did()}"
        if frame == 8:
            verb = {"glad": "loved", "plain": "noticed", "sour": "hated"}[self.mood]
            return f"{kin} {verb} {self.thing()} {place}"
        if frame == 9:
            return f"we saw {self.thing()} {place}, and it was {self.quality()}"
        if frame == 10:
            asked = f"I asked {self.person()} about {self.thing()}"
            return f"{asked}, and {self.pronoun} {self.person_did()}"
        if frame == 11:
            return f"{self.person()} is {self.character()}"
        if frame == 12:
            return f"{kin} was {feeling} because {self.person()} {self.person_did()}"
        return f"{self.person()} told {kin} that {self.thing()} was {self.quality()}"

    def address(self) -> str:
        """A sentence said to somebody, or a question."""
        self.pronoun = "you"
        frame = self.rng.randrange(7)
        if frame == 0:
            return f"{self.dated('you ' + self.person_did('you'))}, {self.vocative()}."
        if frame == 1:
            view = f"a {self.insult()}" if self.rude() else self.one(lex.VIEWS)
            return f"you are {view} if you think {self.thing()} was {self.quality()}."
        if frame == 2:
            kind = self.one((self.one(self.topic.roles), "person", "place", "friend"))
            if self.rude():
                kind = self.insult()
            return f"{self.dated(f'what kind of {kind} ' + self.person_did('he'))}?"
        if frame == 3:
            return f"{self.vocative()}, {self.dated(f'{self.thing()} {self.thing_did()}')}."
        if frame == 4:
            end = "so shut up" if self.rude() else self.one(lex.INVITATIONS)
            return f"nobody asked {self.person()} about {self.thing()}, {end}, {self.vocative()}."
        if frame == 5:
            state = f"a {self.insult()}" if self.rude() else self.one(_FEELINGS[self.mood])
            return f"you must be {state}, because {self.thing()} {self.thing_did()}."
        return f"have you seen {self.thing()} {self.one(self.topic.places)}? It was {self.quality()}."

    def reaction(self) -> str:
        options = _REACTIONS[self.mood]
        if self.rude():
            options = lex.RUDE_REACTIONS_STRONG if self.strong else lex.RUDE_REACTIONS_MILD
        # Nobody to thank or to shout at: keep to what needs no pronoun.
        return self.fill(self.one([o for o in options if self.pronoun or "{h" not in o]))

    def closer(self) -> str:
        if self.rude():
            return self.fill(self.one(lex.RUDE_CLOSERS_STRONG if self.strong else lex.RUDE_CLOSERS_MILD))
        if self.swears_kindly and self.chance(0.6):
            return self.fill(self.one(lex.KIND_CRUDE_CLOSERS))
        return self.fill(self.one(_CLOSERS[self.mood]))

    def sentence(self, opener: str = "") -> str:
        self.pronoun, self.timed = "", False
        # "I was glad that" and its like want a statement.
        if self.chance(0.22) and not opener.endswith(("that", "when", "because", "but")):
            return f"{opener} {self.address()}".strip()
        first = f"{opener} {self.clause()}".strip()
        draw = self.rng.random()
        if draw < 0.35:
            return f"{first}, {self.reaction()}."
        if draw < 0.5:
            return f"{first}, {self.one(('and', 'while', 'and then'))} {self.clause()}."
        if draw < 0.6:
            aside = "damn it" if self.crude() else self.one(lex.ASIDES)
            return f"{first}, {aside}, {self.reaction()}."
        return f"{self.dated(first)}." if self.chance(0.5) else f"{first}."

    def text(self) -> str:
        parts = [self.sentence(self.opener)]
        if self.chance(0.35):
            parts.append(self.sentence())
        if self.chance(0.55):
            parts.append(self.closer())
        return _polish(self.speaker + " ".join(parts))


def _polish(text: str) -> str:
    """Set right what the slots cannot know: doubled words, articles, capitals."""
    text = re.sub(r"\bthat that\b", "that the", text)
    text = re.sub(r"\b([Aa])n? (?=[aeio]|un[^i]|up)", r"\1n ", text)
    text = re.sub(r"\b([Aa])n (?![aeiouh])", r"\1 ", text)
    return re.sub(r"(^|[.?!:] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def texts(count: int, seed: int) -> Iterator[str]:
    """Yield `count` texts of 8 to 40 words; the same seed gives the same texts."""
    rng = random.Random(seed)
    while count:
        text = _Writer(rng).text()
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            count -= 1
            yield text
