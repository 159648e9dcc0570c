"""What a job takes along, and where a token may go."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lwo_dist.cli import main
from lwo_dist.cluster import packing
from lwo_dist.cluster.jobs import Jobs, _is_loopback, _token
from lwo_dist.cluster.packing import CONFIG_NAME, pack, refuse_credentials
from lwo_dist.errors import UserError

TOKEN = "0123456789abcdef" * 4


def _tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "target"
    target.mkdir()
    return target


def _packed(target: Path) -> list[str]:
    return sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()
    )


def test_code_goes_along_and_what_git_ignores_does_not(tmp_path: Path, target: Path) -> None:
    files = {
        "code.py": "x = 1\n",
        "a/b.py": "",
        ".gitignore": "/runs/\n*.log\n",
        "runs/x": "",
        "out.log": "",
    }
    source = _tree(tmp_path / "source", files)
    assert pack(source, "seed: 1\n", target) == []
    assert _packed(target) == [".gitignore", "a/b.py", "code.py", CONFIG_NAME]
    assert (target / CONFIG_NAME).read_text() == "seed: 1\n"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (".env", "A=1", "secret: file name"),
        (".env.local", "A=1", "secret: file name"),
        ("deploy/server.PEM", "x", "secret: file name"),
        ("id_rsa", "x", "secret: file name"),
        (".netrc", "x", "secret: file name"),
        ("notes.txt", "-----BEGIN OPENSSH PRIVATE KEY-----", "secret: private key, line 1"),
        (".npmrc", "x", "secret: file name"),
        ("infra/terraform.tfstate", "{}", "secret: file name"),
        ("app.py", f"\nx = 'hf_{'a' * 34}'", "secret: Hugging Face token, line 2"),
        ("weights/model.safetensors", "x", "data"),
        ("train.jsonl", "{}", "data"),
        ("big.txt", "x" * (packing.MAX_FILE_BYTES + 1), "over 10 MiB"),
    ],
)
def test_data_and_secrets_stay(
    tmp_path: Path, target: Path, name: str, text: str, reason: str
) -> None:
    source = _tree(tmp_path / "source", {"code.py": "", name: text})
    assert pack(source, "", target) == [f"{name} ({reason})"]
    assert _packed(target) == ["code.py", CONFIG_NAME]


def test_a_link_that_leads_out_stays(tmp_path: Path, target: Path) -> None:
    source = _tree(tmp_path / "source", {"code.py": ""})
    (tmp_path / "elsewhere").write_text("mine")
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / "inside").symlink_to("code.py")
    assert pack(source, "", target) == ["link (external symlink)"]
    assert _packed(target) == ["code.py", "inside", CONFIG_NAME]


def test_a_folder_without_git_sends_only_the_config(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "secrets.txt").write_text("x")
    assert pack(source, "", target) == []
    assert _packed(target) == [CONFIG_NAME]


@pytest.mark.parametrize(
    ("files", "config", "where"),
    [
        ({"code.py": f"token = '{TOKEN}'"}, "", "code.py"),
        ({"code.py": ""}, f"a: {TOKEN}", "the config"),
    ],
)
def test_a_credential_of_the_environment_is_never_sent(
    tmp_path: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    config: str,
    where: str,
) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", TOKEN)
    with pytest.raises(UserError, match=f"^{where} holds the value of SOME_API_TOKEN"):
        pack(_tree(tmp_path / "source", files), config, target)


def test_a_token_in_the_config_or_an_override_is_never_sent(tmp_path: Path, target: Path) -> None:
    token = f"hf_{'a' * 34}"
    source = _tree(tmp_path / "source", {"code.py": ""})
    with pytest.raises(UserError, match=r"^the config holds a secret \(Hugging Face token, line 2"):
        pack(source, f"cluster:\n  env: {{HF_TOKEN: {token}}}\n", target)
    assert not (target / CONFIG_NAME).exists()
    with pytest.raises(UserError, match="^an override holds a secret") as error:
        refuse_credentials({"an override": f"cluster.env.HF_TOKEN={token}"})
    assert token not in str(error.value)


def test_names_that_ray_cannot_pack_are_left_out(tmp_path: Path, target: Path) -> None:
    source = _tree(tmp_path / "source", {"code.py": ""})
    name = os.fsdecode(b"caf\xe9")
    (source / f"{name}.py").write_text("x = 1")
    (source / name).mkdir()
    (source / name / "code.py").write_text("x = 1")
    assert sorted(pack(source, "", target)) == [
        f"{name}.py (name is not UTF-8)",
        f"{name}/code.py (name is not UTF-8)",
    ]
    assert (target / "code.py").exists() and not (target / name).exists()


def test_git_that_fails_sends_nothing(tmp_path: Path, target: Path) -> None:
    source = _tree(tmp_path / "source", {"code.py": ""})
    (source / ".git" / "index").write_text("nonsense")
    with pytest.raises(UserError, match="git ls-files failed: .*; fix it, or submit from another"):
        pack(source, "", target)


def test_more_than_ray_takes(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_BYTES", 10)
    with pytest.raises(UserError, match=r"more than 0 MiB to send.*\.gitignore"):
        pack(_tree(tmp_path / "source", {"a.py": "x" * 8, "b.py": "x" * 8}), "", target)


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)


@pytest.mark.parametrize(
    "host", ["head", "10.0.0.7", "192.168.1.2", "[2001:db8::1]", "localhost.example.org"]
)
@pytest.mark.usefixtures("token")
def test_a_token_does_not_go_over_the_network_in_the_clear(
    host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", "list", "--address", f"http://{host}:8265"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "in the clear" in line and "--insecure-token" in line


def test_where_a_token_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from home\n")
    assert _token() == "from home"
    (tmp_path / "file").write_text("from file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert _token() == "from file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from environment")
    assert _token() == "from environment"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("head", False),
    ],
)
def test_what_loopback_is(host: str, expected: bool) -> None:
    assert _is_loopback(host) is expected


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://", "auto"])
def test_an_address_that_is_no_url(address: str) -> None:
    with pytest.raises(UserError, match="not a URL"):
        Jobs(address)
