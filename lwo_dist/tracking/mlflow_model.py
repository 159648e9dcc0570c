"""Log an exported folder as an MLflow model. Weights are neither loaded nor copied, only
uploaded.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lwo_dist.versions import version_of

from .description import is_encoder_decoder

__all__ = ["log_model"]

_REQUIRED = ("accelerate", "mlflow", "safetensors", "tokenizers", "torch", "transformers")


def log_model(client: Any, run_id: str, folder: Path, fields: Mapping[str, Any]) -> None:
    """Log `folder` as the model of run `run_id`, and register it if `register_as` is set.

    Repeating a call does no harm: it finishes what the earlier one left unfinished.
    """
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    found = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=1)
    model = (
        found[0]
        if found
        else client.create_logged_model(
            experiment, fields["name"], run_id, params=run.data.params, model_type="llm"
        )
    )
    if model.status != "READY":
        _upload(client, run_id, model.model_id, folder)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=fields["step"] or 0)])
        _log_scores(client, run, model.model_id, fields["step"])
        client.finalize_logged_model(model.model_id, "READY")
    if fields["register_as"]:
        _register(client, run_id, model, fields["register_as"])


def _log_scores(client: Any, run: Any, model_id: str, step: int | None) -> None:
    """Log the run's scores at `step` as those of the model, on the dataset of the run."""
    from mlflow.entities import Metric

    datasets = [used.dataset for used in run.inputs.dataset_inputs]
    dataset = datasets[0] if datasets else None
    scores = [
        Metric(
            point.key,
            point.value,
            point.timestamp,
            point.step,
            model_id=model_id,
            dataset_name=dataset and dataset.name,
            dataset_digest=dataset and dataset.digest,
            run_id=run.info.run_id,
        )
        for name in run.data.metrics
        if name.startswith("eval/")
        for point in client.get_metric_history(run.info.run_id, name)
        if point.step == step
    ]
    if scores:
        client.log_batch(run.info.run_id, metrics=scores)


def _upload(client: Any, run_id: str, model_id: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        described = Path(name)
        _describe(run_id, model_id, folder, described)
        client.log_model_artifacts(model_id, str(described))
    client.log_model_artifacts(model_id, str(folder), "model")


def _describe(run_id: str, model_id: str, folder: Path, target: Path) -> None:
    """Write all of an MLflow model of the transformers flavour to `target` but its weights.

    `mlflow.transformers.save_model` would hold a second copy of them on disk, and its way to save a
    folder without loading it fails with transformers 5 (seen with MLflow 3.17 and transformers
    5.23). transformers 5 has no pipeline for an encoder-decoder, whose parts alone can be loaded.
    """
    import transformers
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(target / "components" / "tokenizer")
    encodes = is_encoder_decoder(folder)
    text = Schema([ColSpec("string")])
    model = Model(
        run_id=run_id, model_id=model_id, signature=ModelSignature(inputs=text, outputs=text)
    )
    model.add_flavor(
        "transformers",
        transformers_version=transformers.__version__,
        task="text2text-generation" if encodes else "text-generation",
        instance_type="Text2TextGenerationPipeline" if encodes else "TextGenerationPipeline",
        pipeline_model_type=json.loads((folder / "config.json").read_text())["architectures"][0],
        source_model_name=folder.parent.name,
        model_binary="model",
        components=["tokenizer"],
        tokenizer_type=type(tokenizer).__name__,
    )
    if not encodes:
        pyfunc.add_to_model(
            model, loader_module="mlflow.transformers", python_env="python_env.yaml"
        )
    model.model_size_bytes = sum(
        file.stat().st_size for file in folder.rglob("*") if file.is_file()
    )
    model.save(str(target / "MLmodel"))
    requirements = [_requirement(package) for package in _REQUIRED]
    (target / "requirements.txt").write_text("\n".join(requirements) + "\n")
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (target / "python_env.yaml").write_text(yaml.safe_dump(environment))


def _requirement(package: str) -> str:
    """`package==version` as a package index knows it: without a build's suffix, such as `+cpu`."""
    version = version_of(package)
    return package if version is None else f"{package}=={version.partition('+')[0]}"


def _register(client: Any, run_id: str, model: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    if not any(version.run_id == run_id for version in versions):
        # By its location: MLflow would look for models:/<id> in the store that this process has
        # set globally.
        client.create_model_version(
            name, model.artifact_location, run_id, await_creation_for=0, model_id=model.model_id
        )
