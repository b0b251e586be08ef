"""The small random models that the engine is compared on with the reference, as data.

`tools/make_golden.py` runs the reference on them; `test/test_golden.py` makes the same checkpoints again
and compares. Together they cover every model type, rope type, bias, tying, dtype, config generation and many
head counts. Original lengths and windows are far below the prompts' lengths, so that each scaling shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tools.random_weights import Config, Scales, random_tensors, write_json, write_safetensors, write_weights

# Layers weigh more than in trained models, so that a mistake in any of them shows in the logits.
SCALES = Scales(logit=3.0, matrix=2.0, norm=0.3, bias=0.3)


@dataclass(frozen=True)
class GoldenCase:
    """One checkpoint and the length of its prompt."""

    name: str
    config: Config
    prompt_len: int
    dtypes: tuple[str, ...] = ("F32",)  # dealt out to the tensors in turn
    shard_bytes: int | None = None
    skew: int = 0  # where the data section starts, in bytes past a multiple of 8
    store_tied: bool = False  # lm_head.weight is in the file although the config ties it
    stray: bool = False  # a file with other weights of the same names lies beside the indexed shards

    @property
    def seed(self) -> int:
        return sum(self.name.encode())

    def write(self, directory: Path) -> None:
        """Make the checkpoint: weights and config.json, no tokenizer."""
        tensors = random_tensors(self.config, self.dtypes, SCALES, self.store_tied)
        write_weights(directory, tensors, self.seed, self.shard_bytes, self.skew)
        if self.stray:
            write_safetensors(directory / "consolidated.safetensors", tensors, self.seed + 1)
        write_json(directory / "config.json", self.config)


def sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int | None, vocab: int
) -> Config:
    config = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "eos_token_id": 0,
    }
    return config if head_dim is None else config | {"head_dim": head_dim}


def llama3_rope(factor: float, original: int) -> Config:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor} | bands


def old_style(theta: float | None, scaling: Config | None, dtype: str = "float32") -> Config:
    """Configs as written before transformers 5: rope_theta, rope_scaling, torch_dtype."""
    config: Config = {"rope_scaling": scaling, "torch_dtype": dtype}
    return config if theta is None else config | {"rope_theta": theta}


def new_style(theta: float, rope: Config, dtype: str = "float32") -> Config:
    """Configs as written since transformers 5: rope_parameters, dtype."""
    return {"rope_parameters": rope | {"rope_theta": theta}, "dtype": dtype}


QWEN3: Config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6}
QWEN2: Config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6}
LLAMA: Config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
TIED: Config = {"tie_word_embeddings": True}
UNTIED: Config = {"tie_word_embeddings": False}
DEFAULT: Config = {"rope_type": "default"}

CASES: tuple[GoldenCase, ...] = (
    GoldenCase(  # head_dim is not hidden / heads; one bf16 file
        "qwen3-tied",
        QWEN3 | TIED | sizes(64, 160, 3, 4, 2, 32, 384) | old_style(1e6, None, "bfloat16"),
        prompt_len=100,
        dtypes=("BF16",),
    ),
    GoldenCase(  # MQA with 8 heads; odd sizes; an eps that shows
        "qwen3-mqa",
        QWEN3 | UNTIED | sizes(72, 200, 2, 8, 1, 16, 301) | new_style(1e6, DEFAULT) | {"rms_norm_eps": 1e-2},
        prompt_len=150,
    ),
    GoldenCase(  # group 3; YaRN with the attention factor that follows from its factor
        "qwen3-yarn",
        QWEN3
        | UNTIED
        | sizes(96, 136, 2, 6, 2, 64, 256)
        | old_style(1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        prompt_len=140,
    ),
    GoldenCase(  # group 1; a tied lm_head that is stored all the same; a data section at an odd address
        "qwen3-bias",
        QWEN3
        | TIED
        | sizes(72, 120, 2, 3, 3, 24, 333)
        | new_style(5e6, DEFAULT, "float16")
        | {"attention_bias": True},
        prompt_len=90,
        dtypes=("F16",),
        skew=3,
        store_tied=True,
    ),
    GoldenCase(  # three dtypes in one checkpoint; shards with a stray file beside them; head_dim 128
        "qwen3-mixed-shards",
        QWEN3 | TIED | sizes(80, 144, 2, 2, 1, 128, 272) | old_style(1e6, DEFAULT, "bfloat16"),
        prompt_len=129,
        dtypes=("BF16", "F16", "F32", "BF16"),
        shard_bytes=60_000,
        stray=True,
    ),
    GoldenCase(  # q, k and v biases; head_dim left out; a sliding window that is given but switched off
        "qwen2-tied",
        QWEN2
        | TIED
        | sizes(96, 176, 3, 6, 2, None, 320)
        | old_style(1e6, None, "bfloat16")
        | {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1},
        prompt_len=110,
        dtypes=("BF16",),
    ),
    GoldenCase(  # YaRN with an attention factor of its own
        "qwen2-yarn",
        QWEN2
        | UNTIED
        | sizes(64, 100, 2, 4, 1, 16, 247)
        | new_style(
            1e6,
            {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.5,
            },
            "float16",
        ),
        prompt_len=128,
        dtypes=("F16",),
    ),
    GoldenCase(  # linear scaling under the oldest key; head_dim 40
        "qwen2-linear",
        QWEN2
        | UNTIED
        | sizes(120, 184, 2, 4, 2, 40, 288)
        | old_style(1e4, {"type": "linear", "factor": 2.5}),
        prompt_len=75,
    ),
    GoldenCase(  # Llama 2: no GQA, no rope_theta (10,000)
        "llama-plain",
        LLAMA | UNTIED | sizes(64, 172, 2, 4, 4, None, 400) | old_style(None, None, "float16"),
        prompt_len=96,
        dtypes=("F16",),
    ),
    GoldenCase(  # Llama 3.1's scaling, its bands moved to where the prompt is
        "llama-llama3",
        LLAMA | UNTIED | sizes(128, 224, 2, 8, 1, 16, 256) | old_style(5e5, llama3_rope(8.0, 64), "bfloat16"),
        prompt_len=150,
        dtypes=("BF16",),
    ),
    GoldenCase(  # Llama 3.2's scaling as it is; group 3
        "llama-llama3-tied",
        LLAMA
        | TIED
        | sizes(120, 152, 2, 6, 2, 64, 310)
        | new_style(5e5, llama3_rope(32.0, 8192), "bfloat16"),
        prompt_len=130,
        dtypes=("BF16",),
    ),
    GoldenCase(  # every bias that Llama knows; an eps that shows
        "llama-bias",
        LLAMA
        | UNTIED
        | sizes(72, 104, 3, 4, 2, 24, 263)
        | new_style(1e4, DEFAULT)
        | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2},
        prompt_len=70,
    ),
    GoldenCase(  # YaRN with mscale and betas of its own
        "llama-yarn-mscale",
        LLAMA
        | UNTIED
        | sizes(64, 128, 2, 4, 2, 32, 230)
        | old_style(
            1e4,
            {
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 48,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 1.2,
                "mscale_all_dim": 0.6,
            },
        ),
        prompt_len=120,
    ),
    GoldenCase(  # linear scaling in the new style; small shards of mixed dtypes, at odd addresses
        "llama-linear-shards",
        LLAMA
        | TIED
        | sizes(104, 168, 2, 4, 1, 40, 275)
        | new_style(1e4, {"rope_type": "linear", "factor": 4.0}, "bfloat16"),
        prompt_len=135,
        dtypes=("BF16", "F32"),
        shard_bytes=40_000,
        skew=1,
        stray=True,
    ),
    GoldenCase(  # group 8 with two KV heads; wider than the rest; many rows
        "llama-gqa8",
        LLAMA | UNTIED | sizes(256, 312, 1, 16, 2, 128, 500) | old_style(5e5, DEFAULT, "bfloat16"),
        prompt_len=200,
        dtypes=("BF16",),
    ),
)

# Windows shorter than the prompt. An engine runs these as the reference does or refuses them.
SLIDING_CASES: tuple[GoldenCase, ...] = (
    GoldenCase(  # the first layer is full, the others slide
        "qwen2-sliding",
        QWEN2
        | TIED
        | sizes(64, 128, 3, 4, 2, 16, 256)
        | old_style(1e6, None)
        | {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
        prompt_len=120,
    ),
    GoldenCase(
        "qwen3-sliding",
        QWEN3
        | UNTIED
        | sizes(72, 128, 2, 4, 2, 32, 256)
        | new_style(1e6, DEFAULT)
        | {
            "use_sliding_window": True,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        prompt_len=100,
    ),
)
