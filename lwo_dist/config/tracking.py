"""MLflow."""

from __future__ import annotations

from pydantic import Field

from .base import Settings

__all__ = ["TrackingConfig"]


class TrackingConfig(Settings):
    """MLflow."""

    enabled: bool = Field(True, description="log to MLflow")
    uri: str | None = Field(
        None, description="unset: MLFLOW_TRACKING_URI, else sqlite in <storage>/mlflow.db"
    )
    experiment: str = Field("lwo_dist", description="MLflow experiment")
    flush_timeout_s: float = Field(
        30.0, ge=0, description="longest wait at the end for points that are still unsent"
    )
    upload_timeout_s: float = Field(
        600.0, ge=0, description="longest wait at the end, the points sent, for files"
    )
    log_model: bool = Field(True, description="log the exported model as an MLflow model")
    register_as: str | None = Field(None, description="also register that model under this name")
    system_metrics: bool = Field(True, description="log the load of every node and GPU")
