"""The rows of `demo.benchmark`, and how they are printed."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

HEAD = "| model | dtype | isa | attention | threads | batch | depth | test | rate | limit | share |"


@dataclass
class Row:
    """One line of the table: the mean of the rounds and the standard deviation, which is in the unit of the rate; the
    medians of the limit, in limit_unit, and of the rate's share of it."""

    model: str
    dtype: str
    isa: str
    attention: str
    threads: int
    batch: int | None
    depth: int | None
    test: str
    tokens_per_second: float | None
    stddev: float
    limit: float | None = None
    limit_share: float | None = None
    limit_unit: str = "byte/s"
    kv_dtype: str | None = None
    prompt_len: int | None = None
    gen_len: int | None = None
    bytes_per_second: float | None = None
    ranks: int = 1  # each has so many threads

    def line(self) -> str:
        """For the table in Markdown."""
        if self.bytes_per_second is not None:
            rate = f"{self.bytes_per_second / 1e9:.2f} ± {self.stddev / 1e9:.2f} GB/s"
        else:
            rate = f"{self.tokens_per_second:.2f} ± {self.stddev:.2f} tokens/s"
        unit = "GB/s" if self.limit_unit == "byte/s" else "GFLOP/s"
        limit = f"{self.limit / 1e9:.2f} {unit}" if self.limit else ""
        share = f"{self.limit_share:.1%}" if self.limit_share else ""
        depth, batch = ("" if n is None else n for n in (self.depth, self.batch))
        threads = f"{self.ranks} × {self.threads}" if self.ranks > 1 else self.threads
        what = f"{self.model} | {self.dtype} | {self.isa} | {self.attention} | {threads} | {batch} | {depth}"
        return f"| {what} | {self.test} | {rate} | {limit} | {share} |"


def print_rows(rows: Iterable[Row], output: str) -> None:
    """Prints rows as they come ("md", "csv"), or all of them at the end ("json")."""
    if output == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    writer = csv.DictWriter(sys.stdout, [field.name for field in fields(Row)], lineterminator="\n")
    for i, row in enumerate(rows):
        if output == "csv":
            if not i:
                writer.writeheader()
            writer.writerow(asdict(row))
        else:
            print(row.line() if i else f"{HEAD}\n{'|---' * HEAD.count(' | ')}|---|\n{row.line()}")
        sys.stdout.flush()
