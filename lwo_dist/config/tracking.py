"""MLflow."""

from __future__ import annotations

from pydantic import Field

from .base import Settings

__all__ = ["NO_PASSWORD", "TrackingConfig"]

NO_PASSWORD = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment instead, or the"
    " whole URL in MLFLOW_TRACKING_URI"
)
"""What to do about a password in `uri`."""


class TrackingConfig(Settings):
    """MLflow."""

    enabled: bool = Field(True, description="log to MLflow")
    uri: str | None = Field(
        None, description="unset: MLFLOW_TRACKING_URI, else sqlite in <storage>/mlflow.db"
    )
    experiment: str = Field("lwo_dist", description="MLflow experiment")
    parent_run_id: str | None = Field(
        None, description="MLflow run to nest this one under; compare sets it"
    )
    flush_timeout_s: float = Field(
        30.0, ge=0, description="longest wait at the end for points that are still unsent"
    )
    upload_timeout_s: float = Field(
        600.0, ge=0, description="longest wait at the end, the points sent, for files"
    )
    log_model: bool = Field(True, description="log the exported model as an MLflow model")
    register_as: str | None = Field(None, description="also register that model under this name")
    log_completions: bool = Field(
        True,
        description=(
            "include source lines and completions in the report, MLflow and evaluations/; false:"
            " scores only"
        ),
    )
    system_metrics: bool = Field(True, description="log the load of every node and GPU")
