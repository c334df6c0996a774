"""Small stories and poems from a grammar of plots, coherent by construction."""

# ruff: noqa: E501

from __future__ import annotations

import random

from . import words
from .variation import Turn, article, expand, invented, sentence, typed

ENDING = "The end."

_OPENINGS = [
    "Once upon a time there was $a_hero named $name who lived $at_a_place.",
    "Once upon a time, $at_a_place, there lived $a_hero named $name.",
    "There once was $a_hero named $name who lived $at_a_place.",
]  # fmt: skip

# Each plot is a list of sentences; $helper is the second figure, $object the thing that the story is about.
_PLOTS = [
    [
        "One {morning|day}, $name {woke up and saw|noticed} that $his $object was gone.",
        "$Name looked under the bed and behind the door, but the $object was not there.",
        "Then $name met a $helper named $friend.",
        '"Have you seen my $object?" asked $name.',
        '"{No|Not yet}, but I will help you look," said $friend.',
        "{Together they searched|They searched together} all day, and at last they found the $object under an old tree.",
        "$Name was so happy that $he gave $friend a big hug.",
        "From that day on, $name and $friend were best friends.",
    ],
    [
        "One {day|sunny day}, $name found $a_object $at_the_place.",
        '"{Whose|I wonder whose} $object is this?" $name said.',
        "$Name asked everybody, and at last a little $helper named $friend began to smile.",
        '"That is my $object! I lost it a long time ago," said $friend.',
        "$Name gave it back {at once|right away}, although $he liked it very much.",
        "$Friend was so thankful that they shared the $object and played until the evening.",
        "$Name learned that being honest is the best way to make a friend.",
    ],
    [
        "One night a great storm came, and the wind blew very hard.",
        "$Name was {warm and safe at home|sitting at home} when somebody knocked at the door.",
        "It was a $helper named $friend, wet and cold.",
        '"Come in," said $name, and {made a cup of hot tea|gave $friend a warm blanket}.',
        "In the dark, $name lit a candle and showed $friend $his $object.",
        "They told each other stories until the storm was over.",
        "In the morning the sun was shining, and $friend said, \"Thank you, $name. You are very kind.\"",
        "After that, $friend came to visit every week.",
    ],
    [
        "More than anything, $name wanted $a_object.",
        "But $name had no money, so $he {decided to make one|began to make one} from old wood and string.",
        "It was hard work, and the first one broke.",
        '"I will try again," said $name.',
        "A $helper named $friend saw this and came to help.",
        "They worked for three days, and then the $object was ready.",
        "It was {a little crooked|not perfect}, but $name loved it more than anything, because $he had made it with a friend.",
    ],
    [
        "Everybody said that something scary was hiding $at_the_place.",
        "$Name was afraid too, but $he wanted to know what it was.",
        "So one evening $he took $his $object and went to look.",
        "There was a noise! $Name held the $object tight and {said|called}, \"Who is there?\"",
        "Out came a tiny $helper named $friend.",
        '"Please do not be afraid. I am only lonely," said $friend.',
        "$Name laughed and sat down, and the two of them talked until the stars came out.",
        "After that, nobody was afraid anymore.",
    ],
    [
        "One day there was a big race, and the prize was a shiny $object.",
        "$Name ran as fast as $he could, and soon $he was in front.",
        "Then $name saw that a $helper named $friend had fallen down.",
        "$Name stopped, went back and helped $friend to get up.",
        "They came to the finish together, the very last of all.",
        "But everybody cheered, and the $object was given to $name for having a good heart.",
        '"We will share it," said $name, and $friend smiled.',
    ],
    [
        "$Name had a beautiful $object, but $he never let anybody touch it.",
        'One day a $helper named $friend asked, "May I play with your $object?"',
        '"No, it is mine!" said $name, and $friend went away sadly.',
        "Soon $name felt lonely, because playing alone was no fun.",
        "So $he went to $friend and said, \"I am sorry. Let us play together.\"",
        "They had a wonderful afternoon with the $object.",
        "$Name learned that {things are more fun when you share them|sharing makes everybody happy}.",
    ],
    [
        "One day $name found an old map with a red cross on it.",
        '"It must be a treasure!" said $name, and set out {at once|right away}.',
        "On the way $he met a $helper named $friend, who wanted to come along.",
        "They walked over the hills and crossed a cold river.",
        "At the red cross they dug a deep hole, and in it they found $a_object.",
        "It was not gold, but it was the finest $object they had ever seen.",
        '"The best part was the journey," said $name, and $friend agreed.',
    ],
    [
        "Soon it would be the birthday of $friend, a $helper who lived next door.",
        "$Name wanted to give $friend something special, but what?",
        "All day $name thought about it, and then $he had an idea.",
        "$Name took $his own $object, cleaned it until it was shiny, and tied a ribbon around it.",
        "When $friend opened the present, $friend jumped for joy.",
        '"This is the best present ever!" said $friend.',
        "They ate cake and danced until it was dark.",
    ],
    [
        "One day $name planted a tiny seed next to $his $object.",
        "Every morning $he gave it water, but nothing happened.",
        '"Be patient," said a $helper named $friend. "Good things take time."',
        "So $name waited for {many days|a week and another week}, in sun and in rain.",
        "Then one morning there was a little green leaf, and soon a big yellow flower.",
        "$Name and $friend sat down beside it and were very proud.",
        "Now $name knew that waiting can be worth it.",
    ],
    [
        "One evening $name lost the way home, and it was getting dark.",
        "$He had nothing but $a_object in $his bag.",
        "$Name sat down on a stone and began to cry.",
        "Then a $helper named $friend came by and said, \"Do not cry. I know the way.\"",
        "They walked hand in hand, and $name held the $object up high so that they would not be alone in the dark.",
        "At last they saw a light: it was home!",
        '"Thank you, $friend," said $name. "Come and have supper with me."',
    ],
    [
        "$Name had a magic $object that could make one wish come true.",
        '"I could wish for gold," thought $name, "or for a palace."',
        "Then $name saw a sad $helper named $friend, who had nothing to eat.",
        "$Name held the $object and wished for a table full of food for everybody.",
        "There was soup and bread and cake, and $friend ate until $friend could eat no more.",
        "The magic was gone, but $name was not sad at all.",
        '"A friend is better than gold," said $name.',
    ],
]  # fmt: skip

_ASK = ["tell me", "write", "write me", "can you tell me", "please tell me", "make up", "could you write", "I want", "give me", "tell", "I would like", "Can you write"]  # fmt: skip
_STORY = ["a story", "a story", "a short story", "a little story", "a small story", "a fairy tale", "a tale", "a bedtime story", "a very short story", "a long story"]  # fmt: skip


def _hero(rng: random.Random) -> str:
    r = rng.random()
    return rng.choice(words.ANIMALS) if r < 0.66 else rng.choice(words.PEOPLE) if r < 0.9 else invented(rng)


def _name(rng: random.Random) -> str:
    return rng.choice(words.SHE + words.HE) if rng.random() < 0.8 else sentence(invented(rng))


def _pronoun(name: str, hero: str) -> tuple[str, str]:
    if hero in ("girl", "princess", "witch", "queen", "hen", "cow", "fairy"):
        return "she", "her"
    if hero in ("boy", "prince", "knight", "king", "wizard", "clown"):
        return "he", "his"
    if name in words.SHE or (name not in words.HE and name.endswith("a")):
        return "she", "her"
    return "he", "his"


def tell(
    rng: random.Random, *, hero: str, name: str, quality: str, place: str, thing: str, helper: str, friend: str
) -> str:
    """One story about these."""
    he, his = _pronoun(name, hero)
    at = words.PLACES.get(place, "in")
    slots = {
        "a_hero": article(f"{quality} {hero}" if quality else hero), "name": name, "Name": name, "he": he, "He": sentence(he),
        "his": his, "object": thing, "a_object": article(thing), "helper": helper, "friend": friend, "Friend": friend,
        "at_a_place": f"{at} {article(place)}", "at_the_place": f"{at} the {place}",
    }  # fmt: skip
    lines = [rng.choice(_OPENINGS), *rng.choice(_PLOTS), ENDING]
    text = " ".join(expand(rng, line) for line in lines)
    for slot in sorted(slots, key=len, reverse=True):
        text = text.replace("$" + slot, slots[slot])
    for first in "aeiou":
        text = text.replace(f" a {first}", f" an {first}").replace(f" A {first}", f" An {first}")
    return text


def story(rng: random.Random) -> Turn:
    """A wish for a story that names some of its parts, and the story with these parts."""
    hero, name, place = _hero(rng), _name(rng), rng.choice(list(words.PLACES))
    thing = rng.choice(words.OBJECTS) if rng.random() < 0.9 else invented(rng)
    if rng.random() < 0.15:
        thing = f"{rng.choice(words.COLORS)} {thing}"
    quality = rng.choice(words.QUALITIES)
    helper, friend = rng.choice(words.ANIMALS), rng.choice(words.SHE + words.HE)
    while helper == hero:
        helper = rng.choice(words.ANIMALS)
    while friend == name:
        friend = rng.choice(words.SHE + words.HE)
    r = rng.random()
    about = article(f"{quality} {hero}" if rng.random() < 0.2 else hero)
    if r < 0.13:
        wish = ""
    else:
        wish = f" about {about}"
        if rng.random() < 0.3:
            wish += f" {rng.choice(['named', 'called', 'named', 'whose name is'])} {name}"
        elif rng.random() < 0.1:
            wish = f" about {name} the {hero}"
        r = rng.random()
        if r < 0.14:
            wish += f" and {article(thing)}"
        elif r < 0.28:
            pattern = "{ who {finds|loses|wants|has} | with | looking for }$thing"
            wish += expand(rng, pattern, thing=article(thing))
        elif r < 0.34:
            second = helper
            wish = f" about {about} and {article(second)}"
        r = rng.random()
        if r < 0.16:
            wish += f" {words.PLACES[place]} {article(place)}"
        elif r < 0.22:
            wish += (
                f" {rng.choice(['set', 'that happens', 'who lives', 'living'])} {words.PLACES[place]} {article(place)}"
            )
    ask = rng.choice(_ASK)
    question = f"{sentence(ask)} {rng.choice(_STORY)}{wish}{'?' if ask.lower().startswith(('can', 'could')) else '.'}"
    r = rng.random()
    if r < 0.08:
        question = f"{sentence(rng.choice(_STORY))}{wish}{rng.choice([', please.', ' please', '.', ''])}"
    elif r < 0.14:
        question = f"Story{wish}"
    answer = tell(rng, hero=hero, name=name, quality=quality, place=place, thing=thing, helper=helper, friend=friend)
    return typed(rng, question, exact=rng.random() < 0.8), answer


def another(rng: random.Random) -> Turn:
    """A wish for one more story."""
    question = expand(
        rng,
        "{Another {one|story}|One more {story|}|Tell me another {one|story}|Again|A different story|Can I have another one}{, please|}{.|?|}",
    )
    return question, story(rng)[1]


_POEMS = [
    "{I saw|Here is} $a_thing in the morning light,\nIt made the whole world {warm|new} and bright.\n"
    "{I sat beside it|I looked at it} all day long,\nAnd sang it a very little song.",
    "Little $thing, so {quiet|small} and fine,\nI wish that you were always mine.\n"
    "The stars come out, the day is done,\nGood night, my $thing, good night, sun.",
    "{O $thing, my $thing|Dear $thing, dear $thing}, what do you say?\nThe clouds have all gone far away.\n"
    "The birds are singing in the tree,\nAnd you are here to sing with me.",
]
_HAIKU = [
    "Quiet $thing waits there,\nthe wind tells a small story,\nand then all is still.",
    "Morning and a $thing,\nlight comes slowly through the leaves,\na new day begins.",
]


def poem(rng: random.Random) -> Turn:
    """A poem of four lines or a haiku about a thing."""
    thing = rng.choice(words.ANIMALS + words.OBJECTS + list(words.PLACES) + ["moon", "sun", "snow", "rain", "winter"])
    if rng.random() < 0.15:
        thing = invented(rng)
    about = rng.choice([f" about {article(thing)}", f" about the {thing}", f" about {thing}", f" about {thing}s", ""])
    kind = rng.choice(["a poem", "a poem", "a short poem", "a little poem", "a rhyme", "a song", "a haiku", "a haiku"])
    text = expand(rng, rng.choice(_HAIKU if kind == "a haiku" else _POEMS), thing=thing, a_thing=article(thing))
    if not about:
        thing = "moon"
        text = expand(rng, rng.choice(_HAIKU if kind == "a haiku" else _POEMS), thing=thing, a_thing=article(thing))
    ask = rng.choice(["Write", "Write me", "Please write", "Can you write", "Tell me", "Give me", "Make"])
    return typed(rng, f"{ask} {kind}{about}{'?' if ask[:3] == 'Can' else '.'}", exact=True), text


def conversation(rng: random.Random) -> list[Turn]:
    """A story, sometimes two, or a poem."""
    if rng.random() < 0.1:
        return [poem(rng)]
    turns = [story(rng)]
    if rng.random() < 0.08:
        turns.append(another(rng))
    return turns
