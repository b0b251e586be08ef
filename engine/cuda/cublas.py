"""cuBLAS: NVIDIA's library multiplies many rows, where there is one.

Before and after a product run kernels of native/cuda/cublas_matmul.cu, which round x and see to the bias. Where there
is no library, native/cuda/matmul.cu multiplies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from engine import abi
from engine.cuda.kernels import pip_files
from engine.cuda.launches import DTYPES, Launch, n, row_bytes, threads_for
from engine.errors import RillError

NAMES = ("libcublas.so.13", "libcublas.so.12")
WORKSPACE = 32 << 20  # bytes: what NVIDIA recommends for its largest GPUs

abi.ffi.cdef("""
    int cublasCreate_v2(void **handle);
    int cublasDestroy_v2(void *handle);
    int cublasGetVersion_v2(void *handle, int *version);
    int cublasSetStream_v2(void *handle, void *stream);
    int cublasSetWorkspace_v2(void *handle, void *workspace, size_t size);
    const char *cublasGetStatusString(int status);
    int cublasGemmEx(void *handle, int a_operation, int b_operation, int m, int n, int k, const void *alpha,
                     const void *a, int a_type, int a_stride, const void *b, int b_type, int b_stride,
                     const void *beta, void *c, int c_type, int c_stride, int compute, int algorithm);
""")

AS_IT_IS, TRANSPOSED, ANY_ALGORITHM = 0, 1, -1  # cublasOperation_t, cublasGemmAlgo_t
CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF = 0, 2, 14  # cudaDataType
COMPUTE_32F, COMPUTE_32F_PEDANTIC = 68, 69  # cublasComputeType_t: float32 sums; float32 products, too, not TF32
# Weights by dtype: what they are to cuBLAS, the bytes of a number, how they are multiplied.
KINDS = {n.DTYPE_F32: (CUDA_R_32F, 4, COMPUTE_32F_PEDANTIC), n.DTYPE_F16: (CUDA_R_16F, 2, COMPUTE_32F),
         n.DTYPE_BF16: (CUDA_R_16BF, 2, COMPUTE_32F)}  # fmt: skip


class Gemm(NamedTuple):
    """The product of a matmul of so many rows. share: bytes of scratch for each row of x, if it was rounded there; 0: x
    is read where it lies."""

    rows: int
    share: int = 0

    @property
    def shares(self) -> int:
        return self.rows


def takes(op: Any, rows: int) -> bool:
    """Whether a matmul is for cuBLAS: of more rows than the kernels for few take, of a matrix that is not quantised."""
    return bool(rows > n.FEW and not op.weight_group and op.x_width)


def matmul(op: Any, rows: int) -> list[Launch | Gemm]:
    """The launches, in order. The kernels are told the number of rows by the step, cuBLAS is told `rows`."""
    dtype, grid, threads = DTYPES[op.weight_dtype], (rows, 1, 1), threads_for(max(op.x_width // 2, op.out_width))
    if dtype == "f32":
        return [*([Launch("matmul_bias", grid, threads)] if op.bias else ()), Gemm(rows)]
    scale = n.LINE if dtype == "f16" else 0
    share = row_bytes(op.x_width, 2) + scale
    before = Launch(f"matmul_round_{dtype}", grid, threads, share=share, shares=rows)
    after = before._replace(kernel="matmul_unscale_f16")
    return [before, Gemm(rows, share), *((after,) if scale else ())]


def open_cublas(stream: int, allocate: Callable[[int], int]) -> tuple[CuBLAS | None, str]:
    """The library that RILL_CUBLAS names (0 or nothing: none is wanted), else the first that works, and a phrase about
    it or about why there is none. Raises RillError where one that is named does not work."""
    named = os.environ.get("RILL_CUBLAS")
    if named in ("", "0"):
        return None, "without cuBLAS (RILL_CUBLAS)"
    reason = "none was found"
    for file in [named] if named else candidates():
        try:
            cublas = CuBLAS(file, stream, allocate)
            return cublas, f"cuBLAS {cublas.version}"
        except RillError as error:
            if named:
                raise
            if f"{file}: cannot open shared object file" not in str(error):
                reason = str(error)
    return None, f"without cuBLAS ({reason})"


def candidates() -> Iterator[str]:
    """Names that the loader may know, then what pip has installed."""
    yield from NAMES
    for name in NAMES:
        yield from map(str, pip_files(f"*/lib/{name}"))


class CuBLAS:
    """A library and its handle for one stream, in the CUDA context that is current."""

    def __init__(self, file: str, stream: int, allocate: Callable[[int], int]) -> None:
        self.file, self.handle = file, abi.ffi.NULL
        self.one, self.zero = abi.ffi.new("float *", 1.0), abi.ffi.new("float *", 0.0)
        handle, version = abi.ffi.new("void **"), abi.ffi.new("int *")
        try:
            self.library: Any = abi.ffi.dlopen(file)
            self._check(self.library.cublasCreate_v2(handle))
            self.handle = handle[0]
            self._check(self.library.cublasGetVersion_v2(self.handle, version))
            self._check(self.library.cublasSetStream_v2(self.handle, abi.ffi.cast("void *", stream)))
            # After the stream, which takes it away. With one of ours, nothing is allocated while a graph is recorded.
            workspace = abi.ffi.cast("void *", allocate(WORKSPACE))
            self._check(self.library.cublasSetWorkspace_v2(self.handle, workspace, WORKSPACE))
        except (OSError, AttributeError) as error:
            self.close()
            raise RillError(f"cuBLAS: {str(error).partition('.  ')[0]}") from None
        except RillError:
            self.close()
            raise
        self.version = f"{version[0] // 10_000}.{version[0] // 100 % 100}"

    def close(self) -> None:
        if self.handle:
            self.library.cublasDestroy_v2(self.handle)
            self.handle = abi.ffi.NULL

    def bind(self, gemm: Gemm, op: Any, scratch: int) -> Callable[[], None]:
        """A product, ready to be called. cuBLAS sees our rows as columns: to it outᵀ = weight · xᵀ, and the weight is
        transposed. A bias lies in out already."""
        kind, size, compute = KINDS[op.weight_dtype]
        x, x_stride = (abi.ffi.cast("void *", scratch), gemm.share // size) if gemm.share else (op.x, op.x_stride)
        arguments = (
            self.handle, TRANSPOSED, AS_IT_IS, op.out_width, gemm.rows, op.x_width,
            self.one, op.weight, kind, row_bytes(op.x_width, size) // size, x, kind, x_stride,
            self.one if op.bias else self.zero, op.out, CUDA_R_32F, op.out_stride, compute, ANY_ALGORITHM,
        )  # fmt: skip
        return lambda: self._check(self.library.cublasGemmEx(*arguments))

    def _check(self, status: int) -> None:
        if status:
            why = abi.ffi.string(self.library.cublasGetStatusString(status)).decode()
            raise RillError(f"cuBLAS: {self.file}: {why} (status {status})")
