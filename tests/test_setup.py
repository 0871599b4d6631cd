"""The development set-up in `dev/`: what it makes, what it leaves alone, and what it leaves behind (nothing)."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dotenv
import pytest

from conftest import EngineDirect, Names, Registry
from dev import CHECKOUT, SetupError, busybox, packages, wait_until
from dev.engine import Engine, find_engine
from dev.prepare import ensure_env, ensure_secret, read_env
from dev.private_engine import DEEPEST_SOCKET, PrivateEngine, mounts_below, private_home


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def link(path: Path, socket: str) -> str:
    path.symlink_to(socket)
    return str(path)


class TestSecret:
    def test_is_64_hexadecimal_digits_for_its_owner_only(self, tmp_path: Path) -> None:
        path = tmp_path / ".dev" / "secret"
        assert ensure_secret(path)
        secret = path.read_text().removesuffix("\n")
        assert len(bytes.fromhex(secret)) == 32
        assert len(secret) == 64
        assert mode(path) == 0o600

    def test_is_kept_when_there(self, tmp_path: Path) -> None:
        path = tmp_path / "secret"
        ensure_secret(path)
        before = path.read_text()
        assert not ensure_secret(path)
        assert path.read_text() == before

    def test_is_made_once_by_runs_at_the_same_time(self, tmp_path: Path) -> None:
        path = tmp_path / "secret"
        with ThreadPoolExecutor(16) as pool:
            made = list(pool.map(lambda _: (ensure_secret(path), path.read_text()), range(64)))
        assert [first for first, _ in made].count(True) == 1
        assert {seen for _, seen in made} == {path.read_text()}
        assert os.listdir(tmp_path) == ["secret"]


class TestEnvFile:
    def test_is_written_for_its_owner_only(self, tmp_path: Path) -> None:
        path = tmp_path / ".env"
        assert ensure_env(path, {"DOCKER_RUNNER_PORT": "7071"})
        assert mode(path) == 0o600

    def test_that_is_there_is_never_rewritten(self, tmp_path: Path) -> None:
        path = tmp_path / ".env"
        path.write_text("MINE=1\n")
        path.chmod(0o640)
        assert not ensure_env(path, {"DOCKER_RUNNER_PORT": "7071"})
        assert path.read_text() == "MINE=1\n"
        assert mode(path) == 0o640

    @pytest.mark.parametrize(
        "value",
        ["/plain/path", "/with blank/secret", "/it's/secret", "/a#b/secret", "/a #b/secret", "/back\\slash", ""],
    )
    def test_is_read_alike_by_the_setup_and_by_the_runner(self, tmp_path: Path, value: str) -> None:
        path = tmp_path / ".env"
        ensure_env(path, {"DOCKER_RUNNER_SHARED_SECRET_FILE": value})
        assert read_env(path) == {"DOCKER_RUNNER_SHARED_SECRET_FILE": value}
        assert dict(dotenv.dotenv_values(path)) == read_env(path)

    def test_of_a_user_is_read_with_export_quotes_and_comments(self, tmp_path: Path) -> None:
        path = tmp_path / ".env"
        path.write_text('# a comment\nexport A=1\nB = "two words"\nC=3 # three\n\nnonsense\n')
        assert read_env(path) == {"A": "1", "B": "two words", "C": "3"}


class TestFindEngine:
    def test_prefers_docker_socket_over_docker_host(self, engine: Engine, tmp_path: Path) -> None:
        named, host = link(tmp_path / "named", engine.socket), link(tmp_path / "host", engine.socket)
        found = find_engine({"DOCKER_SOCKET": named, "DOCKER_HOST": f"unix://{host}"})
        assert found is not None
        assert found.socket == named

    def test_takes_docker_runner_socket_where_docker_socket_is_empty(self, engine: Engine, tmp_path: Path) -> None:
        named = link(tmp_path / "named", engine.socket)
        found = find_engine({"DOCKER_SOCKET": "", "DOCKER_RUNNER_SOCKET": named})
        assert found is not None
        assert found.socket == named

    def test_prefers_docker_host_over_the_default(self, engine: Engine, tmp_path: Path) -> None:
        host = link(tmp_path / "host", engine.socket)
        found = find_engine({"DOCKER_HOST": f"unix://{host}"})
        assert found is not None
        assert found.socket == host

    def test_never_replaces_a_named_socket_that_does_not_answer(self, engine: Engine, tmp_path: Path) -> None:
        dead = str(tmp_path / "dead")
        assert find_engine({"DOCKER_SOCKET": dead, "DOCKER_HOST": f"unix://{engine.socket}"}) is None


class TestPackages:
    def test_that_are_there_are_not_installed(self) -> None:
        assert packages.missing(["curl", "python3-venv", "docker-registry"]) == []
        assert packages.install(["curl", "python3-venv", "docker-registry"]) == []

    def test_missing_without_root_are_named_with_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(packages.PRESENT, "curl", lambda: False)
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(SetupError, match=r"As root: apt-get update && apt-get install --yes .* curl$"):
            packages.install(["curl", "openssl"])


class TestPrivateEngine:
    def test_stop_leaves_no_process_and_no_mount(self, short_folder: Path) -> None:
        engine = PrivateEngine(short_folder / "stopped", tied=True)
        try:
            engine.start()
            run_sleeper(engine)
            ours = engine.processes()
            assert len(ours) >= 4  # dockerd, containerd, a shim, the container's process
            assert mounts_below(engine.home) != []
            engine.stop()
            assert engine.processes() == []
            assert [pid for pid in ours if is_alive(pid)] == []
            assert mounts_below(engine.home) == []
        finally:
            engine.remove()
        assert not engine.home.exists()

    def test_stop_after_a_kill_ends_the_containers_too(self, private_engine: PrivateEngine) -> None:
        container = run_sleeper(private_engine)
        private_engine.kill()
        assert not private_engine.answers()
        assert is_alive(container)
        private_engine.stop()
        assert not is_alive(container)
        assert private_engine.processes() == []
        assert mounts_below(private_engine.home) == []

    def test_start_after_a_kill_answers_and_still_has_its_images(self, private_engine: PrivateEngine) -> None:
        busybox.import_image(private_engine, "kept:latest")
        private_engine.kill()
        private_engine.start()
        assert private_engine.answers()
        assert busybox.has_image(private_engine, "kept:latest")

    def test_is_stopped_by_another_process_than_the_one_that_started_it(self, private_engine: PrivateEngine) -> None:
        PrivateEngine(private_engine.home).stop()
        assert private_engine.pid() is None
        assert private_engine.processes() == []

    def test_ends_with_the_process_that_started_it_when_tied(self, short_folder: Path) -> None:
        engine = PrivateEngine(short_folder / "tied")
        program = (
            "import os, sys; from pathlib import Path; from dev.private_engine import PrivateEngine;"
            "PrivateEngine(Path(sys.argv[1]), tied=True).start(); os.kill(os.getpid(), 9)"
        )
        try:
            subprocess.run([sys.executable, "-c", program, engine.home], cwd=CHECKOUT, check=False)
            assert wait_until(lambda: engine.processes() == [], 30)
        finally:
            engine.remove()

    def test_pid_file_that_names_another_process_is_not_believed(self, short_folder: Path) -> None:
        engine = PrivateEngine(short_folder / "bystander")
        engine.home.mkdir()
        with subprocess.Popen(["sleep", "infinity"]) as bystander:
            try:
                (engine.home / "pid").write_text(str(bystander.pid))
                engine.stop()
                assert bystander.poll() is None
            finally:
                bystander.kill()

    def test_home_made_by_somebody_else_is_refused(self, short_folder: Path) -> None:
        elsewhere = short_folder / "elsewhere"
        elsewhere.mkdir()
        engine = PrivateEngine(Path(link(short_folder / "trap", str(elsewhere))))
        with pytest.raises(SetupError, match="belongs to somebody else"):
            engine.start()
        engine.remove()
        assert elsewhere.exists()

    def test_failure_to_start_says_why(self, short_folder: Path) -> None:
        engine = PrivateEngine(short_folder / "broken")
        engine.home.mkdir()
        (engine.home / "data").write_text("in the way")
        with pytest.raises(SetupError, match=r"dockerd did not start: .*canonical path points to a file"):
            engine.start()
        assert engine.processes() == []

    @pytest.mark.parametrize("length", [1, 20, 60, 200])
    def test_home_is_absolute_and_fits_sockets_however_long_the_path_of_the_checkout(self, length: int) -> None:
        checkout = Path("/work") / ("x" * length)
        home = private_home(checkout)
        assert home.is_absolute()
        assert len(os.fsencode(home / DEEPEST_SOCKET)) < 108
        assert home == private_home(checkout)

    def test_home_that_is_too_long_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="short enough"):
            PrivateEngine(Path("/" + "x" * 100))


class TestFixtures:
    def test_image_runs(self, direct: EngineDirect, image: str, names: Names) -> None:
        name = names()
        body = {
            "Image": image,
            "Cmd": ["echo", "hello"],
            "Tty": True,
            "Labels": names.labels,
            "HostConfig": {"NetworkMode": "none"},
        }
        assert direct.request("POST", f"/containers/create?name={name}", json=body).status_code == 201
        assert direct.request("POST", f"/containers/{name}/start").status_code == 204
        assert direct.request("POST", f"/containers/{name}/wait").json()["StatusCode"] == 0
        assert direct.request("GET", f"/containers/{name}/logs?stdout=1").content == b"hello\r\n"

    def test_registry_takes_an_image_and_gives_it_back(
        self, direct: EngineDirect, image: str, names: Names, registry: Registry
    ) -> None:
        name = f"{registry.address}/{names()}"
        no_credentials = {"X-Registry-Auth": "e30="}
        assert direct.request("POST", f"/images/{image}/tag?repo={name}&tag=latest").status_code == 201
        pushed = direct.request("POST", f"/images/{name}/push?tag=latest", headers=no_credentials)
        assert b'"error"' not in pushed.content
        direct.request("DELETE", f"/images/{name}:latest")
        pulled = direct.request("POST", f"/images/create?fromImage={name}&tag=latest")
        assert b"Downloaded newer image" in pulled.content or b"Image is up to date" in pulled.content

    def test_registry_comes_back_at_its_address(self, registry: Registry) -> None:
        address = registry.address
        registry.stop()
        registry.start()
        assert registry.address == address

    def test_names_remove_what_bears_them_and_nothing_else(self, direct: EngineDirect, image: str) -> None:
        mine, other = Names(), Names()
        try:
            for names in (mine, other):
                name = names()
                body = {"Image": image, "HostConfig": {"NetworkMode": "none"}}
                assert direct.request("POST", f"/containers/create?name={name}", json=body).status_code == 201
                assert direct.request("POST", "/volumes/create", json={"Labels": names.labels}).status_code == 201
                assert direct.request("POST", f"/images/{image}/tag?repo={name}").status_code == 201
            mine.remove_all(direct)
            assert found(direct, mine) == []
            assert len(found(direct, other)) == 3
        finally:
            mine.remove_all(direct)
            other.remove_all(direct)


def found(direct: EngineDirect, names: Names) -> list[object]:
    containers = direct.request("GET", "/containers/json?all=1").json()
    volumes = direct.request("GET", "/volumes").json()["Volumes"] or []
    images = direct.request("GET", "/images/json").json()
    return [thing for thing in [*containers, *volumes, *images] if names.mark in str(thing)]


def run_sleeper(engine: Engine) -> int:
    """Starts a container that sleeps; returns the pid of its process."""
    direct = EngineDirect(engine.socket)
    busybox.import_image(engine, "sleeper:latest")
    body = {
        "Image": "sleeper:latest",
        "Cmd": ["sleep", "1000000"],
        "StopSignal": "SIGKILL",  # nothing to wait for when the engine stops
        "HostConfig": {"NetworkMode": "none"},
    }
    container = direct.request("POST", "/containers/create", json=body).json()["Id"]
    assert direct.request("POST", f"/containers/{container}/start").status_code == 204
    pid: int = direct.request("GET", f"/containers/{container}/json").json()["State"]["Pid"]
    return pid


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
