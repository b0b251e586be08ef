"""Nodes that are launched together in steps of few rows. They are found in a plan by their ops and by who reads what:

    matmul, add_rmsnorm, matmul [, swiglu]       the first product is added to x where x lies; x is normed as the second
    rmsnorm, matmul [, swiglu]                   one reads it; gate and up meet in the block that has both
    [rmsnorm, rmsnorm,] [rope,] rope, kv_store   norms of query and key heads, rotation, the cache

What a node would have written for the next one alone is not written: nobody else may read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from engine import abi
from engine.cuda import launches
from engine.cuda.launches import Launch, n

if TYPE_CHECKING:
    from engine.plan import Plan, Tensor

PRODUCTS = (
    ("matmul", "add_rmsnorm", "matmul", "swiglu"), ("matmul", "add_rmsnorm", "matmul"),
    ("rmsnorm", "matmul", "swiglu"), ("rmsnorm", "matmul"),
)  # fmt: skip
HEADS = (
    ("rmsnorm", "rmsnorm", "rope", "rope", "kv_store"), ("rmsnorm", "rmsnorm", "rope", "kv_store"),
    ("rope", "rope", "kv_store"), ("rope", "kv_store"),
)  # fmt: skip


class Fused(NamedTuple):
    """One launch in place of `nodes`. main: the node that most of it is for."""

    nodes: range
    main: int
    launch: Callable[[int], Launch]  # of so many rows
    structs: tuple[Any, ...]  # what the kernel takes


class Group(NamedTuple):
    """Nodes of a plan, in a row, that are fused all or not at all."""

    nodes: range
    parts: tuple[Fused, ...]


def find_groups(plan: Plan, structs: Sequence[Any], address: Callable[[Tensor], int]) -> list[Group]:
    """The groups of a plan, in order. structs: its nodes'."""
    finder = _Finder(plan, structs, address)
    found: list[Group] = []
    first = 0
    while first < len(plan.nodes):
        group = finder.products_from(first) or finder.heads_from(first)
        if group:
            found.append(group)
        first = group.nodes.stop if group else first + 1
    return found


class _Finder:
    def __init__(self, plan: Plan, structs: Sequence[Any], address: Callable[[Tensor], int]) -> None:
        self.nodes, self.kept, self.structs, self.address = plan.nodes, plan.kept, structs, address
        self.users = plan.users()

    def _at(self, first: int, patterns: Sequence[tuple[str, ...]]) -> list[range]:
        """The nodes of each pattern that begins here; all of a group are for the same rows."""
        found = []
        for names in patterns:
            nodes = self.nodes[first : first + len(names)]
            if tuple(node.op.name for node in nodes) == names and len({node.rows for node in nodes}) == 1:
                found.append(range(first, first + len(names)))
        return found

    # Products.

    def products_from(self, first: int) -> Group | None:
        return next((self._products(nodes) for nodes in self._at(first, PRODUCTS) if self._is_product(nodes)), None)

    def _is_product(self, group: range) -> bool:
        nodes = [self.nodes[i] for i in group]
        norm = next(i for i in group if self.nodes[i].op.name.endswith("rmsnorm"))
        x, out = self.nodes[norm].tensors["x"], nodes[-1].tensors["out"]
        if self.structs[norm].weight_width != x.width:
            return False  # a norm of parts of a row
        if any(self.address(x.owner) == self.address(other.owner) for other in (out, *self._added(group))):
            return False  # x ends here, and its memory is the output's; or a product of x is added to x
        if nodes[-1].op.name == "swiglu" and nodes[-2].tensors["weight"].group and out.width % n.PANEL:
            return False  # gate and up of an output lie in different places of their panels
        return all(self._is_private(i, group) for i in group[:-1])

    def _added(self, group: range) -> list[Tensor]:
        """Of what a product is that is added to x."""
        first = self.nodes[group.start]
        return [first.tensors["x"]] if first.op.name == "matmul" else []

    def _is_private(self, i: int, group: range) -> bool:
        """Whether the next node, and nobody else, reads what this one writes."""
        out, after = self.nodes[i].tensors["out"], self.nodes[i + 1]
        read = after.tensors["delta" if after.op.name == "add_rmsnorm" else "x"]
        return same(out, read) and self.users[out.owner] == [i, i + 1] and out.owner not in self.kept

    def _products(self, group: range) -> Group:
        parts, first = [], group.start
        if self.nodes[first].op.name == "matmul":
            structs = self.structs[first], self.structs[first + 1]
            parts.append(_product("matmul_add", range(first, first + 1), first, structs, structs[0].out_width))
            first += 1
        name = "rmsnorm_matmul" if len(group) == first + 2 - group.start else "rmsnorm_matmul_swiglu"
        structs = norm_of(self.structs[first]), *self.structs[first + 1 : group.stop]
        parts.append(_product(name, range(first, group.stop), first + 1, structs, structs[-1].out_width))
        return Group(group, tuple(parts))

    # Heads.

    def heads_from(self, first: int) -> Group | None:
        return next((self._heads(nodes) for nodes in self._at(first, HEADS) if self._is_heads(nodes)), None)

    def _is_heads(self, group: range) -> bool:
        store, rope = self.nodes[group[-1]], self.nodes[group[-2]]
        norms, sinks = self._norms(group), self._sinks(group)
        k, v, both, head_dim = (*(store.tensors[name] for name in "kv"), rope.tensors["x"], store.scalars["head_dim"])
        q = part(both, 0, both.width - k.width)
        in_place = [rope, *(self.nodes[i] for i in norms)]
        return (
            place(k) == part(both, q[2], k.width) and q[2] > 0
            and (v.owner is not both.owner or v.column >= both.column + both.width)
            and all(same(node.tensors["x"], node.tensors["out"]) for node in in_place)
            and all(self.nodes[i].tensors["angles"].width == head_dim for i in (group[-2], *sinks))
            and all(self.nodes[i].tensors["weight"].width == head_dim for i in norms)
            and [place(self.nodes[i].tensors["x"]) for i in norms] in ([], [q, place(k)])
            and [place(self.nodes[i].tensors["x"]) for i in sinks] in ([], [q])
            and all(self.nodes[i].tensors["out"].owner is not both.owner for i in sinks)
        )  # fmt: skip

    def _norms(self, group: range) -> range:
        return range(group.start, group.start + 2 * (self.nodes[group.start].op.name == "rmsnorm"))

    def _sinks(self, group: range) -> range:
        return range(self._norms(group).stop, group.stop - 2)

    def _heads(self, group: range) -> Group:
        norms = [self.structs[i] for i in self._norms(group)] or [absent("rmsnorm")] * 2
        sinks = [self.structs[i] for i in self._sinks(group)] or [absent("rope")]
        structs = *norms, *sinks, self.structs[group[-2]], self.structs[group[-1]]

        def launch(rows: int) -> Launch:
            return launches.rmsnorm_rope_kv_store(structs[-2], structs[-1], rows)

        return Group(group, (Fused(group, group[-1], launch, structs),))


def _product(name: str, nodes: range, main: int, structs: tuple[Any, ...], width: int) -> Fused:
    matmul = structs[main - nodes.start]

    def launch(rows: int) -> Launch:
        return launches.few_rows(name, matmul, width, rows)

    return Fused(nodes, main, launch, structs)


def norm_of(struct: Any) -> Any:
    """The norm in an add_rmsnorm, as a struct rmsnorm; a struct rmsnorm as it is."""
    if abi.ffi.typeof(struct) is abi.ffi.typeof("struct rmsnorm *"):
        return struct
    norm = absent("rmsnorm")
    for field, _ in abi.ffi.typeof("struct rmsnorm").fields:
        setattr(norm, field, 1 if field == "groups" else getattr(struct, field))
    return norm


def absent(name: str) -> Any:
    """A struct without anything in it."""
    return abi.ffi.new(f"struct {name} *")


def part(tensor: Tensor, first: int, width: int) -> tuple[Tensor, int, int]:
    """Some columns of a tensor, by where they lie."""
    return tensor.owner, tensor.column + first, width


def place(tensor: Tensor) -> tuple[Tensor, int, int]:
    return part(tensor, 0, tensor.width)


def same(one: Tensor, other: Tensor) -> bool:
    return place(one) == place(other)
