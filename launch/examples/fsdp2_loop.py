"""Layer-wise optimisation of a model that is sharded by FSDP2, with your own accumulation and
learning-rate schedule.

    torchrun --master-port 29500 --nproc-per-node 2 launch/examples/fsdp2_loop.py

The same command with more --steps goes on from --checkpoint.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from common import batches, load, read_arguments, report, resume, save, start
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lwo_dist

MICRO_BATCHES = 2


def learning_rate(step: int) -> float:
    return 1e-3 * min(1.0, (step + 1) / 10)


def main() -> None:
    arguments = read_arguments(__doc__)
    device = start()
    model, tokens = load(arguments.model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if device.type == "cuda":  # compute in bf16; the shards stay fp32, and so do the sums
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    lwo = lwo_dist.attach(model, lwo_dist.LWOConfig(steps_per_layer=2, state="keep"))
    resume(lwo, arguments.checkpoint)
    for batch in batches(tokens, device, lwo.step_count, arguments.steps):
        step = lwo.step_count
        total = torch.zeros((), device=device)
        for i, micro_batch in enumerate(batch.chunk(MICRO_BATCHES)):
            loss = lwo.model(input_ids=micro_batch, labels=micro_batch).loss / MICRO_BATCHES
            total += loss.detach()
            lwo.backward(loss, boundary=i == MICRO_BATCHES - 1)
            done = lwo.step(lr=learning_rate(step))  # updates at the boundary
        report(lwo.step_count, total, done.layer)
    save(lwo, arguments.checkpoint)
    lwo.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
