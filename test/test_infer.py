"""The command line: what it prints where, how it ends, and how it is interrupted."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import engine
from demo import console
from demo.infer import main
from demo.options import OptionError, as_option, parse, template_variables
from engine import machine, verify
from engine.files.checkpoint import read_header
from tools.random_model import preset_config, write_model

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds: a hang, not a slow machine
Rill = Callable[..., "Result"]


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Standard output without the newline that ends it."""
        assert self.status == 0 and self.out.endswith("\n"), self.err
        return self.out[:-1]

    @property
    def first_line(self) -> str:
        return self.err.splitlines()[0]

    @property
    def last_line(self) -> str:
        return self.err.splitlines()[-1]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends a text by itself: its control tokens have no weights."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_model(directory, preset_config("tiny", "f32"), seed=3, dtype="f32", quiet=True)
    width = 4 * preset_config("tiny")["hidden_size"]
    overwrite(directory, "model.embed_tokens.weight", 256 * width, bytes(3 * width))
    return directory


def overwrite(model: Path, tensor: str, start: int, data: bytes) -> None:
    stored = read_header(model / "model.safetensors")[tensor]
    with stored.file.open("r+b") as file:
        file.seek(stored.offset + start)
        file.write(data)


@pytest.fixture
def rill(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Rill:
    """The command in this process: streams captured, `stdin` given as bytes."""

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as end:
            status = int(end.code or 0)
        return Result(status, *capfd.readouterr())

    return run


def start(*args: object, **options: object) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "demo.infer", *map(str, args)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    return subprocess.Popen(command, **{**pipes, **options})  # type: ignore[call-overload]


def end(process: subprocess.Popen[bytes]) -> Result:
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, (out or b"").decode(), (err or b"").decode())


# What goes where.


def test_text_goes_to_stdout_and_the_rest_to_stderr(model: Path, rill: Rill) -> None:
    result = rill(model, "--raw", "-p", "abc", "-n", 12, "--dtype", "float32", "-c", 100)
    llm = engine.LLM(model, max_batch=1)
    expected = llm.generate("abc", engine.SamplingParams(max_tokens=12))
    llm.close()
    assert len(expected.token_ids) == 12 and result.text == expected.text
    for part in (
        "tiny (asked for)",
        "weights float32 (asked for)",
        f"{llm.device.type} {llm.device.description}",
        f"attention {llm.attention} (auto: the fastest here)",
        "KV float32 (default) up to",
        "context 100 (asked for)",
        "raw text",
        "temperature 0.0 (generation_config.json)",
    ):
        assert part in result.first_line
    rates = r"rill: 3 prompt tokens, [\d.]+ tokens/s; 12 generated, [\d.]+ tokens/s; "
    assert re.fullmatch(rates + r"first token after [\d.]+ s; peak memory \d+ MB", result.last_line)
    assert len(result.err.splitlines()) == 2


def test_a_prompt_goes_through_the_template_unless_raw(model: Path, rill: Rill) -> None:
    with engine.LLM(model, max_batch=1) as llm:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        params = engine.SamplingParams(max_tokens=9)
        expected, with_system = llm.chat(messages[1:], params), llm.chat(messages, params)
    assert expected.text != with_system.text
    result = rill(model, "-p", "Hi", "-n", 9)
    assert result.text == expected.text and "chat template" in result.first_line
    assert rill(model, "-p", "Hi", "-n", 9, "--system", "Be brief.").text == with_system.text


def test_a_model_without_template_completes(model: Path, tmp_path: Path, rill: Rill) -> None:
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "tokenizer_config.json").unlink()
    result = rill(bare, "-p", "Hi", "-n", 5)
    assert result.text == rill(model, "--raw", "-p", "Hi", "-n", 5).text and "raw text" in result.first_line
    for option in (["--system", "x", "-p", "Hi"], ["--no-think", "-p", "Hi"], ["--chat"]):
        refused = rill(bare, *option)
        assert refused.status == 2 and "no chat template" in refused.err and refused.err.count("\n") == 1


def test_the_tokenizer_may_lie_elsewhere(model: Path, tmp_path: Path, rill: Rill) -> None:
    bare = Path(shutil.copytree(model, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    refused = rill(bare, "-p", "Hi", "-n", 5)
    assert refused.status == 2 and "no tokenizer.json or tokenizer.model" in refused.err
    assert rill(bare, model, "-p", "Hi", "-n", 5).text == rill(model, "-p", "Hi", "-n", 5).text


def test_prompt_from_stdin(model: Path, rill: Rill) -> None:
    expected = rill(model, "--raw", "-p", "two\nlines é", "-n", 6).text
    assert rill(model, "--raw", "-p", "-", "-n", 6, stdin="two\nlines é\n".encode()).text == expected
    assert rill(model, "--raw", "-p", "-", "-n", 6, stdin="two\nlines é\n\n".encode()).text != expected
    assert rill(model, "--raw", "-p", "-", "-n", 3, stdin=b"a\0b").status == 0


def test_the_same_seed_gives_the_same_text(model: Path, rill: Rill) -> None:
    def draw(*seed: object) -> Result:
        return rill(model, "-p", "Hi", "-n", 20, "--temperature", 1.5, *seed)

    assert draw("-s", 1).text == draw("--seed", 1).text != draw("-s", 2).text
    unseeded = draw()
    seed = re.search(r"seed (\d+) \(random\)", unseeded.err)
    assert seed and draw("-s", seed[1]).text == unseeded.text


def test_every_sampling_option_arrives(model: Path, rill: Rill) -> None:
    values = {"--temperature": 0.5, "--top-k": 7, "--top-p": 0.9, "--min-p": 0.01, "--seed": 11,
              "--repetition-penalty": 1.25, "--presence-penalty": 0.75}  # fmt: skip
    result = rill(model, "-p", "Hi", "-n", 2, *(part for pair in values.items() for part in pair))
    for option, value in values.items():
        assert f"{option[2:].replace('-', '_')} {value} (asked for)" in result.first_line


def test_stop_strings(model: Path, rill: Rill) -> None:
    args = (model, "--raw", "-p", "Hi", "-n", 60, "--temperature", 1.5, "-s", 4)
    text = rill(*args).text
    stops = text[40:43], text[25:28]
    first = min(stops, key=lambda stop: text.index(stop) + len(stop))
    assert 0 < text.index(first) < len(text) - 3
    assert rill(*args, "--stop", stops[0], "--stop", stops[1]).text == text[: text.index(first)]
    assert rill(*args, "--stop", "never this").text == text


def test_environment_stands_below_the_options(
    model: Path, rill: Rill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RILL_ISA", "baseline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = (model, "-p", "Hi", "-n", 1)
    line = rill(*args).first_line
    assert "baseline (from RILL_ISA)" in line and "1 threads (from OMP_NUM_THREADS)" in line
    monkeypatch.setenv("RILL_ISA", "nonsense")
    line = rill(*args, "--isa", "baseline", "-t", 2).first_line
    assert "baseline (asked for)" in line and "2 threads (asked for)" in line
    refused = rill(*args)
    assert refused.status == 2 and "nonsense" in refused.err


def test_the_numpy_device_writes_the_same(model: Path, rill: Rill) -> None:
    args = (model, "-p", "Hi", "-n", 4)
    result = rill(*args, "--device", "numpy")
    assert "; numpy " in result.first_line and result.text == rill(*args).text


def test_verbose_says_more(model: Path, rill: Rill) -> None:
    result = rill(model, "-p", "Hi", "-n", 4, "--verbose")
    assert "qwen3, 2 layers" in result.err and "4 generated, ended by length" in result.err
    assert result.text == rill(model, "-p", "Hi", "-n", 4).text


def test_a_full_context_is_said(model: Path, rill: Rill) -> None:
    result = rill(model, "--raw", "-p", "Hi", "-c", 10)
    assert result.status == 0 and "8 generated" in result.last_line
    assert "context of 10 positions is full" in result.err
    assert "is full" not in rill(model, "--raw", "-p", "Hi", "-c", 10, "-n", 7).err


def test_think_reaches_the_template() -> None:
    assert template_variables(parse(["-p", "x", "--think"])) == {"enable_thinking": True}
    assert template_variables(parse(["-p", "x", "--no-think"])) == {"enable_thinking": False}
    assert template_variables(parse(["-p", "x"])) == {}


def test_version(rill: Rill) -> None:
    assert rill("--version").text == f"rill {engine.__version__}"


def test_help_needs_neither_numpy_nor_the_engine() -> None:
    program = (
        "import sys\nsys.modules.update(dict.fromkeys(['numpy', 'engine', 'cffi']))\n"
        "from demo.infer import main\nmain(['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--repetition-penalty" in result.stdout and result.stderr == ""


# Bad input: one line, the right exit status, nothing on standard output.


def check_refusal(result: Result, status: int, *fragments: str) -> None:
    assert (result.status, result.out) == (status, "")
    assert re.fullmatch(r"rill: error: [^\n]+\n", result.err), result.err
    for fragment in fragments:
        assert fragment in result.err


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["-n", "0"], "--max-tokens: must be"),
        (["-n", "-5"], "--max-tokens: must be"),
        (["-n", "99999999999"], "--max-tokens: must be"),
        (["-n", "9" * 5000], "--max-tokens: expected a whole number"),
        (["-n", "1.5"], "--max-tokens: expected a whole number"),
        (["-n", "１"], "--max-tokens: expected a whole number"),
        (["--temperature", "nan"], "--temperature: expected a number"),
        (["--temperature", "inf"], "--temperature: expected a number"),
        (["--temperature", "1e999"], "--temperature: expected a number"),
        (["--temperature", "-1"], "--temperature: must be"),
        (["--temperature", "1e30"], "--temperature: must be"),
        (["--top-p", "2"], "--top-p: must be"),
        (["--top-p", "0"], "--top-p: must be"),
        (["--top-k", "-1"], "--top-k: must be"),
        (["--min-p", "1.5"], "--min-p: must be"),
        (["--repetition-penalty", "0"], "--repetition-penalty: must be"),
        (["--presence-penalty", "99"], "--presence-penalty: must be"),
        (["--seed", "-1"], "--seed: must be"),
        (["--seed", str(2**64)], "--seed: must be"),
        (["--stop", ""], "--stop: must be"),
        (["-c", "0"], "--ctx-size 0"),
        (["-c", "3"], "4 tokens, the context 3"),
        (["-t", "0"], "--threads 0"),
        (["-t", "100000"], "--threads 100000"),
        (["--isa", "mmx"], "--isa 'mmx' (asked for): this machine has"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--dtype", "int3"], "--dtype 'int3'"),
        (["--kv-dtype", "int3"], "--kv-dtype 'int3'"),
        (["--attention", "sparse"], "--attention 'sparse'"),
        (["--chat"], "--chat: needs the chat template"),
        (["--system", "x"], "--system: needs the chat template"),
        (["--no-think"], "--no-think: needs the chat template"),
        (["--window", "9"], "--window: belongs to --attention streaming"),
        (["--attention", "flash", "--window", "9", "--sink", "2"], "--window: belongs to --attention streaming"),
        (["--attention", "flash", "--sink", "2"], "--sink: belongs to --attention streaming"),
        (["--attention", "streaming", "--sink", "2"], "--sink: needs --window"),
        (["-n", "1", "--attention", "streaming", "--window", "0"], "--window 0"),
        (["-n", "1", "--attention", "streaming", "--window", "9", "--sink", "-1"], "--sink -1"),
        (["--seq-lengths", "9"], "--seq-lengths: belongs to --benchmark"),
        (["--benchmark"], "--benchmark: makes its own prompts"),
        (["--gen-len", "3"], "--gen-len: belongs to --verify"),
        (["--verify", "1"], "--verify: takes token ids"),
        (["--no-such-option"], "--no-such-option"),
        (["--max", "3"], "--max"),
        (["-p"], "--prompt"),
        (["more", "words"], "words"),
    ],
)
def test_misuse_names_the_option(model: Path, rill: Rill, options: list[str], fragment: str) -> None:
    check_refusal(rill(model, "--raw", "-p", "abcd", *options), 2, fragment)


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["--benchmark", "--seq-lengths", "512,0"], "--seq-lengths: expected positive whole numbers"),
        (["--benchmark", "--attention", "flash,dense"], "--attention 'dense'"),
        (["--benchmark", "--attention", "flash", "--window", "9"], "--window: belongs to --attention streaming"),
        (["--verify", ""], "--verify: expected token ids"),
        (["--verify", "1,,2"], "--verify: expected token ids"),
        (["--verify", "1, 2"], "--verify: expected token ids"),
        (["--verify", "-1"], "--verify"),
        (["--verify", "320"], "token id 320: the vocabulary has 0 to 319"),
        (["--verify", "1", "--gen-len", "-1"], "gen_len"),
        ([], "nothing to do"),
        (["-p", "-", "--chat"], "--prompt: -"),
        (["--raw", "-p", ""], "the prompt is empty"),
        (["-p", "\udcff"], "error"),
    ],
)
def test_misuse(model: Path, rill: Rill, args: list[str], fragment: str) -> None:
    check_refusal(rill(model, *args), 2, fragment)


def test_stdin_that_is_not_utf8(model: Path, rill: Rill) -> None:
    check_refusal(rill(model, "-p", "-", stdin=b"ab\xff"), 2, "standard input is not UTF-8 (byte 2)")


def test_models_that_cannot_be_used(model: Path, tmp_path: Path, rill: Rill) -> None:
    check_refusal(rill(tmp_path / "absent", "-p", "x"), 2, "absent: no such file or directory")
    check_refusal(rill("a\0b\nc", "-p", "x"), 2, "a\\x00b\\nc")
    check_refusal(rill(tmp_path, "-p", "x"), 1, "has no weights")
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "config.json").write_text("{")
    check_refusal(rill(broken, "-p", "x"), 1, "config.json: is not valid JSON")
    check_refusal(rill(model, tmp_path, "-p", "x"), 1, str(tmp_path), "tokenizer")


def test_too_little_memory_says_how_much(model: Path, rill: Rill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    check_refusal(rill(model, "-p", "x"), 1, "GiB", "are free")


def test_a_failure_in_the_middle_of_a_text(model: Path, tmp_path: Path, rill: Rill) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "nan"))
    overwrite(broken, "model.layers.1.input_layernorm.weight", 0, b"\x00\x00\xc0\x7f")  # NaN
    result = rill(broken, "-p", "x")
    assert (result.status, result.out) == (1, "\n")
    assert re.match(r"rill: error: .*not finite.*layers\.1", result.last_line)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/closed"), "/closed: Permission denied"),
        (MemoryError(), "out of memory"),
        (ImportError("No module named 'numpy'"), "No module named 'numpy'"),
        (ZeroDivisionError("a\nb"), "unforeseen: ZeroDivisionError: a b (test_infer.py, line"),
    ],
)
def test_never_a_traceback(
    model: Path, rill: Rill, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(engine, "LLM", fail)
    check_refusal(rill(model, "-p", "x"), 1, line)


def test_messages_name_options_only_where_they_begin_with_one() -> None:
    assert as_option("max_seq_len 0: too small") == "-c/--ctx-size 0: too small"
    assert as_option("sampling: top_p: must be") == "--top-p: must be"
    assert as_option("model.safetensors: bad") == "model.safetensors: bad"
    assert as_option("stops here") == "stops here"
    with pytest.raises(OptionError, match="-n/--max-tokens: expected a whole number, got 'x'"):
        parse(["-p", "x", "-n", "x"])


# --verify.


def test_verify_passes(model: Path, rill: Rill) -> None:
    result = rill(model, "--verify", "104,105,106", "--gen-len", 3)
    assert result.status == 0 and result.out.splitlines()[-1].startswith("PASS") and result.err == ""
    assert rill(model, "--verify", "104").status == 0


def test_verify_fails(model: Path, rill: Rill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "NODE_BOUND", {"float32": -1.0, "bfloat16": -1.0})
    result = rill(model, "--verify", "104,105", "--gen-len", 1)
    assert result.status == 1 and "FAIL" in result.out and "PASS" not in result.out


# Attention and --benchmark.


def test_the_options_of_attention_arrive(model: Path, rill: Rill) -> None:
    asked: dict[str, Any] = {"attention": "streaming", "window": 20, "sink": 3, "q_block": 16, "kv_block": 64}
    options = [part for name, value in asked.items() for part in (f"--{name.replace('_', '-')}", value)]
    args = (model, "--raw", "-p", "abc", "-n", 60, "--temperature", 1.5, "-s", 1)
    result = rill(*args, *options)
    with engine.LLM(model, max_batch=1, **asked) as llm:
        expected = llm.generate("abc", engine.SamplingParams(max_tokens=60, temperature=1.5, seed=1))
    assert result.text == expected.text != rill(*args).text
    assert "attention streaming+window (asked for)" in result.first_line
    assert "context without end, of which 20 positions and 3 sinks are seen" in result.first_line


def test_benchmark_compares_kinds_and_lengths(model: Path, rill: Rill) -> None:
    result = rill(model, "--benchmark", "--seq-lengths", "70,300", "-c", 999, "--window", 64)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.text.splitlines()[2:]]
    kinds = ["standard", "flash", "streaming+window"]
    assert [(line[0], line[1]) for line in lines] == [(n, kind) for n in ("70", "300") for kind in kinds]
    for _, _, taken, speed, scratch, cache in lines:
        assert float(taken.removesuffix(" ms")) > 0 and float(speed.removesuffix(" tokens/s")) > 0
        assert float(scratch.removesuffix(" kB")) > 0 and float(cache.removesuffix(" MB")) > 0
    short, long = ({line[1]: float(line[4].split()[0]) for line in lines[i : i + 3]} for i in (0, 3))
    assert long["standard"] > short["standard"] and long["streaming+window"] == short["streaming+window"]
    assert result.err == ""


def test_benchmark_says_what_does_not_fit(model: Path, rill: Rill) -> None:
    text = rill(model, "--benchmark", "--seq-lengths", "50000", "--attention", "standard").text
    assert "| 50000 | standard | not run: the context has 40960 positions |" in text


# Processes: pipes, signals, terminals.


# --profile.


def test_a_profile_is_a_table_and_a_trace(model: Path, tmp_path: Path, rill: Rill) -> None:
    args, trace = (model, "--raw", "-p", "abcdef", "-n", 5), tmp_path / "trace.json"
    trace.write_text("old")
    result = rill(*args, f"--profile={trace}")
    assert result.text == rill(*args).text and result.last_line.startswith("rill: 6 prompt tokens")
    assert re.search(r"prefill: 6 rows in 1 step,.*\ndecode: 4 rows in 4 steps", result.err, re.S)
    assert len(re.findall(r"^  matmul +(8|32) ", result.err, re.M)) == 2 and result.err.count("\n  Python ") == 2
    assert f"trace of 5 steps in {trace}" in result.err
    steps = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "step"]
    assert [step["args"]["rows"] for step in steps] == [6, 1, 1, 1, 1]
    assert list(tmp_path.iterdir()) == [trace]


def test_a_profile_without_a_file_takes_no_other_word_for_one(model: Path, rill: Rill) -> None:
    before = sorted(model.iterdir())
    result = rill("--profile", model, "--raw", "-p", "abc", "-n", 3, "--device", "numpy")
    assert result.status == 0 and "decode: 2 rows in 2 steps" in result.err and "trace" not in result.err
    assert "limits" not in result.err, "NumPy does not say what it could do"
    assert sorted(model.iterdir()) == before


def test_a_profile_of_a_chat(model: Path, rill: Rill) -> None:
    result = rill(model, "--chat", "-n", 4, "--profile", stdin=b"one\ntwo\n")
    assert result.status == 0 and "in 2 steps" in result.err and "decode: 6 rows in 6 steps" in result.err


def test_a_trace_that_cannot_be_written_is_said_first(model: Path, tmp_path: Path, rill: Rill) -> None:
    for path, reason in ((tmp_path, "is there and is no file"), (tmp_path / "no" / "x", "No such file"),
                         (model / "config.json" / "x", "Not a directory")):  # fmt: skip
        check_refusal(rill(model, "-p", "x", f"--profile={path}"), 2, "--profile", str(path), reason)


def test_utf8_whatever_the_locale(model: Path, rill: Rill) -> None:
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    process = start(model, "--raw", "-p", "-", "-n", 8, stdin=subprocess.PIPE, env=ascii_only)
    out, err = process.communicate("é".encode(), timeout=PATIENCE)
    expected = rill(model, "--raw", "-p", "é", "-n", 8).text
    assert process.returncode == 0 and out.decode() == f"{expected}\n", err
    assert not expected.isascii()


def test_where_both_streams_are_one_the_prompt_is_seen(model: Path, rill: Rill) -> None:
    together = end(start(model, "--raw", "-p", "abc", "-n", 5, stderr=subprocess.STDOUT)).out
    assert f"\nabc{rill(model, '--raw', '-p', 'abc', '-n', 5).text}\nrill: " in together


def test_a_closed_pipe_ends_quietly(model: Path) -> None:
    process = start(model, "-p", "Hi")
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(PATIENCE) == 141 and err.count("\n") == 1, err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error(model: Path) -> None:
    with open("/dev/full", "wb") as full:
        result = end(start(model, "-p", "Hi", "-n", 3, stdout=full))
        assert result.status == 1
        assert result.last_line == "rill: error: standard output: No space left on device"
        refused = end(start("--help", stdout=full))
        assert (refused.status, refused.err) == (1, f"{result.last_line}\n")
        silent = end(start(model, "-p", "Hi", "-n", 3, stderr=full))
        assert silent.status == 0 and silent.out.endswith("\n")


def test_ctrl_c_keeps_the_text_so_far(model: Path, rill: Rill) -> None:
    process = start(model, "--raw", "-p", "Hi", "-c", 40000)
    assert process.stdout
    seen = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    text = (seen + out).decode()
    assert process.returncode == 130 and text.endswith("\n") and "Traceback" not in err.decode()
    whole = rill(model, "--raw", "-p", "Hi", "-n", 50).text
    assert len(text) > 10 and (text[:-1].startswith(whole) or whole.startswith(text[:-1]))
    assert "first token after" in err.decode().splitlines()[-1]


def test_ctrl_c_while_a_long_prompt_is_read(model: Path) -> None:
    process = start(model, "--raw", "-p", "-", "-c", 40960, stdin=subprocess.PIPE)
    assert process.stdin and process.stderr
    process.stdin.write(b"x" * 40000)
    process.stdin.close()
    process.stdin = None
    process.stderr.readline()  # what was chosen: the prompt is with the engine now
    process.send_signal(signal.SIGINT)
    result = end(process)
    assert (result.status, result.out) == (130, "\n") and "; 0 generated;" in result.err


def test_ctrl_c_ends_in_a_profile(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    process = start(model, "--raw", "-p", "abc", "-c", 40000, f"--profile={trace}")
    assert process.stdout and process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    result = end(process)
    assert result.status == 130 and "decode: " in result.err and trace.exists(), result.err


def test_ctrl_c_while_loading(rill: Rill, monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = threading.Event()

    def load(*_: object, **__: object) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        going_on.wait(PATIENCE)

    statuses: list[int] = []
    monkeypatch.setattr(engine, "LLM", load)
    monkeypatch.setattr(os, "_exit", statuses.append)
    result = rill("somewhere", "-p", "x")
    going_on.set()
    assert (result.status, result.out, result.err, statuses) == (130, "", "", [130])


def test_the_first_ctrl_c_calls_and_the_second_raises() -> None:
    calls: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with console.on_interrupt(lambda: calls.append(1)):
            signal.raise_signal(signal.SIGINT)
            assert calls == [1]
            signal.raise_signal(signal.SIGINT)
    assert calls == [1] and signal.getsignal(signal.SIGINT) is before


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with console.on_interrupt(lambda: pytest.fail("called")):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_only_where_loading_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    clock = [100.0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    bar = console.ProgressBar()
    for done in (10, 20):
        clock[0] += 0.2
        bar(done, 100)
    assert capsys.readouterr().err == ""
    clock[0] += 2
    bar(50, 100)
    bar(51, 100)  # too soon to draw again
    bar.clear()
    err = capsys.readouterr().err
    assert err.count("loading  50%") == 1 and "51%" not in err
    assert err.endswith("\r\033[K" if terminal else "\n") and ("###" in err) == terminal


# Conversations.


def test_chat_reads_turns_from_a_pipe(model: Path, rill: Rill) -> None:
    result = rill(model, "--chat", "-n", 6, "--verbose", "--system", "S", stdin=b"one\n\ntwo\n")
    with engine.LLM(model, max_batch=1) as llm:
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "one"}]
        first = llm.chat(messages, engine.SamplingParams(max_tokens=6))
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "two"}]
        second = llm.chat(messages, engine.SamplingParams(max_tokens=6))
    assert result.status == 0 and result.out == f"{first.text}\n{second.text}\n"
    turns = re.findall(r"(\d+) prompt tokens, (\d+) of them in the cache", result.err)
    assert turns[0] == (str(len(first.prompt_token_ids)), "0")
    assert turns[1] == (str(len(second.prompt_token_ids)), str(second.timings.cached_tokens))
    assert second.timings.cached_tokens >= len(first.prompt_token_ids)
    assert "12 generated" in result.last_line and "> " not in result.out


def test_chat_begins_with_the_prompt(model: Path, rill: Rill) -> None:
    args = (model, "--chat", "-n", 5)
    assert rill(*args, "-p", "one", stdin=b"two\n").out == rill(*args, stdin=b"one\ntwo\n").out
    assert rill(*args).out == ""


def test_a_turn_that_does_not_fit_ends_a_piped_chat(model: Path, rill: Rill) -> None:
    result = rill(model, "--chat", "-n", 5, "-c", 60, stdin=b"one\n" + b"x" * 100 + b"\n")
    assert result.status == 2 and result.last_line.startswith("rill: error: the prompt has")


class Terminal:
    """The command on a terminal of its own, where Ctrl-C is a character."""

    def __init__(self, *args: object) -> None:
        self.master, slave = pty.openpty()
        program = (
            "import fcntl, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "from demo.infer import main\nsys.exit(main(sys.argv[1:]))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, args)], cwd=ROOT, start_new_session=True,
            stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)

    def read(self, patience: float = PATIENCE) -> bytes:
        ready, _, _ = select.select([self.master], [], [], patience)
        try:
            return os.read(self.master, 65536) if ready else b""
        except OSError:  # nobody is left on the other side
            return b""

    def until(self, pattern: bytes) -> bytes:
        seen = b""
        while re.search(pattern, seen) is None:
            piece = self.read()
            assert piece, f"ended without {pattern!r}: {seen!r}"
            seen += piece
        return seen

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def interrupt(self, pattern: bytes) -> bytes:
        """Ctrl-C at the prompt, until there is an answer. Python misses a signal that comes just before it waits
        for a key; a second one then makes it notice the first."""
        seen = b""
        for _ in range(20):
            self.type(b"\x03")
            while piece := self.read(3):
                seen += piece
                if re.search(pattern, seen):
                    return seen
            if self.process.poll() is not None:
                break
        return seen

    def end(self) -> int:
        while self.read():
            pass
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self.master)


@pytest.fixture
def terminal(model: Path) -> Iterator[Terminal]:
    terminal = Terminal(model, "--chat", "-c", 40000)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_a_reply_and_ctrl_d_ends_the_chat(terminal: Terminal) -> None:
    terminal.until(rb"> $")
    for _ in range(2):
        terminal.type(b"hello\n")
        terminal.until(rb"(?s)hello\r\n.{20}")  # a reply that would go on for 40,000 tokens
        terminal.type(b"\x03")
        terminal.until(rb"\n> $")
    terminal.type(b"\x04")
    assert terminal.end() == 0


def test_two_ctrl_c_end_the_chat(terminal: Terminal) -> None:
    terminal.until(rb"> $")
    terminal.type(b"half a line")
    terminal.until(rb"half a line$")
    assert b"Ctrl-C again" in terminal.interrupt(rb"\n> $")
    terminal.interrupt(rb"\n$")
    assert terminal.end() == 130
