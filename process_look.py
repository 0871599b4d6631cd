"""The shells that look through a container's processes for those of one exec, and signal them.

`_LOOK` is nothing but builtins of `/bin/sh`, and `/proc`; it forks nothing, so a full pids limit does not stop it once
it runs. For each line that it is given it walks the processes once, signals those of the exec, and tells what it found.

A process is the exec's if it bears the mark; or is the child of one that is; or is of a session that one is of. (The
engine starts each exec in a session of its own, and only descendants come to be in it. That finds what has another
environment, or wrote over it.) The first process, its session, and the shell itself never are.

The first shell runs as the exec's user: `environ` is open to a process of the same user only (root in a container lacks
CAP_SYS_PTRACE). Where it finds processes of others that are younger than the exec, one more is started as that user;
where it may not signal one, as root; if the caller's policy allows execs as that user. None is privileged: each can do
what any exec in that container could, with a fixed script, whose arguments are made here. What it says comes from the
container: it is taken for numbers, within bounds.
"""

import asyncio
import contextlib
import re
import secrets
from collections.abc import Callable, Set

import msgspec

from calls import Calls
from errors import RunnerError
from exec_connection import Exec

GRACE_S = 1.0
"""Seconds between SIGTERM and SIGKILL."""
PAUSE_S = (0.005, 0.1)
"""Seconds between two looks, at first and at last."""
TRIES = 3
"""How often the first shell is started, until one runs."""
MAX_USERS = 4
"""Users as which a container is looked through, beside the exec's own."""
MAX_TOLD = 64 * 1024
"""Bytes that one look may tell."""
MAX_SHOWN = 300
"""Characters of what a container says in place of an answer that are passed on."""
MAX_SESSIONS = 1000
"""Sessions of one exec."""

_CHECK = "DR_LOOK"

# Arguments: the mark; a mark of the shell's own, by which it sees that it can read environments (there is a /proc, and
# this shell's `read` gets over NULs); the exec's age in ticks. Each line of input: a signal (or 0), and sessions known
# to be the exec's. Each answer: `other PID UID:GID` for processes that it may not signal, or may not read (of those
# that are younger than the exec, and did not come from outside, as execs do: of these the engine tells); `root PID
# SESSION` for those from outside; then `found COUNT DENIED MAIN SESSION...`, MAIN being 1 if the exec's own is there.
_LOOK = r"""
stat() {
  text=
  { while IFS= read -r line || [ "$line" ]; do text="$text $line"; done; } 2>/dev/null <"/proc/$1/stat"
  set -- ${text##*") "}
  [ $# -ge 20 ] || return 1
  state=$1 parent=$2 group=$3 session=$4 threads=${18} born=${20}
}
marked() {
  readable=
  {
    readable=1
    while IFS= read -r line || [ "$line" ]; do case $line in *"$2"*) return 0 ;; esac; done
  } 2>/dev/null <"/proc/$1/environ"
  return 1
}
owner() {
  uid= gid=
  while read -r key _ id _; do
    case $key in Uid:) uid=$id ;; Gid:) gid=$id ;; esac
  done 2>/dev/null <"/proc/$1/status"
}
tell() {
  owner "$1"
  [ "$uid" ] && echo "other $1 $uid:$gid"
}
take() {
  ours="$ours$pid "
  case $session in 0 | "$first" | "$own") return ;; esac
  case $sessions in *" $session "*) ;; *) sessions="$sessions$session " ;; esac
  case $seen in *" $session "*) ;; *) seen="$seen$session " ;; esac
}
row() {
  pid=${1%%,*} parent=${1#*,} session=${1%,*} group=${1##*,}
  parent=${parent%%,*} session=${session##*,}
}
walk() {
  ours=' ' seen=' ' sessions=" $* " rows= strangers=
  for each in /proc/[0-9]*; do
    pid=${each#/proc/}
    case $pid in 1 | "$self") continue ;; esac
    stat "$pid" || continue
    case $state$threads in [ZX][01]) continue ;; esac
    if marked "$pid" "$mark"; then take
    elif [ ! "$readable" ] && [ "$parent" -gt 0 ] && [ "$born" -ge "$since" ]; then strangers="$strangers $pid"
    fi
    rows="$rows $pid,$parent,$session,$group"
  done
  grown=1
  while [ "$grown" ]; do
    grown=
    for each in $rows; do
      row "$each"
      case $ours in *" $pid "*) continue ;; esac
      case $ours in *" $parent "*) take; grown=1; continue ;; esac
      case $sessions in *" $session "*) take; grown=1 ;; esac
    done
  done
}
send() {
  kill "-$1" "$pid" 2>/dev/null && return
  stat "$pid" || return
  case $state in [ZX]) return ;; esac
  denied=$((denied + 1))
  [ "$denied" -le 100 ] && tell "$pid"
}
mark=$1 check=$2 self=$$
stat "$self" && marked "$self" "$check" || exit 1
own=$session since=$((born - $3)) first=1
stat 1 && first=$session
owner "$self"
echo "ready $self $uid:$gid"
while read -r signal known; do
  walk $known
  count=0 denied=0 listed=0 main=0
  for each in $rows; do
    row "$each"
    case $ours in
      *" $pid "*)
        count=$((count + 1))
        case $parent in 0) main=1 ;; esac
        case $signal in 0) continue ;; KILL)
          # The whole group in one go: what forks meanwhile is hit too.
          case $sessions in *" $session "*) kill -KILL "-$group" 2>/dev/null ;; esac ;;
        esac
        send "$signal" ;;
      *) case $parent in 0) echo "root $pid $session" ;; esac ;;
    esac
  done
  for pid in $strangers; do
    case $ours in *" $pid "*) continue ;; esac
    stat "$pid" || continue
    case $state$threads in [ZX][01]) continue ;; esac
    listed=$((listed + 1))
    [ "$listed" -le 100 ] || break
    tell "$pid"
  done
  echo "found $count $denied $main$seen"
done
""".strip()

# It comes by standard input, up to an empty line: every watcher of events is told an exec's command.
_LOAD = """while IFS= read -r line && [ "$line" ]; do text="$text$line
"; done; eval "$text\""""


class Found(msgspec.Struct):
    """What one look found.

    Args:
        count: processes of the exec that run.
        denied: how many of them may not be signalled.
        main: the process that the engine started is among them.
        sessions: theirs.
        others: the users of younger processes that may not be read, by process.
        roots: the sessions of processes that came from outside, as the exec's own did, by process.
    """

    count: int = 0
    denied: int = 0
    main: bool = False
    sessions: set[int] = msgspec.field(default_factory=set)
    others: dict[int, str] = msgspec.field(default_factory=dict)
    roots: dict[int, int] = msgspec.field(default_factory=dict)


class Looks:
    """The shells that look through one container, each as another user; a context manager.

    Args:
        calls: the engine.
        container: its id.
        arguments: makes those of the shells, but for their own marks.
    """

    def __init__(self, calls: Calls, container: str, arguments: Callable[[], list[str]]) -> None:
        self.sessions: set[int] = set()
        """Known to be the exec's: of the last look and the one before, as a number may come to be another's."""
        self.found_main = False
        """The process that the engine started has been found."""
        self.execs: set[str] = set()
        """Those of the shells."""
        self._calls = calls
        self._container = container
        self._arguments = arguments
        self._shells: list[_Shell] = []
        self._users: set[str] = set()
        self._others: Set[int] = set()
        self._unknown: Set[int] = set()
        self._seen: set[int] = set()

    def __enter__(self) -> "Looks":
        return self

    def __exit__(self, *exc: object) -> None:
        for shell in self._shells:
            shell.process.close()

    async def end_all(self) -> None:
        """SIGTERM, a grace, SIGKILL, until two looks in a row find none: what forks may slip through one."""
        now = asyncio.get_running_loop().time
        kill_at = now() + GRACE_S
        pause_s, longest_s = PAUSE_S
        signal, empty = "TERM", 0
        while True:
            found = await self.look(signal)
            empty = 0 if found.count else empty + 1
            if empty == 2:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)
            signal = "0" if now() < kill_at else "KILL"

    async def look(self, signal: str) -> Found:
        """Have every shell look once, and more of them where these may not; "0" is no signal."""
        if not self._shells:
            await self._start_first()
        looked = 0
        found = Found()
        while looked < len(self._shells):
            shell = self._shells[looked]
            each = await shell.look(signal, self.sessions)
            found = each if looked == 0 else _merged(found, each)
            looked += 1
            if looked == len(self._shells):
                await self._start_as(found)
        for shell in self._shells:
            found.roots.pop(shell.pid, None)
        self.sessions, self._seen = found.sessions | self._seen, found.sessions
        self.found_main |= found.main
        self._unknown = found.others.keys() & self._others
        self._others = found.others.keys()
        if len(self.sessions) > MAX_SESSIONS:
            raise RunnerError("exec_failed", f"they are of more than {MAX_SESSIONS} sessions")
        return found

    def unknown(self) -> str:
        """What nobody may look into, twice in a row (once: it was ending), in words; empty if there is nothing."""
        return f"{len(self._unknown)} processes as young as it may not be looked into" if self._unknown else ""

    async def _start_first(self) -> None:
        """Start the shell that all depends on: where processes are as many as may be, not every try succeeds."""
        for _ in range(TRIES - 1):
            with contextlib.suppress(RunnerError):
                await self._start("")
                return
        await self._start("")

    async def _start_as(self, found: Found) -> None:
        """Start a shell as a user who may do what those that looked may not, if there is one left to try."""
        wanted = sorted(set(found.others.values())) + (["0:0"] if found.denied else [])
        for user in wanted:
            if user not in self._users and len(self._users) <= MAX_USERS:
                with contextlib.suppress(RunnerError):
                    await self._start(user)
                return

    async def _start(self, user: str) -> None:
        self._users.add(user)
        shell = await _Shell.start(self._calls, self._container, user, self._arguments())
        self._shells.append(shell)
        self._users.add(shell.user)
        self.execs.add(shell.process.id)


def _merged(one: Found, other: Found) -> Found:
    """What two shells found in one container: a process is unknown, or beyond reach, only if it is to both."""
    return Found(
        count=max(one.count, other.count),
        denied=min(one.denied, other.denied),
        main=one.main or other.main,
        sessions=one.sessions | other.sessions,
        others={pid: user for pid, user in one.others.items() if pid in other.others},
        roots={pid: session for pid, session in one.roots.items() if pid in other.roots},
    )


class _Shell:
    """`_LOOK`, running: its exec, its process in the container, and its user, `UID:GID`."""

    def __init__(self, process: Exec) -> None:
        self.process = process
        self.pid = 0
        self.user = ""
        self._output = process.output()
        self._said = bytearray()

    @classmethod
    async def start(cls, calls: Calls, container: str, user: str, arguments: list[str]) -> "_Shell":
        """Start it as a user ("": the container's).

        Raises:
            RunnerError: it does not run, or cannot look at processes.
        """
        mark, age = arguments
        check = f"{_CHECK}={secrets.token_hex(16)}"
        config = {
            "Cmd": ["/bin/sh", "-c", _LOAD, "docker-runner", mark, check, age],
            "Env": [check],
            "User": user,
            "WorkingDir": "/",
            **dict.fromkeys(("AttachStdin", "AttachStdout", "AttachStderr"), True),
        }
        shell = cls(await Exec.start(calls, container, config, resolved=True))
        try:
            await shell.process.write(f"{_LOOK}\n\n".encode())
            told = await shell._line()
            if (ready := _READY.fullmatch(told)) is None:
                raise shell._failure(told)
        except BaseException:
            shell.process.close()
            raise
        shell.pid, shell.user = int(ready[1]), ready[2]
        return shell

    async def look(self, signal: str, sessions: set[int]) -> Found:
        """Look once, and send a signal to what is found."""
        found = Found()
        await self.process.write(" ".join((signal, *map(str, sorted(sessions)))).encode() + b"\n")
        told = 0
        while told <= MAX_TOLD:
            line = await self._line()
            told += len(line)
            if other := _OTHER.fullmatch(line):
                found.others[int(other[1])] = other[2]
            elif root := _ROOT.fullmatch(line):
                found.roots[int(root[1])] = int(root[2])
            elif end := _FOUND.fullmatch(line):
                found.count, found.denied = int(end[1]), int(end[2])
                found.main = end[3] == "1"
                found.sessions = set(map(int, end[4].split()))
                return found
            else:
                raise self._failure(line)
        raise self._failure("it says too much")

    async def _line(self) -> str:
        while b"\n" not in self._said:
            piece = await anext(self._output, None)
            if piece is None or len(self._said) > MAX_TOLD:
                raise self._failure(self._said.decode("utf-8", "replace"))
            self._said += piece[1]
        line, _, rest = self._said.partition(b"\n")
        self._said = rest
        return line.decode("utf-8", "replace")

    def _failure(self, told: str) -> RunnerError:
        shown = "".join(c if c.isprintable() else " " for c in told[:MAX_SHOWN]).strip()
        return RunnerError("exec_failed", f"no shell could look at the processes: {shown or 'it ended'}")


_READY = re.compile(r"ready ([0-9]{1,9}) ([0-9]{1,10}:[0-9]{1,10})")
_OTHER = re.compile(r"other ([0-9]{1,9}) ([0-9]{1,10}:[0-9]{1,10})")
_ROOT = re.compile(r"root ([0-9]{1,9}) ([0-9]{1,9})")
_FOUND = re.compile(r"found ([0-9]{1,9}) ([0-9]{1,9}) ([01]) ((?:[0-9]{1,9} )*)")
