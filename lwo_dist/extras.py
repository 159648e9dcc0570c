"""The optional parts of the package: which modules each extra of pyproject.toml installs.

The plugin itself needs torch and pydantic only. A command that needs more checks for it before it
starts, instead of failing at some import in the middle of a run.
"""

from __future__ import annotations

import importlib.util

from .errors import UserError

__all__ = ["EXTRAS", "missing", "require"]

# What the package imports of each extra. `ray[train,default]` is more than `ray`: aiohttp_cors
# comes with its extra `default`, tensorboardX with `train`.
EXTRAS: dict[str, tuple[str, ...]] = {
    "run": (
        "accelerate",
        "bm25s",
        "datasets",
        "datasketch",
        "matplotlib",
        "numpy",
        "obstore",
        "psutil",
        "pyarrow",
        "pynvml",
        "rapidfuzz",
        "sacrebleu",
        "safetensors",
        "tokenizers",
        "transformers",
        "yaml",
    ),
    "ray": ("ray", "aiohttp_cors", "tensorboardX", "yaml"),
    "mlflow": ("mlflow", "matplotlib", "numpy", "yaml"),
    "deepspeed": ("deepspeed",),
    "lora": ("peft",),
    "gguf": ("gguf",),
    "code": (
        "tree_sitter",
        "tree_sitter_c",
        "tree_sitter_cpp",
        "tree_sitter_go",
        "tree_sitter_java",
        "tree_sitter_javascript",
        "tree_sitter_python",
        "tree_sitter_rust",
        "tree_sitter_typescript",
    ),
}


def require(*extras: str, what: str, otherwise: str = "") -> None:
    """Check that the packages of `extras` are installed; nothing is imported.

    Args:
        what: what needs them, for the message: a command or a setting.
        otherwise: how to do without them, for the end of the message.

    Raises:
        UserError: some are not installed. For example: lwo-dist train needs packages that are not
            installed (transformers, ray): pip install 'lwo-dist[run,ray]'
    """
    absent = {extra: missing(extra) for extra in extras}
    wanted = [extra for extra in extras if absent[extra]]
    if not wanted:
        return
    modules = dict.fromkeys(module for extra in wanted for module in absent[extra])
    remedy = f"pip install 'lwo-dist[{','.join(wanted)}]'"
    if otherwise:
        remedy += f", or {otherwise}"
    raise UserError(
        f"{what} needs packages that are not installed ({', '.join(modules)}): {remedy}"
    )


def missing(extra: str) -> list[str]:
    """The modules of `extra` that cannot be imported here."""
    return [module for module in EXTRAS[extra] if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    # A folder in the current directory that is called `datasets` or `ray` is found as a namespace
    # package, which has no origin.
    return spec is not None and spec.origin is not None
