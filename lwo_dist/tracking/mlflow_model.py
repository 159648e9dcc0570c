"""The exported folder as an MLflow model, with no weight loaded and none copied but into the store."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["log_model"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_REQUIRED = ("accelerate", "safetensors", "tokenizers", "torch", "transformers")


def log_model(client: Any, run_id: str, folder: Path, fields: Mapping[str, Any]) -> None:
    """Log `folder` as the model of run `run_id`, and register it where `register_as` says so.

    Harmless to repeat: what an earlier call left unfinished is finished.
    """
    from mlflow.entities import LoggedModelOutput

    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=1)
    model = found[0] if found else client.create_logged_model(experiment, fields["name"], run_id, model_type="llm")
    if model.status != "READY":
        _upload(client, run_id, model.model_id, folder)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=fields["step"])])
        client.finalize_logged_model(model.model_id, "READY")
    if fields["register_as"]:
        _register(client, run_id, model.model_id, fields["register_as"])


def _upload(client: Any, run_id: str, model_id: str, folder: Path) -> None:
    import mlflow.transformers
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    logging.getLogger("mlflow.transformers").setLevel(logging.ERROR)  # it asks the hub for a card and says it has none
    text = Schema([ColSpec("string")])
    with tempfile.TemporaryDirectory() as name:
        # All but the weights: MLflow would copy those, and a disk that holds them once need not hold them twice.
        light, staged = Path(name) / folder.name, Path(name) / "staged"
        shutil.copytree(folder, light, ignore=lambda _, files: [f for f in files if f.endswith(_WEIGHTS)])
        mlflow.transformers.save_model(
            str(light),
            str(staged),
            task="text-generation",
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            signature=ModelSignature(inputs=text, outputs=text),
            pip_requirements=_requirements(),
        )
        shutil.rmtree(staged / "model")
        client.log_model_artifacts(model_id, str(staged))
    client.log_model_artifacts(model_id, str(folder), "model")


def _register(client: Any, run_id: str, model_id: str, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    if not any(version.run_id == run_id for version in versions):
        client.create_model_version(name, f"models:/{model_id}", run_id, await_creation_for=0, model_id=model_id)


def _requirements() -> list[str]:
    # Without what a build adds, such as +cpu: a package index knows the version alone.
    return [f"{package}=={importlib.metadata.version(package).partition('+')[0]}" for package in _REQUIRED]
