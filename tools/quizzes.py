"""Small questions that need no story: sums, counting, opposites, colours, sounds, days, sizes.

Each quiz returns one `QA`. A quiz belongs to the training data or to the held-out data by its facts, so that
a held-out question was never seen in training in that form; other questions about the same facts were.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tools.story_world import NUMBERS, QA, draw_names, is_held_out, with_article

OPPOSITES = dict(
    pair.split("-")
    for pair in (
        "big-small hot-cold tall-short up-down open-closed happy-sad fast-slow day-night hard-soft wet-dry "
        "old-young light-dark full-empty left-right loud-quiet early-late clean-dirty high-low long-short "
        "near-far good-bad rich-poor strong-weak thick-thin front-back inside-outside first-last sweet-sour"
    ).split()
)
COLOUR_OF = dict(
    pair.split("-")
    for pair in (
        "grass-green snow-white milk-white blood-red the_sun-yellow the_sky-blue coal-black a_lemon-yellow "
        "a_carrot-orange a_strawberry-red a_banana-yellow a_frog-green a_pig-pink an_elephant-grey "
        "chocolate-brown a_swan-white a_crow-black a_leaf-green a_tomato-red the_sea-blue"
    ).split()
)
SOUNDS = dict(
    pair.split("-")
    for pair in (
        "dog-woof cat-meow cow-moo duck-quack sheep-baa pig-oink horse-neigh mouse-squeak bee-buzz "
        "frog-ribbit owl-hoot lion-roar chick-cheep snake-hiss"
    ).split()
)
BABIES = dict(
    pair.split("-")
    for pair in (
        "dog-puppy cat-kitten cow-calf sheep-lamb horse-foal hen-chick duck-duckling goat-kid pig-piglet "
        "bear-cub lion-cub swan-cygnet frog-tadpole goose-gosling"
    ).split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SIZES = "ant mouse cat dog sheep cow elephant whale".split()  # smallest first
LEGS = dict(
    pair.split("-")
    for pair in (
        "dog-four cat-four horse-four cow-four duck-two hen-two crow-two spider-eight bee-six ant-six "
        "fish-no snake-no"
    ).split()
)
COUNTED = "apple pear plum nut egg button key cup".split()

Quiz = Callable[[random.Random, bool], QA]
Draw = Callable[[], tuple[object, ...]]  # draws the facts of one question


def _pick_side(rng: random.Random, held_out: bool, draw: Draw) -> tuple[object, ...]:
    while True:
        facts = draw()
        if is_held_out(*facts) == held_out:
            return facts


def _table(table: dict[str, str], ways: tuple[str, ...], answer: str) -> Quiz:
    """A quiz on a fixed table: what is held out is asking for this entry in this way."""

    def quiz(rng: random.Random, held_out: bool) -> QA:
        key, way = _pick_side(rng, held_out, lambda: (rng.choice(list(table)), rng.choice(ways)))
        value = table[str(key)]
        key = str(key).replace("_", " ")
        fields = {"key": key, "a_key": with_article(key), "value": value, "a_value": with_article(value)}
        fields["Key"] = key[0].upper() + key[1:]
        return QA(str(way).format(**fields), answer.format(**fields), "knowledge")

    return quiz


def addition(rng: random.Random, held_out: bool) -> QA:
    """Sums up to twenty, bare or told as a tiny story."""
    told = held_out or rng.random() < 0.5
    a, b = _numbers(rng, "+", told, held_out)
    if not told:
        way = rng.choice(("What is {a} plus {b}?", "What is {a} + {b}?", "How much is {a} and {b}?"))
        return QA(way.format(a=a, b=b), f"{a} plus {b} is {a + b}.", "sums")
    (name,), noun = draw_names(rng, 1), rng.choice(COUNTED)
    question = f"{name} has {_some(a, noun)} and finds {b} more. How many {noun}s does {name} have now?"
    return QA(question, f"{name} has {_some(a + b, noun)} now.", "sums")


def subtraction(rng: random.Random, held_out: bool) -> QA:
    """Differences of numbers up to ten, never below zero."""
    told = held_out or rng.random() < 0.5
    b, a = sorted(_numbers(rng, "-", told, held_out))
    if not told:
        way = rng.choice(("What is {a} minus {b}?", "What is {a} - {b}?"))
        return QA(way.format(a=a, b=b), f"{a} minus {b} is {a - b}.", "sums")
    (name,), noun = draw_names(rng, 1), rng.choice(COUNTED)
    question = f"{name} has {_some(a, noun)} and gives away {b}. How many {noun}s does {name} have now?"
    return QA(question, f"{name} has {_some(a - b, noun)} now.", "sums")


def _some(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _numbers(rng: random.Random, operation: str, told: bool, held_out: bool) -> tuple[int, int]:
    """Two numbers. All pairs are trained as bare sums; held-out pairs are told as a story only in tests."""
    low = 0 if operation == "-" else 1
    while True:
        a, b = rng.randint(low, 10), rng.randint(low, 10)
        facts = (operation, *sorted((a, b))) if operation == "-" else (operation, a, b)
        if not told or is_held_out(*facts) == held_out:
            return a, b


def counting(rng: random.Random, held_out: bool) -> QA:
    """Counting up or down between two numbers up to twenty."""
    while True:
        start, end = rng.sample(range(21), 2)
        if abs(start - end) < 10 and is_held_out("count", start, end) == held_out:
            break
    step = 1 if end > start else -1
    numbers = ", ".join(str(n) for n in range(start, end + step, step))
    return QA(f"Count from {start} to {end}.", f"{numbers}.", "counting")


def neighbour(rng: random.Random, held_out: bool) -> QA:
    """What comes before or after a number, a day or a month."""
    series = rng.choice((DAYS, MONTHS, [str(n) for n in range(21)], list(NUMBERS)))

    def draw() -> tuple[object, ...]:
        return rng.randrange(1, len(series) - 1), rng.choice(("after", "before")), rng.choice(("comes", "is"))

    i, side, verb = _pick_side(rng, held_out, draw)
    index = int(str(i))
    value = series[index + 1] if side == "after" else series[index - 1]
    question = f"What {verb} {'just ' if verb == 'is' else ''}{side} {series[index]}?"
    return QA(question, f"{value[0].upper() + value[1:]} comes {side} {series[index]}.", "counting")


def bigger(rng: random.Random, held_out: bool) -> QA:
    """Which of two numbers or animals is bigger or smaller."""
    words = SIZES if rng.random() < 0.5 else [str(n) for n in range(21)]

    def draw() -> tuple[object, ...]:
        return (*rng.sample(range(len(words)), 2), rng.choice(("bigger", "smaller")))

    i, j, question = _pick_side(rng, held_out, draw)
    first, second = int(str(i)), int(str(j))
    best, other = (max, min) if question == "bigger" else (min, max)
    names = [with_article(w) if words is SIZES else w for w in words]
    right, wrong = names[best(first, second)], names[other(first, second)]
    answer = f"{right[0].upper() + right[1:]} is {question} than {wrong}."
    return QA(f"Which is {question}, {names[first]} or {names[second]}?", answer, "comparing")


QUIZZES: tuple[Quiz, ...] = (
    *(addition, addition, addition, subtraction, subtraction),  # what is hard to learn comes more often
    *(counting, counting, neighbour, bigger, bigger),
    _table(
        OPPOSITES | {v: k for k, v in OPPOSITES.items() if v not in ("short",)},
        (
            "What is the opposite of {key}?",
            "What is the opposite of the word {key}?",
            "Tell me the opposite of {key}.",
        ),
        "The opposite of {key} is {value}.",
    ),
    _table(COLOUR_OF, ("What colour is {key}?", "Tell me the colour of {key}."), "{Key} is {value}."),
    _table(SOUNDS, ("What does {a_key} say?", "What sound does {a_key} make?"), "{a_key} says {value}."),
    _table(
        BABIES,
        ("What is a baby {key} called?", "What do we call a baby {key}?"),
        "A baby {key} is called {a_value}.",
    ),
    _table(
        LEGS,
        ("How many legs does {a_key} have?", "How many legs has {a_key}?"),
        "{a_key} has {value} legs.",
    ),
)


def make_quiz(rng: random.Random, held_out: bool = False) -> QA:
    """One small question of a random kind."""
    qa = rng.choice(QUIZZES)(rng, held_out)
    return QA(qa.question, qa.answer[0].upper() + qa.answer[1:], qa.category)
