"""What every group of settings has in common: frozen pydantic models that know no other keys.

Field descriptions are the documentation: the table of all settings is made from them, and an error
message ends in the description of the field that it is about.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lwo_dist.errors import UserError

from .refusals import one_line

__all__ = ["Settings"]


class Settings(BaseModel):
    """A group of settings.

    Raises:
        UserError: an unknown name or a wrong value, in one line.

    Example:
        >>> from lwo_dist import LWOConfig
        >>> LWOConfig(betas=(1.0, 0.9))
        Traceback (most recent call last):
        lwo_dist.errors.UserError: betas (1.0, 0.9) must lie in [0, 1)
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
