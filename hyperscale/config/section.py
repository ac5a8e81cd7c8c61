"""The base of every recipe section: frozen, and refusing keys it does not know."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One part of a recipe. Instances cannot be changed; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
