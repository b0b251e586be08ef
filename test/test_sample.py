"""Sampling: native code against the NumPy meaning, both against what the literature and the APIs define."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.abi import constants, struct_dtype
from engine.device import Device, NotFiniteError
from engine.device.cpu import CPUDevice, available_isas
from engine.device.numpy import NumPyDevice
from engine.errors import UsageError
from engine.layer import plan_input
from engine.ops.sample import Sample, Samples, philox, uniform
from engine.plan import Plan

TOP = constants.MAX_LOGPROBS
Open = Callable[[], Device]
ISAS: dict[str, Open] = {isa: partial(CPUDevice, isa, 1) for isa in available_isas()}
TEAMS: dict[str, Open] = {f"{isa}-2-threads": partial(CPUDevice, isa, 2) for isa in available_isas()}


def on(devices: dict[str, Open]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("device", devices.values(), ids=devices)


every_cpu = on(ISAS | TEAMS)
every_device = on({"numpy": NumPyDevice} | ISAS)

VOCABULARIES = [1, 2, 15, 16, 17, 127, 128, 129, 300, 5000, 151936]
REQUESTS: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=0, logprobs=TOP),
    dict(temperature=1),
    dict(temperature=0.7, logprobs=0),
    dict(temperature=1, top_k=1),
    dict(temperature=1.5, top_k=20, logprobs=5),
    dict(temperature=1, top_k=2**31 - 1),
    dict(temperature=0.6, top_k=20, top_p=0.95, seed=2**64 - 1),
    dict(temperature=1, top_p=0.9, seed=7),
    dict(temperature=3, top_p=0.5, index=2**40),
    dict(temperature=1, top_p=1e-9),
    dict(temperature=0.8, min_p=0.05),
    dict(temperature=2, top_k=50, top_p=0.9, min_p=0.02, seed=3),
    dict(temperature=0, repetition_penalty=1.5, logprobs=3),
    dict(temperature=0, repetition_penalty=0.5, presence_penalty=2),
    dict(temperature=1, presence_penalty=-1.5, repetition_penalty=1.1, top_p=0.8),
    dict(temperature=0, target=0, logprobs=4),
]


def requests(*wanted: dict[str, Any]) -> np.ndarray:
    """Struct sampling of abi.h, one entry each; what is not named changes nothing."""
    entries = np.zeros(len(wanted), struct_dtype("sampling"))
    entries["top_p"], entries["repetition_penalty"] = 1, 1
    entries["logprobs"], entries["target"] = -1, -1
    for entry, values in zip(entries, wanted, strict=True):
        for name, value in values.items():
            entry[name] = value
    return entries


Outputs = tuple[np.ndarray, ...]  # token, logprob, top_token, top_logprob


def prepare(
    device: Device,
    logits: np.ndarray,
    entries: np.ndarray,
    history: Any = (0,),
    vocab_size: int | None = None,
) -> Callable[[], Outputs]:
    """Lowers a plan of one node; each call replays it."""
    logits = logits.astype(np.float32)
    plan = Plan(device)
    rows = plan_input(plan, np.array([len(logits)], np.int32), None, "rows")
    scores = plan_input(plan, logits, rows, "logits")
    out = Sample(vocab_size or logits.shape[1], device=device).record(
        scores,
        plan_input(plan, entries, rows, "sampling"),
        plan_input(plan, np.array(history, np.int32), None, "history"),
    )
    plan.lower()

    def replay() -> Outputs:
        plan.run()
        np.testing.assert_array_equal(device.download(scores), logits)  # left as they were
        return tuple(device.download(tensor) for tensor in out)

    return replay


def run(*arguments: Any, **options: Any) -> Outputs:
    """One replay of what `prepare` takes."""
    return prepare(*arguments, **options)()


def draws(device: Device, logits: Any, count: int = 1000, history: Any = (0,), **values: Any) -> np.ndarray:
    """The tokens with indices 0 … count − 1 of one request."""
    entries = requests(*[values] * count)
    entries["index"] = np.arange(count)
    return run(device, np.tile(np.asarray(logits, np.float32), (count, 1)), entries, history)[0]


def test_philox_gives_the_published_numbers() -> None:
    """The known answers that come with the paper's library, Random123."""
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@every_cpu
def test_the_generator_is_the_same_everywhere(device: Open) -> None:
    seeds = np.random.default_rng(0).integers(0, 2**64, 200, np.uint64)
    entries = requests(*[dict(temperature=1)] * len(seeds))
    entries["seed"], entries["index"] = seeds, seeds >> 3
    tokens = run(device(), np.zeros((len(seeds), 4096)), entries)[0]
    assert tokens.tolist() == [int(uniform(int(s), int(s) >> 3) * 4096) for s in seeds]


@cache
def every_request(device: Open, vocab_size: int) -> Outputs:
    rng = np.random.default_rng(vocab_size)
    entries = requests(*REQUESTS)
    entries["history_start"], entries["history_length"], entries["prompt_length"] = 10, 50, 30
    history = rng.integers(-2, vocab_size + 2, 80)
    return run(device(), rng.standard_normal((len(REQUESTS), vocab_size)) * 4, entries, history)


@every_cpu
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_native_equals_the_numpy_meaning(device: Open, vocab_size: int) -> None:
    found, expected = every_request(device, vocab_size), every_request(NumPyDevice, vocab_size)
    for name, mine, theirs in zip(Samples._fields, found, expected, strict=True):
        if mine.dtype == np.int32:
            np.testing.assert_array_equal(mine, theirs, name)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=2e-6, err_msg=name)


@every_device
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 300, 3000])
def test_ties_go_to_the_lower_id(device: Open, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    shape = (20, vocab_size)
    logits = rng.integers(-2, 3, shape) * rng.choice([-1.0, 1.0], shape)  # −0 and 0 are equal
    token, _, top_token, _ = run(device(), logits, requests(*[dict(logprobs=TOP)] * 20))
    np.testing.assert_array_equal(token, np.argmax(logits, axis=1))
    best = np.argsort(-logits, axis=1, kind="stable")[:, :TOP]
    np.testing.assert_array_equal(top_token[:, : best.shape[1]], best)
    assert (top_token[:, best.shape[1] :] == -1).all()


@every_device
@pytest.mark.parametrize("top_k", [1, 2, 7, 130, 299])
def test_top_k_draws_from_exactly_k_tokens(device: Open, top_k: int) -> None:
    logits = np.random.default_rng(top_k).integers(0, 3, 300) / 4
    best = np.argsort(-logits, kind="stable")[:top_k]
    assert set(draws(device(), logits, 2000, temperature=1, top_k=top_k)) == set(best)


@every_device
def test_a_top_k_of_the_whole_vocabulary_cuts_nothing(device: Open) -> None:
    logits = np.random.default_rng(3).standard_normal(50)
    plain = draws(device(), logits, temperature=1)
    for top_k in (50, 51, 2**31 - 1):
        np.testing.assert_array_equal(draws(device(), logits, temperature=1, top_k=top_k), plain)


def warped(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution after Hugging Face's warpers, as they define them: from the least likely token up."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(p, kind="stable")
    if top_k:
        p[order[:-top_k]] = 0
    p /= p.sum()
    p[order[np.cumsum(p[order]) <= 1 - top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@every_device
@pytest.mark.parametrize("vocab_size", [17, 300])
@pytest.mark.parametrize(
    "values",
    [(1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 10, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.2)]
    + [(2.0, 12, 0.9, 0.1)],
)
def test_draws_follow_the_distribution(device: Open, vocab_size: int, values: tuple[float, int, float, float]) -> None:
    """Pearson's chi-square over 4,000 draws: within five standard deviations; nothing impossible drawn."""
    temperature, top_k, top_p, min_p = values
    logits = np.random.default_rng(vocab_size).standard_normal(vocab_size).astype(np.float32)
    count = 4000
    p = warped(logits.astype(np.float64), *values)
    tokens = draws(device(), logits, count, seed=11, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    seen = np.bincount(tokens, minlength=vocab_size)
    assert not seen[p == 0].any()
    expected = p[p > 0] * count
    statistic = np.sum((seen[p > 0] - expected) ** 2 / expected)
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@every_device
def test_penalties_count_a_token_once(device: Open) -> None:
    """The sequence is 1 1 3 | 1 5 5: its prompt holds 1 and 3, what was generated 1 and 5."""
    logits = np.array([[0.0, 8.0, 7.0, -4.0, -5.0, 6.0]])
    history = [2, 2, 1, 1, 3, 1, 5, 5, 4]
    place = dict(history_start=2, history_length=6, prompt_length=3)
    cases: list[tuple[dict[str, float], list[float]]] = [
        (dict(repetition_penalty=2.0), [0, 4, 7, -8, -5, 3]),
        (dict(repetition_penalty=0.5), [0, 16, 7, -2, -5, 12]),
        (dict(presence_penalty=1.5), [0, 6.5, 7, -4, -5, 4.5]),
        (dict(repetition_penalty=2.0, presence_penalty=-1.0), [0, 5, 7, -8, -5, 4]),
    ]
    for penalties, expected in cases:
        for hidden in range(6):  # the best of those not hidden tells the order of all
            shown = logits.copy()
            shown[0, hidden] = -100
            scores = np.array(expected)
            scores[hidden] = -100
            token = run(device(), shown, requests({**place, **penalties}), history)[0]
            assert token[0] == np.argmax(scores), (penalties, hidden)
        p = np.exp(np.array(expected) / 8)
        drawn = draws(device(), logits[0], 4000, history, temperature=8, **place, **penalties)
        np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 4000, p / p.sum(), atol=0.035)


@every_device
def test_padding_is_never_looked_at(device: Open) -> None:
    logits = np.random.default_rng(0).standard_normal((40, 300))
    logits[:, 290:] = [[1e30], [np.nan]] * 20
    wanted: list[dict[str, Any]] = [
        dict(),
        dict(temperature=5),
        dict(temperature=5, top_p=0.99),
        dict(temperature=5, min_p=0.01),
    ]
    entries = requests(*(wanted * 10))
    entries["index"], entries["logprobs"] = np.arange(40), TOP
    entries["repetition_penalty"], entries["history_length"] = 2, 2
    token, logprob, top_token, top_logprob = run(device(), logits, entries, [295, 10**9], vocab_size=290)
    assert (token < 290).all() and (top_token < 290).all()
    logprobs = logits[:, :290] - np.log(np.exp(logits[:, :290]).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprob, logprobs[np.arange(40), token], atol=2e-6)
    np.testing.assert_allclose(top_logprob, np.take_along_axis(logprobs, top_token, 1), atol=2e-6)


@every_device
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error(device: Open, value: float) -> None:
    for vocab_size, column in [(1, 0), (17, 16), (300, 0), (300, 130), (300, 299)]:
        logits = np.zeros((5, vocab_size))
        logits[3, column] = value
        with pytest.raises(NotFiniteError) as raised:
            run(device(), logits, requests(*[dict(temperature=0.5)] * 5))
        assert raised.value.row == 3


@every_device
def test_logprobs_are_of_the_raw_logits(device: Open) -> None:
    """Whatever the temperature and the cuts; against float64. A shift of all logits changes nothing."""
    raw = np.random.default_rng(5).standard_normal((6, 1000)) * 5 + 1000
    wanted: list[dict[str, Any]] = [
        dict(logprobs=20), dict(logprobs=3, temperature=2), dict(logprobs=0, temperature=0.5, top_k=1),
        dict(logprobs=1, repetition_penalty=3, history_length=1), dict(logprobs=2, target=999), dict(),
    ]  # fmt: skip
    token, logprob, top_token, top_logprob = run(device(), raw, requests(*wanted), [int(raw[3].argmax())])
    expected = raw.astype(np.float32).astype(np.float64)
    expected -= np.log(np.exp(expected - 1000).sum(axis=1, keepdims=True)) + 1000
    assert token[4] == 999 and token[3] == np.argsort(raw[3])[-2]  # the penalty moves the token, not its logprob
    np.testing.assert_allclose(logprob[:5], expected[np.arange(5), token[:5]], atol=1e-5)
    assert logprob[5] == 0
    for row, values in enumerate(wanted):
        n = values.get("logprobs", 0)
        best = np.argsort(-raw[row], kind="stable")[:n]
        assert top_token[row].tolist() == [*best, *[-1] * (TOP - n)]
        np.testing.assert_allclose(top_logprob[row, :n], expected[row, best], atol=1e-5)
        assert np.isneginf(top_logprob[row, n:]).all()


@every_device
def test_a_target_beyond_the_vocabulary_is_impossible(device: Open) -> None:
    token, logprob, _, _ = run(device(), np.zeros((1, 20)), requests(dict(target=19, logprobs=0)), vocab_size=10)
    assert token[0] == 19 and np.isneginf(logprob[0])


@on(ISAS | dict(list(TEAMS.items())[-1:]))
def test_same_seed_same_token(device: Open) -> None:
    """100 replays of one plan, and the same row alone or among others."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((31, 2000)) * 3
    kinds: list[dict[str, Any]] = [dict(top_p=0.9), dict(), dict(top_k=40)]
    entries = requests(*kinds * 10, dict(min_p=0.1))
    entries["temperature"] = 1
    entries["seed"], entries["index"], entries["logprobs"] = (
        rng.integers(0, 2**63, 31),
        rng.integers(0, 99, 31),
        5,
    )
    opened = device()
    replay = prepare(opened, logits, entries)
    first = replay()
    for _ in range(100):
        for again, before in zip(replay(), first, strict=True):
            np.testing.assert_array_equal(again, before)
    for row in range(31):
        alone = run(opened, logits[row : row + 1], entries[row : row + 1])
        for one, many in zip(alone, first, strict=True):
            np.testing.assert_array_equal(one[0], many[row])
    for one, many in zip(run(opened, logits[::-1], entries[::-1]), first, strict=True):
        np.testing.assert_array_equal(one[::-1], many)


def test_threads_do_not_change_bits() -> None:
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((32, 3000))
    entries = requests(*[dict(temperature=1, top_p=0.7, logprobs=20)] * 32)
    entries["index"] = np.arange(32)
    for isa in available_isas():
        for one, two in zip(
            run(CPUDevice(isa, 1), logits, entries), run(CPUDevice(isa, 2), logits, entries), strict=True
        ):
            np.testing.assert_array_equal(one, two)


@every_device
def test_extreme_numbers(device: Open) -> None:
    """Nothing overflows into NaN: the most likely token, or one of those that share the first place."""
    large = 3e38
    for logits in ([-large, large, -large], [-large] * 3, [-1e30, 0, -1e30], [5, 5, 1]):
        best = {i for i, x in enumerate(logits) if x == max(logits)}
        assert set(draws(device(), logits, 50, temperature=1e-45)) == best
        assert set(draws(device(), logits, 50, temperature=1e-20, top_k=len(best))) == best
        assert set(draws(device(), logits, 50, temperature=0.001, min_p=1)) == best
        assert set(draws(device(), logits, 50, temperature=1, top_p=1e-30)) == {min(best)}
    penalty = dict(repetition_penalty=1e-3, history_length=3, temperature=1)
    assert set(draws(device(), [-large, large, large / 2], 50, [0, 1, 2], **penalty)) == {1, 2}


values_of = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2**64 - 1),
        index=st.integers(0, 2**40),
        temperature=st.sampled_from([0, 0.1, 0.7, 1, 1.9]),
        top_k=st.integers(0, 40),
        top_p=st.sampled_from([0.1, 0.5, 0.93, 1]),
        min_p=st.sampled_from([0, 0.01, 0.3, 1]),
        repetition_penalty=st.sampled_from([0.7, 1, 1.3]),
        presence_penalty=st.sampled_from([-1, 0, 0.6]),
        logprobs=st.integers(-1, TOP),
    )
)


@settings(max_examples=60)
@given(values=values_of, vocab_size=st.integers(1, 400), seed=st.integers(0, 999))
def test_any_request_native_equals_numpy(values: dict[str, Any], vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((1, vocab_size)) * 3
    history = rng.integers(0, vocab_size, 20)
    entries = requests({**values, "history_length": 20, "prompt_length": seed % 21})
    expected = run(NumPyDevice(), logits, entries, history)
    for isa in available_isas():
        token, _, top_token, _ = run(CPUDevice(isa, 1), logits, entries, history)
        assert token[0] == expected[0][0]
        np.testing.assert_array_equal(top_token, expected[2])


def test_wrong_inputs_are_refused_when_recorded() -> None:
    device = NumPyDevice()
    with pytest.raises(UsageError, match="vocab_size 0"):
        Sample(0, "sample", device)
    with pytest.raises(UsageError, match="10 logits for a vocabulary of 11"):
        run(device, np.zeros((1, 10)), requests(dict()), vocab_size=11)
    with pytest.raises(UsageError, match=r"sampling of shape \(2,\) for 1 rows"):
        run(device, np.zeros((1, 10)), requests(dict(), dict()))
