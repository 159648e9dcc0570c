"""LoRA: low-rank adapters on frozen linear layers, by peft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from lwo_dist.config import Config, LoRAConfig, LWOConfig
from lwo_dist.errors import DamagedError, UserError, first_line
from lwo_dist.extras import require
from lwo_dist.layers import Layer

from .base import Method, Saved

__all__ = ["LoRA"]

_ADAPTER = "default"
"""peft's name of the only adapter; it is part of the parameters' names."""
_A, _B = (f".lora_{part}.{_ADAPTER}.weight" for part in "AB")


class LoRA(Method):
    """Adapters (Hu et al., 2022) that are all trained at every step; the base model is frozen.

    It is also for models that peft has changed already, in your own loop.
    """

    name = "lora"
    rate_times_width = 1.2  # 2.1e-3 for SmolLM2-135M
    extras = ("lora",)
    own_settings = tuple(f"lora.{name}" for name in LoRAConfig.model_fields)
    changes_model = True
    trains_adapters = True
    drops_trained = True

    def check(self, config: Config) -> None:
        for key, value, default in (
            ("state", config.lwo.state, "reset"),
            ("inactive_master", config.lwo.inactive_master, "host"),
            ("batches", config.lwo.batches, "fresh"),
        ):
            if value != default:
                raise UserError(
                    f"lwo.{key}: {value} has no effect with method: lora, which never switches;"
                    " drop it"
                )

    def prepare(self, model: nn.Module, config: Config) -> None:
        """Add adapters in fp32 to the linear layers.

        Raises:
            UserError: peft is not installed or refuses the model; `target_modules` has a name of
                no linear layer, or of one whose matrix another module shares.
        """
        require(*self.extras, what="method: lora")
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        targets = config.lora.target_modules or _linear_layers(model)
        _check_targets(model, targets)
        settings = _peft_config(config.lora, model)
        settings.target_modules = set(targets)
        try:
            # Without values: peft would move the adapters to the base's device, which may be meta.
            inject_adapter_in_model(settings, model, _ADAPTER, low_cpu_mem_usage=True)
        except Exception as error:
            raise UserError(
                f"method: lora: peft cannot add adapters to {type(model).__name__}"
                f" ({first_line(error)}); name linear layers of it in lora.target_modules, or"
                " use another method"
            ) from error
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if not _is_linear(layer.get_base_layer()):
                raise UserError(
                    f"method: lora: peft adds adapters to {name} too, the fused experts of a"
                    " mixture; name other layers in lora.target_modules, such as those of the"
                    " attention"
                )
            for part in (layer.lora_A, layer.lora_B):
                part.to_empty(device="cpu")
            layer.reset_lora_parameters(_ADAPTER, True)

    def layers(self, model: nn.Module, config: LWOConfig) -> list[Layer]:
        names = tuple(
            name
            for name, _ in model.named_parameters()
            if any(part.startswith("lora_") for part in name.split("."))
        )
        if not names:
            raise UserError(
                f"this {type(model).__name__} has no LoRA adapters; add them before attach, for"
                " example with peft.get_peft_model(model, LoraConfig(...))"
            )
        return [Layer("adapters", names)]

    def export(self, saved: Saved) -> Iterator[tuple[str, Tensor]]:
        """The merged model: W + scaling B A, in fp32; transposed for a Conv1D."""
        scaling = _settings(saved).scaling
        waiting = set(_adapters(saved))
        for name in saved.names:
            if _A in name or _B in name:
                continue
            weight = saved.read(name)
            path = name.removesuffix(".weight")
            if path in waiting:
                waiting.remove(path)
                down, up = saved.read(path + _A).float(), saved.read(path + _B).float()
                if _is_conv1d(saved.model.get_submodule(path)):
                    down, up = up.T, down.T
                rank = down.shape[:1]
                if up.shape + down.shape != weight.shape[:1] + rank + rank + weight.shape[1:]:
                    raise DamagedError(f"the adapter of {path} does not fit its weight")
                weight = weight.float() + scaling * (up @ down)
            yield name, weight
        if waiting:
            raise DamagedError(f"the base model has no {min(waiting)}, which has an adapter")

    def adapter(self, saved: Saved) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For `PeftModel.from_pretrained(base, folder)`."""
        require(*self.extras, what="an adapter folder")
        settings = _settings(saved)
        paths = _adapters(saved)
        tensors = {
            f"base_model.model.{path}.lora_{part}.weight": saved.read(path + name).float()
            for path in paths
            for part, name in (("A", _A), ("B", _B))
        }
        config = _peft_config(settings, saved.model)
        config.target_modules = sorted(settings.target_modules or {_ending(path) for path in paths})
        config.base_model_name_or_path = saved.record["base_model"]
        config.revision = saved.record.get("revision")
        config.inference_mode = True
        return tensors, config.to_dict()


def _peft_config(settings: LoRAConfig, model: nn.Module) -> Any:
    from peft import LoraConfig

    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LoraConfig(
        task_type="SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.use_rslora,
        lora_dropout=settings.dropout,
        fan_in_fan_out=any(map(_is_conv1d, model.modules())),
    )


def _settings(saved: Saved) -> LoRAConfig:
    if saved.record.get("lora") is None:
        raise DamagedError("the checkpoint does not say which rank and scaling its adapters have")
    return LoRAConfig.model_validate(saved.record["lora"])


def _adapters(saved: Saved) -> list[str]:
    """Paths of the linear layers that have an adapter."""
    names = set(saved.names)
    paths = [name.removesuffix(_A) for name in saved.names if name.endswith(_A)]
    if not paths or any(path + _B not in names for path in paths):
        raise DamagedError("the checkpoint does not hold both matrices of each adapter")
    return paths


def _linear_layers(model: nn.Module) -> tuple[str, ...]:
    """Paths of all linear layers but the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return tuple(
        name for name, module in model.named_modules() if _is_linear(module) and module is not head
    )


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Refuse a name of no module, or of one that an adapter does not fit."""
    modules = dict(model.named_modules())
    example = ", ".join(list(dict.fromkeys(map(_ending, _linear_layers(model))))[:4])
    owners = Counter(
        id(parameter)
        for module in modules.values()
        for parameter in module.parameters(recurse=False)
    )
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        problem = "" if found else f"no module of {type(model).__name__} is named {target}"
        for name in found:
            if not _is_linear(modules[name]):
                problem = f"{name} is a {type(modules[name]).__name__}, not a linear layer"
            elif any(owners[id(parameter)] > 1 for parameter in modules[name].parameters()):
                problem = f"{name} shares its matrix with another module, which would change too"
        if problem:
            raise UserError(
                f"lora.target_modules = [{', '.join(targets)}]: {problem}; name linear"
                f" layers, such as {example}"
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is transposed."""
    return type(module).__name__ == "Conv1D"


def _ending(path: str) -> str:
    return path.rpartition(".")[2]
