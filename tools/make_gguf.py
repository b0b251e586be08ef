"""Write a model directory as a GGUF file, with the format's own package.

    python -m tools.make_gguf DIRECTORY OUT.gguf --type Q8_0 --pre qwen2
    python -m tools.make_gguf --fixtures            # test/gguf, with llama.cpp's quantiser

Needs the `gguf` package; the types with K in their names need `llama_cpp`, whose quantiser writes them out of an F32
file. `--pre` is the format's name for how the tokenizer cuts text, which no model directory says.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import ModelConfig, load_config
from engine.files.checkpoint import Checkpoint
from tools.random_weights import Config, Scales, random_tensors, write_json, write_safetensors

FIXTURES = Path(__file__).resolve().parent.parent / "test" / "gguf"
FIXTURE_SEED = 4
# Rows of 256, as K-quants need; what they leave to others (o_proj's rows of 32) is in it too.
FIXTURE: Config = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 256, "intermediate_size": 256,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 272,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": True,
    "eos_token_id": 256,
}  # fmt: skip
FIXTURE_TYPES = ("Q4_K_M",)
BY_GGUF = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
BY_LLAMA_CPP = ("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")


def write_gguf(directory: Path, out: Path, kind: str = "F32", pre: str | None = None) -> None:
    """Write one file. kind: of matrices, F16 where its blocks do not divide a row; `pre`: None leaves the tokenizer
    out."""
    import gguf

    config = load_config(directory / "config.json")
    writer = gguf.GGUFWriter(out, config.model_type)
    _add_config(writer, config)
    if pre is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
    else:
        _add_tokenizer(writer, directory, pre, config.vocab_size)
    for name, values in _tensors(directory, config).items():
        wanted = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
            wanted = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(source: Path, out: Path, kind: str) -> None:
    """llama.cpp's own quantiser, on one thread."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not write {out}")


def write_fixture_model(directory: Path) -> None:
    """The model directory that the fixtures are made of, the same anywhere."""
    directory.mkdir(exist_ok=True)
    tensors = random_tensors(FIXTURE, ("F32",), Scales(matrix=2.0, norm=0.3))
    write_safetensors(directory / "model.safetensors", tensors, FIXTURE_SEED)
    write_json(directory / "config.json", FIXTURE)


def _add_config(writer: Any, config: ModelConfig) -> None:
    import gguf

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope.type))
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_attn_factor(config.rope.attention_scaling())
        writer.add_rope_scaling_yarn_beta_fast(config.rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(config.rope.beta_slow)


def gguf_names(directory: Path) -> dict[str, str]:
    """What the format calls each tensor of a model directory; not the head where the embedding is it."""
    import gguf

    config = load_config(directory / "config.json")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    wanted = [n for n in Checkpoint(directory).tensors if n != "lm_head.weight" or not config.tie_word_embeddings]
    return {name: str(names.get_name(name, try_suffixes=(".weight", ".bias"))) for name in wanted}


def is_paired(name: str, model_type: str) -> bool:
    """Whether the format has a tensor's rows in another order than a model directory."""
    return model_type == "llama" and name.split(".")[-2] in ("q_proj", "k_proj")


def _tensors(directory: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """All tensors in float32, as the format has them."""
    stored, tensors = Checkpoint(directory).tensors, {}
    for name, own in gguf_names(directory).items():
        values = stored[name].read().astype(np.float32)
        tensors[own] = paired(values, config.head_dim) if is_paired(name, config.model_type) else values
    if config.rope.type == "llama3":
        plain = config.rope.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        tensors["rope_freqs.weight"] = (plain / config.rope.inv_freq(config.head_dim)).astype(np.float32)
    return tensors


def paired(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k put side by side that are rotated together, as Llama's files have them."""
    heads = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)


def _add_tokenizer(writer: Any, directory: Path, pre: str, vocab_size: int) -> None:
    settings: dict[str, Any] = {}
    if (file := directory / "tokenizer_config.json").exists():
        settings = json.loads(file.read_text())
    if (directory / "tokenizer.json").exists():
        tokens, types = _add_byte_level(writer, directory / "tokenizer.json", pre)
    else:
        tokens, types = _add_sentencepiece(writer, directory / "tokenizer.model")
    padding = range(len(tokens), vocab_size)
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in padding])
    writer.add_token_types(types + [5 for _ in padding])
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        if settings.get(f"{name}_token") in tokens:
            add(tokens.index(settings[f"{name}_token"]))
    if "add_bos_token" in settings:
        writer.add_add_bos_token(settings["add_bos_token"])
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])


def _add_byte_level(writer: Any, file: Path, pre: str) -> tuple[list[str], list[int]]:
    spec = json.loads(file.read_text())
    by_id = {i: (token, 1) for token, i in spec["model"]["vocab"].items()}
    by_id |= {t["id"]: (t["content"], 3 if t["special"] else 4) for t in spec["added_tokens"]}
    found = [by_id.get(i, (f"[PAD{i}]", 5)) for i in range(max(by_id) + 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    return [token for token, _ in found], [kind for _, kind in found]


def _add_sentencepiece(writer: Any, file: Path) -> tuple[list[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))
    ids = range(pieces.get_piece_size())
    kinds = ((pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_unused, 5), (pieces.is_byte, 6))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    return [pieces.id_to_piece(i) for i in ids], [next((n for test, n in kinds if test(i)), 1) for i in ids]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.make_gguf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--type", choices=BY_GGUF + BY_LLAMA_CPP, default="F16")
    parser.add_argument("--pre", default="qwen2", help="the tokenizer's way of cutting text, such as llama-bpe")
    parser.add_argument("--no-tokenizer", action="store_const", dest="pre", const=None, help="leave it out, as one "
                        "without merges must be for llama.cpp")  # fmt: skip
    parser.add_argument("--fixtures", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain.gguf"
        if options.fixtures:
            FIXTURES.mkdir(exist_ok=True)
            write_fixture_model(Path(temporary) / "model")
            write_gguf(Path(temporary) / "model", plain)
            for kind in FIXTURE_TYPES:
                quantise(plain, FIXTURES / f"qwen3-{kind.lower()}.gguf", kind)
        elif options.directory is None or options.out is None:
            parser.error("give a directory and a file to write, or --fixtures")
        elif options.type in BY_GGUF:
            write_gguf(options.directory, options.out, options.type, options.pre)
        else:
            write_gguf(options.directory, plain, "F32", options.pre)
            quantise(plain, options.out, options.type)


if __name__ == "__main__":
    main()
