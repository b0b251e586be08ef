"""The generator of stories and chats: seeded, well-formed, consistent, and cleanly split."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from engine.text.tokenizer import load_tokenizer
from tools.chats import CHAT_KINDS, UNKNOWN, ChatKind, Turns, make_chat, told_story
from tools.quizzes import make_quiz
from tools.stories import DRAWN, QUESTIONS, ask, make_story, tell
from tools.story_plots import INTRODUCTION, PLOTS, TREASURE, WEATHER_LINES
from tools.story_world import HE, SHE, WEATHERS, draw_names, is_held_out, is_she, with_article
from tools.train_data import ENCODERS, FREE_WEIGHT, IGNORED, draw_document, pack_rows

MODELS = Path(__file__).parent.parent / "models"
SEEDS = range(150)
TOLD = {"hero", "kind", "friend", "fkind", *DRAWN}
FIXED_ANSWERS = {answer for _, answer in QUESTIONS.values() if "{" not in answer}


@pytest.mark.parametrize("held_out", [False, True])
def test_same_seed_gives_the_same_documents(held_out: bool) -> None:
    def documents(seed: int) -> tuple[str, Turns]:
        rng = random.Random(seed)
        return make_story(rng, held_out).text, make_chat(rng, held_out)

    assert [documents(seed) for seed in range(20)] == [documents(seed) for seed in range(20)]
    assert documents(1) != documents(2)


def test_stories_are_clean_text() -> None:
    for seed in SEEDS:
        text = make_story(random.Random(seed)).text
        assert not re.search(r"[{}|]|  | \n|\n \S|WEATHER", text), text
        assert text[-1] in '."', text
        assert text.count('"') % 2 == 0, text
        assert len(text.split("\n\n")) == 4, text
        assert re.search(r"\ba [aeiou]", text) is None, text
        assert re.search(r"\ban (?!hour)[^aeiou]", text) is None, text


def test_early_facts_return_late() -> None:
    """The last paragraph names something that only the first one introduced."""
    for seed in SEEDS:
        story = make_story(random.Random(seed))
        first, *_, last = story.text.split("\n\n")
        assert story.world["colour"] in first
        assert f"{story.world['colour']} {story.world['thing']}" in last


def test_pronouns_agree_with_names() -> None:
    """Where both are "she" nobody is "he"; the mother bird of one plot is left out."""
    for seed in SEEDS:
        story = make_story(random.Random(seed))
        for name, pronoun in (("hero", "he"), ("friend", "fhe")):
            assert story.world[pronoun] == ("she" if is_she(story.world[name]) else "he")
        if is_she(story.world["hero"]) == is_she(story.world["friend"]) and story.plot != "chick":
            wrong = r"\b(he|him|his)\b" if is_she(story.world["hero"]) else r"\b(she|her)\b"
            assert re.search(wrong, story.text, re.IGNORECASE) is None, story.text


def test_answers_name_what_the_story_says() -> None:
    """Every word of an answer that came from the world stands in the story as well."""
    for seed in SEEDS:
        rng = random.Random(seed)
        story = make_story(rng)
        for qa in ask(rng, story, count=20):
            named = [value for key, value in story.world.items() if key in TOLD and value in qa.answer]
            assert named or qa.answer in FIXED_ANSWERS, qa
            assert all(value in story.text for value in named), (qa, story.text)


@pytest.mark.parametrize("name", PLOTS)
def test_plots_tell_what_may_be_asked(name: str) -> None:
    """A field in the answer to one of the plot's own questions is a field of the plot or of its start."""
    told = " ".join(way for beat in (INTRODUCTION, TREASURE, *PLOTS[name].beats) for way in beat)
    for key in PLOTS[name].asks:
        assert set(re.findall(r"{(\w+)}", QUESTIONS[key][1])) <= set(re.findall(r"{(\w+)}", told)), key


def test_each_weather_has_its_lines() -> None:
    assert set(WEATHER_LINES) == set(WEATHERS)


def test_training_and_held_out_worlds_are_disjoint() -> None:
    def heroes(held_out: bool) -> set[tuple[str, ...]]:
        worlds = [make_story(random.Random(seed), held_out).world for seed in SEEDS]
        return {(w["hero"], w["kind"], w["colour"], w["thing"]) for w in worlds}

    assert not any(is_held_out(*hero) for hero in heroes(False))
    assert all(is_held_out(*hero) for hero in heroes(True))


def test_training_and_held_out_quizzes_are_disjoint() -> None:
    """Sums told as stories have pairs of numbers of their own, and counting its ends."""

    def numbers(held_out: bool) -> set[tuple[str, ...]]:
        rng = random.Random(0)
        asked = [make_quiz(rng, held_out).question for _ in range(4000)]
        kinds = ((kind, q) for q in asked for kind in ("finds", "gives away", "Count") if kind in q)
        return {(kind, *re.findall(r"\d+", q)) for kind, q in kinds}

    train, held_out = numbers(False), numbers(True)
    assert len(train) > 300 and len(held_out) > 30
    assert not train & held_out


def test_sums_and_counts_are_right() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        qa = make_quiz(rng)
        numbers = [int(n) for n in re.findall(r"\d+", qa.question + qa.answer)]
        if "plus" in qa.answer:
            a, b, *_, total = numbers
            assert a + b == total
        if "minus" in qa.answer:
            a, b, *_, rest = numbers
            assert a - b == rest >= 0
        if qa.question.startswith("Count"):
            start, end, *counted = numbers
            assert counted[0] == start and counted[-1] == end
            assert {abs(x - y) for x, y in zip(counted, counted[1:], strict=False)} == {1}


@pytest.mark.parametrize("kind", [kind for kind, _ in CHAT_KINDS])
@pytest.mark.parametrize("held_out", [False, True])
def test_chats_alternate_and_end_with_an_answer(kind: ChatKind, held_out: bool) -> None:
    for seed in range(40):
        turns = kind(random.Random(seed), held_out)
        roles = [turn.role for turn in turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(turn.content == turn.content.strip() != "" for turn in turns)


def test_chats_have_one_answer_to_a_question_in_its_context() -> None:
    """A question that is asked twice in one chat gets the same answer twice."""
    for kind, _ in CHAT_KINDS:
        for seed in range(60):
            turns = kind(random.Random(seed), False)
            answers: dict[str, set[str]] = {}
            for asked, said in zip(turns[::2], turns[1::2], strict=True):
                answers.setdefault(asked.content, set()).add(said.content)
            assert all(len(given) == 1 for given in answers.values()), turns


def test_unknown_things_are_admitted() -> None:
    rng = random.Random(0)
    said = [turn for _ in range(200) for turn in make_chat(rng) if turn.category == "unknown"]
    assert said and all(turn.content == UNKNOWN for turn in said)


def test_names_differ_and_some_are_invented() -> None:
    rng = random.Random(0)
    drawn = [draw_names(rng, 3) for _ in range(300)]
    assert all(len(set(names)) == 3 for names in drawn)
    invented = [name for names in drawn for name in names if name not in SHE + HE]
    assert 0.05 < len(invented) / 900 < 0.25
    assert all(name.isalpha() and name[0].isupper() for name in invented)


@pytest.mark.parametrize(
    ("noun", "article"), [("owl", "an"), ("fox", "a"), ("orange", "an"), ("umbrella", "an")]
)
def test_articles(noun: str, article: str) -> None:
    assert with_article(noun) == f"{article} {noun}"


def test_a_world_can_be_told_in_every_plot() -> None:
    world = make_story(random.Random(0)).world
    assert {tell(random.Random(seed), world).plot for seed in range(400)} == set(PLOTS)


@pytest.mark.parametrize("name", ENCODERS)
def test_chats_are_learned_as_the_engine_renders_them(name: str) -> None:
    """Training reads a chat as the same ids that the model's template and the engine's tokenizer give."""
    encoder, tokenizer = ENCODERS[name](MODELS / name), load_tokenizer(MODELS / name)
    for seed in range(60):
        turns = make_chat(random.Random(seed))
        document = encoder.chat(turns)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        rendered = tokenizer.encode_chat(messages, add_generation_prompt=False)
        assert document.ids[: len(rendered)] == rendered
        first = turns.index(next(turn for turn in turns if turn.role == "assistant"))
        prompt = tokenizer.encode_chat(messages[:first], add_generation_prompt=True)
        assert document.ids[: len(prompt)] == prompt


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_hold_whole_documents(name: str) -> None:
    encoder = ENCODERS[name](MODELS / name)
    rows, again = (pack_rows(encoder, "rows", rows=3, length=512) for _ in range(2))
    assert rows.ids.shape == rows.labels.shape == (3, 512)
    assert (rows.ids == again.ids).all()
    learned = rows.labels != IGNORED
    assert (rows.labels[learned] == rows.ids[learned]).all()
    assert 0.1 < learned.mean() < 0.95
    first = draw_document(encoder, random.Random("rows"), held_out=False)
    size = len(first.ids)
    assert rows.ids[0, :size].tolist() == first.ids
    assert rows.labels[0, :size].tolist() == first.labels
    assert rows.weights[0, :size].tolist() == first.weights
    assert rows.positions[0, : size + 1].tolist() == [*range(size), 0]
    assert rows.documents[0, : size + 1].tolist() == [0] * size + [1]


def test_an_answer_weighs_more_than_what_can_be_told_freely() -> None:
    """Of a story told on request only the questions have one right answer."""
    encoder = ENCODERS["tiny-qwen3"](MODELS / "tiny-qwen3")
    document = encoder.chat(told_story(random.Random(1), False))
    answers = {i for start, end, _ in document.answers for i in range(start, end)}
    learned = {i for i, label in enumerate(document.labels) if label != IGNORED}
    assert answers < learned
    assert all(document.weights[i] == (1.0 if i in answers else FREE_WEIGHT) for i in learned)


@pytest.mark.parametrize("name", ENCODERS)
def test_bundled_models_are_complete_and_small(name: str) -> None:
    files = {file.name: file.stat().st_size for file in (MODELS / name).iterdir()}
    tokenizer = "tokenizer.json" if name == "tiny-qwen3" else "tokenizer.model"
    needed = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "README.md",
    }
    assert set(files) == needed | {tokenizer}
    assert sum(files.values()) <= 8_000_000
