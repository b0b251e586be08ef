"""The decoder that Qwen3, Qwen2 and Llama share; what a model_type adds is in its Family (engine/config.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.attention_choice import AttentionChoice
from engine.config import ModelConfig
from engine.device import Device
from engine.files.checkpoint import Checkpoint
from engine.layer import Layer
from engine.ops.add_rmsnorm import AddRMSNorm
from engine.ops.all_gather import AllGather
from engine.ops.all_reduce import AllReduce
from engine.ops.attention import KINDS
from engine.ops.embedding import Embedding
from engine.ops.kv_store import KVStore, Pages
from engine.ops.logits import Logits
from engine.ops.matmul import Linear
from engine.ops.receive import Receive
from engine.ops.rmsnorm import RMSNorm
from engine.ops.rope import RoPE
from engine.ops.rope_angles import RoPEAngles
from engine.ops.send import Send
from engine.ops.swiglu import SwiGLU
from engine.plan import Tensor
from engine.ranks.split import ALL_LAYERS, WHOLE, Split, Stage
from engine.step import Step


@dataclass
class Parts:
    """What every layer of a model is built from."""

    config: ModelConfig
    checkpoint: Checkpoint
    dtype: str
    attention: AttentionChoice
    device: Device
    split: Split
    heads: Split  # may be split where nothing else is

    def norm(self, name: str, width: int, in_place: bool = False) -> RMSNorm:
        weight = self.checkpoint.take(f"{name}.weight", (width,))
        return RMSNorm(weight, self.config.rms_norm_eps, name, self.device, in_place)

    def add_norm(self, name: str, width: int) -> AddRMSNorm:
        weight = self.checkpoint.take(f"{name}.weight", (width,))
        return AddRMSNorm(weight, self.config.rms_norm_eps, name, self.device)

    def into_parts(
        self, split: Split, prefix: str, outputs: dict[str, int], unit: int, inputs: int, bias: bool
    ) -> Linear:
        """One Linear of several stacked projections: name -> outputs, in units of so many. Of each, a rank makes its
        part."""
        weights = [self.checkpoint.take(f"{prefix}.{name}.weight", (n * unit, inputs)) for name, n in outputs.items()]
        biases = [self.checkpoint.take(f"{prefix}.{name}.bias", (n * unit,)) for name, n in outputs.items() if bias]
        weights, biases = ([split.outputs(source, unit) for source in each] for each in (weights, biases))
        return Linear(weights, biases, self.dtype, f"{prefix}.{'|'.join(outputs)}", self.device)

    def out_of_parts(self, name: str, outputs: int, inputs: int, unit: int, bias: bool) -> Linear:
        """A Linear of which a rank has the inputs that it has made. What it gives is to be summed over all ranks."""
        weight = self.split.inputs(self.checkpoint.take(f"{name}.weight", (outputs, inputs * unit)), unit)
        biases = [self.checkpoint.take(f"{name}.bias", (outputs,))] if bias else []
        return Linear([weight], self.split.once(biases), self.dtype, name, self.device)

    def all_reduce(self, name: str) -> AllReduce:
        return AllReduce(self.split, f"{name}.all_reduce", self.device)

    def all_gather(self, name: str) -> AllGather:
        """Of the heads, where what comes after them is not split as they are."""
        return AllGather(WHOLE if self.split == self.heads else self.heads, f"{name}.all_gather", self.device)


class Angles(NamedTuple):
    """What the rows of a step are rotated by. A key is cached rotated at its own position and never touched again, so
    what a sink sees from behind a window is a query of its own, rotated by no more than sinks and window are long."""

    own: Tensor
    from_sinks: Tensor | None  # where a layer has sinks


class SelfAttention(Layer):
    """q, k, v of the input; norms of the heads where the model has them; rotation; cache; attention; output. A rank has
    some of the heads."""

    def __init__(self, parts: Parts, name: str, index: int) -> None:
        super().__init__(name, parts.device)
        config, own_window = parts.config, parts.config.sliding_windows[index]
        head_dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        own_heads, own_kv_heads = len(parts.heads.part(heads)), len(parts.heads.part(kv_heads))
        self.q_width, self.kv_width = own_heads * head_dim, own_kv_heads * head_dim
        self.qkv = parts.into_parts(parts.heads, name, {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads},
                                    head_dim, config.hidden_size, config.qkv_bias)  # fmt: skip
        self.q_norm = parts.norm(f"{name}.q_norm", head_dim, in_place=True) if config.qk_norm else None
        self.k_norm = parts.norm(f"{name}.k_norm", head_dim, in_place=True) if config.qk_norm else None
        self.rope = RoPE(f"{name}.rope", parts.device, in_place=True)
        self.sink_rope = RoPE(f"{name}.sink_rope", parts.device)
        self.store = KVStore(f"{name}.kv_store", parts.device)
        self.attention = KINDS[parts.attention.kind](
            own_heads, name=f"{name}.attention", device=parts.device,
            **parts.attention.layer_options(own_window),
        )  # fmt: skip
        self.all_gather = parts.all_gather(name)
        self.output = parts.out_of_parts(f"{name}.o_proj", config.hidden_size, heads, head_dim, config.o_bias)
        self.all_reduce = parts.all_reduce(name)

    def record(self, x: Tensor, angles: Angles, pages: Pages, step: dict[str, Tensor]) -> Tensor:
        qkv = self.qkv.forward(x)  # [rows, q | k | v]
        q, k = qkv.columns(0, self.q_width), qkv.columns(self.q_width, self.q_width + self.kv_width)
        v = qkv.columns(self.q_width + self.kv_width, qkv.width)
        if self.q_norm and self.k_norm:
            self.q_norm.forward(q)
            self.k_norm.forward(k)
        q_sink = self.sink_rope.forward(q, angles.from_sinks) if self.attention.sink else None
        self.rope.forward(qkv.columns(0, self.q_width + self.kv_width), angles.own)
        where = step["pos"], step["seq"], pages.page_table
        self.store.forward(k, v, pages.kv, *where, pages.ring)
        attended = self.attention.forward(q, pages.kv, *where, q_sink, pages.ring)
        return self.all_reduce.forward(self.output.forward(self.all_gather.forward(attended)))


class MLP(Layer):
    """down(silu(gate · x) · (up · x)). A rank has some of the neurons."""

    def __init__(self, parts: Parts, name: str) -> None:
        super().__init__(name, parts.device)
        hidden, width, bias = parts.config.hidden_size, parts.config.intermediate_size, parts.config.mlp_bias
        self.gate_up = parts.into_parts(parts.split, name, {"gate_proj": width, "up_proj": width}, 1, hidden, bias)
        self.swiglu = SwiGLU(f"{name}.swiglu", parts.device)
        self.down = parts.out_of_parts(f"{name}.down_proj", hidden, width, 1, bias)
        self.all_reduce = parts.all_reduce(name)

    def record(self, x: Tensor) -> Tensor:
        return self.all_reduce.forward(self.down.forward(self.swiglu.forward(self.gate_up.forward(x))))


class Block(Layer):
    """One layer of the decoder. The MLP's output is added by the norm that comes next, the next block's or the
    model's last. begins: none comes before it, or only in a stage before."""

    def __init__(self, parts: Parts, index: int, begins: bool) -> None:
        super().__init__(f"model.layers.{index}", parts.device)
        hidden = parts.config.hidden_size
        make_norm = parts.norm if begins else parts.add_norm
        self.input_norm: Layer = make_norm(f"{self.name}.input_layernorm", hidden)
        self.attention = SelfAttention(parts, f"{self.name}.self_attn", index)
        self.mlp_norm = parts.add_norm(f"{self.name}.post_attention_layernorm", hidden)
        self.mlp = MLP(parts, f"{self.name}.mlp")

    def record(
        self, x: Tensor, pending: list[Tensor], angles: Angles, pages: Pages, step: dict[str, Tensor]
    ) -> Tensor:
        normed = self.input_norm.forward(x, *pending)
        attended = self.attention.forward(normed, angles, pages, step)
        return self.mlp.forward(self.mlp_norm.forward(x, attended))


class Decoder(Layer):
    """Embedding, blocks, norm and logits of a checkpoint. Takes its tensors from the checkpoint by their Hugging Face
    names and checks their shapes; reads no data until a device loads `weights()`. heads: those to hold; split:
    the part to hold of everything else; stage: the layers to hold. All tensors are taken whatever the stage, so that a
    checkpoint is refused by every rank or by none."""

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, dtype: str, attention: AttentionChoice, device: Device,
        split: Split = WHOLE, heads: Split = WHOLE, stage: Stage = ALL_LAYERS,
    ) -> None:  # fmt: skip
        super().__init__("model", device)
        self.config = config
        parts = Parts(config, checkpoint, dtype, attention, device, split, heads)
        table_shape = (config.vocab_size, config.hidden_size)
        embedding = Embedding(checkpoint.take("model.embed_tokens.weight", table_shape), dtype,
                              "model.embed_tokens", device, split)  # fmt: skip
        self.table_dtype = embedding.table.dtype
        self.embedding: Any = embedding if stage.is_first else Receive(config.hidden_size, "model.receive", device)
        rotation = config.rope.inv_freq(config.head_dim), config.rope.attention_scaling()
        self.angles = RoPEAngles(*rotation, "model.rope", device)
        self.sink_angles = None
        if any(attention.policy(own).sink for own in config.sliding_windows):
            self.sink_angles = RoPEAngles(*rotation, "model.sink_rope", device, attention.last_sink_pos)
        self.layers = stage.layers(config.num_hidden_layers)
        blocks = [Block(parts, i, begins=i == self.layers.start) for i in range(config.num_hidden_layers)]
        self.blocks = [blocks[i] for i in self.layers]
        norm = parts.add_norm("model.norm", config.hidden_size)
        if config.tie_word_embeddings:
            checkpoint.finish(ignore=["lm_head.weight"])
            head = embedding.table
        else:
            head = Embedding(checkpoint.take("lm_head.weight", table_shape), dtype, "lm_head", device, split).table
            checkpoint.finish()
        logits = Logits(head, "lm_head", device, split, config.vocab_size)
        self.norm = norm if stage.is_last else None
        self.logits = logits if stage.is_last else None
        self.send = Send("model.send", device)

    def record(self, step: Step, cache: Sequence[Pages]) -> Tensor:
        """Records a stage over the pages of each of its layers. Returns the logits [logit rows, vocab_size] of the last
        stage, the rows [rows, hidden] that another sends on."""
        inputs = step.tensors
        x = self.embedding.forward(inputs["token"])
        from_sinks = self.sink_angles.forward(inputs["pos"]) if self.sink_angles else None
        angles = Angles(self.angles.forward(inputs["pos"]), from_sinks)
        pending: list[Tensor] = []  # what the next norm adds to x
        for block, pages in zip(self.blocks, cache, strict=True):
            pending = [block.forward(x, pending, angles, pages, inputs)]
        if self.norm is None or self.logits is None:
            return self.send.forward(x, *pending)
        return self.logits.forward(self.norm.forward(x, *pending), inputs["row_index"])
