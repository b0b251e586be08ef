"""Seeded generator of chats: questions about a story, about facts told earlier, small quizzes, small talk.

Every answer follows from the chat itself (or from the small tables of `tools.quizzes`), and there is exactly
one right way to give it, so accuracy can be measured by comparing text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.quizzes import make_quiz
from tools.stories import ask, make_story
from tools.story_world import (
    ANIMALS,
    COLOURS,
    FOODS,
    HOMES,
    QA,
    THINGS,
    draw_names,
    is_held_out,
    is_she,
    with_article,
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who answers with one short sentence.",
    "You are Rill, a tiny language model.",
    "Answer the questions of the user.",
    "You tell stories and answer questions.",
)
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello", "Hi!", "Hi", "Hey!", "Good morning!", "Hello there!"),
        "Hello! How can I help you?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you real?"),
        "I am a tiny language model. I tell short stories and answer simple questions.",
    ),
    (("Are you a person?", "Are you human?"), "No, I am a tiny language model."),
    (
        ("What can you do?", "How can you help me?", "Help!", "What do you know?"),
        "I can tell you a story, answer questions about it, and do small sums.",
    ),
    (("How are you?", "How are you today?", "How do you feel?"), "I am well, thank you. How are you?"),
    (("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later!", "Good night!"), "Goodbye! Come back soon."),
    (("You are nice.", "Well done!", "That was good.", "I like you."), "That is very kind of you."),
    (("Who made you?", "Where do you come from?"), "I was trained for the Rill project on little stories."),
)
UNKNOWN = "I am only a tiny model, and I do not know that."
UNKNOWN_WAYS = (
    "What is the capital of {x}?", "Who wrote {x}?", "How far away is {x}?", "When was {x} built?",
    "Who is the king of {x}?", "How much does {x} cost?", "Explain {x} to me.", "Tell me about {x}.",
    "What is {x}?", "Why is there {x}?", "Write code for {x}.",
)  # fmt: skip
UNKNOWN_TOPICS = (
    "France", "Japan", "Brazil", "the moon", "Mars", "a computer", "gravity", "music", "a car",
    "Paris", "the war", "Python", "football", "money", "an atom", "history", "London", "the internet",
    "India", "Egypt",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message; `category` names the kind of question that an assistant's exact answer belongs to."""

    role: str
    content: str
    category: str = ""


Turns = list[Turn]
CASUAL_STARTS = "What Who Where How Which Tell Count Hello Hi Thanks My Please".split()


def _exchange(qa: QA) -> Turns:
    return [Turn("user", qa.question), Turn("assistant", qa.answer, qa.category)]


def _told(statement: str, reply: str) -> Turns:
    return [Turn("user", statement), Turn("assistant", reply, "reply")]


def small_talk(rng: random.Random, held_out: bool) -> Turns:
    """A greeting, a question about the model, thanks."""
    ways, answer = rng.choice(SMALL_TALK)
    return _exchange(QA(rng.choice(ways), answer, "small talk"))


def unknown(rng: random.Random, held_out: bool) -> Turns:
    """Something the model cannot know."""
    while True:
        way, topic = rng.choice(UNKNOWN_WAYS), rng.choice(UNKNOWN_TOPICS)
        if is_held_out(way, topic) == held_out:
            return _exchange(QA(way.format(x=topic), UNKNOWN, "unknown"))


def quiz(rng: random.Random, held_out: bool) -> Turns:
    """One small question."""
    return _exchange(make_quiz(rng, held_out))


def told_story(rng: random.Random, held_out: bool) -> Turns:
    """The assistant tells a story on request and answers questions about it."""
    story = make_story(rng, held_out)
    request = rng.choice(
        (
            "Tell me a story.",
            "Please tell me a story.",
            "Tell me a story about {a_kind}.",
            "Tell me a story about {a_kind} named {hero}.",
            "Write a short story about {a_kind} and {a_fkind}.",
            "Tell me a story about {a_thing}.",
            "Tell me a story about {hero} and {friend}.",
        )
    ).format(**story.world)
    turns = [Turn("user", request), Turn("assistant", story.text)]
    return turns + _asked(rng, held_out, ask(rng, story, rng.randint(4, 10)))


def given_story(rng: random.Random, held_out: bool) -> Turns:
    """The user gives a story together with the first question."""
    story = make_story(rng, held_out)
    first, *rest = ask(rng, story, rng.randint(5, 12))
    introduction = rng.choice(("", "Here is a story. ", "Read this story.\n\n"))
    way = introduction + "{story}\n\n{q}"
    opening = QA(way.format(story=story.text, q=first.question), first.answer, first.category)
    return _exchange(opening) + _asked(rng, held_out, rest)


def _asked(rng: random.Random, held_out: bool, questions: list[QA]) -> Turns:
    """The questions, with other talk in between now and then."""
    turns: Turns = []
    for qa in questions:
        if rng.random() < 0.15:
            turns += rng.choice((quiz, quiz, small_talk))(rng, held_out)
        turns += _exchange(qa)
    return turns


def about_me(rng: random.Random, held_out: bool) -> Turns:
    """The user tells some things about themselves and asks for them later."""
    facts = rng.sample(_facts_about_me(rng, held_out), rng.randint(2, 5))
    turns: Turns = []
    if rng.random() < 0.3:
        turns = _told(" ".join(statement for statement, _, _ in facts), "Thank you for telling me.")
    else:
        for statement, reply, _ in facts:
            turns += _told(statement, reply)
            if rng.random() < 0.3:
                turns += rng.choice((quiz, small_talk))(rng, held_out)
    questions = [rng.choice(asked) for _, _, asked in facts]
    rng.shuffle(questions)
    return turns + _asked(rng, held_out, questions)


Fact = tuple[str, str, list[QA]]


def _facts_about_me(rng: random.Random, held_out: bool) -> list[Fact]:
    while True:
        name, sibling, pet = draw_names(rng, 3)
        animal, thing, colour = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(COLOURS)
        if is_held_out(name, animal, thing, colour) == held_out:
            break
    home, food, favourite, age = rng.choice(HOMES), rng.choice(FOODS), rng.choice(COLOURS), rng.randint(3, 20)
    role = "sister" if is_she(sibling) else "brother"
    own = f"{with_article(colour)} {thing}"

    def fact(ways: tuple[str, ...], reply: str, *asked: tuple[str, str]) -> Fact:
        return rng.choice(ways), reply, [QA(question, answer, "facts") for question, answer in asked]

    return [
        fact(
            (f"My name is {name}.", f"I am {name}.", f"Hello, my name is {name}."),
            f"Nice to meet you, {name}!",
            ("What is my name?", f"Your name is {name}."),
            ("Who am I?", f"You are {name}."),
        ),
        fact(
            (f"I have {with_article(animal)} called {pet}.", f"My {animal} is called {pet}."),
            f"{pet} is a lovely name for {with_article(animal)}.",
            (f"What is my {animal} called?", f"Your {animal} is called {pet}."),
            (f"Who is {pet}?", f"{pet} is your {animal}."),
        ),
        fact(
            (f"I have {own}.", f"I own {own}.", f"My {thing} is {colour}."),
            f"{with_article(colour).capitalize()} {thing}, how nice!",
            (f"What colour is my {thing}?", f"Your {thing} is {colour}."),
            (f"Which of my things is {colour}?", f"Your {thing} is {colour}."),
        ),
        fact(
            (f"I live {home}.", f"My home is {home}."),
            f"It must be beautiful {home}.",
            ("Where do I live?", f"You live {home}."),
            ("Where is my home?", f"You live {home}."),
        ),
        fact(
            (f"I like {food}.", f"My favourite food is {food}."),
            f"I have never tasted {food}.",
            ("What do I like to eat?", f"You like {food}."),
            ("What is my favourite food?", f"You like {food}."),
        ),
        fact(
            (f"My favourite colour is {favourite}.", f"I like the colour {favourite}."),
            f"{favourite.capitalize()} is a fine colour.",
            ("What is my favourite colour?", f"Your favourite colour is {favourite}."),
        ),
        fact(
            (f"I am {age} years old.", f"I am {age}."),
            f"{age} is a good age.",
            ("How old am I?", f"You are {age} years old."),
        ),
        fact(
            (f"I have a {role} called {sibling}.", f"My {role} is called {sibling}."),
            f"Say hello to {sibling} from me.",
            (f"What is my {role} called?", f"Your {role} is called {sibling}."),
            (f"Who is {sibling}?", f"{sibling} is your {role}."),
        ),
    ]


def _owned(rng: random.Random, held_out: bool, count: int) -> list[tuple[str, str, str]]:
    """Owners, colours and things."""
    while True:
        names, things = draw_names(rng, count), rng.sample(THINGS, count)
        colours = rng.sample(COLOURS, count)
        if is_held_out(*names[:2], *things[:2], *colours[:2]) == held_out:
            return list(zip(names, colours, things, strict=True))


def _statements(owned: list[tuple[str, str, str]]) -> str:
    return " ".join(f"{n} has {with_article(c)} {t}." for n, c, t in owned)


def said_again(rng: random.Random, held_out: bool) -> Turns:
    """Several people own several things; the user wants to hear it again, backwards."""
    owned = _owned(rng, held_out, rng.randint(2, 6))
    request = rng.choice(("Say it again, last first.", "Now say that backwards.", "Who has what, from the last on?"))
    return _exchange(QA(f"{_statements(owned)} {request}", _statements(owned[::-1]), "said again"))


def who_has_what(rng: random.Random, held_out: bool) -> Turns:
    """Several people own several things; the user asks who has which."""
    owned = _owned(rng, held_out, rng.randint(2, 5))
    statement = _statements(owned)
    questions: list[QA] = []
    for name, colour, thing in owned:
        questions += [
            QA(f"What does {name} have?", f"{name} has {with_article(colour)} {thing}.", "who has what"),
            QA(f"Who has the {thing}?", f"{name} has the {thing}.", "who has what"),
            QA(f"What colour is {name}'s {thing}?", f"{name}'s {thing} is {colour}.", "who has what"),
            QA(f"What is {colour}?", f"{name}'s {thing} is {colour}.", "who has what"),
        ]
    first, *rest = rng.sample(questions, min(len(questions), rng.randint(4, 12)))
    opening = QA(f"{statement} {first.question}", first.answer, first.category)
    return _exchange(opening) + _asked(rng, held_out, rest)


def quiz_round(rng: random.Random, held_out: bool) -> Turns:
    """Several small questions in a row, with a greeting or something unknown among them."""
    turns: Turns = []
    for _ in range(rng.randint(2, 9)):
        turns += rng.choice((quiz, quiz, quiz, quiz, quiz, small_talk, unknown))(rng, held_out)
    return turns


ChatKind = Callable[[random.Random, bool], Turns]
CHAT_KINDS: tuple[tuple[ChatKind, float], ...] = (
    (told_story, 0.2),
    (given_story, 0.25),
    (about_me, 0.1),
    (who_has_what, 0.35),
    (said_again, 0.2),
    (quiz_round, 0.15),
)


def make_chat(rng: random.Random, held_out: bool = False) -> Turns:
    """A chat of one kind, sometimes opened by a greeting, and rarely two kinds in a row."""
    kinds, weights = zip(*CHAT_KINDS, strict=True)
    turns: Turns = []
    if rng.random() < 0.15:
        turns.append(Turn("system", rng.choice(SYSTEM_PROMPTS)))
    if rng.random() < 0.15:
        turns += small_talk(rng, held_out)
    for kind in rng.choices(kinds, weights, k=2 if rng.random() < 0.15 else 1):
        turns += kind(rng, held_out)
    return [_casual(turn) if turn.role == "user" and rng.random() < 0.1 else turn for turn in turns]


def _casual(turn: Turn) -> Turn:
    """The message as typed in haste: no final mark, a small first letter where that harms no name."""
    text = turn.content.rstrip("?.!")
    first = text.split(" ", 1)[0]
    if first in CASUAL_STARTS:
        text = first.lower() + text[len(first) :]
    return Turn(turn.role, text, turn.category)
