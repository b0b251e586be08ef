"""What a user may ask of a request, and where the answer comes from when nothing was asked."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from engine.abi import constants
from engine.errors import RillError, UsageError
from engine.files.json_file import Fields, brief

ASKED, GENERATION_CONFIG, DEFAULT = "asked for", "generation_config.json", "default"

NUMBERS = {
    "temperature": "[0, 100]",
    "top_p": "(0, 1]",
    "min_p": "[0, 1]",
    "repetition_penalty": "(0, 100]",
    "presence_penalty": "[-2, 2]",
}
INTEGERS = {
    "top_k": "[0, 2147483647]",
    "max_tokens": "[1, 2147483647]",
    "logprobs": f"[0, {constants.MAX_LOGPROBS}]",
    "prompt_logprobs": f"[0, {constants.MAX_LOGPROBS}]",
}
NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. Raises UsageError naming the parameter that cannot be.

    The first six and the seed may be left to the model (None): `resolve` says how.

    temperature         divides the logits before a draw; 0 takes the most likely token
    top_k               draw from the k most likely tokens; 0: from all
    top_p               draw from the smallest set of tokens that has this probability; 1: from all
    min_p               drop tokens less likely than this share of the most likely one; 0: none
    repetition_penalty  every token so far, the prompt's too: positive logits divided by it, others multiplied
    presence_penalty    subtracted from the logit of every token generated so far
    max_tokens          stop after so many; None: when the context is full
    stop                a text or several that end the generation; they are not part of it
    seed                0 … 2⁶⁴ − 1: the same seed gives the same text; None: a random one
    ignore_eos          go on after the model's end of text
    logprobs            report each generated token's log probability and as many alternatives, at most 20
    prompt_logprobs     likewise of the prompt's tokens
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(SamplingParams)}
        for name, value in _checked(values).items():
            object.__setattr__(self, name, value)

    def resolve(self, generation_config: Mapping[str, Any] | None = None) -> ResolvedParams:
        """Fills in what was not asked for: from the model's generation_config.json, else with what changes
        nothing.

        The temperature is 0 where do_sample is false, and where the file says neither do_sample nor
        temperature (as in transformers); but who asks for top_k, top_p or min_p wants draws, at the file's
        temperature or at 1.
        """
        config = generation_config or {}
        values = {f.name: getattr(self, f.name) for f in fields(SamplingParams)}
        sources = {name: ASKED for name in ("temperature", *NEUTRAL, "seed") if values[name] is not None}
        if values["temperature"] is None:
            values["temperature"], sources["temperature"] = self._default_temperature(config)
        for name, neutral in NEUTRAL.items():
            if values[name] is None:
                values[name] = config.get(name, neutral)
                sources[name] = GENERATION_CONFIG if name in config else DEFAULT
        if values["seed"] is None:
            values["seed"], sources["seed"] = secrets.randbits(64), "random"
        return ResolvedParams(**values, sources=sources)

    def _default_temperature(self, config: Mapping[str, Any]) -> tuple[float, str]:
        wants_draws = bool(self.top_k or self.min_p or (self.top_p or 1) < 1)
        if config.get("do_sample") is False and not wants_draws:
            return 0.0, GENERATION_CONFIG
        if "temperature" in config:
            return config["temperature"], GENERATION_CONFIG
        return (1.0 if wants_draws or config.get("do_sample") else 0.0), DEFAULT


@dataclass(frozen=True, kw_only=True)
class ResolvedParams(SamplingParams):
    """SamplingParams in which nothing is left to the model. sources: where each of these settings comes from,
    "asked for", "generation_config.json", "default", the seed's perhaps "random"."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    stop: tuple[str, ...] = ()
    seed: int
    sources: Mapping[str, str] = field(compare=False, repr=False)

    def fill(
        self,
        entry: np.void,
        *,
        index: int,
        history_start: int,
        history_length: int,
        prompt_length: int,
        target: int | None = None,
    ) -> None:
        """Writes a row of a step's `sampling`, a struct sampling of abi.h.

        index: of the token within its generation. history_start, history_length: where the sequence's tokens
        so far stand in the step's history, the first prompt_length of them the prompt's. target: None draws a
        token; else the row only reports the log probability of this one, the prompt's next.
        """
        logprobs = self.logprobs if target is None else self.prompt_logprobs
        for name in ("temperature", *NEUTRAL, "seed"):
            entry[name] = getattr(self, name)
        entry["index"] = index
        entry["logprobs"] = -1 if logprobs is None else logprobs
        entry["target"] = -1 if target is None else target
        entry["history_start"], entry["history_length"] = history_start, history_length
        entry["prompt_length"] = prompt_length


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values as plain Python ones, each within its interval; None stays. Raises UsageError."""
    given = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items() if v is not None}
    reader = Fields("sampling", given)
    try:
        result: dict[str, Any] = {"ignore_eos": reader.boolean("ignore_eos", False)}
        for name in given:
            if name in NUMBERS:
                result[name] = reader.number(name, NUMBERS[name])
            elif name in INTEGERS:
                result[name] = reader.integer(name, INTEGERS[name])
    except RillError as error:
        raise UsageError(str(error)) from None
    return result | {"seed": _seed(given.get("seed")), "stop": _stop(given.get("stop", ()))}


def _seed(value: object) -> int | None:
    """Checked as an integer: as a float, 2⁶⁴ − 1 would be 2⁶⁴."""
    if value is None or (type(value) is int and 0 <= value < 2**64):
        return value
    raise UsageError(f"sampling: seed: must be an integer in [0, 2^64), found {brief(value)}")


def _stop(value: object) -> tuple[str, ...]:
    """One text or several; a text that is empty would stop everything at once."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"sampling: stop: must be a list of texts that are not empty, found {brief(value)}")
    return tuple(texts)
