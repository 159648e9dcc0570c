"""Passages of the training files, in the tokens of a model."""

from __future__ import annotations

from lwo_dist.config import Config
from lwo_dist.data.comments import comment_mark
from lwo_dist.data.examples import LineTokenizer
from lwo_dist.data.retrieval import Retriever, passages_of, query_of
from lwo_dist.data.source_tree import SourceTree, source_text

__all__ = ["Passages"]


class Passages:
    """The tokens of passages that resemble the end of a text, the best one last."""

    def __init__(self, source: SourceTree, tokenize: LineTokenizer, config: Config):
        self.room = (config.train.sequence_length - config.eval.max_new_tokens) // 2
        self._k = config.data.retrieval
        self._tokenize = tokenize
        self._retriever = Retriever(
            [
                passage
                for file in source.train
                for passage in passages_of(file.name, source_text(file))
            ],
            lambda passage: passage.text,
        )

    def __call__(self, before: str, name: str | None) -> list[int]:
        """As many whole lines of the best passages as fit in `room`, none of the file `name`."""
        line_end = self._tokenize("\n", "x").tokens
        pieces: list[list[int]] = []
        left = self.room
        found = self._retriever.nearest(query_of(before), self._k, lambda each: each.name == name)
        for passage in found:
            header = f"{comment_mark(passage.name)} {passage.name}\n"
            tokenized = self._tokenize(header + passage.text)
            fitting = [edge for edge in tokenized.edges if edge <= left - len(line_end)]
            if len(fitting) < 3:  # no line of it after the header
                break
            piece = tokenized.tokens[: fitting[-1]]
            if not self._tokenize.texts[piece[-1]].endswith("\n"):
                piece = [*piece, *line_end]
            pieces.append(piece)
            left -= len(piece)
        return [token for piece in reversed(pieces) for token in piece]
