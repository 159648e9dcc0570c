"""The versions of Python, of lwo_dist and of what it runs on."""

from __future__ import annotations

import importlib.metadata
import platform

__all__ = ["version_of", "versions"]

_PACKAGES = ("lwo-dist", "torch", "transformers", "peft", "deepspeed", "ray", "mlflow")


def version_of(package: str) -> str | None:
    """The installed version of `package`, such as `2.11.0+cpu`; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # an extra, or a plain checkout of lwo_dist
        return None


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide what a run computes.

    Packages that are not installed are left out.
    """
    found = {package: version_of(package) for package in _PACKAGES}
    installed = {package: version for package, version in found.items() if version is not None}
    return {"python": platform.python_version(), **installed}
