"""What the loops here share: a model, a text, batches of it, and a checkpoint."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import lwo_dist

LENGTH = 128  # tokens of a sequence
SEQUENCES = 4  # on each rank, per step


def read_arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="id or folder of a decoder; default: a tiny random one")
    parser.add_argument("--steps", type=int, default=40, help="where to stop")
    parser.add_argument("--checkpoint", type=Path, default=Path("lwo_checkpoint.pt"))
    return parser.parse_args()


def start() -> torch.device:
    """Join the ranks of torchrun; without it, be the only rank."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def load(name: str | None) -> tuple[nn.Module, Tensor]:
    """A model in fp32, the same on every rank, and the tokens of a text: this folder's sources."""
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
    if name is not None:
        tokens = AutoTokenizer.from_pretrained(name)(text)["input_ids"]
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), torch.tensor(tokens)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    return model, torch.tensor(list(text.encode()))


def batches(tokens: Tensor, device: torch.device, first: int, end: int) -> Iterator[Tensor]:
    """This rank's [SEQUENCES, LENGTH] tokens of the steps from `first` to `end`."""
    for step in range(first, end):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        starts = torch.randint(len(tokens) - LENGTH, (SEQUENCES,), generator=generator)
        yield torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()]).to(device)


def save(lwo: lwo_dist.LWO, path: Path) -> None:
    """Write weights, moments and position. All ranks call it: reading a layer gathers it."""
    weights = {}
    for layer in [*lwo.layers, lwo.rest]:
        weights |= lwo.read_layer(layer)
    state = lwo.state_dict()
    if dist.get_rank() == 0:
        partial = path.with_suffix(".partial")
        torch.save({"weights": weights, "lwo": state}, partial)
        partial.replace(path)
    dist.barrier()


def resume(lwo: lwo_dist.LWO, path: Path) -> None:
    """Go on from `path`, if it is there; it may come from another strategy or world size."""
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        lwo.write_layer(saved["weights"])
        lwo.load_state_dict(saved["lwo"])


def report(step: int, loss: Tensor, layer: str) -> None:
    """Print the mean loss of all ranks."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        print(f"step {step}  loss {mean.item() / dist.get_world_size():.6f}  {layer}", flush=True)
