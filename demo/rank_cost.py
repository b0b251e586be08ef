"""`rill --profile` under mpiexec: what a token costs each rank, and a forecast for more ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.ranks.cost import Cost, Forecast, Link, PhaseCost, Turn

TOKEN = {"prefill": "token of a prompt", "decode": "token"}


def lines(cost: Cost) -> Iterator[str]:
    for name, phase in cost.phases.items():
        yield f"{name}, on {cost.ranks} ranks: µs a {TOKEN[name]}"
        yield from _measured(phase)
    yield f"{'forecast: ' if cost.fits else ''}{describe(cost.link)}, measured after the run"
    for name, phase in cost.phases.items() if cost.fits else ():
        count, size = phase.collectives / phase.tokens, phase.size / phase.tokens
        yield f"{name}: µs a {TOKEN[name]}, with {count:.3g} collectives of {size / 1e3:.3g} KB together"
        yield from _forecast(cost, phase)
        yield f"  {verdict(cost, phase)}"
    if cost.crowded:
        yield "  the ranks have more threads than cores: computing and waiting include waiting for a core"
    if cost.left_out:
        yield f"  replays beyond what is kept, which count nowhere: {cost.left_out}"


def _row(label: object, cells: Sequence[object]) -> str:
    texts = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"  {label!s:>5}" + "".join(f"  {text:>13}" for text in texts)


def _measured(phase: PhaseCost) -> Iterator[str]:
    yield _row("rank", ("compute", "communication", "waiting", "outside", "all"))
    for rank, (compute, waiting, outside) in enumerate(zip(phase.compute, phase.waiting, phase.outside, strict=True)):
        parts = (compute, phase.communication, waiting, outside, phase.seconds)
        yield _row(rank, [float(seconds) / phase.tokens * 1e6 for seconds in parts])


def _forecast(cost: Cost, phase: PhaseCost) -> Iterator[str]:
    yield _row("ranks", ("compute", "communication", "outside", "all", "speed-up"))
    found = {each.ranks: each for each in cost.forecasts(phase)}
    for ranks in cost.fits:
        if ranks not in found:
            yield _row(ranks, ("heads do not divide",))
            continue
        each = found[ranks]
        parts = (each.compute, each.communication, each.outside, each.seconds)
        yield _row(ranks, [*(part * 1e6 for part in parts), f"{found[1].seconds / each.seconds:.2f}"])


def describe(link: Link) -> str:
    rate = f" and 1 s for {link.bandwidth / 1e9:.3g} GB" if link.bandwidth < float("inf") else ""
    return f"a sum between {link.ranks} ranks takes {link.latency * 1e6:.1f} µs{rate}"


def verdict(cost: Cost, phase: PhaseCost) -> str:
    """One line: whether more ranks will be slower, and what would be needed."""
    turn = cost.turn(phase)
    if turn is None:
        best = cost.forecasts(phase)[-1]
        return f"more ranks will not be slower: {best.ranks} are the fastest of these"
    return f"{slower(turn)}; {needed(cost.link, turn)}"


def slower(turn: Turn) -> str:
    def communication(each: Forecast) -> str:
        return f"{each.communication * 1e6:.1f}"

    saved = (turn.before.compute - turn.after.compute) * 1e6
    return (f"{turn.after.ranks} ranks will be slower than {turn.before.ranks}: they save {saved:.1f} µs of computing, "
            f"and communication goes from {communication(turn.before)} to {communication(turn.after)} µs")  # fmt: skip


def needed(link: Link, turn: Turn) -> str:
    rate = f" and {link.bandwidth * turn.factor / 1e9:.3g} GB/s" if link.bandwidth < float("inf") else ""
    return (f"needed: collectives {turn.factor:.1f} times as fast, {link.latency / turn.factor * 1e6:.1f} µs{rate} "
            f"between {link.ranks}")  # fmt: skip
