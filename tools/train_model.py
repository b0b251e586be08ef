"""Train a bundled model on generated stories and chats (needs `torch` and `transformers`).

    python -m tools.train_model --model tiny-qwen3 --steps 4000 --checkpoint DIR --out models/tiny-qwen3

Each worker is one thread and takes its share of a step's rows; gradients meet once a step, so that a busy
machine slows a run down and does not stall it. A run that was interrupted goes on from its last checkpoint
when started again with the same arguments.
`--export` writes the model directory from the last checkpoint without training on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tools.evaluate_model import CONTEXT, count_right_answers, held_out_loss, loss_of
from tools.train_data import ENCODERS, Encoder, pack_rows
from tools.train_tokenizer import TRAINERS
from tools.warm_start import warm_start

# Products in bf16 where the CPU has them; where it has not, they are slower than those in f32.
ARITHMETIC = torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32
STEP_TOKENS = 4096
# Attention over short rows costs less; some long ones then teach recall over the whole context.
ROW_LENGTHS, LATE_ROW_LENGTHS, LATE_SHARE = (512,), (512, 512, 512, CONTEXT), 0.4
FINAL_SHARE, WARM_UP_STEPS = 0.05, 100  # of the learning rate
WEIGHT_DECAY, CLIP_NORM, BETAS = 0.1, 1.0, (0.9, 0.98)
GAIN_RATE = 8  # learning rate of the norms' gains: those on queries and keys bound how sharp attention can be
CHECKPOINT_SECONDS, REPORT_STEPS, EVALUATE_STEPS = 60, 50, 500
EVALUATE_CHATS = 60
SHAPE = {
    "vocab_size": 1536,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 48,
    "max_position_embeddings": CONTEXT,
}


def build_model(name: str) -> torch.nn.Module:
    """A freshly initialised model of three million parameters or a few more."""
    if name == "tiny-qwen3":
        ids = {"bos_token_id": None, "eos_token_id": 1499, "pad_token_id": 1497}
        rope = {"rope_type": "default", "rope_theta": 1e6}
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **ids, tie_word_embeddings=True, rope_parameters=rope))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **ids, tie_word_embeddings=False, rope_parameters=rope))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of a run's `step`-th step: linear warm-up, then a cosine down to a small share of the peak."""
    if step < WARM_UP_STEPS:
        return peak * (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * done)))


def row_length(step: int, steps: int) -> int:
    """Tokens in a row: short ones at first, then a mixture up to the whole context."""
    lengths = ROW_LENGTHS if step < (1 - LATE_SHARE) * steps else LATE_ROW_LENGTHS
    return lengths[step % len(lengths)]


def optimizers_of(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the projections (Jordan et al. 2024), with steps as long as AdamW's, and AdamW for the rest. AdamW for
    all where bf16 is slow, in which Muon makes its matrices orthogonal.

    Each group has its `share` of the learning rate.
    """
    named = list(model.named_parameters())
    projections = [p for n, p in named if p.dim() > 1 and "layers" in n]
    tables = [p for n, p in named if p.dim() > 1 and "layers" not in n]
    gains = [p for _, p in named if p.dim() <= 1]
    projection_group = {"params": projections, "weight_decay": WEIGHT_DECAY, "share": 1.0}
    groups = [
        {"params": tables, "weight_decay": WEIGHT_DECAY, "share": 1.0},
        {"params": gains, "weight_decay": 0.0, "share": GAIN_RATE},
    ]
    if ARITHMETIC == torch.float32:
        return (torch.optim.AdamW([projection_group, *groups], betas=BETAS, fused=True),)
    muon = torch.optim.Muon([projection_group], adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(groups, betas=BETAS, fused=True)


class Training:
    """A model, its optimizer and the step reached, which is also the position in the data.

    Every worker holds the same; worker 0 alone reports and saves.
    """

    def __init__(self, arguments: argparse.Namespace, worker: int = 0) -> None:
        self.name, self.steps, self.directory = arguments.model, arguments.steps, arguments.checkpoint
        self.peak, self.worker, self.workers = arguments.learning_rate, worker, arguments.workers
        self.first = self.step = arguments.first_step
        torch.manual_seed(0)
        self.encoder: Encoder = ENCODERS[self.name](self.directory)
        self.model = build_model(self.name)
        self.model.set_attn_implementation("eager")  # compiled, it is faster than the fused kernel's backward
        self.compiled = torch.compile(self.model, dynamic=False)
        self.optimizers = optimizers_of(self.model)
        self.file = self.directory / "checkpoint.pt"
        if self.file.exists():
            self._restore()

    def _restore(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]

    def save(self) -> None:
        """Write a checkpoint; a reader never sees half of one."""
        partial = self.file.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }
        torch.save(state, partial)
        partial.replace(self.file)

    def run(self) -> None:
        """Train up to the last step."""
        saved = started = time.monotonic()
        losses: list[float] = []
        tokens = 0
        while self.step < self.steps:
            losses.append(self._one_step())
            tokens += STEP_TOKENS
            if self.worker:
                continue
            if self.step % REPORT_STEPS == 0:
                speed = tokens / (time.monotonic() - started)
                self._log(step=self.step, loss=sum(losses) / len(losses), tokens_per_second=round(speed))
                losses = []
            if self.step % EVALUATE_STEPS == 0:
                self._evaluate()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
        if not self.worker:
            self.save()

    def _one_step(self) -> float:
        length = row_length(self.step - self.first, self.steps - self.first)
        count = STEP_TOKENS // length // self.workers
        rows = pack_rows(self.encoder, f"train/{self.step}/{self.worker}", count, length)
        rate = learning_rate(self.step - self.first, self.steps - self.first, self.peak)
        loss = loss_of(self.compiled, rows, ARITHMETIC)
        loss.backward()
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def _average_gradients(self) -> None:
        if self.workers == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients]) / self.workers
        torch.distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _evaluate(self) -> None:
        right, asked = count_right_answers(self.model, self.encoder, EVALUATE_CHATS, ARITHMETIC)
        shares = {category: right[category] / asked[category] for category in sorted(asked)}
        loss = held_out_loss(self.model, self.encoder, ARITHMETIC)
        self._log(step=self.step, held_out_loss=loss, right=right.total() / asked.total(), **shares)

    def _log(self, **values: Any) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
        print(line, flush=True)
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(line + "\n")


def export(training: Training, out: Path) -> None:
    """Write the model directory in Hugging Face format, weights in bf16."""
    partial = out.with_name(out.name + ".partial")
    model = build_model(training.name)
    model.load_state_dict(training.model.state_dict())
    model.to(torch.bfloat16).save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (training.directory / name).exists():
            (partial / name).write_bytes((training.directory / name).read_bytes())
    _write_generation_config(training.name, partial)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        file.chmod(0o644)
        file.replace(out / file.name)
    partial.rmdir()


def _write_generation_config(name: str, directory: Path) -> None:
    config: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    if name == "tiny-qwen3":
        config = {"eos_token_id": [1499, 1497], "pad_token_id": 1497}
    config |= {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.95}
    (directory / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(worker: int, arguments: argparse.Namespace) -> None:
    """What one worker does: train, and for worker 0 export."""
    torch.set_num_threads(1)
    rendezvous = arguments.checkpoint.resolve() / "rendezvous"
    if arguments.workers > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=worker, world_size=arguments.workers
        )
    training = Training(arguments, worker)
    training.run()
    if worker == 0:
        export(training, arguments.out)


def prepare(arguments: argparse.Namespace) -> None:
    """Make the tokenizer and the first checkpoint if they are not there yet."""
    arguments.checkpoint.mkdir(parents=True, exist_ok=True)
    (arguments.checkpoint / "rendezvous").unlink(missing_ok=True)
    if not (arguments.checkpoint / "tokenizer_config.json").exists():
        TRAINERS[arguments.model](arguments.checkpoint)
    training = Training(arguments)
    if arguments.warm_start and not training.file.exists():
        warm_start(training.model, training.encoder, arguments.warm_start)
        training.save()
    print(f"starting at step {training.step}", flush=True)


def main() -> None:
    """Start the workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=TRAINERS, default="tiny-qwen3")
    parser.add_argument("--steps", type=int, default=4000, help="the last step, which is also a position in the data")
    parser.add_argument("--first-step", type=int, default=0, help="where the first run from other weights begins")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="at its peak")
    parser.add_argument(
        "--warm-start", type=Path, help="a directory whose weights to start from: tiny-qwen3, or the model's own"
    )
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2), help="processes of one thread each")
    parser.add_argument(
        "--export", action="store_true", help="only write the directory from the last checkpoint"
    )
    arguments = parser.parse_args()
    if arguments.export:
        export(Training(arguments), arguments.out)
        return
    prepare(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.workers == 1:
        train(0, arguments)
    else:
        torch.multiprocessing.spawn(train, (arguments,), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
