# SPDX-License-Identifier: Apache-2.0
"""How processes of a run find each other, agree, and say what they do not agree on.

All of it without JAX: threads of this process stand for the others.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import ConfigError, RunnerError
from runner.following import agree_on
from runner.processes.peers import ALONE, Connected, PeerLostError, Peers
from runner.processes.place import Place, find_place, in_one_process
from runner.processes.rendezvous import Company, listen, meet
from runner.processes.supervisor import Supervisor
from runner.processes.wire import MOST_BYTES, Wire, WireError
from runner.records.closing import close_record
from runner.records.digests import digest_manifest
from runner.replay.changes import IN_REPRODUCE, spec_of
from runner.spec import DistributedSpec, MeshSpec

ROOT = Path(__file__).parents[1]
FACTS = {
    "config": {"train.steps": "a", "seed": "b"},
    "versions": {"jax": "1"},
    "thread_pool": 4,
}
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes what a test leaves open: it stands for processes that would end."""
    opened: list[Wire] = []
    begin = Wire.__init__

    def note(wire: Wire, connection: socket.socket) -> None:
        opened.append(wire)
        begin(wire, connection)

    monkeypatch.setattr(Wire, "__init__", note)
    yield
    for wire in opened:
        wire.close()


# --- messages


def pair() -> tuple[Wire, Wire]:
    return tuple(map(Wire, socket.socketpair()))  # type: ignore[return-value]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.lists(st.dictionaries(st.from_regex(r"[a-z]+", fullmatch=True), plain)))
def test_messages_arrive_whole_and_in_order(messages: list[dict[str, Any]]) -> None:
    one, other = pair()
    sender = threading.Thread(target=lambda: [one.send(**m) for m in messages])
    sender.start()
    assert [other.receive(10) for _ in messages] == messages
    sender.join()
    one.close()
    with pytest.raises(WireError, match="closed"):
        other.receive(10)
    other.close()


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n", b"[1]\n", b"\xff\xfe\n", b"x" * (MOST_BYTES + 1)]
)
def test_a_stranger_is_no_process(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    wire = Wire(ours)
    sender = threading.Thread(target=lambda: send_all(theirs, sent))
    sender.start()
    with pytest.raises(WireError, match="no message"):
        wire.receive(10)
    wire.close()
    sender.join()


def send_all(to: socket.socket, sent: bytes) -> None:
    with to:
        try:
            to.sendall(sent)
        except OSError:
            return


# --- places


def mesh_of(**fields: Any) -> MeshSpec:
    return MeshSpec(distributed=DistributedSpec(**fields), host_devices=4)


def test_places() -> None:
    assert find_place(MeshSpec()) is None
    assert find_place(mesh_of(num_processes=1)) is None
    assert find_place(mesh_of(num_processes=2)) == Place(None, 0, 2, 0)
    given_ = {"num_processes": 2, "coordinator_address": "node1:29400"}
    assert find_place(mesh_of(**given_, process_id=1)) == Place("node1", 29400, 2, 1)
    six = {"num_processes": 2, "coordinator_address": "[::1]:29400"}
    place = find_place(mesh_of(**six, process_id=0))
    assert place == Place("::1", 29400, 2, 0)
    assert place.address == "[::1]:29400"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"num_processes": 2, "coordinator_address": "h:1"},
            "mesh.distributed.process_id: must say which process this is. "
            "Allowed: from 0 to 1. Set mesh.distributed.process_id=..., another one in "
            "each; or mesh.distributed.coordinator_address=null, which launches all on "
            "this machine.",
        ),
        (
            {"num_processes": 2, "process_id": 1},
            "mesh.distributed.coordinator_address: must say where process 0 listens. "
            "Set mesh.distributed.coordinator_address=HOST:PORT; or "
            "mesh.distributed.process_id=null, which launches all processes on this "
            "machine.",
        ),
        (
            {"num_processes": 2, "coordinator_address": "h:1", "process_id": 2},
            "mesh.distributed.process_id: must be below num_processes, 2 (got 2). Give "
            "the processes the numbers 0 to 1.",
        ),
        (
            {"num_processes": 2, "coordinator_address": "node1", "process_id": 0},
            "mesh.distributed.coordinator_address: must be HOST:PORT (got 'node1'). "
            "Give it a port, as in node1:29400.",
        ),
        (
            {"num_processes": 65},
            "mesh.distributed.num_processes: too many to launch on this machine (got "
            "65). Allowed: at most 64. Set mesh.distributed.coordinator_address and "
            "mesh.distributed.process_id.",
        ),
    ],
)
def test_too_little_or_too_much_said_of_a_place(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        find_place(mesh_of(**fields))
    assert str(raised.value) == said


CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR", "TPU_")


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(CLUSTERS):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_cluster")
def test_auto_without_a_cluster() -> None:
    with pytest.raises(ConfigError, match="auto finds no cluster here") as raised:
        find_place(MeshSpec(distributed="auto"))
    assert "Set mesh.distributed=null to run in one process" in str(raised.value)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(("tasks", "found"), [("4", True), ("1", False)])
def test_auto_under_slurm(
    monkeypatch: pytest.MonkeyPatch, tasks: str, *, found: bool
) -> None:
    variables = {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_NTASKS": tasks,
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "2",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = find_place(MeshSpec(distributed="auto"))
    assert place == (Place("node07", 61441, 4, 0) if found else None)


def test_a_plan_has_all_devices_in_one_process(make_spec: Make) -> None:
    spec = in_one_process(make_spec("+experiment=mesh/hosts2x4"))
    assert (spec.mesh.distributed, spec.mesh.host_devices) == (None, 8)


# --- the meeting


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meet_all(
    *facts: dict[str, Any] | None,
    timeout: float = 10.0,
    places: tuple[Place, ...] | None = None,
) -> list[Company | RunnerError]:
    """What each of some processes comes to know; None stays away."""
    port = free_port()
    if places is None:
        count = len(facts)
        places = tuple(Place("127.0.0.1", port, count, i) for i in range(count))

    def one(place: Place, mine: dict[str, Any] | None) -> Any:
        if mine is None:
            return None
        try:
            server = listen(place) if place.index == 0 else None
            return meet(place, facts=mine, server=server, timeout=timeout)
        except RunnerError as error:
            return error

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(one, places, facts))


def lines(found: list[Any]) -> list[str]:
    assert all(isinstance(each, RunnerError) for each in found), found
    assert {each.exit_code for each in found} == {2}
    return [str(each) for each in found]


def test_all_meet_and_hear_each_other() -> None:
    facts = [{**FACTS, "thread_pool": pool} for pool in (4, 8, 16)]
    found = meet_all(*facts)
    host = socket.gethostname()
    for index, company in enumerate(found):
        assert isinstance(company, Company)
        assert company.names == tuple(f"process {i} of 3 ({host})" for i in range(3))
        assert company.thread_pool == 4
        assert company.devices == (index,)  # they share a host and see the same
        assert set(company.wires) == ({1, 2} if index == 0 else {0})
    first, second, _ = found
    assert isinstance(first, Company)
    assert isinstance(second, Company)
    first.wires[1].send(word="hello")
    assert second.wires[0].receive(10) == {"word": "hello"}


def test_those_who_have_other_configs_are_named_by_all() -> None:
    other = {**FACTS, "config": {"train.steps": "A", "seed": "b", "new": "c"}}
    host = socket.gethostname()
    said = (
        f"mesh.distributed: process 1 ({host}) has other config than process 0 ({host})"
        ": new, train.steps. Launch all of them with one config and one environment."
    )
    assert lines(meet_all(FACTS, other, FACTS)) == [said] * 3


def test_other_versions() -> None:
    other = {**FACTS, "versions": {"jax": "2"}}
    one, two = lines(meet_all(FACTS, other))
    assert "runs other versions than process 0" in one
    assert ": jax. " in one
    assert one == two


def test_fewer_than_promised() -> None:
    first, second, _ = meet_all(FACTS, FACTS, None, timeout=0.6)
    said = (
        "mesh.distributed.num_processes: fewer processes than promised came within "
        "0.6 s (got '2 of 3'). Missing: 2. Start them, or raise mesh.connect_timeout."
    )
    assert lines([first, second]) == [said] * 2


def test_a_coordinator_that_does_not_answer() -> None:
    (_, second) = meet_all(None, FACTS, timeout=0.4)
    (said,) = lines([second])
    assert said.startswith(
        "mesh.distributed.coordinator_address: no answer from process 0 within 0.4 s: "
        "Connection refused"
    )
    assert said.endswith("Start process 0 there, or raise mesh.connect_timeout.")


def test_what_answers_is_no_coordinator() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = Place("127.0.0.1", server.getsockname()[1], 2, 1)

        def answer() -> None:
            with server.accept()[0] as stranger:
                stranger.recv(10)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match="is not process 0 of this run"):
            meet(place, facts=FACTS, server=None, timeout=5)
        thread.join()


def test_a_stranger_at_the_door_changes_nothing() -> None:
    port = free_port()
    places = tuple(Place("127.0.0.1", port, 2, i) for i in range(2))
    server = listen(places[0])
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b'{"process": 1}\n')
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, places[0], facts=FACTS, server=server, timeout=10)
        second = pool.submit(meet, places[1], facts=FACTS, server=None, timeout=10)
        assert set(first.result().wires) == {1}
        assert set(second.result().wires) == {0}
    for stranger in strangers:
        stranger.close()


def test_two_of_one_number() -> None:
    port = free_port()
    places = tuple(Place("127.0.0.1", port, 3, index) for index in (0, 1, 1))
    host = socket.gethostname()
    said = (
        f"mesh.distributed.process_id: 2 processes have the same number (on {host}, "
        f"{host}) (got 1). Give each its own."
    )
    assert lines(meet_all(FACTS, FACTS, FACTS, places=places)) == [said] * 3


def test_two_counts() -> None:
    port = free_port()
    places = (Place("127.0.0.1", port, 2, 0), Place("127.0.0.1", port, 3, 1))
    one, two = lines(meet_all(FACTS, FACTS, places=places))
    assert "was told that there are 3 processes, process 0" in one
    assert one == two


def test_a_port_that_is_taken_and_a_host_that_is_not_this_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"another program has the port {port}"):
            listen(Place("127.0.0.1", port, 2, 0))
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(ConfigError, match=f"{host} is no address of this machine"):
            listen(Place(host, 29400, 2, 0))


def test_a_host_name_that_others_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["node1", "node2"])
    lock = threading.Lock()

    def name() -> str:
        with lock:
            return next(names)

    monkeypatch.setattr("runner.processes.rendezvous._own_address", lambda: "127.0.1.1")
    monkeypatch.setattr(socket, "gethostname", name)
    one, two = lines(meet_all(FACTS, FACTS))
    assert "is that of a loopback address there (127.0.1.1)" in one
    assert "Mend /etc/hosts on node" in one
    assert one == two


def test_devices_that_the_environment_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0")
    for company in meet_all(FACTS, FACTS):
        assert isinstance(company, Company)
        assert company.devices is None


# --- what becomes of them


@pytest.fixture
def quiet_signals() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_alone_nothing_is_waited_for() -> None:
    assert (ALONE.leads, ALONE.count, ALONE.stop_reason()) == (True, 1, "")
    assert ALONE.share({"steps": 3}) == {"steps": 3}
    ALONE.meet()
    ALONE.end()
    ALONE.fail("no one hears it", 1)


CHILD = """
import os, signal, socket, sys
from runner.processes.wire import Wire
wire = Wire(socket.socket(fileno=int(sys.argv[1])))
"""
WAITS = """
while "fault" not in (message := wire.receive(30)):
    wire.send(beat=1)
sys.exit(message["fault"]["code"])
"""


def supervise(does: str, others: dict[int, Wire]) -> Supervisor:
    """A supervisor of process 0 of 2, which does that."""
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD + does, str(fd)], pass_fds=[fd], cwd=ROOT
        )
    child.returncode = 0  # it is the supervisor who waits for it
    company = Company(
        place=Place("here", 1, 2, 0),
        names=("process 0 of 2 (a)", "process 1 of 2 (b)"),
        wires=others,
        devices=None,
        thread_pool=1,
    )
    return Supervisor(
        company, child=child.pid, wire=Wire(ours), words=Path("words"), heartbeat=1.0
    )


def listen_to(wire: Wire, *, say: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """Another supervisor: says what it says, and returns the first that matters."""
    for message in say:
        wire.send(**message)
    while True:
        message = wire.receive(30)
        if "beat" not in message:
            return message
        wire.send(beat=1)


@pytest.mark.usefixtures("quiet_signals")
@pytest.mark.parametrize(
    ("does", "said", "code"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "process 0 of 2 (a) was killed by SIGKILL (code 137); see words",
            1,
        ),
        (
            "os.kill(os.getpid(), signal.SIGABRT)",
            "process 0 of 2 (a) was killed by SIGABRT (code 134); see words",
            1,
        ),
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            "process 0 of 2 (a) was killed by SIGSEGV (code 139); see words",
            1,
        ),
        ("sys.exit(3)", "process 0 of 2 (a) ended with code 3", 1),
        (
            "wire.send(fault=dict(process=0, line='x: y', code=2, is_said=True))",
            "x: y",
            2,
        ),
    ],
    ids=["killed", "aborted", "segfault", "left", "said so"],
)
def test_what_becomes_of_a_process_is_told(does: str, said: str, code: int) -> None:
    mine, theirs = pair()
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(listen_to, theirs)
        supervisor = supervise(does, {1: mine})
        assert supervisor.run() == code
        assert supervisor.fault is not None
        assert supervisor.say(supervisor.fault) == said
        assert heard.result()["fault"]["process"] == 0


@pytest.mark.usefixtures("quiet_signals")
def test_a_process_that_is_lost_ends_the_others() -> None:
    mine, theirs = pair()
    theirs.close()
    supervisor = supervise(WAITS, {1: mine})
    assert supervisor.run() == 1
    assert supervisor.fault is not None
    assert supervisor.say(supervisor.fault).startswith(
        "process 1 of 2 (b) was lost (its connection closed)"
    )


@pytest.mark.usefixtures("quiet_signals")
def test_a_process_that_is_silent_is_lost() -> None:
    mine, theirs = pair()
    supervisor = supervise(WAITS, {1: mine})
    assert supervisor.run() == 1
    assert supervisor.fault is not None
    said = supervisor.say(supervisor.fault)
    assert said == "process 1 of 2 (b) was not heard of for 1 s"
    theirs.close()


STOPS = """
wire.send(training="run")
heard = 0
while heard < 2:
    message = wire.receive(30)
    heard += "stop" in message
    if "stop" in message and heard == 1:
        wire.send(stopping=1)
import time
time.sleep(1.5)  # it saves
wire.send(ended=1)
sys.exit(130)
"""


@pytest.mark.usefixtures("quiet_signals")
def test_who_stops_has_the_time_that_a_save_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All are told to stop, one after the other; only the first must be answered."""
    monkeypatch.setattr("runner.processes.supervisor._ANSWER", 1.0)
    mine, theirs = pair()
    supervisor = supervise(STOPS, {1: mine})
    supervisor.heartbeat = 30.0

    def others() -> None:
        theirs.send(stop="process 1 of 2 (b) was told to stop (SIGTERM)")
        while "ended" not in theirs.receive(30):
            if supervisor.asked and supervisor.stops is None and not again.is_set():
                again.set()
                theirs.send(stop="and again")
        theirs.send(ended=1)

    again = threading.Event()
    thread = threading.Thread(target=others)
    thread.start()
    assert supervisor.run() == 130
    assert supervisor.fault is None
    assert again.is_set()
    thread.join()


@pytest.mark.usefixtures("quiet_signals")
def test_who_does_not_answer_a_stop_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.processes.supervisor._ANSWER", 0.5)
    mine, theirs = pair()
    supervisor = supervise("wire.send(training='run')" + WAITS, {1: mine})
    supervisor.heartbeat = 30.0
    theirs.send(stop="process 1 of 2 (b) was told to stop (SIGTERM)")
    assert supervisor.run() == 1
    assert supervisor.fault is not None
    said = supervisor.say(supervisor.fault)
    assert said == "process 0 of 2 (a) did not stop within 0.5 s"
    theirs.close()


@pytest.mark.usefixtures("quiet_signals")
def test_a_signal_stops_a_run_that_trains_and_ends_one_that_does_not() -> None:
    mine, theirs = pair()
    supervisor = supervise(WAITS, {1: mine})
    supervisor.signals.append(signal.SIGTERM)
    assert supervisor.run() == 130
    assert supervisor.fault is not None
    said = supervisor.say(supervisor.fault)
    assert said == "process 0 of 2 (a) was stopped (SIGTERM)"
    theirs.close()


@pytest.mark.usefixtures("quiet_signals")
def test_the_words_of_another_hold_for_all() -> None:
    mine, theirs = pair()
    fault = {"process": 1, "line": "ValueError: no", "code": 2, "is_said": True}
    theirs.send(fault=fault)
    supervisor = supervise(WAITS, {1: mine})
    assert supervisor.run() == 2
    assert supervisor.fault is not None
    assert supervisor.say(supervisor.fault) == "process 1 of 2 (b): ValueError: no"
    theirs.close()


def test_a_value_is_that_of_process_0(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = threading.Event()

    def leave(_: int) -> None:
        left.set()
        threading.Event().wait()  # nothing comes after an exit

    monkeypatch.setattr(os, "_exit", leave)
    words = tmp_path / "words"
    words.touch()
    hub, mine = pair()
    follower = Connected(mine, index=1, count=2, words=words)
    hub.send(value=[True, "", 8])
    assert follower.share("its own") == [True, "", 8]
    hub.send(go=1)
    follower.meet()
    assert hub.receive(10) == {"arrived": 1}
    hub.send(stop="because")
    hub.send(beat=1)
    assert hub.receive(10) == {"beat": 1}
    assert follower.stop_reason() == "because"
    hub.send(fault={"process": 1, "line": "its own words", "code": 2})
    with pytest.raises(PeerLostError, match="its own words") as raised:
        follower.share(None)
    assert raised.value.exit_code == 2
    assert not left.is_set()
    hub.close()
    assert left.wait(10)  # none stays without a supervisor


# --- the record of a process that is gone


FILES = {"metrics": "metrics.jsonl", "states": "states.jsonl"}


def test_a_record_is_closed_for_a_process_that_is_gone(tmp_path: Path) -> None:
    manifest = {"status": "running", "reason": "", "steps": 0, "digests": {}}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    rows = [{"phase": "train", "step": step} for step in range(3)]
    rows.append({"phase": "eval", "step": 3})
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"phase": "tr')
    close_record(tmp_path, "process 1 was lost", files=FILES)
    closed = json.loads((tmp_path / "run.json").read_text())
    assert (closed["status"], closed["reason"]) == ("failed", "process 1 was lost")
    assert closed["steps"] == 3
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    digest = sha256(whole.encode()).hexdigest()
    assert closed["digests"] == {"metrics": digest}
    assert closed["digest"] == digest_manifest(closed)

    close_record(tmp_path, "again", files=FILES)  # it has ended
    assert json.loads((tmp_path / "run.json").read_text()) == closed
    close_record(tmp_path / "nowhere", "no run yet", files=FILES)


def test_a_record_does_not_choose_whom_this_process_connects_to(
    compose_config: Make,
) -> None:
    config = compose_config("+experiment=mesh/hosts2x4")
    address = "evil.invalid:1"
    there = {"num_processes": 2, "coordinator_address": address, "process_id": 1}
    config["mesh"]["distributed"] = there
    record: Any = SimpleNamespace(config=config)
    asked = spec_of(record).mesh.distributed
    assert asked == DistributedSpec(num_processes=2)
    mine = {
        "mesh.distributed.coordinator_address": "mine:1",
        "mesh.distributed.process_id": 0,
    }
    asked = spec_of(record, changes=mine, may_change=IN_REPRODUCE).mesh.distributed
    assert asked == DistributedSpec(2, "mine:1", 0)


def test_what_is_not_the_same_in_all_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(Peers):
        met = 0

        def share(self, value: Any) -> Any:
            return {**value, "data": "theirs"}

        def meet(self) -> None:
            self.met += 1

    other = Other()
    monkeypatch.setattr("runner.following.peers", lambda: other)
    agree_on({"keys": "mine"})
    assert other.met == 1
    with pytest.raises(ConfigError) as raised:
        agree_on({"keys": "mine", "data": "mine"})
    assert str(raised.value) == (
        "mesh.distributed: other data than in process 0 (got 'mine'). All processes "
        "must read the same files."
    )
    assert other.met == 1
