"""The rules that launch/Dockerfile keeps, each shown to bite on a broken copy. test_image_build.py
builds it.
"""

from __future__ import annotations

import fnmatch
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
    return [
        (line.split(" ", 1)[0], line.split(" ", 1)[1])
        for line in joined.splitlines()
        if line.strip()
    ]


def stages(text: str) -> list[list[Instruction]]:
    """The instructions of each stage, FROM first; what stands before the first FROM is left out."""
    found: list[list[Instruction]] = []
    for instruction in instructions(text):
        if instruction[0] == "FROM":
            found.append([])
        if found:
            found[-1].append(instruction)
    return found


def image(text: str) -> list[Instruction]:
    """The instructions whose outcome stays: those of the last stage and of the stages that it
    starts from.
    """
    found: list[Instruction] = []
    parent: str | None = None
    for stage in reversed(stages(text)):
        start, _, name = stage[0][1].partition(" AS ")
        if parent is None or name == parent:
            found = stage[1:] + found
            parent = start
    return found


def more_than_one_stage(text: str) -> Iterator[str]:
    if len(stages(text)) < 2:
        yield "one stage only: its tools stay in the image"


def base_is_pinned(text: str) -> Iterator[str]:
    defaults = dict(
        words.split("=", 1) for word, words in instructions(text) if word == "ARG" and "=" in words
    )
    earlier: set[str] = set()
    for stage in stages(text):
        start, _, name = stage[0][1].partition(" AS ")
        base = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), start)
        if base not in earlier and not re.search(r":[-\w.]*\d{8}[-\w]*@sha256:[0-9a-f]{64}$", base):
            yield f"{base}: no dated tag with its digest"
        earlier.add(name)


def no_compiler_in_the_image(text: str) -> Iterator[str]:
    for word, words in image(text):
        for tool in re.findall(
            r"\b(gcc|g\+\+|clang|make|cmake|build-essential|[\w-]+-dev|nvcc)(?!\w)", words
        ):
            if word == "RUN":
                yield f"{tool} in the image"


def no_installer_in_the_image(text: str) -> Iterator[str]:
    for word, words in image(text):
        if word == "RUN" and re.search(r"python3?-(pip|venv)\b", words):
            yield "pip in the image"
    if "-m venv --without-pip /opt/lwo/venv" not in text:
        yield "pip in the image's environment"


def nothing_may_become_root(text: str) -> Iterator[str]:
    last = max(
        (at for at, (_, words) in enumerate(image(text)) if "apt-get install" in words), default=0
    )
    if not any("-perm /6000 -exec chmod a-s" in words for _, words in image(text)[last:]):
        yield "setuid programs stay"


def runs_as_nobody_special(text: str) -> Iterator[str]:
    users = [words for word, words in image(text) if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield (
            "the last USER must be a number other than 0, with its group: Kubernetes checks no"
            " names"
        )
    manifest = yaml.safe_load((REPOSITORY / "k8s" / "base" / "ray-job.yaml").read_text())
    context = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "securityContext"
    ]
    if users and users[-1] != f"{context['runAsUser']}:{context['runAsGroup']}":
        yield "another user than the manifests'"


def python_packages_have_hashes(text: str) -> Iterator[str]:
    for word, words in instructions(text):
        for part in re.split(r"&&|;;|\|\|", words):
            if word != "RUN" or not re.search(r"\bpip\b.* (install|wheel|download) ", part):
                continue
            locked = "--require-hashes --no-deps" in part and re.search(
                r"-r requirements[-\w]*\.txt", part
            )
            if not locked and "--no-index --no-deps" not in part:
                yield (
                    f"{part.strip()}: neither from a lock file with hashes nor from what was"
                    " fetched so"
                )


def nothing_from_elsewhere(text: str) -> Iterator[str]:
    for word, words in instructions(text):
        if word == "ADD" or re.search(r"(curl|wget)\s[^|]*https?://|\|\s*(ba)?sh\b", words):
            yield "fetched without a pin"


def no_secrets(text: str) -> Iterator[str]:
    for word, words in instructions(text):
        if word in ("ARG", "ENV") and re.search(r"token|secret|passw|_key", words, re.IGNORECASE):
            yield f"{word} {words}: stays in the image's history"


def writes_only_below_tmp(text: str) -> Iterator[str]:
    words = " ".join(words for word, words in image(text) if word == "ENV")
    for setting in ("HOME=/tmp", "PYTHONDONTWRITEBYTECODE=1"):
        if setting not in words.split():
            yield f"no {setting}: something would write to the read-only root"


def copies_code_only(text: str) -> Iterator[str]:
    allowed = re.compile(
        r"launch/image/requirements-(build|\$VARIANT)\.txt|pyproject\.toml|README\.md|LICENSE|lwo_dist"
    )
    for word, words in instructions(text):
        if word == "COPY" and not words.startswith("--from="):
            yield from (
                f"COPY {words}" for source in words.split(" ")[:-1] if not allowed.fullmatch(source)
            )


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
        no_compiler_in_the_image,
        no_installer_in_the_image,
        nothing_may_become_root,
        runs_as_nobody_special,
        python_packages_have_hashes,
        nothing_from_elsewhere,
        no_secrets,
        writes_only_below_tmp,
        copies_code_only,
        package_lists_are_removed,
    )
}

HARDENED = " && find / -xdev -type f -perm /6000 -exec chmod a-s {} +"
BROKEN = [
    ("more_than_one_stage", "", ""),  # only the last stage is left
    ("base_is_pinned", "-20261005-slim@", "-slim@"),
    ("base_is_pinned", re.findall("@sha256:.*", DOCKERFILE)[0], ""),
    ("base_is_pinned", "FROM system AS build", "FROM python:3 AS build"),
    ("no_compiler_in_the_image", "python3 tini", "python3 tini gcc"),
    ("no_compiler_in_the_image", "python3 tini", "python3 tini python3-dev"),
    ("no_compiler_in_the_image", "RUN ln -s", "RUN apt-get install gcc && ln -s"),
    ("no_installer_in_the_image", "python3 tini", "python3 python3-venv tini"),
    ("no_installer_in_the_image", "--without-pip ", ""),
    ("nothing_may_become_root", HARDENED, " && true"),
    ("nothing_may_become_root", "RUN ln -s", "RUN apt-get install sudo && ln -s"),
    ("runs_as_nobody_special", "USER 1000:1000", "USER lwo"),
    ("runs_as_nobody_special", "USER 1000:1000", "USER 0:0"),
    ("runs_as_nobody_special", "USER 1000:1000", "USER 1001:1001"),
    ("runs_as_nobody_special", "USER 1000:1000", ""),
    ("python_packages_have_hashes", "pip install --require-hashes", "pip install"),
    (
        "python_packages_have_hashes",
        "pip wheel --require-hashes --no-deps",
        "pip wheel --require-hashes",
    ),
    ("python_packages_have_hashes", "install --no-index --no-deps", "install"),
    ("python_packages_have_hashes", "RUN ln -s", "RUN pip install requests && ln -s"),
    ("nothing_from_elsewhere", "WORKDIR /build", "RUN curl -s https://example.org/x | sh"),
    ("nothing_from_elsewhere", "WORKDIR /build", "ADD https://example.org/x /x"),
    ("no_secrets", "WORKDIR /build", "ARG HF_TOKEN"),
    ("writes_only_below_tmp", "HOME=/tmp", "HOME=/var/lwo"),
    ("copies_code_only", "COPY lwo_dist source/lwo_dist", "COPY . ."),
    ("package_lists_are_removed", " && rm -rf /var/lib/apt/lists/* \\\n", " \\\n"),
]


def test_the_image_keeps_every_rule() -> None:
    assert {name: found for name, rule in RULES.items() if (found := list(rule(DOCKERFILE)))} == {}


@pytest.mark.parametrize(("rule", "old", "new"), BROKEN)
def test_a_rule_bites(rule: str, old: str, new: str) -> None:
    assert old in DOCKERFILE
    broken = DOCKERFILE.replace(old, new)
    if rule == "more_than_one_stage":
        broken = DOCKERFILE[DOCKERFILE.rindex("FROM ") :]
    assert list(RULES[rule](broken)) != []


def test_every_rule_is_shown_to_bite() -> None:
    assert {rule for rule, _, _ in BROKEN} == RULES.keys()


def test_the_manifests_find_what_they_name() -> None:
    smoke = yaml.safe_load(
        (REPOSITORY / "k8s" / "overlays" / "cpu-smoke" / "config.yaml").read_text()
    )
    assert f" {smoke['data']['source']}\n" in DOCKERFILE
    (tag,) = set(re.findall(r"lwo-dist:(\S+-cpu)\b", DOCKERFILE))
    assert f"newTag: {tag}" in (REPOSITORY / "k8s" / "base" / "kustomization.yaml").read_text()


def test_the_builder_gets_what_is_copied_and_no_more() -> None:
    ignore = (REPOSITORY / "launch" / "Dockerfile.dockerignore").read_text().split("\n")
    assert ignore[1] == "*"
    let_in = [line[1:] for line in ignore if line.startswith("!")]
    copied = [
        source.replace("$VARIANT", variant)
        for word, words in instructions(DOCKERFILE)
        if word == "COPY" and not words.startswith("--from=")
        for source in words.split(" ")[:-1]
        for variant in ("cpu", "cuda")
    ]
    assert all((REPOSITORY / source).exists() for source in copied)
    assert [
        source
        for source in copied
        if not any(fnmatch.fnmatch(source, pattern) for pattern in let_in)
    ] == []
    assert [pattern for pattern in let_in if not fnmatch.filter(copied, pattern)] == []
