"""What MLflow gets of a spool's points and parameters: names, units, and what is left out."""

from __future__ import annotations

from lwo_dist.config import Config, LWOConfig, TrainConfig
from lwo_dist.run_info import run_parameters
from lwo_dist.spool import Point
from lwo_dist.tracking.shown import shown_parameters, shown_points

from .test_run_info import make_info


def shown(**values: float) -> dict[str, float]:
    points = [Point(name.replace("__", "/"), value, 5, 1000) for name, value in values.items()]
    found = shown_points(points)
    assert all((point.step, point.time_ms) == (5, 1000) for point in found)
    return {point.name: point.value for point in found}


def test_memory_is_shown_in_gigabytes_among_the_system_metrics() -> None:
    assert shown(memory__peak_bytes=1_213_804_544, memory__optimizer_state_bytes=5e8) == {
        "system/peak_memory_GB": 1.213804544,
        "system/optimizer_state_GB": 0.5,
    }


def test_constants_and_details_stay_in_the_spool() -> None:
    assert not shown(
        memory__parameter_bytes=1,
        memory__ranks__peak_bytes_0=1,
        comm__bytes_per_step=1,
        checkpoint__bytes=1,
        time__step_seconds=1,
        lwo__active_layer=1,
        visit__seconds=1,
    )


def test_what_did_not_happen_is_not_shown() -> None:
    nothing = {"train__skipped_steps": 0.0, "run__attempt": 1.0, "time__lost_seconds": 0.0}
    assert not shown(**nothing)
    assert shown(**dict.fromkeys(nothing, 2.0)) == {
        "update/skipped_steps": 2.0,
        "system/attempt": 2.0,
        "system/lost_seconds": 2.0,
    }


def test_scores_losses_and_names_of_others_stay_as_they_are() -> None:
    values = {"eval__loss": 1.0, "eval__tests_passed": 2.0, "train__loss": 3.0, "mine__x": 0.0}
    assert shown(**values) == {k.replace("__", "/"): value for k, value in values.items()}


def test_no_parameter_is_empty_repeated_or_of_the_machine() -> None:
    config = Config(run_name="r", lwo=LWOConfig(lr=1e-3, max_steps=1000, seed=0))
    config = config.model_copy(update={"train": TrainConfig(steps=1000)})
    data = {"windows": 7, "held_out_lines": 5, "held_out_lines_asked": 9, "skipped": {}}
    parameters = shown_parameters(run_parameters(make_info(config, data=data)))
    assert not {"", "null", "{}", "[]"} & set(parameters.values())
    left_out = "tracking. checkpoint. cluster. access storage run_name host data.cache"
    assert not [name for name in parameters if name.startswith(tuple(left_out.split()))]
    assert not {"lwo.seed", "lwo.max_steps", "data.held_out_lines_asked"} & parameters.keys()
    kept = {"lwo.lr": "0.001", "lwo.betas": "0.9, 0.999", "seed": "0", "data.windows": "7"}
    assert kept.items() <= parameters.items()


def test_a_setting_that_differs_from_the_one_it_follows_is_shown() -> None:
    assert shown_parameters({"seed": "0", "lwo.seed": "3"}) == {"seed": "0", "lwo.seed": "3"}


def test_two_runs_differ_in_what_was_changed_alone() -> None:
    one, other = (
        shown_parameters(run_parameters(make_info(Config(lwo=LWOConfig(lr=lr)), host=host)))
        for lr, host in ((1e-3, "a"), (1e-4, "b"))
    )
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == ["lwo.lr"]


def test_a_list_is_on_one_line_and_other_text_as_it_is() -> None:
    values = {"a": '[".py", ".rs"]', "b": "[broken", "c": "x, y"}
    assert shown_parameters(values) == {"a": ".py, .rs", "b": "[broken", "c": "x, y"}
