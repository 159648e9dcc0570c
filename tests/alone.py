"""A training loop of one's own where nothing is installed but lwo_dist, torch and pydantic.

test_alone.py runs this file, in such an environment, as `alone.py MODE`, where MODE is `plain`, or
`fsdp2 RANK WORLD_SIZE FILE` with a file for the ranks to meet at. It prints a line of JSON: the
losses, those of the same training in plain torch, and what lwo_dist tried to import besides.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

NOT_HERE = [
    "accelerate",
    "bm25s",
    "datasets",
    "deepspeed",
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "mlflow",
    "numpy",
    "pandas",
    "peft",
    "psutil",
    "pyarrow",
    "pynvml",
    "rapidfuzz",
    "ray",
    "requests",
    "sacrebleu",
    "safetensors",
    "tokenizers",
    "transformers",
    "yaml",
]
OUR_OWN = {"lwo_dist", "torch", "pydantic"}

STEPS = 40
STEPS_PER_LAYER = 4
LR = 0.01
EPS = 1e-6
LAYERS = [("embed.",), ("blocks.0.",), ("blocks.1.",), ("blocks.2.",), ("norm.", "head.")]


class Recorder:
    """A finder that finds nothing, and keeps the names of the packages that lwo_dist itself looks
    for; what torch tries is torch's.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = name.partition(".")[0]
        known = top in OUR_OWN or top in sys.stdlib_module_names
        if not known and _importer(sys._getframe(1)).partition(".")[0] == "lwo_dist":
            self.names.add(top)
        return None


def _importer(frame: FrameType | None) -> str:
    """The module whose code imports, below the frames of the import system."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("importlib", "_frozen_importlib"):
            return name
        frame = frame.f_back
    return ""


def main(mode: str, *ranks: str) -> None:
    found = [name for name in NOT_HERE if importlib.util.find_spec(name) is not None]
    assert not found, f"this is no environment of the plugin alone: {found}"
    recorder = Recorder()
    sys.meta_path.insert(0, recorder)
    losses = _train(_model(), 0, 1) if mode == "plain" else _train_fsdp2(*ranks)
    result = {"losses": losses, "plain": _train_in_plain_torch(_model())}
    print(json.dumps(result | {"attempted": sorted(recorder.names)}))


def _train_fsdp2(rank: str, world_size: str, file: str) -> list[float]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks, rank_here = int(world_size), int(rank)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank_here, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    model = _model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = _train(model, rank_here, ranks)
    dist.destroy_process_group()
    return losses


def _train(model: Any, rank: int, ranks: int) -> list[float]:
    """The loop of the README, then what else the hook offers. Returns the loss of the whole batch
    at each step.
    """
    import torch.distributed as dist

    import lwo_dist

    config = lwo_dist.LWOConfig(lr=LR, eps=EPS, steps_per_layer=STEPS_PER_LAYER, max_grad_norm=0)
    losses = []
    lwo = lwo_dist.attach(model, config)
    for step in range(STEPS):
        loss = _loss(lwo.model, step, rank, ranks)
        lwo.backward(loss)
        lwo.step()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
    lwo.flush()
    for layer in lwo.layers:
        lwo.write_layer(lwo.read_layer(layer))
    lwo.load_state_dict(lwo.state_dict())
    lwo.memory()
    return losses


def _train_in_plain_torch(model: Any) -> list[float]:
    """The same from the definition: an AdamW for one layer after the other, each with no state."""
    import torch

    losses = []
    for step in range(STEPS):
        if step % STEPS_PER_LAYER == 0:
            prefixes = LAYERS[step // STEPS_PER_LAYER % len(LAYERS)]
            active = [p for name, p in model.named_parameters() if name.startswith(prefixes)]
            optimizer = torch.optim.AdamW(active, lr=LR, eps=EPS, weight_decay=0.0)
        loss = _loss(model, step, 0, 1)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _model() -> Any:
    import torch
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.norm = nn.LayerNorm(16)
            self.head = nn.Linear(16, 32)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            logits: Tensor = self.head(self.norm(x))
            return logits

    torch.manual_seed(0)
    return Model().double()


def _loss(model: Any, step: int, rank: int, ranks: int) -> Any:
    """The mean loss of this rank's part of a batch: which token comes next, by a simple rule."""
    import torch

    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(32, (64,), generator=generator).chunk(ranks)[rank]
    return torch.nn.functional.cross_entropy(model(tokens), (5 * tokens + 3) % 32)


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    main(*sys.argv[2:])
