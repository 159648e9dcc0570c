"""What every group of settings has in common: frozen pydantic models that know no other keys.

Field descriptions are the documentation: the table of all settings is made from them, and an error
message ends in the description of the field that it is about.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Settings"]


class Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,  # it may hold a password
    )
