"""Layer-wise optimisation in a loop of Hugging Face's accelerate.

    torchrun --master-port 29500 --nproc-per-node 2 launch/examples/accelerate_loop.py

The same command with more --steps goes on from the folder --checkpoint.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from common import LENGTH, SEQUENCES, load, read_arguments
from torch.utils.data import DataLoader

from lwo_dist import LWOConfig
from lwo_dist.integrations.accelerate import prepare


def main() -> None:
    arguments = read_arguments(__doc__)
    # Without cpu=True, accelerate takes several processes on CPUs for runs of their own.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, tokens = load(arguments.model)
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    config = LWOConfig(lr=1e-3, steps_per_layer=2, state="keep")
    model, optimizer, loader = prepare(
        accelerator, model, config, DataLoader(blocks, batch_size=SEQUENCES, drop_last=True)
    )
    lwo = optimizer.lwo
    if arguments.checkpoint.exists():
        accelerator.load_state(str(arguments.checkpoint))
    while lwo.step_count < arguments.steps:
        for batch in accelerator.skip_first_batches(loader, lwo.step_count % len(loader)):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean = accelerator.reduce(loss.detach(), "mean").item()
            accelerator.print(f"step {lwo.step_count}  loss {mean:.6f}  {optimizer.report.layer}")
            if lwo.step_count == arguments.steps:
                break
    accelerator.save_state(str(arguments.checkpoint))
    accelerator.end_training()


if __name__ == "__main__":
    main()
