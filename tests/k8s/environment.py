"""A container's environment as a kubelet makes it: the image's, envFrom, env, and $(NAME) in values
and commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from .manifests import Object

if TYPE_CHECKING:
    from .pods import Pod

__all__ = ["environment_of", "expand"]


def environment_of(pod: Pod, container: Object, of_image: Mapping[str, str]) -> dict[str, str]:
    own: dict[str, str] = {}
    for source in container.get("envFrom", []):
        own |= _secret(pod, source["secretRef"])
    for entry in container.get("env", []):
        for value in _values(pod, entry):
            own[entry["name"]] = expand(value, own) if "value" in entry else value
    return {**of_image, "HOSTNAME": pod.name, **own}


def _values(pod: Pod, entry: Object) -> Iterator[str]:
    """The entry's value, or nothing where it may be absent and is."""
    source = entry.get("valueFrom")
    if source is None:
        yield entry.get("value", "")
    elif "secretKeyRef" in source:
        secret, key = _secret(pod, source["secretKeyRef"]), source["secretKeyRef"]["key"]
        if key in secret or not source["secretKeyRef"].get("optional"):
            yield secret[key]
    else:
        yield _field(pod, source["fieldRef"]["fieldPath"])


def _secret(pod: Pod, reference: Object) -> Mapping[str, str]:
    name = reference["name"]
    if name not in pod.kubelet.secrets and not reference.get("optional"):
        raise RuntimeError(f"{pod.name}: there is no Secret {name}: CreateContainerConfigError")
    return pod.kubelet.secrets.get(name, {})


def _field(pod: Pod, path: str) -> str:
    if match := re.fullmatch(r"metadata\.labels\['(.+)'\]", path):
        return pod.labels.get(match[1], "")
    return {"metadata.name": pod.name, "metadata.namespace": pod.thing["metadata"]["namespace"]}[
        path
    ]


def expand(text: str, known: Mapping[str, str]) -> str:
    """$(NAME) is the variable's value if there is one, $$ a dollar."""
    return re.sub(
        r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)",
        lambda match: "$" if match[1] is None else known.get(match[1], match[0]),
        text,
    )
