"""The plan as people read it, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lwo_dist.units import human_bytes, human_count

from .estimate import Plan, Plans, Refusal
from .gpus import GPUS, USABLE, UTILISATION, Cluster

__all__ = ["as_json", "lines"]

_GB = 1e9
_COLUMNS = ("weights", "grads", "state", "gathered", "buffers", "activ.", "peak", "host")


def lines(plans: Plans, cluster: Cluster | None) -> Iterator[str]:
    """A page of text; a ">" marks what the config chooses."""
    config, world_size = plans.config, plans.world_size
    train = config.train
    accumulation = config.lwo.gradient_accumulation_steps
    micro = train.global_batch_size // world_size // accumulation
    layers = f", {plans.layers} trained {'layer' if plans.layers == 1 else 'layers'}"
    yield (
        f"{config.model.name}: {human_count(plans.parameters)} parameters"
        f"{layers if plans.layers else ''}"
    )
    if cluster is not None:
        machines = -(-world_size // cluster.per_machine)
        yield (
            f"{world_size:,} ranks on {machines:,} x {cluster.per_machine} {cluster.gpu.name}:"
            f" {cluster.gpu.memory / _GB:.0f} GB and {cluster.gpu.flops / 1e12:.0f} TFLOP/s each"
        )
    else:
        yield f"{world_size:,} {'rank' if world_size == 1 else 'ranks'}"
    yield (
        f"a rank's micro-batch: {micro} x {train.sequence_length:,} tokens, {accumulation} a step;"
        f" {'bf16' if plans.bf16 else 'fp32'};"
        f" activations {'recomputed' if train.gradient_checkpointing else 'kept'}"
    )
    yield ""
    yield "GB of a rank at the worst moment of a step"
    head = "  method  strategy  " + "".join(f"{name:>9}" for name in _COLUMNS)
    head += "   step, s  sent, GB   fits" if cluster else "   sent, GB   fits"
    yield head
    notes = []
    for plan in plans.rows:
        if isinstance(plan, Refusal):
            notes.append(f"{plan.method} with {plan.name}: {plan.why}")
            continue
        mark = ">" if (plan.method, plan.name) == plans.own else " "
        peak = plan.peak
        parts = (
            peak.weights,
            peak.gradients,
            peak.optimizer_state,
            peak.gathered,
            peak.buffers,
            peak.activations,
            peak.total,
            plan.host_bytes,
        )
        name = f"zero {plan.stage}" if plan.stage else plan.strategy
        row = f"{mark} {plan.method:<8}{name:<10}"
        row += "".join(f"{_gigabytes(part):>9}" for part in parts)
        if cluster is not None:
            computing, sending = plan.seconds(cluster)
            row += f"{_step(plan, computing, sending):>10.3g}"
        row += f"{_gigabytes(plan.bytes_sent):>10}"
        yield row + f"   {_fits(plan, cluster)}"
    yield ""
    yield from (f"not possible: {note}" for note in notes)
    yield from _explanations(plans, cluster)


def _explanations(plans: Plans, cluster: Cluster | None) -> Iterator[str]:
    yield "weights, grads, state: exact. gathered, buffers, activ. (activations, logits and"
    yield "  temporaries): from a rehearsal of the model's own operations. host: at most."
    yield "sent: each tensor of a collective counted whole, a cycle's mean."
    if cluster is not None:
        yield (
            f"step: an estimate: counted FLOPs at {UTILISATION:.0%} of the data sheet's, and links"
            f" of {cluster.rate / _GB:.0f} GB/s."
        )
        yield (
            f"fits: at most {USABLE:.0%} of {cluster.gpu.memory / _GB:.0f} GB; CUDA, NCCL and"
            " fragmentation take the rest."
        )
    for plan in plans.rows:
        if isinstance(plan, Refusal) or (plan.method, plan.name) != plans.own:
            continue
        yield ""
        yield f"> this config: {plan.method} with {plan.name}; worst in visits of {plan.visit}"
        yield (
            f"  checkpoints: {human_bytes(plan.whole_checkpoint_bytes)} the first time, then up to"
            f" {human_bytes(plan.checkpoint_bytes)} for each visit since"
        )


def _gigabytes(size: float) -> str:
    value = size / _GB
    if value == 0:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 0.05 else "<0.1"


def _step(plan: Plan, computing: float, sending: float) -> float:
    """What gathers weights does so while it computes; gradients come after backward."""
    overlaps = plan.strategy == "fsdp" or plan.stage == 3
    return max(computing, sending) if overlaps else computing + sending


def _fits(plan: Plan, cluster: Cluster | None) -> str:
    if cluster is not None:
        return "yes" if plan.peak.total <= USABLE * cluster.gpu.memory else "no"
    smallest = [gpu for gpu in GPUS.values() if plan.peak.total <= USABLE * gpu.memory]
    return min(smallest, key=lambda gpu: gpu.memory).name if smallest else "no GPU in the table"


def as_json(plans: Plans, values: dict[str, Any], cluster: Cluster | None) -> dict[str, Any]:
    """Everything, in bytes and seconds.

    Args:
        values: the config without secrets.
    """
    rows = []
    for plan in plans.rows:
        if isinstance(plan, Refusal):
            rows.append({"method": plan.method, "strategy": plan.name, "refused": plan.why})
            continue
        row = asdict(plan) | {
            "strategy": plan.name,
            "chosen": (plan.method, plan.name) == plans.own,
            "peak_bytes": plan.peak.total,
        }
        if cluster is not None:
            computing, sending = plan.seconds(cluster)
            row |= {
                "compute_seconds": computing,
                "link_seconds": sending,
                "step_seconds": _step(plan, computing, sending),
                "fits": plan.peak.total <= USABLE * cluster.gpu.memory,
            }
        rows.append(row)
    gpu = None if cluster is None else asdict(cluster.gpu) | {"per_machine": cluster.per_machine}
    return {"world_size": plans.world_size, "gpu": gpu, "plans": rows, "config": values}
