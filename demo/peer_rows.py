"""The lines of `demo.compare_llama_cpp`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from demo.timed_model import spread

HEAD = ("| test | threads | isa | Rill's weights | Rill, tokens/s | share of its limit | llama.cpp's weights | "
        "llama.cpp, tokens/s | ratio | ratio of the fastest | others' CPUs |")  # fmt: skip


@dataclass(frozen=True)
class Round:
    """Tokens a second of both programs, one after the other; Rill's share of its limit; how many CPUs other
    programs kept busy meanwhile."""

    rill: float
    share: float
    peer: float
    others: float


@dataclass(frozen=True)
class Pair:
    """One test of both programs. dtype: of Rill's weights; peer_weights: what the file holds that llama.cpp ran."""

    test: str
    depth: int
    threads: int
    isa: str
    model: str
    dtype: str
    kv_dtype: str
    peer_weights: str
    peer_kv_dtype: str
    peer_build: dict[str, Any]
    rounds: list[Round]

    def summary(self) -> dict[str, float]:
        """Means and standard deviations of the rates; of each round's ratio the median, the least and the greatest; the
        ratio of the fastest rounds, which other programs disturbed least."""
        rill, peer = [r.rill for r in self.rounds], [r.peer for r in self.rounds]
        ratios = [a / b for a, b in zip(rill, peer, strict=True)]
        return {"rill": mean(rill), "rill_stddev": spread(rill), "peer": mean(peer), "peer_stddev": spread(peer),
                "share": median(r.share for r in self.rounds), "ratio": median(ratios), "ratio_least": min(ratios),
                "ratio_greatest": max(ratios), "ratio_of_fastest": max(rill) / max(peer),
                "others": mean(r.others for r in self.rounds)}  # fmt: skip

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), **self.summary()}

    def line(self) -> str:
        """For the table in Markdown."""
        s = self.summary()
        test = f"{self.test} @ {self.depth}" if self.depth else self.test
        return (f"| {test} | {self.threads} | {self.isa} | {self.dtype} | {s['rill']:.1f} ± {s['rill_stddev']:.1f} | "
                f"{s['share']:.0%} | {self.peer_weights} | {s['peer']:.1f} ± {s['peer_stddev']:.1f} | "
                f"{s['ratio']:.2f} ({s['ratio_least']:.2f}–{s['ratio_greatest']:.2f}) | {s['ratio_of_fastest']:.2f} | "
                f"{s['others']:.1f} |")  # fmt: skip
