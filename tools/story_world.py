"""The words of the little world in which the bundled models' stories and chats take place.

Everything the generator says comes from here and from the templates in `tools.stories` and `tools.chats`;
all of it was written for this project.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

SHE = "Anna Lily Mia Rosa Nora Ella Ivy Ruby Clara Daisy Zoe Hanna Molly Emma Tilda Sara Luna Pia".split()
HE = "Tom Ben Max Leo Sam Finn Otto Hugo Pip Milo Oscar Jack Theo Felix Paul Rufus Toby Emil".split()
CHILDREN = ("girl", "boy")
ANIMALS = "fox rabbit bear mouse owl duck cat dog frog hedgehog squirrel turtle pony goat lamb crow".split()
TRAITS = "kind brave shy curious clever gentle patient cheerful quiet friendly careful lazy".split()
COLOURS = "red blue green yellow orange purple pink brown white black grey golden".split()
THINGS = (
    "ball kite boat hat scarf drum book lamp cup basket bell key box bag coat spoon button ring "
    "whistle flute blanket ribbon umbrella lantern"
).split()
FOODS = "bread cake soup honey cheese berries apples pears carrots nuts plums rice".split()
HOMES = (
    "by the river", "in the forest", "on a farm", "on a hill", "near the sea", "in a village",
    "in a valley", "by a lake", "on an island", "in a small town", "in the mountains", "near a windmill",
)  # fmt: skip
PLACES = "market beach lake park bridge orchard pond harbour well castle meadow station".split()
SPOTS = (
    "under a bush", "behind a rock", "in a hollow tree", "under the stairs", "in a wooden cart",
    "behind the barn", "in the tall grass", "under a pile of leaves", "beside a fence",
    "inside an old barrel", "under a wooden bench", "on top of a wall",
)  # fmt: skip
WEATHERS = "sunny rainy windy snowy foggy cloudy warm cold".split()
FEELINGS = "happy proud glad thankful calm lucky safe joyful".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()

CONSONANTS, VOWELS = "bdfgklmnprstvw", "aeiou"
INVENTED_SHARE = 0.12  # of the names


def draw_names(rng: random.Random, count: int) -> list[str]:
    """Different names; some are invented, so that names must be copied and not only recognised."""
    while True:
        names = rng.sample(SHE + HE, count)
        names = [_invent(rng) if rng.random() < INVENTED_SHARE else name for name in names]
        if len(set(names)) == count:
            return names


def _invent(rng: random.Random) -> str:
    syllables = (rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3))))
    return "".join(syllables).title() + rng.choice(("", "", "n", "l", "s"))


def is_she(name: str) -> bool:
    """Whether stories say "she" of this name; of invented names, those in -a."""
    return name in SHE or (name not in HE and name.endswith("a"))


def with_article(noun: str) -> str:
    """ "a fox", "an owl"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def is_held_out(*facts: object) -> bool:
    """Whether this combination of facts is kept out of the training data (one in twelve is)."""
    return zlib.crc32("/".join(map(str, facts)).encode()) % 12 == 0


@dataclass(frozen=True)
class QA:
    """A question, its one right answer, and the kind of question it is."""

    question: str
    answer: str
    category: str
