"""NetworkPolicies in force: each pod's network namespace gets them as rules of nftables.

What no policy selects is open, as in Kubernetes. The node (KubeRay's operator and probes come from
there) gets in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .manifests import Object

if TYPE_CHECKING:
    from .pods import Pod

__all__ = ["enforce", "selects"]

_SIDES = {"Ingress": ("input", "from", "saddr"), "Egress": ("output", "to", "daddr")}


def enforce(objects: list[Object], pods: list[Pod], node: str) -> None:
    policies = [thing["spec"] for thing in objects if thing["kind"] == "NetworkPolicy"]
    for pod in pods:
        rules = "table inet pod {}\nflush table inet pod\ntable inet pod {\n"
        for side, (chain, peers_key, address) in _SIDES.items():
            held = [
                p
                for p in policies
                if side in p["policyTypes"] and selects(p["podSelector"], pod.labels)
            ]
            rules += (
                f"chain {chain} {{\ntype filter hook {chain} priority 0; policy"
                f" {'drop' if held else 'accept'};\n"
            )
            rules += "ct state established,related accept\n"
            rules += (
                'iif "lo" accept\n' + f"ip saddr {node} accept\n"
                if chain == "input"
                else 'oif "lo" accept\n'
            )
            for policy in held:
                for rule in policy.get(side.lower(), []):
                    rules += "".join(_lines(rule, rule.get(peers_key), address, pods))
            rules += "}\n"
        pod.host.nft(rules + "}\n")


def _lines(
    rule: Object, peers: list[Object] | None, address: str, pods: list[Pod]
) -> Iterator[str]:
    addresses = (
        [""]
        if peers is None
        else [line for peer in peers for line in _addresses(peer, address, pods)]
    )
    ports = [
        f"{port.get('protocol', 'TCP').lower()} dport {port['port']}"
        for port in rule.get("ports", [])
    ]
    for line in addresses:
        for port in ports or [""]:
            yield f"{line} {port} accept\n"


def _addresses(peer: Object, address: str, pods: list[Pod]) -> Iterator[str]:
    if (block := peer.get("ipBlock")) is not None:
        out = "".join(
            f" ip {address} != {ipaddress.ip_network(net)}" for net in block.get("except", [])
        )
        yield f"ip {address} {block['cidr']}{out}"
    elif (
        "namespaceSelector" not in peer
    ):  # All pods here are of one namespace, and that is none of the system's.
        chosen = [pod.address for pod in pods if selects(peer["podSelector"], pod.labels)]
        if chosen:
            yield f"ip {address} {{ {', '.join(chosen)} }}"


_OPERATORS: dict[str, Callable[[str | None, list[str]], bool]] = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, _: value is not None,
    "DoesNotExist": lambda value, _: value is None,
}


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector fits; an empty one fits all."""
    expressions = selector.get("matchExpressions", [])
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        _OPERATORS[expression["operator"]](
            labels.get(expression["key"]), expression.get("values", [])
        )
        for expression in expressions
    )
