"""Layer-wise optimisation of a DeepSpeed engine, ZeRO stage 3.

    torchrun --master-port 29500 --nproc-per-node 2 launch/examples/deepspeed_loop.py

The same command with more --steps goes on from --checkpoint.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from common import SEQUENCES, batches, load, read_arguments, report, resume, save, start

import lwo_dist


def main() -> None:
    arguments = read_arguments(__doc__)
    device = start()
    model, tokens = load(arguments.model)
    config = lwo_dist.LWOConfig(lr=1e-3, steps_per_layer=2, state="keep")
    parameters = lwo_dist.prepare(model, config)  # freezes all but the layer that is trained first
    import deepspeed  # after `prepare`, which chooses the CPU where there is no GPU

    deepspeed.init_distributed(dist_init_required=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        optimizer=torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay),
        config={
            "train_micro_batch_size_per_gpu": SEQUENCES,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": device.type == "cuda"},
            "steps_per_print": 2**31,
        },
        dist_init_required=False,
    )
    lwo = lwo_dist.attach(engine, config)
    resume(lwo, arguments.checkpoint)
    for batch in batches(tokens, device, lwo.step_count, arguments.steps):
        loss = lwo.model(input_ids=batch, labels=batch).loss
        lwo.backward(loss)
        done = lwo.step()
        report(lwo.step_count, loss, done.layer)
    save(lwo, arguments.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
