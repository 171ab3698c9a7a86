"""What the built-in corpus talks about: topics and what happens in them; all names are invented."""

from __future__ import annotations

from dataclasses import dataclass


def listed(text: str) -> tuple[str, ...]:
    """Split "one / two / three" into its entries; line breaks count as spaces."""
    return tuple(entry for entry in (" ".join(part.split()) for part in text.split("/")) if entry)


@dataclass(frozen=True)
class Topic:
    """One thing to talk about.

    `heat` multiplies the risk that a text on it turns rude. `things` and `roles` are nouns that follow "the",
    `places` are prepositional phrases, `praise` and `blame` adjectives; what somebody or something
    did is a verb phrase.
    """

    heat: float
    things: tuple[str, ...]
    roles: tuple[str, ...]
    places: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]
    role_did_well: tuple[str, ...]
    role_did: tuple[str, ...]
    role_did_badly: tuple[str, ...]
    thing_did_well: tuple[str, ...]
    thing_did_badly: tuple[str, ...]


def _topic(heat: float, *lists: str) -> Topic:
    return Topic(heat, *(listed(text) for text in lists))


TOPICS: tuple[Topic, ...] = (
    _topic(  # a restaurant
        1.0,
        "soup / bread / fish pie / menu / coffee / table / lentil stew / cake / wine / bill",
        "waiter / cook / owner / waitress / man at the next table",
        """at the Copper Spoon / in the new place on Brindle Street / at the corner café / by the window /
        in the harbour""",
        "delicious / fresh / generous / warm / tasty",
        "cold / salty / bland / overpriced / greasy",
        """brought us extra bread without being asked / remembered my name / found us a table by the fire
        / packed the leftovers with a smile / explained every dish to my mother""",
        "took our order / wrote the specials on a board / carried the plates inside / poured the water",
        """forgot our order twice / spilled gravy on my coat / argued about the tip / charged us for a
        dish we never had / let the food go cold""",
        "tasted like home / smelled wonderful / came with fresh herbs / was worth every penny",
        "tasted of nothing / arrived an hour late / had a hair in it / came back burnt",
    ),
    _topic(  # the road
        2.2,
        "bus / junction / bike lane / car park / van / traffic light / ring road / ticket machine",
        "driver / cyclist / traffic warden / bus driver / man in the van / taxi driver",
        "at the bridge / on Mill Road / outside the station / in the left lane / near the roundabout",
        "quick / quiet / well marked / smooth / punctual",
        "late / blocked / noisy / packed / slow",
        """waited for the old lady to sit down / waved me across / let everyone merge / helped me change a
        tyre / gave me clear directions""",
        "stopped at the crossing / turned left / checked the tickets / parked by the kerb",
        """cut in front of me / parked across two spaces / leaned on the horn for a full minute / ran the
        red light / drove off while I was running""",
        "came right on time / got us home before dark / moved faster than I expected",
        "broke down again / made everyone late / stood still for forty minutes / swallowed my coins",
    ),
    _topic(  # rented rooms
        2.0,
        "boiler / flat / lease / kitchen sink / heating / front door / deposit / stairwell",
        "landlord / plumber / caretaker / agent / man upstairs / letting clerk",
        "on the third floor / in our building / at Oakmere Court / under the stairs / down the hall",
        "spotless / cosy / bright / warm / well kept",
        "damp / filthy / broken / mouldy / freezing",
        """fixed the leak within the hour / came by with a spare heater / returned every penny / painted
        the hall for us / kept the rent where it was""",
        "came to read the meter / left a note / changed the lock / looked at the ceiling",
        """ignored my calls for a week / kept the deposit / raised the rent again / walked in without
        knocking / blamed us for the leak""",
        "worked like new / kept us warm all winter / stayed dry through the storm",
        "leaked through the ceiling / died in January / smelled of wet dog / fell off its hinges",
    ),
    _topic(  # gadgets
        1.4,
        "phone / charger / Lumo 4 / kettle / screen / update / vacuum / warranty / keyboard",
        "salesman / support agent / technician / clerk / woman on the hotline",
        "at the Tandry store / on the help line / at the repair desk / in the manual / online",
        "reliable / sturdy / handy / fast / clever",
        "flimsy / useless / laggy / faulty / misleading",
        """walked me through every step / replaced it for free / stayed on the line until it worked /
        answered within minutes / refunded me at once""",
        "asked for the serial number / opened the case / sent me a form / read from a script",
        """hung up on me / sold me the wrong cable / lost my receipt / told me to buy a new one / kept me
        on hold for an hour""",
        """lasted all day / did exactly what it promised / survived a fall down the stairs / made life
        easier""",
        "stopped working after a week / overheated on my desk / cracked in my pocket / deleted my photos",
    ),
    _topic(  # post and parcels
        1.5,
        "parcel / box / letter / tracking page / lamp / delivery / label / refund",
        "courier / postman / seller / depot manager / neighbour who signed for it",
        "at the depot / on the doorstep / behind the bins / at the post office / in the hallway",
        "early / well packed / intact / cheap / prompt",
        "crushed / late / soaked / missing / torn",
        """carried it up four floors / waited while I found my keys / wrapped it with care / sent a kind
        note / tracked it down in a day""",
        "rang the bell / scanned the label / left a card / asked for a signature",
        """threw it over the fence / signed for it himself / lied about the delivery / left it in the rain
        / refused to pay me back""",
        "came two days early / arrived without a scratch / looked even better than the picture",
        "went to the wrong town / turned up in pieces / vanished for a month / arrived empty",
    ),
    _topic(  # work
        1.4,
        "meeting / report / schedule / printer / budget / new office / deadline / contract",
        "boss / manager / intern / accountant / colleague / consultant",
        "in the Monday meeting / at the office / on the second floor / on the call / at Harrow and Finch",
        "useful / clear / productive / fair / well planned",
        "pointless / chaotic / endless / confusing / rushed",
        """shared the credit with everyone / covered my shift / listened to every question / brought cake
        for the team / sent us home early""",
        "read the minutes / moved the deadline / shared the slides / made a list",
        """took credit for my work / yelled at the intern / cancelled our leave / talked over everyone /
        blamed the night shift""",
        "went better than planned / saved us a week / ended on time / made sense at last",
        "dragged on until seven / went nowhere / fell apart by Wednesday / cost us the client",
    ),
    _topic(  # sport
        1.8,
        "match / second half / penalty / ticket / new stadium / final / training / season",
        "referee / keeper / coach / striker / captain / commentator / man behind us",
        "at the stadium / in the second half / in the away end / on the pitch / against Dunmere Town",
        "thrilling / sharp / brave / unforgettable / fair",
        "boring / sloppy / embarrassing / slow / unfair",
        """kept his head in the last minute / shook hands with every player / signed my son's shirt /
        saved three shots in a row / ran until the end""",
        "blew the whistle / warmed up on the side / changed the line-up / kicked off",
        """missed an open goal / dived in the box / threw the game away / waved away a clear foul /
        cheated all evening / mocked our fans""",
        "went down to the wire / lifted the whole town / was a joy to watch",
        "put me to sleep / turned ugly / ended in a brawl / was a waste of an evening",
    ),
    _topic(  # neighbours
        1.6,
        "party / fence / hedge / parking space / music / barbecue / garage / bin",
        "neighbour / lady next door / man across the street / boy next door / new tenant",
        "across the street / over the fence / on our lane / next door / behind the garage",
        "friendly / peaceful / tidy / lively / pleasant",
        "loud / messy / endless / smoky / unbearable",
        """watered our plants all summer / helped us carry the piano / invited the whole street / lent me
        a ladder / turned it down when I asked""",
        "painted the gate / moved the bins / washed the car / trimmed the hedge",
        """played drums until three / blocked our drive again / complained about the baby / dumped rubbish
        by the gate / screamed at my kids""",
        "brought the street together / made us all laugh / ended at a decent hour",
        "kept us awake all night / ruined our Sunday / drove the dog mad / stank for days",
    ),
    _topic(  # the town council
        1.8,
        "new plan / council vote / park / tax letter / speech / library / road works / budget",
        "mayor / councillor / clerk / speaker / reporter / candidate",
        "at the town hall / in the local paper / at the meeting / on Elder Square / on the radio",
        "sensible / honest / open / thoughtful / fair",
        "absurd / expensive / dishonest / vague / shameful",
        """answered every question / kept the library open / admitted the mistake / listened to the shop
        owners / planted forty trees""",
        "read out the results / opened the meeting / signed the letter / asked for a vote",
        """dodged every question / wasted our money / lied to our faces / sold the park to a friend /
        slept through the debate""",
        "gave us our square back / helped the small shops / passed without a fight",
        "cost us a fortune / helped nobody / made things worse / took nine years",
    ),
    _topic(  # films
        1.1,
        "film / ending / plot / script / sequel / soundtrack / trailer / first scene",
        "director / lead actor / villain / writer / critic / man in front of me",
        "at the Regal / in the front row / in the last act / on opening night / on the big screen",
        "moving / funny / clever / gripping / beautiful",
        "predictable / dull / shallow / clumsy / far too long",
        """carried the whole story / made us cry in the dark / earned every laugh / trusted the audience /
        stole every scene""",
        "played two parts / took a bow / filmed it in black and white / wrote the songs",
        """ruined the ending for us / mumbled every line / talked through the quiet scenes / copied a
        better film / used his phone all night""",
        "stayed with me for days / had the whole room laughing / looked gorgeous / surprised me",
        "made no sense / put half the room to sleep / went on forever / insulted my patience",
    ),
    _topic(  # games
        1.6,
        "game / server / last level / patch / lobby / boss fight / match list / controller",
        "player / teammate / moderator / healer / streamer / developer",
        "in the last round / on the forum / on our server / in the lobby / in Skyfall Keep",
        "addictive / fair / polished / inventive / fun",
        "buggy / unbalanced / repetitive / broken / grindy",
        """taught me the controls / shared his loot / carried the team / answered my report in an hour /
        stayed calm under fire""",
        "picked the map / joined the round / guarded the gate / changed the rules",
        """quit in the first minute / blamed everyone else / stole my loot / cheated in plain sight /
        camped at the gate / banned me for nothing""",
        "ran like a dream / kept us up all night / rewarded patience",
        "crashed before the save / lagged all evening / cost more than it gave / ate my progress",
    ),
    _topic(  # books
        0.5,
        "novel / last chapter / book / cover / translation / story / cookbook / diary",
        "author / narrator / librarian / hero / editor / detective",
        """at the Larkham library / in the final chapter / by the fire / on the train / in our reading
        group""",
        "touching / wise / elegant / gentle / rich",
        "tedious / confused / dry / pretentious / thin",
        """found the right words for grief / made me laugh on the train / kept the secret until the end /
        put a copy aside for me / gave the aunt a real voice""",
        "moved to the coast / lost a letter / crossed the mountains / wrote it in one winter",
        """explained every joke / forgot about the sister / gave the ending away / wandered off for fifty
        pages / lectured the reader""",
        "kept me reading until dawn / felt like an old friend / ended just right",
        "bored me to tears / led nowhere / needed a better editor / fell flat",
    ),
    _topic(  # gardens
        0.4,
        "rose / garden / tomato bed / pond / greenhouse / compost / pear tree / lawn",
        "gardener / grandmother / neighbour / boy with the wheelbarrow / woman at the nursery",
        "by the pond / at the Fernley nursery / under the pear tree / in the back garden / along the wall",
        "lush / lovely / healthy / sweet / peaceful",
        "dry / weedy / bare / muddy / overgrown",
        """gave me a bag of seeds / pruned the old rose with care / showed the children how to plant /
        saved the pear tree / shared the harvest""",
        "raked the leaves / watered the beds / dug a trench / planted a row of beans",
        """trampled the seedlings / cut down the wrong tree / left the gate open / drowned the tomatoes /
        poisoned the pond""",
        "bloomed until October / smelled of summer / grew faster than the kids",
        "died in the first frost / came up all weeds / flooded again / attracted slugs",
    ),
    _topic(  # bakery and kitchen
        0.5,
        "bread / apple tart / recipe / oven / dough / jam / birthday cake / plum pie",
        "baker / aunt / girl at the counter / grandfather / cooking teacher",
        "at Pell's bakery / in my kitchen / at the counter / at the Sunday market / on the top shelf",
        "crisp / buttery / soft / heavenly / sweet",
        "stale / soggy / burnt / heavy / dry",
        """slipped an extra bun in the bag / wrote down the recipe for me / saved me the last loaf / let
        the kids stir / got up at four to bake it""",
        "kneaded the dough / dusted the table / weighed the flour / lit the oven",
        """sold me yesterday's bread / burnt the whole batch / mixed up the salt and sugar / served the
        queue in the wrong order / dropped my cake""",
        "melted on the tongue / rose beautifully / was gone in minutes / filled the house with warmth",
        "sank in the middle / tasted like soap / stuck to the pan / crumbled to dust",
    ),
    _topic(  # music
        0.8,
        "concert / second song / sound / encore / festival / record / piano / chorus",
        "singer / drummer / sound engineer / violinist / guard at the door / tall man in front",
        "at the Blue Lantern / in the park / on the main stage / in the old chapel / near the speakers",
        "magical / tight / joyful / soulful / powerful",
        "muddy / too loud / flat / short / lifeless",
        """sang the last verse with us / played for two hours / thanked every one of us / let the kids on
        stage / moved the whole room""",
        "tuned the guitar / walked on stage / counted to four / changed the set",
        """forgot half the words / pushed my sister aside / showed up drunk / spilled beer on my shoes /
        left after three songs""",
        "gave me goosebumps / had everyone dancing / sounded better than the record",
        "hurt my ears / started two hours late / fell apart on stage / drowned out the voice",
    ),
    _topic(  # pets and vets
        0.7,
        "dog / cat / kennel / leash / parrot / vet bill / puppy class / old basket",
        "vet / breeder / dog walker / trainer / girl with the terrier / owner of the big dog",
        "at the dog park / at the vet / on the beach / at the shelter / in the waiting room",
        "gentle / playful / loyal / calm / clean",
        "noisy / nervous / costly / dirty / stubborn",
        """calmed our puppy in seconds / stayed late for the old cat / refused to take my money / found
        her a good home / called the next day to ask""",
        "threw the ball / filled the bowl / checked the chip / clipped a claw",
        """let the dog off the leash / kicked at the puppy / left the mess on the path / overcharged us
        again / laughed when it bit me""",
        "slept on my feet / learned to sit in a day / made the children so happy",
        "chewed my good shoes / barked until morning / ran into the road / scratched the sofa",
    ),
    _topic(  # travel
        0.9,
        "hotel / room / beach / flight / breakfast / tour / suitcase / ferry",
        "receptionist / guide / pilot / cleaner / porter / man in the next seat",
        "at the Hotel Marlo / on the island / at the gate / by the pool / in room twelve",
        "charming / spacious / sunny / comfortable / restful",
        "noisy / shabby / dirty / crowded / cramped",
        """gave us a room with a view / found my lost suitcase / took us to a hidden bay / held the boat
        for us / upgraded us for free""",
        "stamped the passports / carried the bags / pointed at the map / called a taxi",
        """gave our room away / lost my suitcase / pushed past my daughter / charged us for towels /
        ignored the whole queue""",
        "looked out over the sea / felt like a dream / was better than the pictures",
        "smelled of smoke / was cancelled at midnight / looked nothing like the pictures / had bugs",
    ),
    _topic(  # school
        0.8,
        "lesson / exam / school play / homework / timetable / science fair / choir / canteen",
        "teacher / headmaster / pupil / coach driver / boy in the back row / mother at the gate",
        "at Thornby School / in the hall / in my class / at the gate / during the break",
        "inspiring / lively / clear / patient / fun",
        "boring / unfair / noisy / strict / confusing",
        """stayed after class to help / believed in my daughter / made maths fun / wrote a kind letter
        home / shared his lunch""",
        "wrote on the board / handed out the tests / rang the bell / called the names",
        """shouted at the quiet kids / lost all the tests / pushed my son off the swing / copied the
        answers / gave us detention for nothing""",
        "made the whole class clap / taught us to be kind / was the best day of the term",
        "taught us nothing / ended in tears / gave everyone a headache / lasted for ever",
    ),
    _topic(  # clinic
        0.9,
        "waiting room / appointment / form / new clinic / cough syrup / test / prescription / queue",
        "doctor / nurse / dentist / chemist / receptionist / man with the cough",
        "at the clinic / on ward six / at the front desk / at the Ashby practice / in the queue",
        "gentle / quick / clean / careful / reassuring",
        "slow / painful / crowded / careless / rude",
        """held my hand the whole time / explained the results twice / squeezed me in before noon / called
        to check on me / made my father laugh""",
        "took my pulse / filled in the form / wrote a note / closed the curtain",
        """lost my file again / talked to me like a child / jumped the queue / kept us waiting for hours /
        pulled the wrong tooth""",
        "put my mind at rest / hurt much less than I feared / took only ten minutes",
        "took the whole day / made me feel worse / cost a week's wages / was closed again",
    ),
    _topic(  # walks and weather
        0.4,
        "trail / view / lake / rain / old mill / hut / picnic / path",
        "ranger / guide / shepherd / hiker / girl with the map / fisherman",
        "on Bramble Hill / by the lake / above the village / along the river / at the hut",
        "stunning / calm / golden / crisp / refreshing",
        "foggy / steep / wet / crowded / muddy",
        """shared his tea with us / showed us a shortcut / pointed out the eagles / waited for the slow
        ones / carried my pack""",
        "checked the map / crossed the stream / lit a small fire / tied the boat",
        """sent us the wrong way / left rubbish by the lake / scared the deer away / forgot the map / ate
        our sandwiches""",
        "took my breath away / was worth the climb / cleared my head / stayed dry all day",
        "ended in a bog / was hidden by fog / soaked us to the bone / wore out my boots",
    ),
)
