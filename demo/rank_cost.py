"""`rill --profile` under mpiexec: what a token costs each rank, and a forecast for more ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.ranks.cost import Cost, Line, Link, PhaseCost, Turn

TOKEN = {"prefill": "token of a prompt", "decode": "token"}


def lines(cost: Cost) -> Iterator[str]:
    where = f"{cost.stages} stages" if cost.line else f"{cost.ranks} ranks"
    for name, phase in cost.phases.items():
        yield f"{name}, on {where}: µs a {TOKEN[name]}"
        yield from _measured(phase)
    if cost.line:
        yield f"stages, one after the other: {order(cost)}"
    yield f"{'forecast: ' if cost.shares else ''}{describe(cost)}, measured after the run"
    for name, phase in cost.phases.items() if cost.shares else ():
        yield f"{name}: µs a {TOKEN[name]}, with {messages(cost.line, phase) if cost.line else collectives(phase)}"
        yield from _forecast(cost, phase)
        yield f"  {verdict(cost, phase)}"
    if cost.crowded:
        yield "  the ranks have more threads than cores: computing and waiting include waiting for a core"
    if cost.left_out:
        yield f"  replays beyond what is kept, which count nowhere: {cost.left_out}"


def order(cost: Cost) -> str:
    """Which ranks each stage has: rank 0 is in the last one."""
    width = cost.ranks // cost.stages
    starts = [*range(width, cost.ranks, width), 0]
    return ", ".join(f"rank {i}" if width == 1 else f"ranks {i} to {i + width - 1}" for i in starts)


def collectives(phase: PhaseCost) -> str:
    count, size = phase.collectives / phase.tokens, phase.size / phase.tokens
    return f"{count:.3g} collectives of {size / 1e3:.3g} KB together"


def messages(line: Line, phase: PhaseCost) -> str:
    size, pieces = phase.tokens / phase.steps * line.row, phase.steps / phase.runs
    prompts = f", {pieces:.3g} pieces of a prompt at work at once" if pieces > 1 else ""
    return f"{size / 1e3:.3g} KB a step from stage to stage{prompts}"


def _row(label: object, cells: Sequence[object]) -> str:
    texts = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
    return f"  {label!s:>5}" + "".join(f"  {text:>13}" for text in texts)


def _measured(phase: PhaseCost) -> Iterator[str]:
    yield _row("rank", ("compute", "communication", "waiting", "outside", "all"))
    parts = (phase.compute, phase.communication, phase.waiting, phase.outside)
    for rank, seconds in enumerate(zip(*parts, strict=True)):
        yield _row(rank, [float(each) / phase.tokens * 1e6 for each in (*seconds, phase.seconds)])


def _forecast(cost: Cost, phase: PhaseCost) -> Iterator[str]:
    what, none = ("stages", "fewer layers") if cost.line else ("ranks", "heads do not divide")
    yield _row(what, ("compute", "communication", "outside", "all", "speed-up"))
    found = {each.ranks: each for each in cost.forecasts(phase)}
    for ranks in cost.shares:
        if ranks not in found:
            yield _row(ranks, (none,))
            continue
        each = found[ranks]
        parts = (each.compute, each.communication, each.outside, each.seconds)
        yield _row(ranks, [*(part * 1e6 for part in parts), f"{found[1].seconds / each.seconds:.2f}"])


def describe(cost: Cost) -> str:
    if cost.line:
        message, told = cost.line.message, cost.line.told
        return f"a message from stage to stage takes {_way(message)}, to tell of a step {_way(told)}"
    assert cost.link
    return f"a sum between {cost.link.ranks} ranks takes {_way(cost.link)}"


def _way(link: Link) -> str:
    return f"{link.latency * 1e6:.1f} µs" + (f" and 1 s for {_rate(link)}" if _rate(link) else "")


def _rate(link: Link, factor: float = 1.0) -> str:
    return f"{link.bandwidth * factor / 1e9:.3g} GB" if link.bandwidth < float("inf") else ""


def verdict(cost: Cost, phase: PhaseCost) -> str:
    """One line: whether more ranks will be slower, and what would be needed."""
    what, turn = "stages" if cost.line else "ranks", cost.turn(phase)
    if turn is None:
        best = cost.forecasts(phase)[-1]
        return f"more {what} will not be slower: {best.ranks} are the fastest of these"
    begin = f"{turn.after.ranks} {what} will be slower than {turn.before.ranks}: they save "
    grows = f"communication goes from {turn.before.communication * 1e6:.1f} to {turn.after.communication * 1e6:.1f} µs"
    if turn.saved <= 0:
        return f"{begin}no computing, for one works at a time, and {grows}; {what} make room, not speed"
    return f"{begin}{turn.saved * 1e6:.1f} µs of computing, and {grows}; {needed(cost, turn)}"


def needed(cost: Cost, turn: Turn) -> str:
    if cost.line:
        return f"needed: messages {turn.factor:.1f} times as fast"
    link = cost.link
    assert link
    rate = f" and {_rate(link, turn.factor)}/s" if _rate(link) else ""
    return (f"needed: collectives {turn.factor:.1f} times as fast, {link.latency / turn.factor * 1e6:.1f} µs{rate} "
            f"between {link.ranks}")  # fmt: skip
