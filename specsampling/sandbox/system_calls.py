"""Lists the system calls that a judged program may make; all others are refused.

The list holds what Python 3.10 to 3.14 and its standard library ask of glibc and musl, except for
new processes, networks and other programs. So a program cannot take memory that no limit counts
(semaphores, messages, rings, keys, sockets' buffers), nor use a call that a later kernel brings.

A refused call fails as if the kernel did not have it (ENOSYS), and every libc then has another way.
A new process fails as if there were too many (EAGAIN). Some calls are refused for an argument only.
This module knows nothing about programs and how they are started.
"""

import platform
import re
import struct
import sys

# Each name has its numbers on x86_64 and on aarch64, which lacks many old calls (-).
_NUMBERS = """
# Memory.
    brk 12 214, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233,
    msync 26 227,
# Files that are open.
    read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68,
    preadv 295 69, pwritev 296 70, preadv2 327 286, pwritev2 328 287, lseek 8 62, close 3 57,
    close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24, flock 73 32, fsync 74 82,
    fdatasync 75 83, ftruncate 77 46, fallocate 285 47, fadvise64 221 223, sendfile 40 71,
    copy_file_range 326 285, pipe 22 -, pipe2 293 59, getdents 78 -, getdents64 217 61,
# Files by name. No attribute is set, no device made, nobody else's file synced.
    open 2 -, openat 257 56, creat 85 -, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79,
    statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48,
    faccessat2 439 439, readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49, fchdir 81 50,
    mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -,
    renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36,
    chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, truncate 76 45, utime 132 -,
    utimes 235 -, utimensat 280 88, umask 95 166, getxattr 191 8, lgetxattr 192 9,
    fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13,
# Waiting for files, and talking over a pair of sockets, as asyncio's loop does.
    poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -,
    epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22,
    epoll_pwait2 441 441, sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockname 51 204,
    getpeername 52 205, getsockopt 55 209,
# Threads. glibc ends the process where a thread's rseq is refused.
    futex 202 98, set_robust_list 273 99, rseq 334 293, gettid 186 178, sched_yield 24 124,
    sched_getaffinity 204 123, membarrier 324 283, exit 60 93, exit_group 231 94,
    restart_syscall 219 128,
# Signals, within the namespace.
    rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
    rt_sigsuspend 130 133, rt_sigtimedwait 128 137, sigaltstack 131 132, pause 34 -, kill 62 129,
    tkill 200 130, tgkill 234 131, alarm 37 -, setitimer 38 103, getitimer 36 102, wait4 61 260,
    waitid 247 95,
# Clocks and chance.
    time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114,
    clock_nanosleep 230 115, nanosleep 35 101, times 100 153, getrandom 318 278,
# What the process is and may.
    getpid 39 172, getppid 110 173, getpgid 121 155, getpgrp 111 -, getsid 124 156,
    getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148,
    getresgid 120 150, getgroups 115 158, getpriority 140 141, setpriority 141 140,
    getrlimit 97 163, setrlimit 160 164, prlimit64 302 261, getrusage 98 165, sysinfo 99 179,
    uname 63 160,
# Those that depend on an argument; fork and vfork fail, and clone starts threads only.
    socketpair 53 199, prctl 157 167, ioctl 16 29, fcntl 72 25, fork 57 -, vfork 58 -, clone 56 220,
"""
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's numbers of the machines

EPERM, EAGAIN, EINVAL, ENOTTY, ENOSYS, EAFNOSUPPORT = 1, 11, 22, 25, 38, 97

# The place of the argument, its allowed values, and the error of all others.
_CHECKED: dict[str, tuple[int, tuple[int, ...], int]] = {
    "socketpair": (0, (1,), EAFNOSUPPORT),  # AF_UNIX
    "prctl": (0, (15, 16), EINVAL),  # a thread's name
    # TCGETS TCGETS2 TIOCGWINSZ (is it a terminal?) FIONREAD FIONBIO FIONCLEX FIOCLEX FICLONE. The
    # last serves Python 3.14's copies, which have another way only if the file system refuses it.
    "ioctl": (1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x40049409), ENOTTY),
    # F_DUPFD F_GETFD F_SETFD F_GETFL F_SETFL F_GETLK F_SETLK F_SETLKW F_DUPFD_CLOEXEC F_GETPIPE_SZ,
    # but not F_SETPIPE_SZ. SQLite needs the locks, which get slow before they take much memory.
    "fcntl": (1, (*range(8), 1030, 1032), EPERM),
    "fork": (0, (), EAGAIN),
    "vfork": (0, (), EAGAIN),
}
CLONE_THREAD, CLONE_NEW_NAMESPACES = 0x10000, 0x7E020000


def has_filter() -> bool:
    """Tell whether system calls can be filtered here. The filter stops root's forks, too."""
    return sys.platform == "linux" and platform.machine() in MACHINES and sys.maxsize > 2**32


def numbers_of(machine: str) -> dict[str, int]:
    """Return the listed calls that the machine has, with their numbers."""
    column = list(MACHINES).index(machine) + 1
    rows = re.findall(r"(\w+) (\d+|-) (\d+|-)", _NUMBERS)
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def filter_program(machine: str) -> bytes:
    """Return the filter in classic BPF, in steps (code, jump if true, jump if false, operand)."""
    load, equal, has_bits, answer = 0x20, 0x15, 0x45, 0x06
    allow, kill, fail = 0x7FFF0000, 0x80000000, 0x00050000
    steps = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine]), (answer, 0, 0, kill)]
    steps += [(load, 0, 0, 0)]
    numbers = numbers_of(machine)
    for name, number in numbers.items():
        if name not in (*_CHECKED, "clone"):
            steps += [(equal, 0, 1, number), (answer, 0, 0, allow)]
    for name, (place, values, error) in _CHECKED.items():
        if name in numbers:
            checks = [(load, 0, 0, 16 + 8 * place)]
            for value in values:
                checks += [(equal, 0, 1, value), (answer, 0, 0, allow)]
            checks += [(answer, 0, 0, fail | error)]
            steps += [(equal, 0, len(checks), numbers[name]), *checks]
    steps += [(equal, 0, 5, numbers["clone"]), (load, 0, 0, 16), (has_bits, 0, 2, CLONE_THREAD)]
    steps += [(has_bits, 1, 0, CLONE_NEW_NAMESPACES), (answer, 0, 0, allow)]
    steps += [(answer, 0, 0, fail | EAGAIN), (answer, 0, 0, fail | ENOSYS)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
