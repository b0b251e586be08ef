"""The options of `rill`: what they are called, what they take, and which of them belong to the engine."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from math import isfinite
from typing import Any, NoReturn

from demo.console import write

DESCRIPTION = """\
Rill runs Qwen3, Qwen2 and Llama checkpoints. Text goes to standard output as it is generated,
everything else to standard error.

Where the model has a chat template, a prompt is a message to the assistant and goes through it;
--raw has the model continue the text instead."""

EPILOG = """\
examples:
  rill --raw -p "Once upon a time"             the bundled model goes on with a story
  rill MODEL -p "What is rain?" -n 100         at most 100 tokens of an answer
  rill MODEL -p - --temperature 0 < FILE       the prompt from standard input, the likeliest answer
  rill MODEL --chat                            a conversation: Ctrl-C stops a reply, Ctrl-D ends

Sampling options that are not given come from the model's generation_config.json. RILL_ISA and
OMP_NUM_THREADS (the most threads) count where --isa and --threads are not given. OMP_PROC_BIND=true binds each thread
to a core.
RILL_CACHE_GB bounds what is kept of quantised weights, by default to a quarter of the disk; what has been unused
for longest goes first.

exit status: 0 done, 1 failed, 2 misused, 130 stopped by Ctrl-C."""

LLM_OPTIONS = ("device", "isa", "attention", "sink", "window", "q_block", "kv_block", "dtype", "kv_dtype",
               "max_seq_len", "threads", "cache", "tp", "pp", "parallel")  # fmt: skip
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                    "max_tokens", "stop", "seed")  # fmt: skip


class OptionError(ValueError):
    """A command line that cannot be followed: exit status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message.removeprefix('argument ')} ({self.prog} --help lists the options)")

    def _print_message(self, message: str, file: Any = None) -> None:
        write(message)  # argparse would ignore an error


class Version(argparse.Action):
    """Reads the version only when it is asked for: importing the engine takes longer than --help may."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from engine import __version__

        write(f"rill {__version__}\n")
        parser.exit()


def integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text[:40]!r}")
    return int(text)


def number(text: str) -> float:
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) and isfinite(float(text)):
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a number, got {text[:40]!r}")


def positive(text: str) -> int:
    if (value := integer(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def lengths(text: str) -> list[int]:
    """Positive whole numbers with commas between them."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}(,0*[1-9][0-9]{0,8})*", text):
        raise argparse.ArgumentTypeError(f"expected positive whole numbers like 512,1024, got {text[:40]!r}")
    return [int(part) for part in text.split(",")]


def counts(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise argparse.ArgumentTypeError(f"expected whole numbers like 0,4096, got {text[:40]!r}")
    return [int(part) for part in text.split(",")]


def token_ids(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", text):
        raise argparse.ArgumentTypeError(f"expected token ids like 151644,872, got {text[:40]!r}")
    return [int(part) for part in text.split(",")]


def make_parser() -> Parser:
    """An option for an argument of LLM or SamplingParams goes by its name; those not given are None."""
    parser = Parser("rill", usage="rill [MODEL] [TOKENIZER] -p TEXT [options]", description=DESCRIPTION,
                    epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="directory in Hugging Face format, hub name, .safetensors "
        "file or its index; without one, the bundled model")  # fmt: skip
    add("tokenizer", nargs="?", metavar="TOKENIZER", help="directory or file; without one, the model's own")
    add("--version", action=Version, nargs=0, help="print the version and exit")
    add("--verbose", action="store_true", help="say more about the model, the prompt and each reply")
    _add_prompt(parser.add_argument_group("the prompt"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_engine(parser.add_argument_group("the engine"))
    group = parser.add_argument_group("checking the engine")
    group.add_argument("--verify", type=token_ids, metavar="IDS", help="run these token ids on the device "
                       "and on the NumPy oracle and compare every node; print PASS or the first "
                       "difference")  # fmt: skip
    group.add_argument("--gen-len", type=integer, metavar="N",
                       help="with --verify: tokens to generate as well, by default 0")  # fmt: skip
    group = parser.add_argument_group("measuring the engine")
    group.add_argument("--benchmark", action="store_true", help="time prompts of several lengths with each kind of "
                       "attention, and print its memory; --attention may then list kinds with commas")  # fmt: skip
    group.add_argument("--profile", metavar="[=TRACE.json]", help="time every node: a table by op on standard error, "
                       "and in a file that is named a trace for Perfetto or chrome://tracing")  # fmt: skip
    group.add_argument("--seq-lengths", type=lengths, metavar="LIST",
                       help="with --benchmark: tokens of the prompts, by default 512,1024,2048,4096")  # fmt: skip
    return parser


def _add_prompt(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-p", "--prompt", metavar="TEXT", help='what to answer or continue; "-" reads standard input')
    add("--raw", action="store_true", help="no chat template: continue the text as it stands")
    add("--system", metavar="TEXT", help="system message, before the prompt or the conversation")
    add("--think", action=argparse.BooleanOptionalAction,
        help="let the model think first, or not; for templates that know enable_thinking")  # fmt: skip
    add("--chat", action="store_true", help="a conversation, one line a turn; a prompt comes first")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-n", "--max-tokens", type=integer, metavar="N", help="tokens to generate at most; by default, to "
        "the end of the context")  # fmt: skip
    add("--temperature", type=number, metavar="X", help="0 takes the likeliest token; higher is more random")
    add("--top-k", type=integer, metavar="K", help="sample from the K likeliest tokens; 0 for all")
    add("--top-p", type=number, metavar="P", help="sample from the fewest tokens that have probability P")
    add("--min-p", type=number, metavar="P", help="leave out tokens below this share of the likeliest")
    add("--repetition-penalty", type=number, metavar="X", help="divides the scores of tokens so far; 1: none")
    add("--presence-penalty", type=number, metavar="X", help="taken off scores of generated tokens; 0: none")
    add("-s", "--seed", type=integer, metavar="N", help="the same seed gives the same text; else random")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")


def _add_engine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-c", "--ctx-size", type=integer, dest="max_seq_len", metavar="N", help="positions of the context, "
        "prompt and reply together; by default 4096, at most the model's own limit")  # fmt: skip
    add("-t", "--threads", type=integer, metavar="N", help="by default one a core, and fewer in short steps")
    add("--device", metavar="NAME", help="auto, cpu, cuda or numpy")
    add("--tp", type=positive, metavar="N", help="ranks that share each layer: by default all that mpiexec has started")
    add("--pp", type=positive, metavar="N", help="stages of ranks that share the layers, by default 1: "
        "tp times pp ranks")  # fmt: skip
    add("--parallel", metavar="NAME", help="what ranks share: tensor (every layer) or allgather (the heads alone)")
    add("--isa", metavar="NAME", help="auto, baseline, avx2, avx512 (the best of its family), ...")
    add("--dtype", metavar="NAME", help="of the weights: auto (as stored), float32, int8 or int4 (quantised, "
        "in groups of 64 and 32; int4-128 and the like: of so many)")  # fmt: skip
    add("--no-cache", action="store_false", dest="cache", default=None, help="do not keep quantised weights in the "
        "user's cache directory, nor take them from there")  # fmt: skip
    add("--kv-dtype", metavar="NAME", help="of the KV cache: auto, float32, bfloat16, float16 or int8")
    add_attention(group)


def add_attention(group: Any) -> None:
    """The options of attention, for any program."""
    add = group.add_argument
    add("--attention", metavar="NAME", help="auto, standard, flash or streaming")
    add("--window", type=integer, metavar="W", help="with --attention streaming: each position sees the last W only, "
        "and text goes on without end in constant memory")  # fmt: skip
    add("--sink", type=integer, metavar="K", help="with --window: each position sees the first K, too")
    add("--q-block", type=integer, metavar="N", help="queries to a block of flash and streaming attention")
    add("--kv-block", type=integer, metavar="N", help="keys to a block, a multiple of 64")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises OptionError, or SystemExit after --help and --version."""
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    # A file may follow --profile after an equals sign only: after a space stands a model.
    options = parser.parse_args(["--profile=" if word == "--profile" else word for word in words])
    if problem := _contradiction(options):
        parser.error(problem)
    return options


def misfit_window(options: argparse.Namespace, kinds: Sequence[str]) -> str | None:
    """Why --sink and --window do not go with these kinds of attention."""
    if options.sink is None and options.window is None:
        return None
    if "streaming" not in kinds:
        name = "--sink" if options.window is None else "--window"
        return f"{name}: belongs to --attention streaming"
    return "--sink: needs --window" if options.window is None else None


def _contradiction(options: argparse.Namespace) -> str | None:
    measured = options.benchmark and options.attention is None  # then every kind there is
    kinds = ["streaming"] if measured else (options.attention or "").split(",")
    return misfit_window(options, kinds) or _contradictory_work(options)


def _contradictory_work(options: argparse.Namespace) -> str | None:
    if options.profile is not None and (options.benchmark or options.verify is not None):
        return "--profile: of a prompt or a chat, no --benchmark and no --verify"
    if options.benchmark:
        given = options.prompt is not None or options.chat or options.verify is not None
        return "--benchmark: makes its own prompts, no --prompt, --chat or --verify" if given else None
    if options.seq_lengths is not None:
        return "--seq-lengths: belongs to --benchmark"
    if options.verify is not None:
        given = options.prompt is not None or options.chat
        return "--verify: takes token ids, no --prompt and no --chat" if given else None
    if options.gen_len is not None:
        return "--gen-len: belongs to --verify; --max-tokens bounds a reply"
    if options.prompt is None and not options.chat:
        return "nothing to do: give a prompt with -p TEXT or -p -, or talk with --chat"
    if options.prompt == "-" and options.chat:
        return "--prompt: - reads all of standard input, from which --chat takes its turns"
    if options.raw:
        needs_template = {"--chat": options.chat, "--system": options.system is not None,
                          "--think/--no-think": options.think is not None}  # fmt: skip
        return next((f"{name}: needs the chat template that --raw leaves out"
                     for name, given in needs_template.items() if given), None)  # fmt: skip
    return None


def given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named options that stand on the command line."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def system_message(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def template_variables(options: argparse.Namespace) -> dict[str, Any]:
    """What the chat template is told beside the messages."""
    return {} if options.think is None else {"enable_thinking": options.think}


def as_option(message: str) -> str:
    """The message; where it begins with an argument of LLM or SamplingParams, with the option's name."""
    flags = {action.dest: "/".join(action.option_strings) for action in make_parser()._actions}
    message = message.removeprefix("sampling: ")
    name = re.match(r"\w*", message)[0]  # type: ignore[index]
    return flags[name] + message[len(name) :] if name in LLM_OPTIONS + SAMPLING_OPTIONS else message
