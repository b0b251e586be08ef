"""The cuda device's attention and products beside PyTorch's, on the same shapes and dtypes: rows with the ratio.

Attention: `scaled_dot_product_attention` with FlashAttention-2 and with cuDNN, each forced; on Hopper, Rill's prefill
by mma.sync and by wgmma. Products: `torch.matmul`, which is cuBLAS; where Rill has cuBLAS, its own kernel, too. Needs
PyTorch with CUDA. tools.cuda_bench calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from demo.attention_rig import AttentionRig, AttentionShape
from engine.abi import BFLOAT16, FLOAT32
from engine.ops.matmul import Linear
from engine.plan import Plan, Tensor
from engine.profile import TIMES
from engine.step import Step
from tools.random_model import PRESETS

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION")  # of torch.nn.attention.SDPBackend
WARM, ROUNDS = 5, 31
ROWS = 2048  # of a product
METHOD = (f"CUDA events around each call, so that what the GPU waits for launches counts on both sides; median of "
          f"{ROUNDS} after {WARM} to warm up; normally distributed data; Rill's queries, inputs and outputs are "
          "float32")  # fmt: skip
Timed = Callable[[], float]  # the seconds of one call
Work = Callable[[], Timed]  # prepares one


class Attention(NamedTuple):
    """Heads of 128 over `length` keys of bf16; causal over all rows, or the last row alone."""

    heads: int
    kv_heads: int
    length: int
    rows: int

    @property
    def name(self) -> str:
        what = "decode" if self.rows == 1 else "prefill"
        return f"{what}, {self.heads}/{self.kv_heads} heads, {self.length} keys"

    @property
    def operations(self) -> int:
        return 4 * self.heads * 128 * self.shape.scores(self.rows)

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, 128, (self.length,))


class Product(NamedTuple):
    """[rows, inputs] · [outputs, inputs]ᵀ in bf16."""

    node: str
    rows: int
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        return f"{self.node}, {self.rows} × {self.inputs} × {self.outputs}"

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


def attention_cases() -> list[Attention]:
    prefill = [Attention(heads, kv, 1 << i, 1 << i) for heads, kv in ((16, 16), (64, 8)) for i in range(10, 15)]
    return prefill + [Attention(64, 8, 1 << i, 1) for i in range(11, 18)]


def product_cases(preset: str = "qwen3-0.6b") -> list[Product]:
    """What a layer of the model multiplies."""
    config = PRESETS[preset]
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    return [Product("qkv", ROWS, hidden, q + 2 * kv), Product("o", ROWS, q, hidden),
            Product("gate·up", ROWS, hidden, 2 * inner), Product("down", ROWS, inner, hidden)]  # fmt: skip


# What is timed.


def rill_seconds(plan: Plan, first: int) -> Timed:
    """One node of a plan, between two events."""
    times = np.zeros((1, 1), TIMES)
    plan.program.begin()  # type: ignore[union-attr]

    def call() -> float:
        plan.program.run(first, first + 1, times)  # type: ignore[union-attr]
        return float(times["end"][0, 0] - times["begin"][0, 0]) * 1e-9

    return call


def torch_seconds(torch: Any, work: Callable[[], object]) -> Timed:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def call() -> float:
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return call


def rill_attention(device: Any, case: Attention, hopper: bool) -> Timed:
    device.hopper, kept = hopper, device.hopper
    rig = AttentionRig(device, case.shape, "flash", BFLOAT16, rows=case.rows)
    device.hopper = kept
    rig.store()
    return rill_seconds(rig.plan, rig.first)


def torch_attention(torch: Any, case: Attention, backend: str) -> Timed:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sizes = [(case.heads, case.rows), (case.kv_heads, case.length), (case.kv_heads, case.length)]
    inputs = [torch.randn(1, heads, n, 128, dtype=torch.bfloat16, device="cuda") for heads, n in sizes]
    options = {"is_causal": case.rows > 1, "enable_gqa": case.heads != case.kv_heads}

    attend = partial(torch.nn.functional.scaled_dot_product_attention, *inputs, **options)
    timed = torch_seconds(torch, attend)

    def call() -> float:
        with sdpa_kernel(getattr(SDPBackend, backend)), torch.inference_mode():
            return timed()

    return call


def rill_product(device: Any, case: Product, cublas: Any) -> Timed:
    """cublas: the device's, or None for its own kernel."""
    rng, plan = np.random.default_rng(0), Plan(device)
    step = Step(device, plan, case.rows, 1, 1)
    weight = rng.standard_normal((case.outputs, case.inputs), np.float32).astype(ml_dtypes.bfloat16)
    layer = Linear([weight], name=case.node, device=device)
    x = Tensor((case.rows, case.inputs), FLOAT32, "x", plan, step.tensors["rows"])
    device.upload(x, rng.standard_normal(x.shape, np.float32))
    plan.keep(layer.record(x))
    device.load([layer.matrices[0]])
    device.cublas, kept = cublas, device.cublas
    plan.lower()
    device.cublas = kept
    step.set_rows([0] * case.rows, [0] * case.rows, [0] * case.rows)
    return rill_seconds(plan, 0)


def torch_product(torch: Any, case: Product) -> Timed:
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    x, weight = torch.randn(case.rows, case.inputs, **make), torch.randn(case.outputs, case.inputs, **make)
    return torch_seconds(torch, lambda: torch.matmul(x, weight.t()))


# Rows.


def median_seconds(call: Timed) -> float:
    for _ in range(WARM):
        call()
    return median(call() for _ in range(ROUNDS))


def case_rows(case: Attention | Product, works: dict[str, Work]) -> Iterator[dict[str, Any]]:
    """A row for each of the works, Rill's first. One that refuses gets a row with its reason; times_ours is its time by
    Rill's, None where either is missing."""
    ours: float | None = None
    for i, (by, prepare) in enumerate(works.items()):
        row: dict[str, Any] = {"case": case.name, "by": by, "seconds": None, "flops": None, "times_ours": None}
        try:
            seconds = median_seconds(prepare())
        except Exception as error:  # whatever a backend raises for a shape that it does not take
            yield row | {"refused": " ".join(str(error).split())[:200] or type(error).__name__}
            continue
        ours = seconds if i == 0 else ours
        yield row | {"seconds": seconds, "flops": case.operations / seconds, "times_ours": ours and seconds / ours}


def compare(device: Any, torch: Any, cases: Sequence[Attention | Product]) -> Iterator[dict[str, Any]]:
    for case in cases:
        works: dict[str, Work]
        if isinstance(case, Attention):
            works = {"Rill": partial(rill_attention, device, case, False)}
            if device.driver.hopper and case.rows > 1:
                works["Rill by wgmma"] = partial(rill_attention, device, case, True)
            works |= {f"PyTorch {backend}": partial(torch_attention, torch, case, backend) for backend in BACKENDS}
        else:
            works = {"Rill": partial(rill_product, device, case, device.cublas)}
            if device.cublas:
                works["Rill's own kernel"] = partial(rill_product, device, case, None)
            works["cuBLAS"] = partial(torch_product, torch, case)
        yield from case_rows(case, works)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | by | ms | TFLOP/s | time ÷ Rill's |", "|---" * 5 + "|"]
    for row in rows:
        if row["seconds"] is None:
            lines.append(f"| {row['case']} | {row['by']} | refused: {row['refused'].replace('|', '/')} | | |")
            continue
        ratio = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}"
        measured = f"{row['seconds'] * 1e3:.4f} | {row['flops'] / 1e12:.1f} | {ratio}"
        lines.append(f"| {row['case']} | {row['by']} | {measured} |")
    return "\n".join(lines) + "\n"


def beside_pytorch(device: Any) -> dict[str, Any]:
    """All cases beside PyTorch, or the reason why there is nothing beside."""
    try:
        import torch
    except ImportError as error:
        return {"rows": [], "absent": f"no PyTorch: {error}"}
    if not torch.cuda.is_available():
        return {"rows": [], "absent": f"PyTorch {torch.__version__} sees no GPU"}
    rows = list(compare(device, torch, [*attention_cases(), *product_cases()]))
    return {"method": METHOD, "pytorch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}
