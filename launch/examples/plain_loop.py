"""Layer-wise optimisation of a plain module: every rank holds the whole model.

    python launch/examples/plain_loop.py
    torchrun --master-port 29500 --nproc-per-node 2 launch/examples/plain_loop.py

The same command with more --steps goes on from --checkpoint.
"""

from __future__ import annotations

import torch.distributed as dist
from common import batches, load, read_arguments, report, resume, save, start

import lwo_dist


def main() -> None:
    arguments = read_arguments(__doc__)
    device = start()
    model, tokens = load(arguments.model)
    model.to(device)
    lwo = lwo_dist.attach(model, lwo_dist.LWOConfig(lr=1e-3, steps_per_layer=2, state="keep"))
    resume(lwo, arguments.checkpoint)
    for batch in batches(tokens, device, lwo.step_count, arguments.steps):
        loss = lwo.model(input_ids=batch, labels=batch).loss
        lwo.backward(loss)
        done = lwo.step()
        report(lwo.step_count, loss, done.layer)
    save(lwo, arguments.checkpoint)
    lwo.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
