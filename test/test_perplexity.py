"""demo.perplexity: what is scored, the four readings, the table and the files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo import perplexity
from demo.texts import Text, stories
from engine import LLM
from engine.text.tokenizer import load_tokenizer
from tools.train_data import IGNORED, Qwen3Encoder, draw_document

ROOT = Path(__file__).parent.parent
BUNDLED = str(ROOT / "models" / "tiny-qwen3")
Out = pytest.CaptureFixture[str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("The mouse lived by the river. " * 9, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, dtype="float32") as llm:
        yield llm


def logprobs(llm: LLM, tokens: list[int]) -> np.ndarray:
    """Of each token but the first, among those that are text: the embedding has more rows."""
    assert llm.tokenizer is not None
    scores = llm.logits(tokens).astype(np.float64)[:-1, : llm.tokenizer.vocab_size]
    top = scores.max(axis=1)
    return scores[np.arange(len(scores)), tokens[1:]] - top - np.log(np.exp(scores - top[:, None]).sum(axis=1))


def measure(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    prefix = tmp_path / "out"
    assert perplexity.main([*map(str, arguments), "--dtype", "float32", "-o", str(prefix)]) == 0
    content: dict[str, Any] = json.loads(prefix.with_suffix(".json").read_text())
    return content


def test_every_reading_is_what_the_logits_say(tiny: Path, llm: LLM, text: Path, tmp_path: Path, capsys: Out) -> None:
    content = measure(tmp_path, tiny, text, "--window", 20, "--sink", 3)
    tokens = llm._encode(text.read_text())
    whole = logprobs(llm, tokens)
    alone = [logprobs(llm, tokens[max(0, p - 20) : p + 1])[-1] for p in range(1, len(tokens))]
    windows = {}
    for sink in (0, 3):
        with LLM(tiny, dtype="float32", attention="streaming", window=20, sink=sink) as streaming:
            windows[sink] = logprobs(streaming, tokens)
    expected: dict[str, Any] = {"full": whole, "recomputed": alone}
    expected |= {"window 20": windows[0], "sinks 3 + window 20": windows[3]}
    assert content["tokens"] == content["scored"] == len(tokens)
    for row in [*content["rows"], content["beyond_the_window"]]:
        assert row["at_sampled"].keys() == expected.keys()
        for name, values in expected.items():
            exact = np.exp(-np.mean(values[row["start"] - 1 : row["stop"] - 1]))
            assert row["at_sampled"][name] == pytest.approx(exact, rel=1e-4), (name, row["start"])
            assert name == "recomputed" or row["perplexity"][name] == row["at_sampled"][name]
    assert abs(whole - windows[0])[25:].max() > 1e-3 and abs(windows[0] - windows[3])[25:].max() > 1e-3
    out, err = capsys.readouterr()
    assert [(row["start"], row["stop"]) for row in content["rows"]] == [(1, 64), (64, 128), (128, 256), (256, 270)]
    assert out.splitlines()[2].startswith(f"| 1–63 | 63 | {content['rows'][0]['perplexity']['full']:.4f} | ")
    assert "beyond the window, sinks 3 + window 20: " in out and "streaming+window" in err
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_every_nth_token_compares_the_same_ones(tiny: Path, llm: LLM, text: Path, tmp_path: Path, capsys: Out) -> None:
    content = measure(tmp_path, tiny, text, "--window", 20, "--every", 7, "--max-tokens", 120)
    tokens = llm._encode(text.read_text())[:120]
    picked = [p for p in range(1, 120, 7) if p > 20]
    beyond = content["beyond_the_window"]
    assert (beyond["tokens"], beyond["sampled"]) == (99, len(picked))
    exact = np.exp(-np.mean([logprobs(llm, tokens[p - 20 : p + 1])[-1] for p in picked]))
    assert beyond["at_sampled"]["recomputed"] == pytest.approx(exact, rel=1e-4)
    exact = np.exp(-np.mean([logprobs(llm, tokens)[p - 1] for p in picked]))
    assert beyond["at_sampled"]["full"] == pytest.approx(exact, rel=1e-4)
    head = capsys.readouterr().out.splitlines()[0]
    assert "| full | " in head and "| full (every 7) |" in head and "| recomputed (every 7) |" in head


def test_a_text_may_be_longer_than_the_context(tmp_path: Path, capsys: Out) -> None:
    content = measure(tmp_path, BUNDLED, "--stories", 6, "--window", 30, "--every", 200)
    limit = json.loads((Path(BUNDLED) / "config.json").read_text())["max_position_embeddings"]
    assert content["tokens"] > limit
    last = content["rows"][-1]["perplexity"]
    assert last["full"] is None and 1 < last["sinks 4 + window 30"] < 100 and "not run" in capsys.readouterr().out
    assert content["rows"][0]["perplexity"]["full"] > 1


def test_stories_are_the_held_out_ones_of_the_training(tmp_path: Path) -> None:
    import random

    rng = random.Random(5)
    documents = [draw_document(Qwen3Encoder(Path(BUNDLED)), rng, held_out=True) for _ in range(4)]
    found = stories(BUNDLED, 4, seed=5)
    assert found.tokens == [i for document in documents for i in document.ids]
    assert found.scored == [label != IGNORED for document in documents for label in document.labels]
    assert stories(BUNDLED, 4, seed=5) == found != stories(BUNDLED, 4, seed=6)
    assert 0 < sum(found.scored) < len(found.tokens)
    assert load_tokenizer(BUNDLED).decode(found.tokens)


def test_the_first_token_follows_nothing() -> None:
    text = Text("some", list(range(9)), [True, False, True, True, True, False, True, True, True])
    assert text.sample(1) == [2, 3, 4, 6, 7, 8] and text.sample(4) == [2, 7]
    assert text.cut(4).sample(1) == [2, 3] and text.cut(None) == text


def test_buckets_double() -> None:
    assert list(perplexity.buckets(300)) == [(1, 64), (64, 128), (128, 256), (256, 300)]
    assert list(perplexity.buckets(40)) == [(1, 40)]


def test_a_bucket_that_was_not_read_whole_has_no_figure() -> None:
    reading = perplexity.Reading("full", {p: -1.0 for p in range(1, 100)})
    assert reading.perplexity(range(1, 101)) == pytest.approx(np.e)  # but for one in a hundred
    assert reading.perplexity(range(1, 104)) is None and reading.perplexity([]) is None


@pytest.mark.parametrize(
    ("arguments", "status", "fragment"),
    [
        ([], 2, "give one of TEXT and --stories"),
        (["TEXT", "--stories", "3"], 2, "give one of TEXT and --stories"),
        (["TEXT", "--window", "0"], 2, "--window: expected a positive number"),
        (["TEXT", "--sink", "-2"], 2, "-2"),
        (["TEXT", "--window", "600"], 2, "--window 600: the text has 270 tokens, too few"),
        (["TEXT", "--attention", "dense"], 2, "--attention 'dense'"),
        (["TEXT", "--device", "tpu"], 2, "device 'tpu'"),
        (["TEXT", "-o", "absent/x"], 2, "--output absent/x: absent is no directory"),
        (["absent"], 1, "absent: No such file or directory"),
        (["BINARY"], 2, "is not UTF-8 (byte 1)"),
    ],
)
def test_misuse_is_one_line(
    tiny: Path, text: Path, tmp_path: Path, arguments: list[str], status: int, fragment: str, capsys: Out
) -> None:
    (tmp_path / "binary").write_bytes(b"a\xff")
    paths = {"TEXT": str(text), "BINARY": str(tmp_path / "binary")}
    assert perplexity.main([str(tiny), "-o", str(tmp_path / "out"), *(paths.get(a, a) for a in arguments)]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("demo.perplexity: error: ") and fragment in err
    assert not list(tmp_path.glob("out*"))


def test_a_window_must_fit_the_context(tmp_path: Path, capsys: Out) -> None:
    limit = json.loads((Path(BUNDLED) / "config.json").read_text())["max_position_embeddings"]
    arguments = [BUNDLED, "--stories", "8", "--window", str(limit - 1), "-o", str(tmp_path / "out")]
    assert perplexity.main(arguments) == 2
    expected = f"--window {limit - 1}: to run it anew the model has {limit - 2} positions at most\n"
    assert capsys.readouterr().err.endswith(expected)
