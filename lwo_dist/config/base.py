"""What every group of settings has in common: frozen pydantic models that know no other keys.

Field descriptions are the documentation: the table of all settings is made from them, and an error
message ends in the description of the field that it is about.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lwo_dist.errors import UserError

__all__ = ["MAX_SHOWN", "Settings", "one_line"]

MAX_SHOWN = 200
"""Characters of a value that a message shows."""


class Settings(BaseModel):
    """A group of settings.

    Raises:
        UserError: an unknown name or a wrong value, in one line.

    Example:
        >>> from lwo_dist import LWOConfig
        >>> LWOConfig(lr=0)
        Traceback (most recent call last):
        lwo_dist.errors.UserError: lr = 0: must be greater than 0 (peak learning rate of AdamW)
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,  # it may hold a password
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(one_line(error, type(self))) from None

    # As pydantic's own: a group inside another is checked with it, and its errors keep their path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong with the values of `model`, in one line."""
    first = error.errors()[0]
    location = ".".join(str(part)[:MAX_SHOWN] for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if first["type"] == "value_error":
        return f"{location}: {message}" if location else message
    if first["type"] == "extra_forbidden":
        group: Any = model
        for part in first["loc"][:-1]:
            group = group.model_fields[str(part)].annotation
        near = difflib.get_close_matches(str(first["loc"][-1]), group.model_fields, n=1)
        known = ", ".join(group.model_fields)
        mend = f"did you mean {near[0]}?" if near else f"known here: {known}"
        return f"unknown key {location}; {mend}"
    field: Any = model
    for part in first["loc"]:
        field = getattr(field, "model_fields", {}).get(str(part))
        if field is None:
            break
        description = field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            field = field.annotation
        else:
            return f"{location} = {repr(first['input'])[:MAX_SHOWN]}: {message} ({description})"
    return f"{location} = {repr(first['input'])[:MAX_SHOWN]}: {message}"
