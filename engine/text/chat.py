"""Chat templates: from a checkpoint's Jinja text and a list of messages to the prompt's text."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import RillError, UsageError
from engine.files.json_file import parse_object, read_bytes

if TYPE_CHECKING:
    from jinja2 import Template

    from engine.text.sandbox import BoundedEnvironment

MAX_TEMPLATE_BYTES = 1_000_000
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points that never get a meaning: stand-ins for masked tokens


def read_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The directory's chat template, or None.

    `chat_template.jinja` comes before `chat_template.json`, and that before the `chat_template` of
    tokenizer_config.json (`config`), which is text or a list of named templates; of these "default" is used.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(_read_text(file), str(file))
    file = directory / "chat_template.json"
    if not file.is_file():
        file = directory / "tokenizer_config.json"
    else:
        config = parse_object(read_bytes(file, MAX_TEMPLATE_BYTES), str(file))
    source = config.get("chat_template")
    if source is None:
        return None
    return ChatTemplate(_default_template(source, file), str(file))


def _default_template(source: Any, file: Path) -> str:
    if isinstance(source, list) and all(isinstance(t, dict) for t in source):
        named = {str(t.get("name")): t.get("template") for t in source}
        if "default" not in named and len(named) != 1:
            names = ", ".join(named) or "none"
            raise RillError(f"{file}: chat_template has no template named 'default' (it has: {names})")
        source = named["default"] if "default" in named else next(iter(named.values()))
    if not isinstance(source, str):
        raise RillError(f"{file}: chat_template must be text or a list of named templates")
    return source


def _read_text(file: Path) -> str:
    try:
        return read_bytes(file, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RillError(f"{file}: is not UTF-8 (byte {error.start})") from None


class ChatTemplate:
    """One Jinja template. `name` is the file it came from, for messages."""

    def __init__(self, source: str, name: str) -> None:
        self.source = source
        self.name = name
        self._lock = threading.Lock()  # the sandbox counts one rendering at a time
        self._loaded: tuple[BoundedEnvironment, Template] | None = None

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt's text. `variables` are what the template may name: add_generation_prompt, bos_token, …

        Raises RillError with the template's own message (`raise_exception`), or with the bound it passed.
        """
        check_messages(messages)
        from jinja2.exceptions import TemplateSyntaxError

        try:
            with self._lock:
                environment, template = self._load()
                return environment.render(template, {**VARIABLES, **variables, "messages": messages})
        except TemplateSyntaxError as error:
            raise RillError(f"{self.name}: chat template, line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise RillError(f"{self.name}: chat template: it recurses without end") from None
        except (Exception, MemoryError) as error:  # whatever the template's own operations raise
            reason = str(error) or type(error).__name__
            raise RillError(f"{self.name}: chat template: {' '.join(reason.split())}") from None

    def _load(self) -> tuple[BoundedEnvironment, Template]:
        from engine.text.sandbox import BoundedEnvironment

        if self._loaded is None:
            environment = BoundedEnvironment()
            self._loaded = environment, environment.load(self.source)
        return self._loaded


def check_messages(messages: Any) -> None:
    """Raise UsageError unless `messages` is a non-empty list of dicts with a `role`."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UsageError("messages must be a list of at least one {'role': ..., 'content': ...}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(f"messages[{index}] must be a dict with a 'role' and a 'content'")


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d", format):
        raise ValueError("strftime_now: widths are not allowed")
    return datetime.now().strftime(format)


# what every template may name, beside what a caller gives
VARIABLES: Mapping[str, Any] = {
    "tools": None,
    "documents": None,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}


class Mask:
    """Hides control tokens in the caller's own text while a template is rendered.

    Each control token's text becomes one private-use character that occurs nowhere in the inputs; the
    template strips, splits and joins around it as around any letter. Afterwards the control tokens left in
    the rendering are the template's own, and `lift` turns the stand-ins back into plain text.
    """

    def __init__(self, controls: re.Pattern[str], inputs: Any, source: str) -> None:
        self._controls = controls
        used = set(source)
        for text in _strings(inputs):
            used.update(text)
        self._free: Iterator[str] = (c for c in map(chr, PRIVATE_USE) if c not in used)
        self._stand_in: dict[str, str] = {}

    def put(self, value: Any, keep: frozenset[str] = frozenset()) -> Any:
        """`value` with control tokens masked in all text it holds, except for those in `keep`."""
        if isinstance(value, str):
            return self._controls.sub(lambda m: m[0] if m[0] in keep else self._char(m[0]), value)
        if isinstance(value, Mapping):
            return {self.put(k, keep): self.put(v, keep) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.put(v, keep) for v in value]
        return value

    def lift(self, text: str) -> str:
        """`text` with the stand-ins replaced by what they stand for."""
        return text.translate({ord(char): control for control, char in self._stand_in.items()})

    def _char(self, control: str) -> str:
        if control not in self._stand_in:
            self._stand_in[control] = next(self._free)
        return self._stand_in[control]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
