"""The native boundary: reads native/abi.h, opens libraries, fills argument structs.

The only module that imports cffi. The header is the single description of structs, constants and functions; nothing
of it is repeated here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cffi
import ml_dtypes
import numpy as np

from engine import machine
from engine.errors import RillError

if TYPE_CHECKING:
    from engine.plan import Node

LIBRARIES = Path(os.environ.get("RILL_LIBRARIES") or Path(__file__).parent / "_native")
CHECKOUT = Path(__file__).parent.parent / "native"
SOURCES = CHECKOUT if (CHECKOUT / "abi.h").exists() else LIBRARIES  # of abi.h and of kernels, which a wheel has there
ISAS = ("baseline", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_amx")  # the best last

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)
INT8 = np.dtype(np.int8)
INT4 = np.dtype(ml_dtypes.int4)
UINT8 = np.dtype(np.uint8)
UINT4 = np.dtype(ml_dtypes.uint4)

LAST_POS = 2**31 - 1  # positions are int32


ffi = cffi.FFI()
ffi.cdef((SOURCES / "abi.h").read_text("utf-8"))
STRUCTS = [name for name in ffi.list_types()[1] if name != "worker"]  # of abi.h
constants: Any = ffi.dlopen(None)  # the enums of abi.h as attributes: constants.PAGE

DTYPE_CODES = {FLOAT32: constants.DTYPE_F32, BFLOAT16: constants.DTYPE_BF16, FLOAT16: constants.DTYPE_F16,
               INT8: constants.DTYPE_I8, INT4: constants.DTYPE_I4, UINT8: constants.DTYPE_U8,
               UINT4: constants.DTYPE_U4}  # fmt: skip


def struct_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a struct of numbers in abi.h."""
    struct = ffi.typeof(f"struct {name}")
    kinds = {"int32_t": "i4", "int64_t": "i8", "uint64_t": "u8", "float": "f4", "double": "f8"}
    fields = [(field, kinds[info.type.cname], info.offset) for field, info in struct.fields]
    names, formats, offsets = zip(*fields, strict=True)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": ffi.sizeof(struct)})


def why_no_libraries() -> str:
    """The reason why there are none to open, as the installation noted it."""
    note = LIBRARIES / "why_no_native.txt"
    if not note.exists():
        return "the native libraries have not been built (`make native`)"
    return note.read_text("utf-8").strip()


def open_library(isa: str) -> Any:
    """The library for one ISA, opened privately, so that several can live in one process."""
    path = LIBRARIES / f"libengine_{isa}.so"
    if not path.exists():
        raise RillError(f"{path.name} is not built: run `make native` (or reinstall with a C compiler)")
    machine.allowed_cpus()
    library = ffi.dlopen(str(path), ffi.RTLD_NOW | ffi.RTLD_LOCAL)
    for name in STRUCTS:
        if library.struct_size(name.encode()) != ffi.sizeof(f"struct {name}"):
            raise RillError(f"{path.name} was built from another abi.h (struct {name} differs): run `make native`")
    return library


def address(array: np.ndarray) -> int:
    """Where an array's data starts."""
    return array.__array_interface__["data"][0]


def fill_struct(node: Node, pointer_of: Any) -> Any:
    """The C argument struct of a node, by the naming rule of abi.h.

    `pointer_of(tensor)` gives a tensor's address on the device. Raises RillError where node and struct do not match.
    """
    type_name = f"struct {node.op.struct or node.op.name}"
    struct = ffi.new(f"{type_name} *")
    fields, used = dict(ffi.typeof(type_name).fields), set()
    for field, info in fields.items():
        tensor_name, _, attribute = field.rpartition("_")
        if field in node.tensors:
            setattr(struct, field, ffi.cast(info.type, pointer_of(node.tensors[field])))
            used.add(field)
        elif field in node.scalars:
            setattr(struct, field, node.scalars[field])
            used.add(field)
        elif field == "rows":
            setattr(struct, field, ffi.cast(info.type, pointer_of(node.rows)))
        elif tensor_name in node.tensors and attribute in ("width", "stride", "dtype", "group"):
            tensor = node.tensors[tensor_name]
            setattr(struct, field, DTYPE_CODES[tensor.dtype] if attribute == "dtype" else getattr(tensor, attribute))
        elif info.type.kind != "pointer" and tensor_name not in node.absent:  # what an absent tensor would fill stays 0
            raise RillError(f"{node.op.name}: nothing to fill abi.h's field {field} with")
    if unknown := (node.tensors.keys() | node.scalars.keys()) - used:
        raise RillError(f"{node.op.name}: abi.h has no field {', '.join(sorted(unknown))}")
    return struct
