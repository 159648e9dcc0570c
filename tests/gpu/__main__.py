"""What only a GPU tells, in a process of its own: `python -m tests.gpu [--json FILE]`.

Needs torch, pydantic and transformers; what needs more is skipped, with the reason. Without a GPU
the checks that work on a CPU run there, under gloo.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lwo_dist
from lwo_dist.hook import LWO
from lwo_dist.layers import find_layers
from lwo_dist.orthogonal import orthogonalise
from lwo_dist.strategies.fsdp.builder import shard_model
from lwo_dist.strategies.parks import HostParks
from lwo_dist.training.watchdog import Watchdog
from tests import oracle

RECIPE = oracle.Recipe(steps=14, steps_per_layer=2, max_grad_norm=0.5)
BOUND = 1e-9  # float64; the GPU sums in another order than the CPU
BOUND_OF_WEIGHTS = 1e-6
"""After 14 steps. The norms compute in float32: now and then a sum in another order is rounded to
another number, and AdamW turns any gradient into a step of about `lr`. An H200 differs by 4e-8; a
missing step would by 3e-4."""
BOUND_OF_DIRECTIONS = 1e-5
"""`orthogonalise` makes the small parts of a gradient up to 19 times larger, and with them the
rounding errors of the norms. A step moves a weight by about 3e-4."""


class SkipError(Exception):
    """Why a check cannot run here."""


def check_oracle(device: torch.device, strategy: str, *, keep: bool) -> str:
    """Equal to the plain loop, which runs on the CPU."""
    state = "keep" if keep else "reset"
    lwo = _attach(_model(strategy, torch.float64, device), state=state)
    losses = [_step(lwo, step, device) for step in range(RECIPE.steps)]
    model = oracle.tiny_model(tied=False, dtype=torch.float64)
    layers = [layer.parameter_names for layer in find_layers(model)]
    expected = oracle.train(model, layers, RECIPE, keep=keep)
    _equal(torch.tensor(losses), torch.tensor(expected), "losses")
    weights = _weights(lwo)
    for name, parameter in model.named_parameters():
        _equal(weights[name], parameter.detach(), name, BOUND_OF_WEIGHTS)
    return f"{RECIPE.steps} steps, 2 cycles"


def check_suffix_backward(device: torch.device, strategy: str) -> str:
    """The same as on the CPU in its own choice of sublayers, which both make from one state."""
    here = _attach(_model(strategy, torch.float64, device), suffix_backward=0.5)
    there = _attach(oracle.tiny_model(tied=False, dtype=torch.float64), suffix_backward=0.5)
    _step(here, 0, device)
    _step(there, 0, torch.device("cpu"))
    there.load_state_dict({**here.state_dict()})
    dropped = 0
    for step in range(1, RECIPE.steps):
        dropped += len(here._suffix._dropped)
        loss = _step(here, step, device)
        _equal(
            torch.tensor(loss), torch.tensor(_step(there, step, torch.device("cpu"))), "the loss"
        )
    _require(dropped > 10, f"{dropped} sublayers were dropped")
    return f"{dropped} sublayers dropped"


def check_stateless(device: torch.device, strategy: str) -> str:
    """Every matrix moves in every step, as on the CPU; the embedding with its own moments."""
    settings = {"stateless": "all", "embeddings": "always", "state": "keep", "order": "random"}
    here = _attach(_model(strategy, torch.float64, device), **settings)
    there = _attach(oracle.tiny_model(tied=False, dtype=torch.float64), **settings)
    for step in range(RECIPE.steps):
        loss = _step(here, step, device)
        expected = _step(there, step, torch.device("cpu"))
        _equal(torch.tensor(loss), torch.tensor(expected), "the loss", BOUND_OF_WEIGHTS)
    expected_weights = _weights(there)
    for name, weight in _weights(here).items():
        _equal(weight, expected_weights[name], name, BOUND_OF_DIRECTIONS)
    return f"{len(here.visit.stateless)} layers beside the active one"


def check_orthogonalise(device: torch.device) -> str:
    """In bf16, a matrix of rank one, whose singular value is 1, does not grow."""
    _require_gpu(device)
    torch.manual_seed(0)
    matrices = torch.randn(50, 30, 1) @ torch.randn(50, 1, 20)
    found = orthogonalise(matrices.to(device)).cpu()
    largest = float(torch.linalg.svdvals(found).max())
    _require(0.7 < largest < 1.5, f"a singular value of 1 became {largest:.2f}")
    return f"the largest singular value is {largest:.2f}"


def _keep_busy(device: torch.device) -> None:
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy / 64


def check_parks(device: torch.device) -> str:
    """Pinned on the host, copied ahead on a stream of their own, bit for bit what they were."""
    _require_gpu(device)
    parks = HostParks()
    tensors = {"a": torch.randn(1 << 22, device=device), "step": torch.tensor(3.0)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for ahead in (False, True):
        source = {name: tensor.clone() for name, tensor in before.items()}
        _keep_busy(device)
        parks.put("layer", source)
        _require(not parks._arriving["layer"].query(), "put waited for the device")
        source["a"].zero_()
        if ahead:
            parks.prefetch("layer", device)
            _require(parks._stream != torch.cuda.current_stream(device), "no stream of its own")
        else:
            found = parks.get("layer")
            _require(all(t.is_pinned() for t in found.values()), "the park is not pinned")
            _require(torch.equal(found["a"], before["a"].cpu()), "it was read too early")
        taken = parks.take("layer", device)
        for name, tensor in before.items():
            _require(torch.equal(taken[name], tensor.to(device)), f"{name} has changed")
        _require(parks.nbytes == 0, "the park is still there")
    return f"{tensors['a'].nbytes >> 20} MiB"


def check_bf16_storage(device: torch.device) -> str:
    """Masters of fp32 come back bit for bit from bf16 weights and parked bits."""
    model = oracle.tiny_model(tied=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    shard_model(model.to(device), precision="bf16", device_type=device.type)
    lwo = _attach(model)
    before: dict[str, Tensor] = {}
    for step in range(RECIPE.steps):
        layer = lwo.active_layer
        _step(lwo, step, device)
        if lwo.active_layer is not layer:
            before |= lwo.read_layer(layer)
    now = _weights(lwo)
    own = dict(model.named_parameters())
    trained = {name for name in before if name not in lwo.visit.parameter_names}
    rounded = 0
    for name in trained:
        _require(own[name].dtype == torch.bfloat16, f"{name} is stored in {own[name].dtype}")
        _require(torch.equal(now[name], before[name]), f"the master of {name} has changed")
        rounded += int((now[name] != now[name].bfloat16()).sum())
    _require(rounded > 0, "no master has more bits than its weight")
    return f"{rounded} masters with more bits than bf16"


def check_watchdog(device: torch.device) -> str:
    """It ends a process that a kernel keeps waiting."""
    _require_gpu(device)
    ended: list[int] = []
    with Watchdog(1.0, end=ended.append) as watchdog:
        watchdog.beat(0, "layer")
        busy = torch.randn(8192, 8192, device=device)
        until = time.monotonic() + 60
        while not ended and time.monotonic() < until:
            for _ in range(50):
                busy = busy @ busy / 90
            torch.cuda.synchronize(device)
    _require(ended == [1], "it did not end the process")
    return "ended after 1.5 s without a beat"


def check_nvml(device: torch.device) -> str:
    _require_gpu(device)
    for module in ("psutil", "pynvml"):
        if importlib.util.find_spec(module) is None:
            raise SkipError(f"{module} is not installed")
    from lwo_dist.training.system_metrics import SystemMetrics

    system = SystemMetrics(device, ".", interval_s=0.1)
    time.sleep(1.0)
    metrics = system.metrics([system.read()])
    found = {name.rpartition("/")[2]: value for name, value in metrics.items() if "gpu" in name}
    _require("gpu_0_memory_usage_megabytes" in found, f"NVML tells {sorted(found)}")
    return ", ".join(f"{name} {value:.0f}" for name, value in found.items())


CHECKS: dict[str, Callable[[torch.device], str]] = {
    **{
        f"oracle, {strategy}, state: {'keep' if keep else 'reset'}": (
            lambda device, strategy=strategy, keep=keep: check_oracle(device, strategy, keep=keep)
        )
        for strategy in ("replicate", "fsdp")
        for keep in (False, True)
    },
    "suffix_backward, replicate": lambda device: check_suffix_backward(device, "replicate"),
    "suffix_backward, fsdp": lambda device: check_suffix_backward(device, "fsdp"),
    "stateless, replicate": lambda device: check_stateless(device, "replicate"),
    "stateless, fsdp": lambda device: check_stateless(device, "fsdp"),
    "orthogonalise in bf16": check_orthogonalise,
    "parks": check_parks,
    "bf16 storage": check_bf16_storage,
    "watchdog": check_watchdog,
    "NVML": check_nvml,
}


def _model(strategy: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    model = oracle.tiny_model(tied=False, dtype=dtype).to(device)
    if strategy == "fsdp":
        shard_model(model, precision="fp32", device_type=device.type)
    return model


def _attach(model: nn.Module, **config: Any) -> LWO:
    settings = lwo_dist.LWOConfig(
        lr=RECIPE.lr,
        eps=RECIPE.eps,
        weight_decay=0.01,
        max_grad_norm=RECIPE.max_grad_norm,
        steps_per_layer=RECIPE.steps_per_layer,
        **config,
    )
    return lwo_dist.attach(model, settings)


def _step(lwo: LWO, step: int, device: torch.device) -> float:
    tokens, labels = (tensor.to(device) for tensor in oracle.global_batch(step))
    loss = oracle.loss_sum(lwo.model, tokens, labels) / (labels[:, 1:] != -100).sum()
    lwo.backward(loss)
    lwo.step()
    return loss.item()


def _weights(lwo: LWO) -> dict[str, Tensor]:
    layers = [layer for layer in [*lwo.layers, lwo.rest] if layer.parameter_names]
    return {name: tensor for layer in layers for name, tensor in lwo.read_layer(layer).items()}


def _equal(found: Tensor, expected: Tensor, what: str, bound: float = BOUND) -> None:
    difference = float((found.double().cpu() - expected.double()).abs().max())
    _require(difference < bound, f"{what} differ by {difference:.1e}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise SkipError("no GPU")


def run(name: str, device: torch.device) -> dict[str, Any]:
    """The outcome of a check: ok, skipped or failed, and what it says."""
    started = time.perf_counter()
    try:
        said, outcome = CHECKS[name](device), "ok"
    except SkipError as reason:
        said, outcome = str(reason), "skipped"
    except Exception:
        said, outcome = traceback.format_exc(), "failed"
    seconds = round(time.perf_counter() - started, 2)
    return {"check": name, "outcome": outcome, "said": said, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    name = torch.cuda.get_device_name() if on_gpu else "no GPU: on the CPU what works there"
    print(f"{name}; torch {torch.__version__}", flush=True)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=0,
            world_size=1,
            device_id=device if on_gpu else None,
        )
        for check in CHECKS:
            outcome = run(check, device)
            print("{outcome:8} {check} ({seconds} s): {said}".format(**outcome), flush=True)
            outcomes.append(outcome)
        dist.destroy_process_group()
    if arguments.json:
        found = {"device": name, "torch": torch.__version__, "checks": outcomes}
        arguments.json.write_text(json.dumps(found, indent=1))
    return any(outcome["outcome"] == "failed" for outcome in outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
