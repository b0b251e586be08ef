"""Seeded generator of short stories with questions about them.

A story is a plot told in a world that is drawn at random: a hero, a friend, a place, a treasure. What is said
at the start is taken up again at the end, so that whoever continues a story must remember it.

`python -m tools.stories --seed 1 --count 3` prints some.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass

from tools.story_plots import (
    FEELING,
    FRIENDSHIP,
    INTRODUCTION,
    LAST,
    PARAGRAPH,
    PLOTS,
    RECALL,
    REMEMBER,
    TREASURE,
    WEATHER_LINES,
    Beat,
    Plot,
)
from tools.story_world import (
    ANIMALS,
    COLOURS,
    FEELINGS,
    FOODS,
    HOMES,
    PLACES,
    QA,
    SPOTS,
    THINGS,
    TRAITS,
    WEATHERS,
    draw_names,
    is_held_out,
    is_she,
    with_article,
)

World = dict[str, str]

# key of a fact -> ways to ask, and the one answer
QUESTIONS: dict[str, tuple[Beat, str]] = {
    "name": (("What was the {kind}'s name?", "What was the {kind} called?"), "The {kind}'s name was {hero}."),
    "kind": (("Who was {hero}?",), "{hero} was {a_trait} {kind}."),
    "home": (("Where did {hero} live?", "Where was {hero}'s home?"), "{hero} lived {home}."),
    "thing": (("What did {hero} have?", "What did {hero} own?"), "{hero} had {a_thing}."),
    "colour": (
        ("What colour was the {thing}?", "What was the colour of the {thing}?"),
        "The {thing} was {colour}.",
    ),
    "friend": (
        ("Who was {hero}'s friend?", "What was {hero}'s friend called?"),
        "{hero}'s friend was {friend}.",
    ),
    "friend_kind": (("What kind of animal was {friend}?", "Who was {friend}?"), "{friend} was {a_fkind}."),
    "weather": (("What was the weather like?", "How was the weather?"), "It was a {weather} day."),
    "place": (("Where did {hero} go?", "What place did {hero} go to?"), "{hero} went to the {place}."),
    "feel": (("How did {hero} feel in the end?", "How did {hero} feel?"), "{hero} felt {feel}."),
    "food": (("What did they eat?", "What did {hero} and {friend} eat?"), "They ate some {food}."),
    "spot": (("Where was the {thing}?", "Where did they find the {thing}?"), "The {thing} was {spot}."),
    "finder": (("Who found the {thing}?",), "{friend} found the {thing}."),
    "helper": (("Who helped {hero}?",), "{friend} helped {hero}."),
    "shelter": (("Where did they hide from the storm?",), "They hid in a small cave."),
    "built": (("What did they build?",), "They built a little house."),
    "breaker": (("Who broke the {thing}?",), "{friend} broke the {thing}."),
    "nest": (("Where was the nest?",), "The nest was {spot}."),
    "lost_animal": (("What did {hero} find?",), "{hero} found a baby bird."),
    "who_fell": (("Who fell?",), "{friend} fell."),
    "planted": (("What did they plant?",), "They planted a seed."),
    "wanted": (("Who wanted the {thing}?",), "{hero} and {friend} wanted the {thing}."),
    "treasure": (("Where was the pot?", "Where was the treasure?"), "The pot was {spot}."),
    "found_map": (("What did they find first?",), "They found an old map."),
    "met": (("Who was new there?",), "{friend} was new there."),
    "who_was_ill": (("Who was ill?",), "{friend} was ill."),
}
ALWAYS_TOLD = (
    "name", "kind", "home", "thing", "colour", "friend", "friend_kind", "weather", "place", "feel",
)  # fmt: skip


DRAWN = {
    "colour": COLOURS, "thing": THINGS, "trait": TRAITS, "food": FOODS, "home": HOMES, "place": PLACES,
    "spot": SPOTS, "weather": WEATHERS, "feel": FEELINGS,
}  # fmt: skip


@dataclass(frozen=True)
class Story:
    """A story's text, the world it was told in, and the plot it followed."""

    text: str
    world: World
    plot: str


def draw_world(rng: random.Random, held_out: bool) -> World:
    """A world whose hero, treasure and colour belong to the wanted side of the split."""
    while True:
        world = _draw_any_world(rng)
        if is_held_out(world["hero"], world["kind"], world["colour"], world["thing"]) == held_out:
            return world


def _draw_any_world(rng: random.Random) -> World:
    hero, friend = draw_names(rng, 2)
    kind, friend_kind = rng.sample(ANIMALS, 2)
    if rng.random() < 0.3:
        kind = "girl" if is_she(hero) else "boy"
    world = {"hero": hero, "friend": friend, "kind": kind, "fkind": friend_kind}
    world |= {field: rng.choice(words) for field, words in DRAWN.items()}
    world |= {f"a_{field}": with_article(world[field]) for field in ("trait", "kind", "fkind")}
    world["a_thing"] = f"{with_article(world['colour'])} {world['thing']}"
    world["one_thing"] = with_article(world["thing"])
    return world | _pronouns(hero, "") | _pronouns(friend, "f")


def _pronouns(name: str, prefix: str) -> World:
    he, him, his = ("she", "her", "her") if is_she(name) else ("he", "him", "his")
    forms = {"he": he, "him": him, "his": his, "He": he.title(), "His": his.title()}
    return {prefix + key: form for key, form in forms.items()}


def tell(rng: random.Random, world: World) -> Story:
    """Tell a randomly chosen plot in this world."""
    name = rng.choice(list(PLOTS))
    sentences = [rng.choice(beat) for beat in _beats(PLOTS[name])]
    sentences = [rng.choice(WEATHER_LINES[world["weather"]]) if s == "WEATHER" else s for s in sentences]
    paragraphs = " ".join(s for s in sentences if s).split("|")
    return Story("\n\n".join(p.strip() for p in paragraphs).format(**world), world, name)


def _beats(plot: Plot) -> tuple[Beat, ...]:
    start = (INTRODUCTION, TREASURE) if plot.friend_is_new else (INTRODUCTION, TREASURE, FRIENDSHIP)
    return (*start, PARAGRAPH, *plot.beats, PARAGRAPH, FEELING, REMEMBER, RECALL, LAST)


def make_story(rng: random.Random, held_out: bool = False) -> Story:
    """A story about a newly drawn world."""
    return tell(rng, draw_world(rng, held_out))


def ask(rng: random.Random, story: Story, count: int) -> list[QA]:
    """Up to `count` different questions about the story."""
    keys = [*ALWAYS_TOLD, *PLOTS[story.plot].asks]
    return [_question(rng, story, key) for key in rng.sample(keys, min(count, len(keys)))]


def _question(rng: random.Random, story: Story, key: str) -> QA:
    if key == "colour" and rng.random() < 0.3:
        return _yes_or_no(rng, story.world)
    ways, answer = QUESTIONS[key]
    return QA(rng.choice(ways).format(**story.world), answer.format(**story.world), "story")


def _yes_or_no(rng: random.Random, world: World) -> QA:
    colour, thing = world["colour"], world["thing"]
    guess = colour if rng.random() < 0.5 else rng.choice(COLOURS)
    word = "Yes" if guess == colour else "No"
    return QA(f"Was the {thing} {guess}?", f"{word}, the {thing} was {colour}.", "story")


def main() -> None:
    """Print some stories, each with its questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    for _ in range(arguments.count):
        story = make_story(rng)
        print(story.text, "\n")
        for qa in ask(rng, story, 4):
            print(f"Q: {qa.question}\nA: {qa.answer}")
        print()


if __name__ == "__main__":
    main()
