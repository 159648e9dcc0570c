"""The rules that the image's lock files keep, each shown to bite on broken copies."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lwo_dist.extras import EXTRAS as MODULES

from .manifests import REPOSITORY

# `server` is for MLflow's server, which our code does not import.
EXTRAS = ("run", "ray", "mlflow", "deepspeed", "lora", "code", "server")
TORCH_LINKS = "--find-links https://download.pytorch.org/whl/cpu/torch/"
# What torch brings for CUDA, which nobody but it asks for.
CUDA = re.compile(r"nvidia-|cuda-|triton$")

Texts = dict[str, str]


def lines(text: str) -> list[str]:
    """The requirements and options, continued lines joined, comments gone."""
    return [
        line
        for line in re.sub(r"\\\n\s*", "", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
        if line
    ]


def pins(text: str) -> dict[str, str]:
    """Name -> version."""
    words = [line.split(" ")[0].partition("==") for line in lines(text) if not line.startswith("-")]
    return {canonicalize_name(name): version for name, _, version in words}


def all_have_hashes(texts: Texts) -> Iterator[str]:
    for file in ("build", "cpu", "cuda"):
        for line in lines(texts[file]):
            if (
                not re.fullmatch(r"[\w.-]+==[\w.+]+( --hash=sha256:[0-9a-f]{64})+", line)
                and line != TORCH_LINKS
            ):
                yield f"{file}: {line[:60]}: not a pin with hashes"


def locks_follow_the_constraints(texts: Texts) -> Iterator[str]:
    wanted = pins(texts["constraints"])
    for file in ("build", "cpu", "cuda"):
        for name, version in pins(texts[file]).items():
            if version.removesuffix("+cpu") != wanted.get(name, version):
                yield f"{file}: {name} is {version} and launch/constraints.txt has {wanted[name]}"
    for name in pins(texts["cuda"]).keys() - wanted.keys():
        if not CUDA.match(name) and name != "setuptools":
            yield f"cuda: {name} is not in launch/constraints.txt"


def both_variants_are_one(texts: Texts) -> Iterator[str]:
    """Else an audit of the CUDA file would not be one of the CPU file."""
    cpu, cuda = pins(texts["cpu"]), pins(texts["cuda"])
    if cpu.get("torch") != f"{cuda.get('torch')}+cpu":
        yield "cpu: torch is not the CPU build of the same version"
    more = {name: version for name, version in cuda.items() if not CUDA.match(name) or name in cpu}
    if cpu | {"torch": ""} != more | {"torch": ""}:
        yield "the variants differ in more than torch's CUDA libraries"


def what_is_asked_for_is_there(texts: Texts) -> Iterator[str]:
    project = tomllib.loads(texts["project"])["project"]
    asked = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]
    locked = pins(texts["cpu"])
    for requirement in map(Requirement, asked):
        version = locked.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version):
            yield f"{requirement} of pyproject.toml is not met by {version}"
    for name in ("boto3", "mypy", "pip", "pytest"):
        if name in locked:
            yield f"{name} is not needed in the image"


def nothing_is_there_unused(texts: Texts) -> Iterator[str]:
    """Our code imports each extra of the image, and each package belongs to an extra or is a direct
    or indirect dependency of one.
    """
    if tuple(re.findall(r"--extra (\w+)", texts["script"])) != EXTRAS:
        yield f"lock.sh: other extras than {', '.join(EXTRAS)}"
    for extra in re.findall(r"--extra (\w+)", texts["script"]):
        modules = MODULES.get(extra, ())
        if extra != "server" and not any(
            re.search(rf"(?m)^\s*(import|from) {module}\b", texts["code"]) for module in modules
        ):
            yield f"lock.sh: our code imports no package of the extra {extra}"
    for file in ("cpu", "cuda"):
        parents = _parents(texts[file])
        needed = _asked(texts)
        while more := {name for name in parents.keys() - needed if parents[name] & needed}:
            needed |= more
        yield from (
            f"{file}: nothing in the image needs {name}" for name in parents.keys() - needed
        )


def _asked(texts: Texts) -> set[str]:
    """Names of the packages that pyproject.toml requires in the image."""
    project = tomllib.loads(texts["project"])["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def _parents(text: str) -> dict[str, set[str]]:
    """Name -> the packages that require it, as uv notes below each pin."""
    found: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        if pin := re.match(r"([\w.-]+)==", line):
            name = canonicalize_name(pin[1])
            found[name] = set()
        elif name and (parent := re.match(r"    # +(?:via )?(?!via$|-c )(\S.*)", line)):
            found[name].add(canonicalize_name(parent[1]))
    return found


def nothing_of_a_builder(texts: Texts) -> Iterator[str]:
    for file in ("build", "cpu", "cuda"):
        for line in texts[file].splitlines():
            if re.search(r"https?:|file:|(?<![\w.])/(?!/)\w", line) and line != TORCH_LINKS:
                yield f"{file}: {line}: an address or a path"
        if "./launch/image/lock.sh" not in texts[file].partition("\n\n")[0]:
            yield f"{file}: does not say how it is made"


RULES: dict[str, Callable[[Texts], Iterator[str]]] = {
    rule.__name__: rule
    for rule in (
        all_have_hashes,
        locks_follow_the_constraints,
        both_variants_are_one,
        what_is_asked_for_is_there,
        nothing_is_there_unused,
        nothing_of_a_builder,
    )
}

# What no extra of the image has.
UNUSED = (
    f"gguf==0.19.0 \\\\\n    --hash=sha256:{'0' * 64}\n"
    "    # via\n    #   lwo-dist (pyproject.toml)\n"
)
BROKEN = [
    ("all_have_hashes", "cpu", r"(?m)^ray==.*\n(    --hash.*\n)+", "ray==2.60.0\n"),
    ("all_have_hashes", "cuda", r"(?m)^ray==", "ray>="),
    (
        "all_have_hashes",
        "build",
        r"(?m)^setuptools==",
        "--index-url https://example.org/simple\nsetuptools==",
    ),
    ("locks_follow_the_constraints", "cpu", r"(?m)^mlflow==[\d.]+", "mlflow==3.0.0"),
    ("locks_follow_the_constraints", "constraints", r"(?m)^deepspeed==.*$", "deepspeed==0.1"),
    ("locks_follow_the_constraints", "constraints", r"(?m)^ray==.*\n", ""),
    ("both_variants_are_one", "cpu", r"(?m)^torch==([\d.]+)\+cpu", r"torch==\1"),
    ("both_variants_are_one", "cpu", r"(?m)^accelerate==[\d.]+", "accelerate==1.10.0"),
    ("both_variants_are_one", "cpu", r"(?m)^accelerate==.*\n(    --hash.*\n)+", ""),
    ("what_is_asked_for_is_there", "cpu", r"(?m)^accelerate==.*\n(    --hash.*\n)+", ""),
    ("what_is_asked_for_is_there", "project", r'"mlflow>=[\d.]+"', '"mlflow>=99"'),
    ("what_is_asked_for_is_there", "cpu", r"(?m)^ray==", "boto3=="),
    ("nothing_is_there_unused", "script", "--extra server", "--extra server --extra gguf"),
    ("nothing_is_there_unused", "cpu", r"(?m)^ray==", f"{UNUSED}ray=="),
    ("nothing_is_there_unused", "project", r"(?m)^deepspeed = .*", "deepspeed = []"),
    ("nothing_is_there_unused", "code", r"(import|from) deepspeed\b", "import another"),
    ("nothing_of_a_builder", "cpu", r"download\.pytorch\.org", "mirror.example"),
    ("nothing_of_a_builder", "cuda", r"-c launch/constraints", "-c /data/launch/constraints"),
    ("nothing_of_a_builder", "build", r"(?m)^#    \./launch/image/lock\.sh$", "#"),
]


@pytest.fixture
def texts() -> Texts:
    launch = REPOSITORY / "launch"
    files = {
        name: launch / "image" / f"requirements-{name}.txt" for name in ("build", "cpu", "cuda")
    }
    files |= {"constraints": launch / "constraints.txt", "project": REPOSITORY / "pyproject.toml"}
    files["script"] = launch / "image" / "lock.sh"
    code = "\n".join(file.read_text() for file in (REPOSITORY / "lwo_dist").rglob("*.py"))
    return {name: file.read_text() for name, file in files.items()} | {"code": code}


def test_the_locks_keep_every_rule(texts: Texts) -> None:
    assert {name: found for name, rule in RULES.items() if (found := list(rule(texts)))} == {}


@pytest.mark.parametrize(("rule", "file", "old", "new"), BROKEN)
def test_a_rule_bites(texts: Texts, rule: str, file: str, old: str, new: str) -> None:
    broken = re.sub(old, new, texts[file])
    assert broken != texts[file]
    assert list(RULES[rule](texts | {file: broken})) != []


def test_every_rule_is_shown_to_bite() -> None:
    assert {rule for rule, *_ in BROKEN} == RULES.keys()
