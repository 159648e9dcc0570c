"""The rules that launch/Dockerfile keeps, each shown to bite on a broken copy. Building it is not part of this."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = (REPOSITORY / "launch" / "Dockerfile").read_text()

Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """(keyword, arguments) in order, continued lines joined, comments gone."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


def stages(text: str) -> list[list[Instruction]]:
    """The instructions of each stage, FROM first; what stands before the first FROM is left out."""
    found: list[list[Instruction]] = []
    for instruction in instructions(text):
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def more_than_one_stage(text: str) -> Iterator[str]:
    if len(stages(text)) < 2:
        yield "one stage only: its tools stay in the image"


def base_is_pinned(text: str) -> Iterator[str]:
    defaults = dict(words.split("=", 1) for word, words in instructions(text) if word == "ARG" and "=" in words)
    for stage in stages(text):
        image = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), stage[0][1].split(" ")[0])
        if not re.search(r":\d+\.\d+\.\d+[-\w]*$|@sha256:[0-9a-f]{64}$", image):
            yield f"{image}: no full version and no digest"


def no_compiler_in_the_last_stage(text: str) -> Iterator[str]:
    for word, words in stages(text)[-1]:
        for tool in re.findall(r"\b(gcc|g\+\+|clang|make|cmake|build-essential|[\w-]+-dev|nvcc)(?!\w)", words):
            if word == "RUN":
                yield f"{tool} in the last stage"


def runs_as_nobody_special(text: str) -> Iterator[str]:
    users = [words for word, words in stages(text)[-1] if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield "the last USER must be a number other than 0, with its group: Kubernetes checks no names"
    manifest = yaml.safe_load((REPOSITORY / "k8s" / "base" / "ray-job.yaml").read_text())
    context = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    if users and users[-1] != f"{context['runAsUser']}:{context['runAsGroup']}":
        yield "another user than the manifests'"


def python_packages_are_pinned(text: str) -> Iterator[str]:
    for word, words in instructions(text):
        installs = [part for part in re.split(r"&&|;;|\|\|", words) if "pip install" in part]
        if word == "RUN" and any("--constraint launch/constraints.txt" not in part for part in installs):
            yield "pip install without the pins of launch/constraints.txt"


def nothing_from_elsewhere(text: str) -> Iterator[str]:
    for word, words in instructions(text):
        if word == "ADD" or re.search(r"(curl|wget)\s[^|]*https?://|\|\s*(ba)?sh\b", words):
            yield "fetched without a pin"


def no_secrets(text: str) -> Iterator[str]:
    for word, words in instructions(text):
        if word in ("ARG", "ENV") and re.search(r"token|secret|passw|_key", words, re.IGNORECASE):
            yield f"{word} {words}: stays in the image's history"


def writes_only_below_tmp(text: str) -> Iterator[str]:
    words = " ".join(words for word, words in stages(text)[-1] if word == "ENV")
    for setting in ("HOME=/tmp", "PYTHONDONTWRITEBYTECODE=1"):
        if setting not in words.split():
            yield f"no {setting}: something would write to the read-only root"


def copies_code_only(text: str) -> Iterator[str]:
    allowed = {"launch/constraints.txt", "pyproject.toml", "README.md", "LICENSE", "lwo_dist"}
    for word, words in instructions(text):
        if word == "COPY" and not words.startswith("--from=build ") and not set(words.split(" ")[:-1]) <= allowed:
            yield f"COPY {words}"


def package_lists_are_removed(text: str) -> Iterator[str]:
    for word, words in instructions(text):
        tidy = "--no-install-recommends" in words and "rm -rf /var/lib/apt/lists/*" in words
        if word == "RUN" and "apt-get install" in words and not tidy:
            yield "apt-get install leaves more than was asked for"


RULES: dict[str, Callable[[str], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (
        more_than_one_stage,
        base_is_pinned,
        no_compiler_in_the_last_stage,
        runs_as_nobody_special,
        python_packages_are_pinned,
        nothing_from_elsewhere,
        no_secrets,
        writes_only_below_tmp,
        copies_code_only,
        package_lists_are_removed,
    )
}

BROKEN = [
    ("more_than_one_stage", "", ""),  # cut off before the last FROM
    ("base_is_pinned", "PYTHON=3.12.8-slim-bookworm", "PYTHON=latest"),
    ("base_is_pinned", "PYTHON=3.12.8-slim-bookworm", "PYTHON=3-slim"),
    ("no_compiler_in_the_last_stage", "git tini", "git tini gcc"),
    ("no_compiler_in_the_last_stage", "git tini", "git tini python3-dev"),
    ("runs_as_nobody_special", "USER 1000:1000", "USER lwo"),
    ("runs_as_nobody_special", "USER 1000:1000", "USER 0:0"),
    ("runs_as_nobody_special", "USER 1000:1000", "USER 1001:1001"),
    ("runs_as_nobody_special", "USER 1000:1000", ""),
    ("python_packages_are_pinned", "pip install --constraint launch/constraints.txt torch", "pip install torch"),
    ("nothing_from_elsewhere", "WORKDIR /build", "RUN curl -s https://example.org/x | sh"),
    ("nothing_from_elsewhere", "WORKDIR /build", "ADD https://example.org/x /x"),
    ("no_secrets", "WORKDIR /build", "ARG HF_TOKEN"),
    ("writes_only_below_tmp", "HOME=/tmp", "HOME=/var/lwo"),
    ("copies_code_only", "COPY lwo_dist lwo_dist", "COPY . ."),
    ("package_lists_are_removed", " && rm -rf /var/lib/apt/lists/* \\\n", " \\\n"),
]


def test_the_image_keeps_every_rule() -> None:
    assert {name: found for name, rule in RULES.items() if (found := list(rule(DOCKERFILE)))} == {}


@pytest.mark.parametrize(("rule", "old", "new"), BROKEN)
def test_a_rule_bites(rule: str, old: str, new: str) -> None:
    assert old in DOCKERFILE
    broken = DOCKERFILE.replace(old, new)
    if rule == "more_than_one_stage":
        broken = DOCKERFILE[: DOCKERFILE.rindex("FROM ")]
    assert list(RULES[rule](broken)) != []


def test_every_rule_is_shown_to_bite() -> None:
    assert {rule for rule, _, _ in BROKEN} == RULES.keys()


def test_the_manifests_find_what_they_name() -> None:
    smoke = yaml.safe_load((REPOSITORY / "k8s" / "overlays" / "cpu-smoke" / "config.yaml").read_text())
    assert f" {smoke['data']['source']}\n" in DOCKERFILE
    (tag,) = set(re.findall(r"lwo-dist:(\S+-cpu)\b", DOCKERFILE))
    assert f"newTag: {tag}" in (REPOSITORY / "k8s" / "base" / "kustomization.yaml").read_text()
