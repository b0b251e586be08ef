"""A Jinja sandbox that ends: steps, seconds and sizes are bounded.

A chat template comes with a checkpoint, so it is a stranger's program. Jinja's immutable sandbox keeps it
from reaching Python; this one also keeps it from running, or growing, without end. Loop rounds and calls are
counted, every value that an operation could blow up is weighed first, and the output is cut off.
"""

from __future__ import annotations

import json
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000  # an ordinary template takes 10 to 30 a message
MAX_SECONDS = 5.0
MAX_CHARS = 8_000_000  # of any one value, and of the output
ITEM_CHARS = 32  # what an item of a container counts for
MAX_PRODUCT = 32 * MAX_CHARS  # of the sizes of one operation's operands, which bounds its result
MAX_BITS = 4096  # of an integer

BIG_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|{[^}]*:[^}]*\d{5}")
NOT_WEIGHED = {"length", "count", "first", "last", "default", "d"}  # cheap for a value of any size
NOT_OFFERED = {"urlize", "wordwrap", "xmlattr", "pprint"}  # slow for their size, of no use in a chat


class TooMuch(TemplateError):
    """The template went past a bound of the sandbox."""


class Meter:
    """Counts what one rendering does; raises `TooMuch` past a bound."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooMuch(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise TooMuch(f"it takes longer than {MAX_SECONDS:g} seconds")

    def weigh(self, value: Any) -> int:
        """Size of a value with all that it holds, shared parts counted each time they would be printed."""
        weight, todo = 0, [value]
        while todo:
            item = todo.pop()
            weight += ITEM_CHARS
            if isinstance(item, (str, bytes)):
                weight += len(item)
            elif isinstance(item, int):
                if item.bit_length() > MAX_BITS:
                    raise TooMuch(f"it makes a number of more than {MAX_BITS} bits")
            elif isinstance(item, Mapping):
                todo.extend(item.keys())
                todo.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                todo.extend(item)
            if weight + ITEM_CHARS * len(todo) > MAX_CHARS:
                raise TooMuch(f"it makes a value of more than {MAX_CHARS} characters")
        return weight

    def multiply(self, values: Iterable[Any]) -> None:
        """Bound the product of the sizes (for a number: its value) of an operation's operands."""
        product = 1
        for value in values:
            product *= abs(value) + 1 if isinstance(value, int) else self.weigh(value) - ITEM_CHARS + 1
        if product > MAX_PRODUCT:
            raise TooMuch(f"an operation could make more than {MAX_PRODUCT} characters")


class _Instrument(NodeTransformer):
    """Sends loops, concatenations and literals of a template through the sandbox's counting filters."""

    @staticmethod
    def _through(name: str, node: Any) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through("_rounds", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_weighed", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_weighed", node) if node.ctx == "load" else node


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox for chat templates, with the extensions and the whitespace rules the field uses."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.meter = Meter()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self._finalizer(),
        )
        self.globals.pop("lipsum")
        self.filters = {n: self._guard(n, f) for n, f in self.filters.items() if n not in NOT_OFFERED}
        self.filters["tojson"] = self._guard("tojson", _tojson)
        self.filters.update(_rounds=self._rounds, _concat=self._concat, _weighed=self._weighed)

    def load(self, source: str) -> Template:
        """A template from its text. Raises `TemplateSyntaxError`; RecursionError for absurd nesting."""
        self.meter.start()
        code = self.compile(_Instrument().visit(self.parse(source)))
        return self.template_class.from_code(self, code, self.make_globals(None))

    def render(self, template: Template, variables: dict[str, Any]) -> str:
        """A template's text. Raises `TemplateError`, or what the template's own operations raise."""
        self.meter.start()
        pieces: list[str] = []
        length = 0
        for piece in template.generate(**variables):
            length += len(piece)
            if length > MAX_CHARS:
                raise TooMuch(f"its text is longer than {MAX_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # jinja2's own parameter names: a template may pass any keyword, `self` too
        meter = __self.meter
        meter.step()
        if isinstance(__obj, types.BuiltinMethodType):
            meter.multiply([getattr(__obj, "__self__", None), *args, *kwargs.values()])
        else:
            meter.weigh([args, kwargs])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.meter.step()
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
                raise TooMuch(f"it makes a number of more than {MAX_BITS} bits")
        elif operator == "*" and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            self.meter.multiply([left, right])
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
            self.meter.multiply([left, right])
        result = super().call_binop(context, operator, left, right)
        self.meter.weigh(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            text = getattr(value, "__self__", "")
            _check_widths(text)
            return self._guard("format", lambda *args, **kwargs: wrapped(*args, **kwargs))
        return None

    def _finalizer(self) -> Callable[[Context, Any], Any]:
        # with a context: otherwise jinja2 evaluates constant output when it compiles
        @pass_context
        def finalize(_context: Context, value: Any) -> Any:
            self.meter.weigh(value)
            return value

        return finalize

    def _guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that is counted, and its operands weighed; iterators are drawn first for that."""

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.meter.step()
            args = tuple(list(self._rounds(a)) if isinstance(a, Iterator) else a for a in args)
            if name == "format":
                _check_widths(next((a for a in args if isinstance(a, str)), ""))
            if name not in NOT_WEIGHED:
                self.meter.multiply([*args, *kwargs.values()])
            return function(*args, **kwargs)

        return guarded

    def _rounds(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.meter.step()
            yield value

    def _concat(self, values: list[Any]) -> str:
        self.meter.step()
        self.meter.weigh(values)
        return "".join(map(str, values))

    def _weighed(self, value: Any) -> Any:
        self.meter.step()
        self.meter.weigh(value)
        return value


def _check_widths(text: str) -> None:
    if BIG_WIDTH.search(text):
        raise SecurityError("a format with a width of more than four digits, or with *")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it: no HTML escapes, no ASCII escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
