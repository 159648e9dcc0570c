"""What `inactive_master: discard` costs: bf16 storage, the masters parked or rounded away at the
end of each visit.

    python tests/benchmarks/rounding.py [--lr 1e-4 1e-5 3e-6] [--json FILE]

A small model of bytes learns the standard library's text, then LWO tunes it on the source of one
package, three cycles of ten steps a layer; the loss is that of held-out files of the package. One
process, on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

import lwo_dist
from lwo_dist import distributed
from lwo_dist.strategies.fsdp.builder import shard_model

LENGTH, BATCH = 128, 16
STEPS_PER_LAYER, CYCLES = 10, 3
PACKAGE = "email"


def read(paths: list[Path]) -> Tensor:
    """The files' bytes, one after the other."""
    return torch.tensor(list(b"\n".join(path.read_bytes() for path in paths)))


def batch(text: Tensor, seed: int, size: int = BATCH) -> Tensor:
    starts = torch.randint(
        len(text) - LENGTH, (size,), generator=torch.Generator().manual_seed(seed)
    )
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def pretrain(text: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=LENGTH,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        loss_of(model, batch(text, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.to(torch.bfloat16)


def tune(
    base: nn.Module, text: Tensor, held_out: Tensor, lr: float, inactive_master: str
) -> dict[str, Any]:
    model = copy.deepcopy(base)
    shard_model(model, precision="bf16", device_type="cpu")
    config = lwo_dist.LWOConfig(
        lr=lr, steps_per_layer=STEPS_PER_LAYER, inactive_master=inactive_master
    )  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        lwo = lwo_dist.attach(model, config)
    layers = list(lwo.layers)
    start = {name: tensor for layer in layers for name, tensor in lwo.read_layer(layer).items()}
    before = evaluate(model, held_out)
    for step in range(CYCLES * STEPS_PER_LAYER * len(layers)):
        lwo.backward(loss_of(model, batch(text, 10**6 + step)))
        lwo.step()
    end = {name: tensor for layer in layers for name, tensor in lwo.read_layer(layer).items()}
    lwo.flush()
    still = sum(int((start[name] == end[name]).sum()) for name in start) / sum(
        t.numel() for t in start.values()
    )
    after = evaluate(model, held_out)
    return {
        "lr": lr,
        "inactive_master": inactive_master,
        "loss_before": before,
        "loss_after": after,
        "reduction": before - after,
        "unchanged_share": still,
        "warning": str(said[-1].message) if said else None,
    }


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor) -> float:
    return sum(float(loss_of(model, batch(text, seed, 64))) for seed in range(4)) / 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 1e-5, 3e-6])
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--json", type=Path, help="write what is printed here too")
    options = parser.parse_args(arguments)
    distributed.init_process_group(300)
    library = Path(sysconfig.get_path("stdlib"))
    general = [path for path in sorted(library.glob("*.py")) if path.stem != PACKAGE]
    package = sorted((library / PACKAGE).rglob("*.py"))
    held_out, tuned = read(package[::4]), read([path for i, path in enumerate(package) if i % 4])
    base = pretrain(read(general), options.pretrain_steps)
    rows = []
    print(f"{'':8}  {'':11}  {'reduced by':>17}  {'weights that end as they began':>30}")
    print(
        f"{'lr':>8}  {'loss before':>11}  {'host':>8} {'discard':>8}  {'host':>21} {'discard':>8}"
    )
    for lr in options.lr:
        host, discard = (tune(base, tuned, held_out, lr, master) for master in ("host", "discard"))
        rows += [host, discard]
        print(
            f"{lr:8.0e}  {host['loss_before']:11.4f}  {host['reduction']:8.4f}"
            f" {discard['reduction']:8.4f}  {host['unchanged_share']:21.1%}"
            f" {discard['unchanged_share']:8.1%}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"cases": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
