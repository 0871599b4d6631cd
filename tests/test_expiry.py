"""Containers with a time to live on a real engine: idle for that long they are stopped and removed, and no others."""

import json
import re
from pathlib import Path

import pytest
from minded import TTL_S, Minded, exec_of, folder, minded

from answers import told
from conftest import Names
from dev import busybox
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from leases import INSTANCE, LEASE, TTL

__all__ = ["folder", "minded"]  # Fixtures.


class TestIdle:
    def test_one_that_was_idle_for_its_time_to_live_goes_with_its_anonymous_volumes(self, minded: Minded) -> None:
        named = minded.names("volume")
        name = minded.names("box")
        box = minded.make(name=name, anonymousVolumes=["/data"], binds=[f"{named}:/named"])
        mounts = minded.engine.request("GET", f"/containers/{box}/json").json()["Mounts"]
        (anonymous,) = [mount["Name"] for mount in mounts if mount["Destination"] == "/data"]
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)
        assert minded.engine.request("GET", f"/volumes/{anonymous}").status_code == 404
        assert minded.engine.request("GET", f"/volumes/{named}").status_code == 200
        minded.runner.wait_for_log(f"removed container {box[:12]} ({name}): idle for 100")
        line = minded.line(box)
        assert re.fullmatch(r"[0-9a-f]{16}", line["request_id"])
        kept = {name: line.get(name) for name in ("decision", "operations", "status", "code", "key", "client")}
        assert kept == {
            "decision": "allowed",
            "operations": ["ContainerStop", "ContainerDelete"],
            "status": 204,
            "code": None,
            "key": None,
            "client": "expiry",
        }
        said = [json.loads(each) for each in minded.runner.log]
        assert [each["request_id"] for each in said if each["message"].startswith(f"removed container {box[:12]}")] == [
            line["request_id"]
        ]

    def test_one_that_the_engine_removes_by_itself_once_it_has_stopped(self, minded: Minded) -> None:
        box = minded.make(autoRemove=True, anonymousVolumes=["/data"])
        (mount,) = minded.engine.request("GET", f"/containers/{box}/json").json()["Mounts"]
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)
        assert minded.line(box)["status"] == 204
        assert minded.engine.request("GET", f"/volumes/{mount['Name']}").status_code == 404

    @pytest.mark.parametrize("state", ["kill", "pause"])
    def test_one_that_does_not_run(self, minded: Minded, state: str) -> None:
        box = minded.make()
        assert minded.engine.request("POST", f"/containers/{box}/{state}").status_code == 204
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)
        assert minded.line(box)["status"] == 204

    def test_one_that_never_ran_and_was_labelled_by_hand(self, minded: Minded) -> None:
        box = minded.create(start=False, Labels=minded.own())
        minded.wait_minded(box)
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)

    def test_one_with_a_restart_policy(self, minded: Minded) -> None:
        box = minded.make(createExtras={"HostConfig": {"RestartPolicy": {"Name": "always"}}})
        minded.forward(TTL_S + 1)
        minded.wait_gone(box)

    def test_many_at_once(self, minded: Minded) -> None:
        boxes = [minded.create(start=False, Labels=minded.own()) for _ in range(20)]
        for box in boxes:
            minded.wait_minded(box)
        minded.forward(TTL_S + 1)
        minded.wait_gone(*boxes)
        assert len({minded.line(box)["request_id"] for box in boxes}) == 20

    def test_its_labels_are_nobodys_to_take_away(self, minded: Minded) -> None:
        for labels in ({"a": "b"}, None, {}, {TTL: "5", INSTANCE: "other", LEASE: "x"}):
            box = minded.make(createExtras={"Labels": labels})
            found = minded.engine.request("GET", f"/containers/{box}/json").json()["Config"]["Labels"]
            assert (found[INSTANCE], found[TTL]) == (minded.instance, str(TTL_S))
            assert re.fullmatch(r"[0-9a-f]{16}", found[LEASE])
            assert minded.engine.request("DELETE", f"/containers/{box}?force=1").status_code == 204

    def test_without_one_there_are_no_labels_and_no_end(self, minded: Minded) -> None:
        plain, others = minded.make(None), minded.create(Labels={INSTANCE: "another", TTL: "1"})
        wrong = minded.create(Labels={INSTANCE: minded.instance, TTL: "soon"})
        assert set(minded.wire.get("/v1/containers/labels", containerId=plain).json["labels"]) == set(
            minded.names.labels
        )
        witness = minded.make()
        minded.forward(100 * TTL_S)
        minded.wait_gone(witness)
        assert all(minded.is_running(each) for each in (plain, others, wrong))


class TestWhose:
    def test_labels_that_are_an_images_say_nothing(self, minded: Minded) -> None:
        first = minded.make()
        images = []
        # A commit puts a container's labels on an image; and whoever makes images may label them as he likes.
        for more in ({}, {"Labels": {LEASE: ""}}, {"Labels": minded.own(1)}):
            repository = minded.names("image")
            made = minded.engine.request("POST", f"/commit?container={first}&repo={repository}", json=more)
            assert made.status_code == 201, made.text
            images.append(repository)
        victims = [minded.create(Image=each) for each in images]
        victims += [minded.make(None, image=each) for each in images]
        for victim in victims:
            minded.runner.wait_for_log(f"container {victim[:12]} has a time to live, but only its image says so")
        own = minded.make(image=images[0])
        minded.forward(100 * TTL_S)
        minded.wait_gone(first, own)
        assert all(minded.is_running(each) for each in victims)
        for victim in victims:
            minded.engine.request("DELETE", f"/containers/{victim}?force=1")

    def test_a_namesake_is_another(self, minded: Minded) -> None:
        name = minded.names("box")
        box, witness = minded.make(name=name), minded.make()
        minded.engine.request("DELETE", f"/containers/{box}?force=1")
        namesake = minded.make(None, name=name)
        minded.forward(TTL_S + 1)
        minded.wait_gone(witness)
        assert minded.is_running(namesake)

    def test_where_every_policy_has_a_scope_nothing_outside_of_them_is_touched(
        self, engine: Engine, folder: Path, image: str, names: Names
    ) -> None:
        policy = folder / "policy.toml"
        policy.write_text(
            'preset = "everything"\n[scope]\nlabel = "team=red"\n[keys.blue.scope]\nlabel = "team=blue"\n'
        )
        scoped = Minded(engine.socket, folder, image, names, {"DOCKER_RUNNER_POLICY": str(policy)})
        try:
            red = scoped.make()
            blue = scoped.create(Labels={**scoped.own(), "team": "blue"})
            scoped.wait_minded(blue)
            green, nobodys = scoped.create(Labels={**scoped.own(), "team": "green"}), scoped.create(Labels=scoped.own())
            witness = scoped.make()
            scoped.forward(TTL_S + 1)
            scoped.wait_gone(red, blue, witness)
            assert scoped.is_running(green)
            assert scoped.is_running(nobodys)
        finally:
            assert scoped.runner.stop() == 0


class TestRestart:
    def test_of_the_runner_nothing_expires_early(self, engine: Engine, folder: Path, image: str, names: Names) -> None:
        minded = Minded(engine.socket, folder, image, names)
        box = minded.make()
        minded.forward(0.9 * TTL_S)
        assert minded.runner.stop() == 0
        minded.start()
        try:
            minded.wait_minded(box)
            witness = minded.make(TTL_S // 2)
            minded.forward(0.9 * TTL_S)
            minded.wait_gone(witness)
            assert minded.is_running(box)
            minded.forward(0.2 * TTL_S)
            minded.wait_gone(box)
        finally:
            assert minded.runner.stop() == 0

    def test_of_the_engine_its_absence_is_not_idle_time(
        self, private_engine: PrivateEngine, folder: Path, names: Names
    ) -> None:
        busybox.import_image(private_engine, "box:latest")
        minded = Minded(private_engine.socket, folder, "box:latest", names)
        try:
            box, witness = minded.make(), minded.make(TTL_S * 2)
            minded.forward(0.9 * TTL_S)
            private_engine.kill()
            minded.runner.wait_for_log("cannot ask for containers with a time to live")
            minded.forward(50 * TTL_S)
            private_engine.start()
            minded.runner.wait_for_log("asked for containers with a time to live again", 30)
            assert minded.is_there(box)
            # The engine has stopped it; somebody still may want it.
            assert minded.wire.post("/v1/containers/touch", containerId=witness).status == 204
            minded.forward(TTL_S)
            minded.wait_gone(box)
            assert minded.is_there(witness)
        finally:
            minded.runner.stop()


class TestRaces:
    def test_while_it_is_being_removed_it_cannot_be_used_but_read(self, minded: Minded) -> None:
        name = minded.names("box")
        script = "trap '' TERM; echo said; sleep 1d"
        stubborn = minded.make(name=name, cmd=["sh", "-c", script], createExtras={"StopSignal": "TERM"})
        waiting = exec_of(minded, stubborn)
        minded.forward(TTL_S + 1)
        minded.runner.wait_for_log(f"({name}) has expired: it is stopped and removed")
        reply = minded.wire.post("/v1/containers/touch", containerId=stubborn)
        assert told(reply) == (409, "conflict", False)
        assert "is not running: it has expired" in reply.json["message"]
        run = minded.wire.post("/v1/exec/run", containerId=stubborn, command="true")
        assert told(run) == (409, "container_stopped_paused", False)
        for path in (f"/containers/{stubborn}/exec", f"/exec/{waiting}/start"):
            answer = minded.ask("POST", path, b'{"Cmd":["true"]}' if path.endswith("exec") else b"{}")
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (409, "conflict")
        assert b"said" in minded.ask("GET", f"/containers/{stubborn}/logs?stdout=1").body
        minded.wait_gone(stubborn)
        assert minded.wire.post("/v1/containers/touch", containerId=stubborn).status == 404
