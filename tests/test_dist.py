"""The one file of `make dist`: what is in it, what it needs, what it says where it cannot run."""

import ast
import os
import re
import shlex
import shutil
import stat
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridged import ask, dial, request
from dev import dist
from dev.engine import Engine
from packed import Program, one_file, packed, run, serving
from service import ROOT, SECRET
from wire import Wire

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES: list[str] = PROJECT["tool"]["setuptools"]["py-modules"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The setting of a folder to unpack in, that is the only one: there is no home."""
    return {"SHIV_ROOT": str(tmp_path_factory.mktemp("unpacked")), "HOME": "/nonexistent"}


@pytest.fixture(scope="module")
def service(engine: Engine, unpacked: dict[str, str]) -> Iterator[Program]:
    with serving(engine.socket, unpacked) as running:
        yield running


def entries() -> list[str]:
    with zipfile.ZipFile(one_file()) as archive:
        return archive.namelist()


def at(service: Program) -> dict[str, str]:
    """The settings by which other commands find the running service."""
    return {
        "DOCKER_RUNNER_HOST": "127.0.0.1",
        "DOCKER_RUNNER_PORT": service.found[2],
        "DOCKER_RUNNER_SHARED_SECRET": SECRET,
    }


# What is in it.


def test_its_name_says_which_python_and_machine() -> None:
    machine = os.uname().machine
    assert one_file().name == f"docker-runner-cp3{sys.version_info.minor}-linux_{machine}.pyz"


def test_every_module_of_the_house_is_in_it() -> None:
    assert set(MODULES) == {path.stem for path in ROOT.glob("*.py")}
    assert {f"site-packages/{name}.py" for name in MODULES} <= set(entries())


def test_what_only_development_needs_is_not() -> None:
    tops = {entry.split("/")[1] for entry in entries() if entry.startswith("site-packages/")}
    assert {"uvloop", "websockets", "requests"} < tops
    assert not tops & {"pytest", "hypothesis", "mypy", "ruff", "yaml", "shiv", "pip"}
    assert not [name for name in entries() if name.endswith((".pyc", ".pyx", ".c", "RECORD", "direct_url.json"))]


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    """From another folder, by another user's habits, without the repository."""
    (tmp_path / "dev").mkdir()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("dev/*.py"), ROOT / "pyproject.toml", ROOT / "LICENSE"]:
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    script = f"umask 077 && exec {shlex.quote(sys.executable)} -m dev.dist built"
    status, said = run(["sh", "-c", script], {"SOURCE_DATE_EPOCH": str(dist.epoch())}, cwd=tmp_path)
    assert (status, said) == (0, f"built/{one_file().name}\n")
    built = tmp_path / said.strip()
    assert built.read_bytes() == one_file().read_bytes()
    assert stat.S_IMODE(built.stat().st_mode) == 0o755


def test_it_holds_the_commits_time_and_nothing_of_the_machine() -> None:
    with zipfile.ZipFile(one_file()) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {time.gmtime(dist.epoch() // 2 * 2)[:6]}
        assert not [name for name in archive.namelist() if os.fsencode(ROOT) in archive.read(name)]


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for path in ROOT.glob("dev/*.py"):
        shutil.copy(path, tmp_path / "dev")
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"starlette>=1.0"', '"starlette>=1000"'))
    status, said = run([sys.executable, "-m", "dev.dist"], {}, cwd=tmp_path)
    assert status == 1
    assert said.startswith("error: starlette>=1000 is needed, ")


# What it does.


def test_it_serves_and_ends_in_order(engine: Engine, unpacked: dict[str, str]) -> None:
    with serving(engine.socket, unpacked) as running:
        assert Wire(running.found[1], SECRET).request("GET", "/version").json["ApiVersion"]
        assert running.stop() == 0


def test_it_unpacks_where_it_is_told_and_nowhere_else(engine: Engine, unpacked: dict[str, str], tmp_path: Path) -> None:
    before = sorted(path.name for path in one_file().parent.iterdir())
    with serving(engine.socket, {**unpacked, "TMPDIR": str(tmp_path)}):
        assert [path.name.split("_")[0] for path in Path(unpacked["SHIV_ROOT"]).glob("[!.]*")] == [
            one_file().name.split("_")[0]
        ]
        assert sorted(path.name for path in one_file().parent.iterdir()) == before
        assert list(tmp_path.iterdir()) == []


def test_a_second_start_needs_no_writable_folder(unpacked: dict[str, str]) -> None:
    assert run(packed("--version"), unpacked)[0] == 0
    made = [unpacked["SHIV_ROOT"], *(str(path) for path in Path(unpacked["SHIV_ROOT"]).iterdir())]
    modes = {path: os.stat(path).st_mode for path in made}
    before = os.stat(unpacked["SHIV_ROOT"]).st_mtime_ns
    try:
        for path in made:
            os.chmod(path, 0o500)
        assert run(packed("--version"), unpacked)[0] == 0
        assert os.stat(unpacked["SHIV_ROOT"]).st_mtime_ns == before
    finally:
        for path, mode in modes.items():
            os.chmod(path, mode)


def test_check(engine: Engine, unpacked: dict[str, str]) -> None:
    settings = {**unpacked, "DOCKER_SOCKET": engine.socket, "DOCKER_RUNNER_SHARED_SECRET": SECRET}
    status, said = run(packed("check"), settings)
    assert status == 0
    assert "ok    engine: version " in said


def test_sign_and_curl(service: Program, unpacked: dict[str, str]) -> None:
    settings = {**unpacked, **at(service)}
    status, headers = run(packed("sign", "GET", "/_ping"), settings)
    assert (status, headers.count("-H X-DR-")) == (0, 3)
    assert run(packed("curl", "-s", "/_ping"), settings) == (0, "OK")


def test_bridge(service: Program, unpacked: dict[str, str], short_folder: Path) -> None:
    listen = f"unix://{short_folder}/packed.sock"
    command = packed("bridge", "--url", service.found[1], "--listen", listen)
    with Program(command, "bridge listens", unpacked), dial(listen) as sock:
        assert ask(sock, request("GET", "/_ping")).body == b"OK"


# The health of a running service, for HEALTHCHECK and the like.


@pytest.mark.parametrize(("option", "says"), [("--health", '{"status":"ok"}'), ("--ready", '{"status":"ready"}')])
def test_a_running_service_is_well(service: Program, unpacked: dict[str, str], option: str, says: str) -> None:
    path = option.replace("--", "/v1/")
    assert run(packed("check", option), {**unpacked, **at(service)}) == (
        0,
        f"ok    {service.found[1]}{path}: 200 {says}\n",
    )


def test_one_that_listens_on_every_address_is_asked_on_loopback(engine: Engine, unpacked: dict[str, str]) -> None:
    settings = {**unpacked, "DOCKER_SOCKET": engine.socket, "DOCKER_RUNNER_HOST": "0.0.0.0", "DOCKER_RUNNER_PORT": "0"}
    with Program(packed("serve"), r"listens on http://0\.0\.0\.0:(\d+)", settings) as running:
        status, said = run(packed("check", "--health"), {**settings, "DOCKER_RUNNER_PORT": running.found[1]})
    assert (status, said.partition(":")[0]) == (0, "ok    http")


def test_one_without_its_engine_is_well_but_not_ready(unpacked: dict[str, str], tmp_path: Path) -> None:
    with serving(str(tmp_path / "none.sock"), unpacked) as running:
        assert run(packed("check", "--health"), {**unpacked, **at(running)})[0] == 0
        status, said = run(packed("check", "--ready"), {**unpacked, **at(running)})
    assert status == 1
    assert "503" in said


def test_no_service_is_not_well(service: Program, unpacked: dict[str, str]) -> None:
    settings = {**unpacked, **at(service), "DOCKER_RUNNER_HOST": "127.0.0.2"}
    status, said = run(packed("check", "--health"), settings)
    assert status == 1
    assert said.startswith(f"FAIL  http://127.0.0.2:{service.found[2]}/v1/health: ")
    assert "Connection refused" in said


# Where it cannot run.


def remade(folder: Path, constant: str, value: str) -> Path:
    """The file, made for something else."""
    target = folder / "other.pyz"
    with zipfile.ZipFile(one_file()) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            if name == "__main__.py":
                data, count = re.subn(rf"(?m)^{constant} = .*".encode(), f"{constant} = {value}".encode(), data)
                assert count == 1
            archive.writestr(name, data)
    return target


def main_source() -> str:
    with zipfile.ZipFile(one_file()) as archive:
        return archive.read("__main__.py").decode()


@pytest.mark.parametrize(
    ("constant", "value", "wanted", "found"),
    [
        ("PYTHON", "(3, 9)", "CPython 3.9 on Linux", f"CPython 3.{sys.version_info.minor}"),
        ("MACHINE", "'vax'", "Linux vax", f"linux {os.uname().machine}"),
        ("GLIBC", "(9, 9)", "glibc 9.9", "glibc 2."),
    ],
)
def test_on_another_python_or_machine_it_says_what_it_is_for(
    tmp_path: Path, constant: str, value: str, wanted: str, found: str
) -> None:
    other = remade(tmp_path, constant, value)
    status, said = run([sys.executable, "-I", str(other), "--version"], {"SHIV_ROOT": str(tmp_path / "unpacked")})
    assert status == 1
    assert re.fullmatch(
        rf"docker-runner: this file is for .*{wanted}.*, and \S+ is {found}\S*\.\nRun it with python3\.\d+, or .*\n",
        said,
    )
    assert not (tmp_path / "unpacked").exists()


def test_an_old_python_understands_as_much() -> None:
    ast.parse(main_source(), feature_version=(3, 4))


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, said = run(packed("--version"), {"SHIV_ROOT": str(tmp_path / "file")})
    assert status == 1
    assert said == (
        f"docker-runner: cannot unpack in {tmp_path}/file: File exists. SHIV_ROOT names the folder to unpack in:"
        " one of its own, writable, not mounted noexec.\n"
    )
