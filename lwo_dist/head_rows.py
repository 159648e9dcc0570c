"""The head learns only from tokens that the step's batches hold (`lwo.head_rows: batch`).

The head has a row for each token. The gradient of the row of a token that is in no batch is small,
and a step against it always makes the token less likely. AdamW divides by the gradient's size, so
it moves such a row as far as any other, and tokens that a step does not show become less likely for
good. Here those rows have a gradient of 0 instead.

The tokens are those of all ranks and of all micro-batches of a step: how its sequences are divided
does not change the update.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .handles import remove
from .layers import Visit
from .names import named_parameters
from .strategies import Strategy
from .strategies.refusals import is_compiled

__all__ = ["HeadRows"]

_TARGETS = ("labels", "shift_labels", "decoder_input_ids")
"""Arguments of a model that hold tokens which its embedding may not be given."""


class HeadRows:
    """Notes the tokens that `module` is given in passes with gradients, until `end`.

    Raises:
        UserError: the model does not say which modules are its embedding and head, no visit trains
            the head with optimizer state, or the embedding is compiled.
    """

    def __init__(self, module: nn.Module, visits: Sequence[Visit], strategy: Strategy):
        embedding = _part(module, "get_input_embeddings")
        head = _part(module, "get_output_embeddings")
        self._rows = {
            name: parameter.shape[0]
            for name, parameter in named_parameters(module).items()
            if any(parameter is own for own in head.parameters(recurse=False))
        }
        self._refuse_untrained(visits)
        if any(is_compiled(part) and embedding in part.modules() for part in module.modules()):
            raise UserError(
                "head_rows: batch cannot be used where the embedding is part of a compiled module,"
                " in which its tokens cannot be noted; compile single layers, or set head_rows: all"
            )
        self._strategy = strategy
        # An encoder-decoder's two stacks have modules of their own with the same matrix.
        matrices = {id(p) for part in (embedding, head) for p in part.parameters()}
        embeddings = [
            part
            for part in module.modules()
            if part is embedding or (isinstance(part, nn.Embedding) and id(part.weight) in matrices)
        ]
        self._size = max(p.shape[0] for part in (*embeddings, head) for p in part.parameters())
        self._seen: Tensor | None = None
        rows = weakref.ref(self)

        def before_embedding(_: nn.Module, args: Any, kwargs: Any) -> None:
            live = rows()
            if live is not None and torch.is_grad_enabled():
                live._note(args[0] if args else next(iter(kwargs.values())))

        def before_model(_: nn.Module, __: Any, kwargs: Any) -> None:
            live = rows()
            if live is None or not torch.is_grad_enabled():
                return
            found = [kwargs[name] for name in _TARGETS if kwargs.get(name) is not None]
            for ids in found:
                live._note(ids)
            if kwargs.get("inputs_embeds") is not None and not found:
                raise RuntimeError(_NO_TOKENS)

        handles = [
            module.register_forward_pre_hook(before_model, with_kwargs=True),
            *(e.register_forward_pre_hook(before_embedding, with_kwargs=True) for e in embeddings),
        ]
        self._end = weakref.finalize(self, remove, handles)

    def take(self, visit: Visit) -> dict[str, Tensor]:
        """For each parameter of the head that `visit` trains, 1 for each row of a token seen since
        the last call, on any rank, and 0 for the others. All ranks call it.

        Raises:
            RuntimeError: no tokens were seen.
        """
        seen = self._seen
        self.forget()
        names = self._of(visit)
        if not names:
            return {}
        if seen is None:
            raise RuntimeError(_NO_TOKENS)
        seen = self._strategy.any_rank(seen)
        return {name: seen[: self._rows[name]] for name in names}

    def forget(self) -> None:
        """Drop the tokens of passes whose gradients no step will use."""
        self._seen = None

    def end(self) -> None:
        self._end()

    def _of(self, visit: Visit) -> list[str]:
        return [name for name in visit.parameter_names if name in self._rows]

    def _note(self, ids: Tensor) -> None:
        if self._seen is None:
            self._seen = torch.zeros(self._size + 1, dtype=torch.uint8, device=ids.device)
        ids = ids.to(self._seen.device).flatten().long()
        # -100 is no token; the last element stands for all such numbers.
        self._seen.index_fill_(0, torch.where(ids < 0, self._size, ids), 1)

    def _refuse_untrained(self, visits: Sequence[Visit]) -> None:
        if not any(self._of(visit) for visit in visits):
            raise UserError(
                "head_rows: batch has no effect, as no step trains the head's own matrix; set"
                " head_rows: all"
            )
        for visit in visits:
            for layer in visit.stateless:
                if not self._rows.keys().isdisjoint(layer.parameter_names):
                    raise UserError(
                        f"head_rows: batch is for AdamW, and {layer.name}, which holds the head, is"
                        " trained without optimizer state; set head_rows: all"
                    )


_NO_TOKENS = (
    "head_rows: batch must know which tokens a step has, and the model was given none; pass"
    " input_ids instead of inputs_embeds, or labels as well, or set head_rows: all"
)


def _part(module: nn.Module, getter: str) -> Any:
    try:
        found = getattr(module, getter, lambda: None)()
    except NotImplementedError:  # from transformers, for a model whose parts it does not know
        found = None
    if found is None:
        raise UserError(
            f"head_rows: batch needs the model's embedding and head, and {type(module).__name__}"
            f" has no {getter}(), or one that gives None; set head_rows: all"
        )
    return found
