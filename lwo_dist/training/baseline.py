"""Takes over the untuned model's scores from another run of the same comparison."""

from __future__ import annotations

from lwo_dist import distributed
from lwo_dist.checkpoint.schema import read_json
from lwo_dist.config import Config
from lwo_dist.data import PreparedData
from lwo_dist.errors import DamagedError, UserError
from lwo_dist.storage import RunFolder

from .results import Results

__all__ = ["take_baseline"]

_SCORES = "evaluations/step_000000.json"


def take_baseline(config: Config, data: PreparedData, results: Results) -> None:
    """Set the evaluation of step 0 to that of the finished run `eval.baseline`. A collective.

    Raises:
        UserError: on all ranks. There is no such run, it has not finished, or it scored another
            model or other examples.
    """
    name = str(config.eval.baseline)
    record = distributed.on_rank_0(_read, config, data, name)
    results.take_evaluation(0, record)


def _read(config: Config, data: PreparedData, name: str) -> dict[str, object]:
    run_folder = RunFolder(config.storage, name)
    try:
        run_folder.fetch_small()
        summary = read_json(run_folder.file("summary.json"))
        record: dict[str, object] = read_json(run_folder.file(_SCORES))
        if not {"scores", "cost"} <= record.keys():
            raise DamagedError(f"{_SCORES} was written by an older lwo_dist")
        found = {"model": summary["base_model"], "examples": summary["fingerprint"]}
    except (DamagedError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"eval.baseline = {name}: {run_folder} has no scores of an untuned model ({error});"
            " give a finished run, or leave it unset"
        ) from None
    own = {"model": config.model.name, "examples": data.fingerprint}
    for what, value in own.items():
        if found[what] != value:
            raise UserError(
                f"eval.baseline = {name}: it scored other {what} ({found[what]}, not {value}); give"
                " a run with the same ones, or leave it unset"
            )
    return record
