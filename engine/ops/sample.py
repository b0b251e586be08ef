from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.abi import FLOAT32, constants, struct_dtype
from engine.device import Device, NotFiniteError
from engine.layer import Layer
from engine.plan import Tensor, op

INT32 = np.dtype(np.int32)
LARGEST = np.finfo(np.float32).max


@op("token", "logprob", "top_token", "top_logprob")
def sample(
    logits: np.ndarray,
    sampling: np.ndarray,
    history: np.ndarray,
    token: np.ndarray,
    logprob: np.ndarray,
    top_token: np.ndarray,
    top_logprob: np.ndarray,
    *,
    vocab_size: int,
) -> None:
    top_token[...], top_logprob[...], logprob[...] = -1, -np.inf, 0
    for row, (scores, s) in enumerate(zip(logits[:, :vocab_size], sampling, strict=True)):
        if not np.isfinite(scores).all():
            raise NotFiniteError(row)
        token[row] = s["target"] if s["target"] >= 0 else choose(penalised(scores, s, history), s)
        if s["logprobs"] >= 0:
            logprobs = log_softmax(scores)
            best = most_likely_first(scores)[: s["logprobs"]]
            logprob[row] = logprobs[token[row]] if token[row] < vocab_size else -np.inf
            top_token[row, : len(best)], top_logprob[row, : len(best)] = best, logprobs[best]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """log(e^x / Σ e^x), float64."""
    shifted = scores.astype(np.float64) - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def most_likely_first(scores: np.ndarray) -> np.ndarray:
    """All ids, equal scores by lower id."""
    return np.argsort(-scores, kind="stable")


def penalised(scores: np.ndarray, s: np.void, history: np.ndarray) -> np.ndarray:
    """Repetition penalty (Keskar et al., 2019) of every token so far, presence penalty (OpenAI's API) of
    every generated one; each token counts once, however often it appears."""
    tokens = history[s["history_start"] :][: s["history_length"]]
    scores, penalty = scores.copy(), s["repetition_penalty"]
    seen = distinct(tokens, len(scores))
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    scores[distinct(tokens[s["prompt_length"] :], len(scores))] -= s["presence_penalty"]
    return np.clip(scores, -LARGEST, LARGEST)


def distinct(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return np.unique(tokens[(tokens >= 0) & (tokens < vocab_size)])


def choose(scores: np.ndarray, s: np.void) -> int:
    """The most likely token, or a draw: temperature, then top-k (Fan et al., 2018), then top-p (Holtzman et
    al., 2020), then min-p (Nguyen et al., 2024), then the first token at which the sum of probabilities
    exceeds u of the whole. The sum runs in order of ids where none of the three is set, else from the most
    likely token down.
    """
    if s["temperature"] == 0:
        return int(np.argmax(scores))
    weights = np.exp((scores.astype(np.float64) - scores.max()) / s["temperature"])
    if (s["top_k"] <= 0 or s["top_k"] >= len(scores)) and s["top_p"] >= 1 and s["min_p"] <= 0:
        ids = np.arange(len(scores))
    else:
        ids = most_likely_first(scores)[: s["top_k"] if s["top_k"] > 0 else None]
        ids = ids[: kept(weights[ids], float(s["top_p"]), float(s["min_p"]))]
    sums = np.cumsum(weights[ids])
    wanted = min(uniform(int(s["seed"]), int(s["index"])) * sums[-1], np.nextafter(sums[-1], 0))
    return int(ids[np.searchsorted(sums, wanted, side="right")])


def kept(weights: np.ndarray, top_p: float, min_p: float) -> int:
    """How many of these falling weights make up at least top_p of their sum and are at least min_p of the
    first."""
    sums = np.cumsum(weights)
    by_mass = np.searchsorted(sums, top_p * sums[-1]) + 1 if top_p < 1 else len(weights)
    return max(1, min(int(by_mass), len(weights), int(np.sum(weights >= min_p * weights[0]))))


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, a generator whose whole state is a counter (Salmon et al., Parallel random numbers: as
    easy as 1, 2, 3, 2011): four words from four words and a key of two."""
    (c0, c1, c2, c3), (key0, key1) = counter, key
    for _ in range(10):
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            product2 >> 32 ^ c1 ^ key0,
            product2 & 0xFFFFFFFF,
            product0 >> 32 ^ c3 ^ key1,
            product0 & 0xFFFFFFFF,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) of 53 bits: the seed is Philox's key, the index its counter."""
    words = philox((index & 0xFFFFFFFF, index >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[0] << 32 | words[1]) >> 11) * 2.0**-53


class Samples(NamedTuple):
    """What `Sample` gives for each row of logits. Logprobs are those of the logits as they come: no
    temperature, no penalty, nothing cut."""

    token: Tensor  # int32 [rows]
    logprob: Tensor  # float32 [rows] of that token, 0 unless asked for
    top_token: Tensor  # int32 [rows, MAX_LOGPROBS], the most likely tokens asked for, then -1
    top_logprob: Tensor  # float32 [rows, MAX_LOGPROBS], theirs, then -inf


class Sample(Layer):
    """Draws a token of each row of logits, by the row's own parameters (struct sampling of abi.h). A draw
    depends on the row's logits, its parameters and its sequence's tokens only: not on device, threads or the
    other rows.

    vocab_size: ids from here on are padding of the logits and are never drawn.
    forward: logits [rows, at least vocab_size], sampling [rows], history int32 [tokens of all sequences] ->
    Samples, which outlive the plan's run. Raises NotFiniteError when a plan meets NaN or infinity.
    """

    def __init__(self, vocab_size: int, name: str = "", device: Device | None = None) -> None:
        super().__init__(name, device)
        self.vocab_size = vocab_size
        self.check(vocab_size > 0, f"vocab_size {vocab_size}, expected at least 1")

    def record(self, logits: Tensor, sampling: Tensor, history: Tensor) -> Samples:
        width, vocab_size = logits.width, self.vocab_size
        self.check(vocab_size <= width, f"{width} logits for a vocabulary of {vocab_size}")
        self.check(sampling.dtype == struct_dtype("sampling"), f"sampling is {sampling.dtype}")
        self.check(history.dtype == INT32, f"history is {history.dtype}, expected int32")
        plan = self.plan_of(logits, sampling)
        rows = logits.shape[0]
        self.check(sampling.shape == (rows,), f"sampling of shape {sampling.shape} for {rows} rows of logits")

        def output(name: str, dtype: np.dtype, *width: int) -> Tensor:
            return plan.keep(Tensor((rows, *width), dtype, f"{self.name}.{name}", plan, logits.rows))

        top = constants.MAX_LOGPROBS
        out = Samples(output("token", INT32), output("logprob", FLOAT32),
                      output("top_token", INT32, top), output("top_logprob", FLOAT32, top))  # fmt: skip
        plan.record(sample, self.name, logits=logits, sampling=sampling, history=history,
                    vocab_size=vocab_size, **out._asdict())  # fmt: skip
        return out
