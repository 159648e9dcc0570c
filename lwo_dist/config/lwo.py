"""The settings of the hook: all that a training loop of one's own needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from lwo_dist.errors import UserError

from .base import Settings

__all__ = ["LWOConfig"]


def _default(alone: Any, *, with_stateless: Any) -> Callable[[dict[str, Any]], Any]:
    """A default factory for a setting whose best value depends on `stateless`."""

    def choose(values: dict[str, Any]) -> Any:
        if values.get("stateless", "none") == "none":
            return alone
        # `embeddings` and `head_rows` suit an embedding and a head that are trained.
        trained = values.get("train_embeddings", True) and values.get("train_head", True)
        return with_stateless if trained else alone

    return choose


class LWOConfig(Settings):
    """What the hook needs: the optimizer, the schedule of layers and of the learning rate.

    The defaults suit a pretrained model of a billion parameters and more. Visits of 10 steps reach
    all layers of such a model within 300 steps, and longer ones learned nothing more.
    """

    lr: float | None = Field(
        None,
        gt=0,
        description=("peak learning rate of AdamW; unset: by the method and the model's width"),
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay, on every parameter of the active layer"
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="clip the active layer's gradient norm; 0 turns it off"
    )
    stateless: Literal["none", "suffix", "all"] = Field(
        "none",
        description=(
            "transformer layers updated alongside the active one, by their orthogonalised gradient"
            " and without optimizer state: none, those above it (which backward crosses anyway), or"
            " all; suffix and all change the defaults of steps_per_layer, order, state, embeddings"
            " and head_rows; strategy: fsdp or replicate"
        ),
    )
    steps_per_layer: int = Field(
        default_factory=_default(10, with_stateless=1),
        ge=1,
        description="optimizer steps that a layer stays active; unset: 10, or 1 with stateless",
    )
    order: Literal["ascending", "descending", "random", "weighted"] = Field(
        default_factory=_default("ascending", with_stateless="random"),
        description=(
            "order of the layers; random is reshuffled each cycle, weighted draws by layer_weights;"
            " unset: ascending, or random with stateless"
        ),
    )
    layer_weights: dict[str, float] = Field(
        default_factory=dict,
        description="order: weighted only; layer name -> relative frequency, 1 where unnamed",
    )
    seed: int = Field(
        0, ge=0, description="seed of the random and weighted orders, and of suffix_backward"
    )
    state: Literal["reset", "keep"] = Field(
        default_factory=_default("reset", with_stateless="keep"),
        description=(
            "a layer's moments at a switch: reset drops them, keep parks them for its next visit;"
            " those of embeddings: always go on. Unset: reset, or keep with stateless"
        ),
    )
    inactive_master: Literal["host", "discard"] = Field(
        "host",
        description=(
            "16-bit weights' fp32 masters between visits: host parks them, discard rounds them away"
        ),
    )
    train_embeddings: bool = Field(True, description="make the embedding a trained layer")
    train_head: bool = Field(
        True, description="make the output head, with the final norm, a trained layer"
    )
    layers_per_group: int = Field(
        1, ge=1, description="neighbouring transformer layers trained as one layer"
    )
    embeddings: Literal["visit", "always"] = Field(
        default_factory=_default("visit", with_stateless="always"),
        description=(
            "visit: the embedding and the head have visits of their own; always: they are trained"
            " in every step, beside the active layer; unset: visit, or always with stateless where"
            " both are trained"
        ),
    )
    head_rows: Literal["all", "batch"] = Field(
        default_factory=_default("all", with_stateless="batch"),
        description=(
            "all: every row of the head has a gradient; batch: only the rows of tokens in the"
            " step's batches, so that AdamW does not move the others; unset: all, or batch with"
            " stateless where the embedding and the head are trained; a loop that shifts its"
            " targets itself needs all; strategy: fsdp or replicate"
        ),
    )
    stateless_every: int = Field(
        1,
        ge=1,
        description=(
            "update only every n-th of the layers of stateless in a step, counted from the active"
            " layer; 1: all of them"
        ),
    )
    stateless_update: Literal["step", "backward"] = Field(
        "step",
        description=(
            "when the layers of stateless are updated: all at once; or in the backward pass, each"
            " matrix as soon as it has its gradient, so that those gradients take next to no"
            " memory: strategy: replicate, one process, gradient_accumulation_steps: 1"
        ),
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="micro-batches per optimizer step"
    )
    suffix_backward: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "share of the backward pass above the active layer that is computed (DropBP); below 1"
            " gradients are approximations"
        ),
    )
    lr_scheduler_type: Literal["auto", "constant", "linear", "cosine"] = Field(
        "auto",
        description=(
            "decay after the warm-up; auto: linear where the length of the stretch is known, as it"
            " is in a run, else constant"
        ),
    )
    lr_schedule_over: Literal["run", "cycle", "visit"] = Field(
        "run", description="the stretch that one learning-rate schedule spans"
    )
    warmup_steps: int = Field(
        0, ge=0, description="linear warm-up at the start of each such stretch"
    )
    visit_ramp_steps: int = Field(
        0, ge=0, description="n > 0: the first n steps of a visit run at lr/n, 2 lr/n, ..."
    )
    batches: Literal["fresh", "cycle"] = Field(
        "fresh",
        description=(
            "fresh: new batches at every step; cycle: all layers of a cycle are trained on the same"
            " ones, and the hidden states below the active layer are kept, not computed again"
        ),
    )
    prefix_host_gb: float = Field(
        4.0,
        ge=0,
        description=(
            "batches: cycle only; the most host memory that a worker's hidden states take, in GB"
        ),
    )
    prefix_disk_gb: float = Field(
        16.0,
        ge=0,
        description=(
            "batches: cycle only; the most disk that they take beyond that, in LWO_SCRATCH_DIR or"
            " the temporary folder"
        ),
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        description=(
            "optimizer steps of the run; a decay over the run needs it (a run fills it in)"
        ),
    )

    @property
    def peak_lr(self) -> float:
        """`lr`, once it is known: `attach` sets it where it is unset.

        Raises:
            UserError: it is unset.
        """
        if self.lr is None:
            raise UserError("lr is unset, and there is no model to choose it by; set lr")
        return self.lr

    @model_validator(mode="after")
    def _check(self) -> LWOConfig:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        if self.order == "weighted" and not self.layer_weights:
            raise ValueError(
                "order: weighted needs layer_weights, for example layer_weights: {head: 2.0}"
            )
        if self.order != "weighted" and self.layer_weights:
            raise ValueError(
                f"layer_weights has no effect with order: {self.order}; set order: weighted or"
                " drop it"
            )
        for name, default in (("stateless", "none"), ("embeddings", "visit")):
            value = getattr(self, name)
            if value != default and self.batches == "cycle":
                raise ValueError(
                    f"{name}: {value} cannot be used with batches: cycle, which needs the layers"
                    f" below the active one unchanged; set batches: fresh or {name}: {default}"
                )
        if self.batches == "cycle" and self.order != "ascending":
            raise ValueError(
                f"batches: cycle needs order: ascending, not {self.order}: hidden states are kept"
                " from one layer to the next above it"
            )
        if self.stateless != "none" and self.suffix_backward < 1:
            raise ValueError(
                f"stateless: {self.stateless} needs the gradients that suffix_backward ="
                f" {self.suffix_backward:g} leaves out; set suffix_backward: 1"
            )
        if self.stateless == "none" and self.stateless_every > 1:
            raise ValueError(
                f"stateless_every = {self.stateless_every} has no effect with stateless: none; set"
                " stateless: suffix or all, or drop it"
            )
        if self.stateless_update == "backward" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "stateless_update: backward drops each gradient once it is used, and cannot be used"
                f" with gradient_accumulation_steps = {self.gradient_accumulation_steps}; set it to"
                " 1, or stateless_update: step"
            )
        for name in ("prefix_host_gb", "prefix_disk_gb"):
            value = getattr(self, name)
            if self.batches != "cycle" and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} = {value:g} has no effect with batches: {self.batches}; set batches:"
                    " cycle or drop it"
                )
        if any(w <= 0 for w in self.layer_weights.values()):
            raise ValueError(
                f"layer_weights {self.layer_weights} must be above 0; freeze a layer by other means"
            )
        return self
