"""What every section of the config has in common, and the types of its numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.uri import allowed, has_secret, public_address

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Range = tuple[Fraction, Fraction]
Weight = Annotated[float, Field(ge=0, le=1000)]


class Section(BaseModel):
    """A group of fields: unknown keys are refused, numbers are finite, values never change.

    No text holds a key or a password: the config is written into the run folder, into checkpoints
    and to MLflow, and what is typed can be seen in the list of processes and jobs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        several = value.values() if isinstance(value, dict) else value
        for text in (value, *(several if isinstance(value, dict | list | tuple) else ())):
            if isinstance(text, str) and has_secret(text):
                raise ValueError(
                    f"{public_address(text)} was given with what may be a key or password: nothing "
                    f"before the host, and {allowed(text)}; put keys into the environment "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD)"
                )
        return value
