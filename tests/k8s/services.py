"""Services in force, as by kube-proxy and DNS: names in each pod's /etc/hosts, and addresses that
lead to pods.

A Service has an address of its own, on which its ports are open, each leading to its targetPort; a
headless one is a name for its pods' addresses. Of several pods that are ready, the first gets all
connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .manifests import Object

if TYPE_CHECKING:
    from .pods import Pod

__all__ = ["enforce", "names"]


def names(objects: list[Object], pods: list[Pod], net: int) -> str:
    """Lines for /etc/hosts."""
    lines = ""
    for service, own in _services(objects, net):
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        full = f"{name}.{namespace}.svc"
        for address in [own] if own else [pod.address for pod in _behind(service, pods)]:
            lines += f"{address} {full}.cluster.local {full} {name}.{namespace} {name}\n"
    return lines


def enforce(objects: list[Object], pods: list[Pod], net: int) -> None:
    lines = ""
    for service, own in _services(objects, net):
        for pod in _behind(service, pods)[:1] if own else []:
            for port in service["spec"]["ports"]:
                protocol, target = (
                    port.get("protocol", "TCP").lower(),
                    pod.port(port.get("targetPort", port["port"])),
                )
                lines += (
                    f"ip daddr {own} {protocol} dport {port['port']} dnat to"
                    f" {pod.address}:{target}\n"
                )
    rules = (
        "table ip services {}\nflush table ip services\ntable ip services {\n"
        f"chain lead {{\ntype nat hook output priority -100; policy accept;\n{lines}}}\n"
        # Nothing is behind it, or not on that port.
        "chain refuse {\ntype filter hook output priority 10; policy accept;\n"
        f"ip daddr {_addresses(net)}0/24 reject\n}}\n}}\n"
    )
    for pod in pods:
        pod.host.nft(rules)


def _services(objects: list[Object], net: int) -> Iterator[tuple[Object, str | None]]:
    """Each Service and its own address, None if it is headless."""
    services = [thing for thing in objects if thing["kind"] == "Service"]
    for i, service in enumerate(services, start=1):
        yield (
            service,
            None if service["spec"].get("clusterIP") == "None" else f"{_addresses(net)}{i}",
        )


def _addresses(net: int) -> str:
    return f"10.78.{net}."


def _behind(service: Object, pods: list[Pod]) -> list[Pod]:
    selector, early = (
        service["spec"]["selector"].items(),
        service["spec"].get("publishNotReadyAddresses", False),
    )
    return [pod for pod in pods if selector <= pod.labels.items() and (early or pod.ready)]
