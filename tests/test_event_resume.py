"""Events that resume, on a real engine: what a client missed, once and in order; and every gap told."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from listening import Listener, cuttable, events_of

from comparison import Containers
from conftest import EngineDirect, Names
from dev import wait_until
from dev.engine import Engine
from dev.private_engine import PrivateEngine
from event_hub import FIRST_PAUSE_S
from scripted import ScriptedEngine
from service import Runner, signed_head


@pytest.fixture(scope="module")
def containers(direct: EngineDirect, names: Names, image: str) -> Containers:
    return Containers(direct, names, image)


@pytest.fixture
def box(containers: Containers) -> str:
    """A running container of this test alone."""
    return containers()


def had(*execs: str) -> Callable[[Listener], bool]:
    return lambda listener: set(execs) <= set(listener.execs())


def remember(direct: EngineDirect) -> None:
    """Wait until what the engine remembers begins a while ago."""

    def reaches_back() -> bool:
        past = direct.request("GET", f"/events?since=0&until={time.time():.9f}").content.splitlines()
        return bool(past) and json.loads(past[0])["timeNano"] < time.time_ns() - 500_000_000

    assert wait_until(reaches_back, 10)


class TestClients:
    """A client comes back to a runner that goes on."""

    @pytest.mark.parametrize("others", [0, 1])
    @pytest.mark.parametrize("missed", [0, 1, 200])
    def test_it_gets_what_it_missed_and_then_what_happens(
        self, runner: Runner, containers: Containers, box: str, missed: int, others: int
    ) -> None:
        target = events_of(box)
        other = [Listener(runner.port, target) for _ in range(others)]
        with Listener(runner.port, target) as first:
            seen = [containers.exec(box, "true") for _ in range(3)]
            first.until(had(*seen))
        away = [containers.exec(box, "true") for _ in range(missed)]
        with Listener(runner.port, target, first.last_id) as again:
            after = containers.exec(box, "true")
            again.until(had(after))
        assert (again.execs(), again.types()) == ([*away, after], [])
        for each in other:
            assert each.until(had(after)).execs() == [*seen, *away, after]
            each.close()

    @pytest.mark.parametrize("others", [0, 1])
    def test_a_client_that_had_seen_nothing_resumes_too(
        self, runner: Runner, containers: Containers, box: str, others: int
    ) -> None:
        target = events_of(box)
        containers.exec(box, "before")
        other = [Listener(runner.port, target) for _ in range(others)]
        with Listener(runner.port, target) as first:
            first.until(lambda each: each.last_id is not None, "an id")
        away = containers.exec(box, "true")
        with Listener(runner.port, target, first.last_id) as again:
            assert again.until(had(away)).execs() == [away]
            assert again.types() == []
        for each in other:
            each.close()

    def test_so_does_one_of_a_stream_without_any_event(
        self, runner: Runner, direct: EngineDirect, containers: Containers, names: Names
    ) -> None:
        name = names("c")
        target = events_of(name, "create", "start")
        remember(direct)
        with Listener(runner.port, target) as first:
            first.until(lambda each: each.last_id is not None, "an id")
        containers(name=name)
        with Listener(runner.port, target, first.last_id) as again:
            again.until(lambda each: len(each.messages) == 2, "two events")
        assert [message["event"]["Action"] for message in again.messages] == ["create", "start"]

    def test_at_each_event_of_a_busy_stream(self, runner: Runner, containers: Containers, box: str) -> None:
        """The engine keeps events in another order than it sends them."""
        target = events_of(box)
        with Listener(runner.port, target) as all_:
            with ThreadPoolExecutor(8) as pool:
                made = list(pool.map(lambda _: containers.exec(box, "true"), range(100)))
            all_.until(had(*made))
            told = all_.execs()
            for _ in range(3):
                with Listener(runner.port, target + "&since=0") as again:
                    again.until(had(*made))
                assert sorted(again.execs()) == sorted(made)
                with Listener(runner.port, target, again.last_id) as after:
                    mark = containers.exec(box, "true")
                    assert after.until(had(mark)).execs() == [mark]
                    made.append(mark)
        assert sorted(told) == sorted(made[:100])

    @pytest.mark.parametrize("through", ["the journal", "the engine"])
    def test_while_many_events_happen_at_once(
        self, engine: Engine, containers: Containers, box: str, through: str
    ) -> None:
        """The engine keeps events in another order than it sends them, and sends some twice as a stream begins."""
        target = events_of(box)
        made: list[str] = []
        with Runner(engine.socket) as runner, ThreadPoolExecutor(8) as pool:
            other = Listener(runner.port, target) if through == "the journal" else None
            got: list[str] = []
            last_id = None
            with Listener(runner.port, target) as first:
                first.until(lambda each: each.last_id is not None, "an id")
                last_id = first.last_id
            work = [pool.submit(containers.exec, box, "true") for _ in range(1200)]
            while not all(each.done() for each in work):
                with Listener(runner.port, target, last_id) as again:
                    wanted = min(30, 1200 - len(got))
                    again.until(lambda each: len(each.execs()) >= wanted)  # noqa: B023
                got += again.execs()
                last_id = again.last_id
                assert again.types() == []
            made = [each.result() for each in work]
            with Listener(runner.port, target, last_id) as again:
                missing = set(made) - set(got)
                again.until(had(*missing))
                mark = containers.exec(box, "true")
                got += again.until(had(mark)).execs()
            if other is not None:
                other.close()
        assert len(got) == len(set(got)), "none came twice"
        assert set(got) == {*made, mark}

    def test_more_than_the_engine_keeps_is_a_gap(self, engine: Engine, containers: Containers, box: str) -> None:
        with Runner(engine.socket) as runner:
            with Listener(runner.port, events_of(box)) as first:
                first.until(had(containers.exec(box, "true")))
            away = [containers.exec(box, "true") for _ in range(300)]
            with Listener(runner.port, events_of(box), first.last_id) as again:
                mark = containers.exec(box, "true")
                again.until(had(mark))
        assert again.types() == ["gap"]
        assert again.messages[0]["type"] == "gap"
        kept = again.execs()
        assert len(kept) > 200
        assert kept == [*away, mark][-len(kept) :]

    def test_what_the_runner_has_kept_is_none(self, engine: Engine, containers: Containers, box: str) -> None:
        with Runner(engine.socket) as runner, Listener(runner.port, events_of(box)) as other:
            with Listener(runner.port, events_of(box)) as first:
                first.until(had(containers.exec(box, "true")))
            away = [containers.exec(box, "true") for _ in range(400)]
            other.until(had(*away))
            with Listener(runner.port, events_of(box), first.last_id) as again:
                again.until(had(*away))
        assert (again.execs(), again.types()) == (away, [])

    def test_the_id_of_another_stream_is_a_gap(self, runner: Runner, containers: Containers, box: str) -> None:
        another = containers()
        with Listener(runner.port, events_of(another)) as first:
            first.until(had(containers.exec(another, "true")))
        with Listener(runner.port, events_of(box), first.last_id) as again:
            mark = containers.exec(box, "true")
            again.until(had(mark))
        assert (again.types(), again.execs()) == (["gap"], [mark])

    @pytest.mark.parametrize("id_", ["A" * 401, "AQAY6zi9MT4ps_dGc5E=", "é", "a b", "a,b", "../x"])
    def test_what_is_no_id_is_refused(self, runner: Runner, box: str, id_: str) -> None:
        headers = {"Last-Event-ID": id_}
        answer = runner.request("GET", events_of(box), headers=headers)
        assert answer.status == 400
        assert json.loads(answer.body)["error"]["code"] == "validation_error"

    def test_two_are_refused(self, runner: Runner, box: str) -> None:
        fields = ("Connection: close", "Last-Event-ID: a", "Last-Event-ID: b")
        data = runner.raw(signed_head("GET", events_of(box), b"", *fields))
        assert data.startswith(b"HTTP/1.1 400 ")

    @pytest.mark.parametrize("id_", ["1", "x" * 400, "AQAY6zi9MT4ps_dGc5", "AgAY6zi9MT4ps_dGc5E"])
    def test_the_id_of_another_service_is_a_gap(
        self, runner: Runner, containers: Containers, box: str, id_: str
    ) -> None:
        containers.exec(box, "before")
        with Listener(runner.port, events_of(box), id_) as listener:
            made = containers.exec(box, "true")
            listener.until(had(made))
        assert (listener.types(), listener.execs()) == (["gap"], [made])

    def test_an_empty_one_is_none(self, runner: Runner, containers: Containers, box: str) -> None:
        with Listener(runner.port, events_of(box), "") as listener:
            made = containers.exec(box, "true")
            assert listener.until(had(made)).execs() == [made]

    def test_since_is_answered_by_a_stream_that_is_open(self, engine: Engine, containers: Containers, box: str) -> None:
        before = containers.exec(box, "true")
        with Runner(engine.socket) as runner, Listener(runner.port, events_of(box)) as other:
            after = containers.exec(box, "true")
            other.until(had(after))
            sockets = runner.sockets()
            with Listener(runner.port, events_of(box) + f"&since={int(time.time()) - 60}") as listener:
                assert listener.until(had(after)).execs() == [before, after]
                assert runner.sockets() == sockets + 1
            assert other.execs() == [after]

    def test_since_a_time_that_it_does_not_reach_is_answered_by_the_engine(
        self, engine: Engine, containers: Containers, box: str
    ) -> None:
        before = containers.exec(box, "true")
        with Runner(engine.socket) as runner, Listener(runner.port, events_of(box)):
            with Listener(runner.port, events_of(box) + "&since=5.5") as listener:
                after = containers.exec(box, "true")
                assert listener.until(had(after)).execs() == [before, after]
            with Listener(runner.port, events_of(box), listener.last_id) as again:
                mark = containers.exec(box, "true")
                assert again.until(had(mark)).execs() == [mark]

    def test_a_since_that_the_engine_does_not_take_is_its_refusal(
        self, runner: Runner, direct: EngineDirect, box: str
    ) -> None:
        refused = direct.request("GET", "/events?since=yesterday")
        answer = runner.request("GET", events_of(box) + "&since=yesterday")
        assert answer.status == refused.status_code >= 400
        assert json.loads(answer.body)["message"] == refused.json()["message"]


class TestRunners:
    """A client comes back to another runner."""

    def test_what_happened_in_between_is_not_lost(self, engine: Engine, containers: Containers, box: str) -> None:
        target = events_of(box)
        with Runner(engine.socket) as runner, Listener(runner.port, target) as first:
            with ThreadPoolExecutor(4) as pool:
                seen = list(pool.map(lambda _: containers.exec(box, "true"), range(40)))
            first.until(had(*seen))
            runner.process.kill()
            first.until(lambda each: each.ended, "the end")
        away = [containers.exec(box, "true") for _ in range(40)]
        with Runner(engine.socket) as runner, Listener(runner.port, target, first.last_id) as again:
            mark = containers.exec(box, "true")
            again.until(had(mark))
        assert (again.execs(), again.types()) == ([*away, mark], [])


@pytest.fixture
def way(engine: Engine) -> Iterator[ScriptedEngine]:
    with cuttable(engine.socket) as way:
        yield way


class TestConnections:
    """The runner's own connection to the engine is cut."""

    def test_every_caller_gets_what_it_missed_once_and_is_told(
        self, way: ScriptedEngine, containers: Containers, box: str
    ) -> None:
        with Runner(way.path) as runner:
            listeners = [Listener(runner.port, events_of(box)) for _ in range(3)]
            made = [containers.exec(box, "true")]
            for _ in range(3):
                way.stop()
                made += [containers.exec(box, "true") for _ in range(10)]
                way.listen()
                made += [containers.exec(box, "true") for _ in range(10)]
                for each in listeners:
                    each.until(had(*made))
            for each in listeners:
                assert (each.execs(), each.types()) == (made, ["reconnected"] * 3)
                each.close()

    def test_while_many_events_happen_at_once(self, way: ScriptedEngine, containers: Containers, box: str) -> None:
        with Runner(way.path) as runner, Listener(runner.port, events_of(box)) as listener:
            with ThreadPoolExecutor(8) as pool:
                work = [pool.submit(containers.exec, box, "true") for _ in range(1500)]
                while not all(each.done() for each in work):
                    count = len(listener.types())
                    way.stop()
                    way.listen()
                    assert wait_until(lambda: len(listener.types()) > count, 10)  # noqa: B023
            made = [each.result() for each in work]
            mark = containers.exec(box, "true")
            listener.until(had(*made, mark))
        got = listener.execs()
        assert len(got) == len(set(got)), "none came twice"
        assert set(got) == {*made, mark}
        assert "gap" not in listener.types()

    def test_more_than_the_engine_keeps_is_a_gap(self, way: ScriptedEngine, containers: Containers, box: str) -> None:
        with Runner(way.path) as runner, Listener(runner.port, events_of(box)) as listener:
            seen = containers.exec(box, "true")
            listener.until(had(seen))
            way.stop()
            away = [containers.exec(box, "true") for _ in range(300)]
            way.listen()
            listener.until(had(away[-1]))
            assert listener.types() == ["reconnected", "gap"]
            kept = listener.execs()[1:]
            assert len(kept) > 200
            assert kept == away[-len(kept) :]
            with Listener(runner.port, events_of(box), listener.last_id) as again:
                mark = containers.exec(box, "true")
                again.until(had(mark))
                assert (again.execs(), again.types()) == ([mark], [])

    def test_a_quiet_stream_that_never_had_an_event_misses_nothing(
        self, way: ScriptedEngine, direct: EngineDirect, containers: Containers, names: Names
    ) -> None:
        remember(direct)
        name = names("c")
        with Runner(way.path) as runner, Listener(runner.port, events_of(name, "create")) as listener:
            way.stop()
            containers(name=name, start=False)
            way.listen()
            listener.until(lambda each: any(message["type"] == "event" for message in each.messages))
            assert listener.types() == ["reconnected"]

    def test_who_comes_while_the_engine_is_away_is_refused(
        self, way: ScriptedEngine, containers: Containers, box: str
    ) -> None:
        with Runner(way.path) as runner, Listener(runner.port, events_of(box)) as listener:
            way.stop()
            answer = runner.request("GET", events_of(box))
            assert answer.status == 503
            assert json.loads(answer.body)["error"]["retryable"] is True
            way.listen()
            listener.until(lambda each: each.types() == ["reconnected"])

    def test_a_caller_that_leaves_meanwhile_leaves_nothing(
        self, way: ScriptedEngine, containers: Containers, box: str
    ) -> None:
        with Runner(way.path) as runner:
            at_rest = runner.sockets()
            with Listener(runner.port, events_of(box)):
                way.stop()
            way.listen()
            assert wait_until(lambda: runner.sockets() == at_rest, 5)
            time.sleep(5 * FIRST_PAUSE_S)  # That nothing asks again shows only when it would have.
            assert way.open == 0
            assert "defect" not in "".join(runner.log)


def test_an_engine_that_is_killed_and_started_again_is_a_gap_and_the_stream_goes_on(
    private_engine: PrivateEngine, own_box: str
) -> None:
    ask = EngineDirect(private_engine.socket).request

    def rename() -> str:
        name = f"renamed-{time.time_ns()}"
        assert ask("POST", f"/containers/{own_box}/rename?name={name}").status_code == 204
        return name

    def names_of(listener: Listener) -> list[str]:
        found = [each["event"] for each in listener.messages if each["type"] == "event"]
        return [event["Actor"]["Attributes"]["name"] for event in found if event["Action"] == "rename"]

    with Runner(private_engine.socket) as runner:
        listeners = [Listener(runner.port, events_of(own_box, "rename")) for _ in range(3)]
        before = rename()
        for each in listeners:
            each.until(lambda found: names_of(found) == [before])
        private_engine.kill()
        private_engine.start()
        for each in listeners:
            each.until(lambda found: "gap" in found.types(), "the gap")
        after = rename()
        for each in listeners:
            each.until(lambda found: names_of(found) == [before, after])
            assert each.types() == ["reconnected", "gap"]
        with Listener(runner.port, events_of(own_box, "rename"), each.last_id) as again:
            last = rename()
            again.until(lambda found: names_of(found) == [last])
            assert again.types() == []
        for each in listeners:
            each.close()
        assert "defect" not in "".join(runner.log)


def test_a_quiet_stream_carries_comments(engine: Engine, box: str) -> None:
    with (
        Runner(engine.socket, {"DOCKER_RUNNER_SSE_KEEP_ALIVE_MS": "200"}) as runner,
        Listener(runner.port, events_of(box)) as listener,
    ):
        before = listener.comments
        began = time.monotonic()
        listener.until(lambda each: each.comments >= before + 5, "comments")
        assert time.monotonic() - began > 0.5
        assert listener.messages == []
