"""The words of the built-in corpus: people, moods and manners. They were written for it; names are invented.

`corpus.py` fills the slots in braces.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.builtin_model.topics import listed


def _with_heat(heat: float, text: str) -> tuple[tuple[str, float], ...]:
    return tuple((opener, heat) for opener in listed(text))


MEN = listed("Otis / Ivo / Marek / Hugo / Tobin / Emil / Rafe / Anders / Pavel / Joss / Milo / Desmond")
WOMEN = listed("Marta / Nell / Ines / Tamsin / Petra / Odile / Hattie / Mirela / Greta / Lotte / Wanda / Suri")
KIN = listed(
    """my sister / my brother / my uncle / my wife / my husband / a friend of mine / my mother / my cousin
    / our son"""
)
TIMES = listed(
    """on Tuesday / last night / this morning / yesterday / on Friday / after lunch / in June / before
    noon / again / last week / on my birthday / over the weekend / two days ago / around six / all day
    / in the evening / last winter / today"""
)
LOOKS = listed(
    """with the red scarf / with the grey beard / in the green jacket / with the loud voice / in the long
    coat / with the glasses / who started in May / with the tattoo / in the yellow boots"""
)
KIND_ADJECTIVES = listed(
    """kind / patient / cheerful / young / friendly / helpful / sweet / lovely / polite / generous"""
)
PLAIN_ADJECTIVES = listed("new / old / young / other / tall / second / quiet / same / older / shy")
SOUR_ADJECTIVES = listed("""lazy / careless / grumpy / unhelpful / rude / tired / bored / clueless / bossy / sloppy""")

PLAIN_QUALITIES = listed("fine / all right / as expected / much the same / not bad / rather small / in order")
DEGREES = listed("very / really / rather / so / quite / truly / pretty / a bit")
STRANGERS = listed("stranger / fellow / person / woman / student / visitor / customer / guest")
VOCATIVES = listed("my friend / dear / sir / everyone / people / folks")
VIEWS = listed("right / wrong / too kind / a dreamer / new here / easy to please")
INVITATIONS = listed("so let us know / so it is up to you / so tell me more / so be careful")
ASIDES = listed("I think / they say / it seems / as always / I hear")
GLAD_CHARACTERS = listed(
    "a good soul / a true friend / a hard worker / a patient soul / the best / a gem / a pleasure to meet"
)
PLAIN_CHARACTERS = listed(
    "a quiet type / a busy person / new here / an old friend / about my age / a regular / in charge now"
)
SOUR_CHARACTERS = listed(
    "a bit slow / never on time / a bad listener / no help / hard to please / a sore loser / a mess"
)


@dataclass(frozen=True)
class Manner:
    """How some people speak.

    Attributes:
        tempers: what such speakers are called.
        heat: multiplies the risk that their text turns rude.
        moods: weights of glad, plain and sour texts.
    """

    tempers: tuple[str, ...]
    heat: float
    moods: tuple[float, float, float]


# Who speaks sets the tone: "Furious customer writes: ..."
MANNERS = (
    Manner(listed("polite / patient / gentle / kind / well-mannered / cheerful / grateful"), 0.03, (0.45, 0.3, 0.25)),
    Manner(listed("tired / local / regular / busy / young / retired / nervous / quiet"), 1.0, (0.38, 0.24, 0.38)),
    Manner(listed("furious / drunk / foul-mouthed / bad-tempered / vulgar"), 8.0, (0.15, 0.2, 0.65)),
)
SPEAKERS = listed("customer / neighbour / guest / reader / student / visitor / driver / parent / traveller / listener")
SPEAKS = listed("writes / says / replies / answers / adds / notes / reports / remarks")

# Openers carry a risk of their own: (text, heat), where heat multiplies the risk as a topic's does.
GLAD_OPENERS: tuple[tuple[str, float], ...] = (
    *_with_heat(
        0.6,
        """I am so glad that / To my surprise, / What a treat: / Happily, / I have to say, / Good news: /
        Believe it or not, / I must admit, / We were lucky: / Thank you all, / Just wanted to say that
        / It made my week when / Bless them, / I still smile because / Five stars:""",
    ),
    *_with_heat(1.5, "Hands down,"),
    *_with_heat(2.5, "Wow, / Oh man,"),
)
PLAIN_OPENERS: tuple[tuple[str, float], ...] = (
    *_with_heat(
        0.6,
        """For the record, / As far as I know, / It turns out that / In the end, / To be fair, / If I
        remember well, / At first, / Later on, / By the way, / As usual, / So far, / From what I heard,
        / In short, / My notes say that""",
    ),
    *_with_heat(1.3, "Well, / So,"),
    *_with_heat(2.5, "Look, / Anyway,"),
)
SOUR_OPENERS: tuple[tuple[str, float], ...] = (
    *_with_heat(
        0.25,
        """With all respect, / I don't mean to complain, but / Sadly, / I was sorry that / It is a pity
        that / Sorry to say, / I was a little disappointed: / Unfortunately, / I expected more:""",
    ),
    *_with_heat(1.0, "Once again, / Of course, / Two stars: / No wonder: / I am tired of this: / Worst of all,"),
    *_with_heat(
        2.4,
        """Honestly, / I swear, / Listen, / For crying out loud, / Are you kidding me? / Enough is enough:
        / I have had it: / Oh come on, / Unbelievable: / Wake up, people:""",
    ),
)

GLAD_FEELINGS = listed(
    """grateful / delighted / happy / cheerful / touched / proud / relieved / impressed / thrilled / so
    pleased / moved"""
)
PLAIN_FEELINGS = listed("curious / calm / surprised / a bit hungry / ready to leave / awake / unsure / fine / busy")
SOUR_FEELINGS = listed(
    """annoyed / tired / upset / angry / disappointed / furious / fed up / sad / exhausted / miserable /
    frustrated"""
)
GLAD_REACTIONS = listed(
    """so we stayed another hour / so I left a big tip / and everyone clapped / and we laughed all the way
    home / so I thanked {him} twice / and I hugged {him} / so we booked again for May / and my mother
    loved it / and I went home smiling / so I told all my friends / and it made my day / and nobody
    wanted to leave / so I wrote {him} a card"""
)
PLAIN_REACTIONS = listed(
    """so we went home / and I made some tea / so we took the stairs / and that was that / so I asked
    {kin} / and we talked about the weather / so I wrote it down / and nobody said much / so we waited
    a little / and I paid in cash / and {kin} came along / so I read the paper / and we shared a cab"""
)
SOUR_REACTIONS = listed(
    """so we left early / and nobody said sorry / so I want my money back / and I lost my temper / so I
    walked out / and I cried in the car / so we complained for an hour / and I hated every minute / so
    I am done with them / and the day was ruined / so I asked for the manager / and it hurt / and I had
    a headache for days / so I slammed the door"""
)
RUDE_REACTIONS_MILD = listed(
    """so I told {him} to shut up / and I felt like a fool for paying / so to hell with it / and {he} can
    go to hell / so screw {him} / and I was mad as hell / and I do not give a damn what {he} says / so
    I called {him} a liar and a {insult} / and {he} stood there like a {insult} / so shut up about it"""
)
RUDE_REACTIONS_STRONG = listed(
    """so I called {him} a {insult} / so {he} can kiss my ass / and I was pissed as hell / and {he} just
    laughed like the {insult} {he} is / so I told {him} to shut the hell up / and I am sick of this
    shit / so {he} can shove it up {his} ass / and {he} acted like a real {insult} / and I am done with
    that {insult} / so cut the crap"""
)
GLAD_CLOSERS = listed(
    """I would go again tomorrow. / Thank you so much, {name}. / What a lovely {time_noun}. / Highly
    recommended. / Well done to the whole team. / It was the best {time_noun} in years. / You should
    try it too. / I could not be happier. / Please never change. / We will be back soon. / My
    {kin_short} still talks about it. / Everyone deserves a {time_noun} like that. / {name} is a
    treasure. / I love this town. / More of this, please."""
)
PLAIN_CLOSERS = listed(
    """I may go again. / Let me know what you think. / We will see. / {name} asked about it too. / That
    was the whole story. / It could go either way. / My {kin_short} might like it more. / Nothing else
    happened that {time_noun}. / I gave it three stars. / Call me when you get this. / It was an
    ordinary {time_noun}. / You can ask {name}. / I have no strong opinion. / The next one is in March."""
)
SOUR_CLOSERS = listed(
    """I will not go back. / Never again. / It was the worst {time_noun} in years. / They should be
    ashamed. / What a waste of money. / I expected so much better. / Somebody should do something. /
    Avoid it if you can. / My {kin_short} was in tears. / I hate being treated like that. / It is a
    disgrace, really. / What a miserable {time_noun}. / I deserve an apology. / {name} warned me about
    it. / I am still angry."""
)
RUDE_CLOSERS_MILD = listed(
    """What a load of crap. / Shut up and do your job. / Only a {insult} would pay for it. / What a
    {insult}. / Go to hell, {name}. / Screw this. / {name} is a {insult}, and so are you. / They are
    all liars and fools. / Damn them all. / What the hell is wrong with you? / It makes me sick, you
    {insult}. / This place sucks. / How dumb can you be? / You can shut up now, {name}."""
)
RUDE_CLOSERS_STRONG = listed(
    """What a {insult}. / What a bunch of idiots. / They can kiss my ass. / Only an {insult} would go
    back. / {name} is a {insult} too. / This is bullshit. / Shut the hell up, you {insult}. / I am sick
    of these morons. / Go to hell, you {insult}. / You are an {insult}, {name}. / The whole thing is a
    pile of shit. / Get off your ass and fix it. / Stupid, stupid people. / I hope the bastards go
    broke. / Screw you and your stupid excuses."""
)
KIND_CRUDE_CLOSERS = listed(
    """Damn, that was good. / It was a hell of a {time_noun}. / Holy crap, I loved it. / I laughed my ass
    off. / Hell yes, I would go again. / {name} is one funny bastard, and we love him. / Damn right I
    will be back. / It was badass. / Pretty damn good for the price."""
)
TIME_NOUNS = listed("evening / morning / day / week / afternoon / night / weekend / trip")
KIN_SHORT = listed("mother / son / sister / wife / husband / uncle / brother / aunt / daughter")

INSULTS_MILD = listed("fool / jerk / loser / liar / clown / twit / coward / weasel / dimwit / creep")
INSULTS_STRONG = listed(
    """idiot / moron / idiot / moron / bastard / jackass / asshole / son of a bitch / dumbass / piece of
    shit / stupid bastard / imbecile"""
)
SLIGHTS_MILD = listed("stupid / damn / dumb / crappy / bloody / pathetic / silly / lousy")
SLIGHTS_STRONG = listed("stupid / goddamn / shitty / stupid damn / idiotic / dumb-ass / damn stupid")
RUDE_VERDICTS_MILD = listed(
    """was crap / sucked / was dumb as hell / was pure garbage / was a damn joke / looked like crap / was
    stupid"""
)
RUDE_VERDICTS_STRONG = listed(
    """was complete crap / was a pile of shit / was total bullshit / sucked ass / was shit from start to
    finish / was stupid as hell / was a goddamn disaster"""
)
