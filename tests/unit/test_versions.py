"""The versions that a run records."""

import importlib.metadata
import platform

import pytest

from lwo_dist.versions import version_of, versions


def test_the_version_of_a_package() -> None:
    assert version_of("torch") == importlib.metadata.version("torch")
    assert version_of("lwo-dist-has-no-such-extra") is None


def test_python_comes_first_and_what_is_not_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"torch": "2.11.0", "ray": "3.0"}

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert list(versions().items()) == [("python", platform.python_version()), *installed.items()]
