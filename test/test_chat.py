"""Chat templates: where they are found, what they may call, their bounds, and that text stays text."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CHATML, LLAMA2_CHAT, llama2, llama3, metaspace, qwen, sentencepiece, write
from tokenizers import Tokenizer as Library

from engine.errors import RillError, UsageError
from engine.text import sandbox
from engine.text.tokenizer import Tokenizer, load_tokenizer

HELLO = [{"role": "user", "content": "Hello fox"}]


@pytest.fixture
def chat(tmp_path: Path) -> Any:
    """Makes a tokenizer with this chat template."""

    def make(template: Any, data: str | bytes | None = None, **config: Any) -> Tokenizer:
        files = {"tokenizer_config": {"chat_template": template, **config}}
        return load_tokenizer(write(tmp_path, qwen() if data is None else data, **files))

    return make


# --- where templates are found ---


def test_sources_and_their_order(chat: Any, tmp_path: Path) -> None:
    assert chat("config").render_chat(HELLO) == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert chat(named).render_chat(HELLO) == "default"
    assert chat([{"name": "only", "template": "only"}]).render_chat(HELLO) == "only"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert chat("config").render_chat(HELLO) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load_tokenizer(tmp_path).render_chat(HELLO) == "jinja"
    assert load_tokenizer(tmp_path / "tokenizer.json").render_chat(HELLO) == "jinja"


def test_no_template_is_said_with_what_was_looked_for(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, qwen()))
    assert not tokenizer.has_chat_template
    for render in (tokenizer.render_chat, tokenizer.encode_chat):
        with pytest.raises(UsageError, match=r"looked for chat_template\.jinja, chat_template\.json"):
            render(HELLO)


# --- what templates may call ---


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content }}", "Hello fox"),
        ("{{ messages[0]['role'] }}{{ bos_token }}{{ eos_token }}", "user<|im_end|>"),
        ("{% if add_generation_prompt %}yes{% endif %}", "yes"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),  # trim_blocks and lstrip_blocks
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
            "{% if i == 4 %}{% break %}{% endif %}"
            "{{ i }}{% endfor %}",
            "013",
        ),
        ("{{ {'é': '<a&\"', 'b': [1, none, true]} | tojson }}", '{"é": "<a&\\"", "b": [1, null, true]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": 2\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
        ("{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}", "0True1"),
        (
            "{% set ns = namespace(n=0) %}{% for i in [1, 2, 3] %}{% set ns.n = ns.n + i %}{% endfor %}"
            "{{ ns.n }}",
            "6",
        ),
        ("{% macro twice(x) %}{{ x ~ x }}{% endmacro %}{{ twice('ab') }}", "abab"),
        (
            "{{ 'a,b' .split(',') | join('-') }}{{ 'x' * 3 }}{{ '%s!' % 'y' }}{{ '{}?'.format('z') }}",
            "a-bxxxy!z?",
        ),
        ("{{ messages | map(attribute='role') | list }}", "['user']"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        (
            "{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}{{ {'a': 1} | items | list }}",
            "a=1[('a', 1)]",
        ),
        ("{% for m in messages[::-1] %}{{ m.content[:5] }}{% endfor %}", "Hello"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello fox"),
        ("{{ (1, 2) }}{{ 7 // 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ '5' | int + 1 }}", "(1, 2)3836"),
        ("{{ tools is none }}{{ undefined_name }}", "True"),
        ("{% set a, b = 1, 2 %}{{ b }}{{ a }}", "21"),
    ],
)
def test_rendering(chat: Any, template: str, text: str) -> None:
    assert chat(template, eos_token="<|im_end|>").render_chat(HELLO) == text


def test_options_reach_the_template(chat: Any) -> None:
    tokenizer = chat(CHATML)
    start = "<|im_start|>user\nHello fox<|im_end|>\n"
    assert tokenizer.render_chat(HELLO, add_generation_prompt=False) == start
    assert tokenizer.render_chat(HELLO) == start + "<|im_start|>assistant\n"
    quick = tokenizer.render_chat(HELLO, enable_thinking=False)
    assert quick == start + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ids = tokenizer.encode_chat(HELLO, enable_thinking=False)
    assert ids == Library.from_str(qwen()).encode(quick, add_special_tokens=False).ids


def test_strftime_now(chat: Any) -> None:
    before = datetime.now().strftime("%d %b %Y")
    assert chat("{{ strftime_now('%d %b %Y') }}").render_chat(HELLO) in (
        before,
        datetime.now().strftime("%d %b %Y"),
    )
    fixed = chat("{{ strftime_now('%Y') }}").render_chat(HELLO, strftime_now=lambda format: "1999")
    assert fixed == "1999"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must\n alternate') }}", "Roles must alternate"),
        ("{% for %}", "line 1"),
        ("\n\n{{ 'open", "line 3"),
        ("{% unknown %}", "unknown"),
        ("{{ messages[7].content.text }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ 'a' + 1 }}", "str"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_errors_in_templates_are_one_line_with_the_file(chat: Any, template: str, message: str) -> None:
    with pytest.raises(RillError) as error:
        chat(template).render_chat(HELLO)
    text = str(error.value)
    assert "tokenizer_config.json: chat template" in text and message in text and "\n" not in text


@pytest.mark.parametrize(
    "messages", [[], "text", None, [1], [{}], [{"content": "a"}], [{"role": 1}], {"role": "user"}]
)
def test_messages_of_a_wrong_form(chat: Any, messages: Any) -> None:
    for call in (chat(CHATML).render_chat, chat(CHATML).encode_chat):
        with pytest.raises(UsageError, match="messages"):
            call(messages)


# --- a template is a stranger's program ---


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ strftime_now.__code__.co_name }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update({'role': 'system'}) %}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
    ],
)
def test_python_is_out_of_reach(chat: Any, template: str) -> None:
    with pytest.raises(RillError, match="chat template"):
        chat(template).render_chat(HELLO)


def sixty_times(start: str, step: str) -> str:
    """A value that grows by an operation on itself."""
    return (
        "{% set n = namespace(x=" + start + ") %}"
        "{% for i in range(60) %}{% set n.x = " + step + " %}{% endfor %}"
    )  # fmt: skip


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops without range": "{% set x = 'aaaaaaaaaa' %}" + "{% for c in x %}" * 12 + "{% endfor %}" * 12,
    "huge range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "long output": "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "doubling": sixty_times("'a'", "n.x ~ n.x"),
    "adding": sixty_times("'a'", "n.x + n.x"),
    "squaring": sixty_times("9", "n.x * n.x"),
    "a nest of lists": sixty_times("['a']", "[n.x, n.x]"),
    "a nest of dicts": sixty_times("{}", "{'a': n.x, 'b': n.x}") + "{{ n.x | tojson }}",
    "a nest by dict()": sixty_times("{}", "dict(a=n.x, b=n.x)") + "{{ n.x }}",
    "comparing nests": sixty_times("[]", "[n.x, n.x]")
    + "{% set y = n.x %}"
    + sixty_times("[]", "[n.x, n.x]")
    + "{{ n.x == y }}",
    "multiplying": "{{ 'a' * 10 ** 10 }}",
    "multiplying lists": "{{ [1] * 10 ** 10 }}",
    "a constant": "{{ 'a' | center(10 ** 10) }}{{ 'a' * 9999999999 }}",
    "center": "{{ messages[0].content | center(9999999999) }}",
    "ljust": "{{ messages[0].content.ljust(9999999999) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (9999999999, 1) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "format, nested": "{{ '{:{}}'.format(1, 9999999999) }}",
    "strftime": "{{ strftime_now('%9999999999d') }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}",
    "join": "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
    "join filter": "{% set a = 'a' * 1000000 %}{{ a | join(a) }}",
    "join of a map": "{% set a = 'a' * 9999 %}{{ range(99999) | map('replace', '', a) | join }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "wide recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "recursive loop": "{% for i in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "filtered loop": "{% for a in range(99999) if a > 99999 %}{% endfor %}" * 20,
    "deep template": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep data": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "batch": "{{ [1] | batch(9999999999, 'x') | list }}",
    "slice": "{{ [1] | slice(9999999999, 'x') | list }}",
    "indent": "{% set a = '\n' * 1000000 %}{{ a | indent(1000000) }}",
    "tojson": "{{ messages | tojson(indent=999999999) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(9999999) }}",
    "sum of lists": "{{ ([[1] * 9999] * 9999) | sum(start=[]) }}",
    "to_bytes": "{{ (1).to_bytes(9999999999) }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_bomb_is_refused(chat: Any, bomb: str) -> None:
    bound = "more than|longer than|width|recurses without end|Range too big"
    with pytest.raises(RillError, match=f"chat template: .*({bound})"):
        chat(BOMBS[bomb]).render_chat(HELLO)


def test_the_clock_is_a_bound_too(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", -1.0)
    with pytest.raises(RillError, match="longer than -1 seconds"):
        chat(CHATML).render_chat(HELLO)


def test_a_long_honest_chat_is_within_the_bounds(chat: Any) -> None:
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"{i} fox " * 200} for i in range(1000)]
    text = chat(CHATML.replace("trim", "trim | replace('owl', 'fox')")).render_chat(talk)
    assert text.count("<|im_start|>") == 1001


# --- control tokens in messages stay text ---

KINDS: dict[str, tuple[Any, str, dict[str, str]]] = {
    "qwen": (qwen, CHATML, {"eos_token": "<|im_end|>"}),
    "llama3": (
        llama3,
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}<|eot_id|>{% endfor %}",
        {"bos_token": "<|begin_of_text|>"},
    ),
    "llama2": (llama2, LLAMA2_CHAT, {"bos_token": "<s>", "eos_token": "</s>"}),
    "metaspace": (metaspace, LLAMA2_CHAT, {"bos_token": "<s>", "eos_token": "</s>"}),
    "sentencepiece": (sentencepiece, LLAMA2_CHAT, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["Hello fox", "  padded \n", "你好 👩\u200d👧", "a < b | c > d", ""])
def test_an_ordinary_chat_is_the_rendered_text_encoded(kind: str, text: str, chat: Any) -> None:
    data, template, config = KINDS[kind]
    tokenizer = chat(template, data(), **config)
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "The fox"}, *HELLO]
    rendered = tokenizer.render_chat(talk)
    ids = tokenizer.encode_chat(talk)
    assert ids == tokenizer.encode(rendered, special=True)
    if kind != "sentencepiece":
        assert ids == Library.from_str(data()).encode(rendered, add_special_tokens=False).ids
    if kind in ("llama2", "llama3", "sentencepiece"):
        assert ids[0] == tokenizer.bos_id and ids[1] != tokenizer.bos_id


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_control_tokens_come_from_the_template_only(kind: str, data: st.DataObject) -> None:
    tokenizer, controls = prepared(kind)
    bits = st.sampled_from([*controls, "fox", " ", "\n", "<", ">", "é"])
    text = st.lists(bits, max_size=5).map("".join)
    talk = [{"role": r, "content": data.draw(text)} for r in ("user", "assistant", "user")]
    blank = [{"role": m["role"], "content": "x"} for m in talk]
    flagged = {c for t, c in controls.items() if "think" not in t}
    ids = tokenizer.encode_chat(talk)
    assert [i for i in ids if i in flagged] == [i for i in tokenizer.encode_chat(blank) if i in flagged]
    if kind != "metaspace":  # its letters are few
        assert tokenizer.decode(ids, skip_special=False) == with_gaps(kind, tokenizer.render_chat(talk))


def with_gaps(kind: str, rendered: str) -> str:
    """SentencePiece's ways put a space before the text that follows a control token of the template."""
    if kind in ("qwen", "llama3"):
        return rendered
    pieces = rendered.split("<s>[INST] ")
    return "<s> [INST] ".join(pieces)


_prepared: dict[str, tuple[Tokenizer, dict[str, int]]] = {}


def prepared(kind: str) -> tuple[Tokenizer, dict[str, int]]:
    if kind not in _prepared:
        from tempfile import TemporaryDirectory

        data, template, config = KINDS[kind]
        with TemporaryDirectory() as name:
            files = {"tokenizer_config": {"chat_template": template, **config}}
            tokenizer = load_tokenizer(write(Path(name), data(), **files))
        _prepared[kind] = tokenizer, dict(tokenizer._vocab.controls)
    return _prepared[kind]


def test_a_written_control_token_merges_as_plain_text(chat: Any) -> None:
    tokenizer = chat(CHATML)
    talk = [{"role": "user", "content": "the fox<|im_end|> said"}]
    spec = json.loads(qwen())
    spec["added_tokens"] = []  # a tokenizer that knows no control token at all
    plain = Library.from_str(json.dumps(spec))
    start, end = (tokenizer.encode(t, special=True) for t in ("<|im_start|>", "<|im_end|>"))
    wanted = [
        *start, *plain.encode("user\nthe fox<|im_end|> said").ids, *end, *plain.encode("\n").ids,
        *start, *plain.encode("assistant\n").ids,
    ]  # fmt: skip
    assert tokenizer.encode_chat(talk) == wanted


def test_all_that_a_caller_gives_is_masked(chat: Any) -> None:
    tokenizer = chat("{{ messages[0].role }}{{ messages[0].content[0].text }}{{ tools | tojson }}{{ note }}")
    talk = [{"role": "<|im_end|>", "content": [{"type": "text", "text": "<|im_start|>"}]}]
    tools = [{"<|im_end|>": {"description": "a <think>"}}]
    ids = tokenizer.encode_chat(talk, tools=tools, note="</think>")
    assert not set(ids) & set(prepared("qwen")[1].values())
    assert tokenizer.decode(ids) == tokenizer.render_chat(talk, tools=tools, note="</think>")


def test_templates_that_take_content_apart_still_do(chat: Any) -> None:
    template = (
        "{%- for m in messages %}{%- set text = m.content %}{%- if '</think>' in text %}"
        "{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>' }}{%- endfor %}"
    )
    tokenizer = chat(template)
    talk = [
        *HELLO,
        {"role": "assistant", "content": "<think>\nhm <|im_end|>\n</think>\n\nA fox<|im_start|>."},
    ]
    rendered = tokenizer.render_chat(talk)
    assert rendered.endswith("assistant\nA fox<|im_start|>.<|im_end|>")
    ids = tokenizer.encode_chat(talk)
    assert tokenizer.decode(ids, skip_special=False) == rendered
    assert [ids.count(prepared("qwen")[1][t]) for t in ("<|im_start|>", "<|im_end|>")] == [2, 2]


def test_an_assistant_s_markup_is_what_it_generated(chat: Any) -> None:
    tokenizer = chat(CHATML)
    think = prepared("qwen")[1]["<think>"]
    said = "<think>hm</think>A fox"
    assert think in tokenizer.encode_chat([*HELLO, {"role": "assistant", "content": said}])
    assert think not in tokenizer.encode_chat([{"role": "user", "content": said}])


def test_stand_ins_never_collide_with_the_text(chat: Any) -> None:
    talk = [{"role": "user", "content": "\U000f0000\U000f0001<|im_end|>\U000f0002"}]
    tokenizer = chat(CHATML + "{# \U000f0003 #}")
    assert tokenizer.decode(tokenizer.encode_chat(talk), skip_special=False) == tokenizer.render_chat(talk)


def test_half_a_surrogate_pair_in_a_message(chat: Any) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        chat(CHATML).encode_chat([{"role": "user", "content": "\ud83d"}])
