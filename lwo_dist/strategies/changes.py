"""Whether a model still has the parameters that a hook was attached to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lwo_dist.names import clean_name

__all__ = ["KnownParameters", "changed"]


class KnownParameters:
    """The parameters of a model, under all their names, when it was attached."""

    def __init__(self, model: nn.Module):
        self._model = model
        named = model.named_parameters(remove_duplicate=False)
        self._known = {clean_name(name): (name.split("."), parameter) for name, parameter in named}

    def refuse_replaced(self, names: Iterable[str]) -> None:
        """Raise RuntimeError if the model has another parameter under one of these names."""
        for name in names:
            path, known = self._known[name]
            if self._find(path) is not known:
                self._refuse_other(name, known)

    def _refuse_other(self, name: str, known: nn.Parameter) -> None:
        """Let a module around it pass, such as that of `torch.compile(layer)`."""
        for other, parameter in self._model.named_parameters(remove_duplicate=False):
            if clean_name(other) == name and parameter is known:
                self._known[name] = other.split("."), known
                return
        raise changed(f"{name} was replaced")

    def refuse_any_change(self) -> None:
        """Raise RuntimeError if a parameter was replaced, added or removed."""
        self.refuse_replaced(self._known)
        for name, _ in self._model.named_parameters(remove_duplicate=False):
            if clean_name(name) not in self._known:
                raise changed(f"{name} was added")

    def _find(self, path: list[str]) -> nn.Parameter | None:
        module: nn.Module | None = self._model
        for part in path[:-1]:
            module = module._modules.get(part) if module is not None else None
        return module._parameters.get(path[-1]) if module is not None else None


def changed(what: str) -> RuntimeError:
    """The error for a model that changed under the hook. `what` happened to which parameter."""
    return RuntimeError(
        f"the model changed after attach: {what}, and would not be trained; move, resize, wrap,"
        " extend or load it (assign=True) before attach, or detach first and attach again;"
        " lwo.write_layer sets weights in place"
    )
