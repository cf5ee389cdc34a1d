"""Confine this process and all that it starts, for ever, and become COMMAND:

    python -IS confine.py [--read=PATH]... [--write=PATH]... [options] -- COMMAND

`--no-sockets` denies every socket but pairs; `--namespaces` furnishes those that were just made: a
root of nothing but these paths, and a /dev/shm; `--loopback` brings it up in a network that was;
`--abi=N` uses no more of Landlock than that version has, and nothing of it with 0.

Covered: only these paths can be opened, run and changed (Landlock, which binds root too); no socket
of another program in the file system, which Landlock lets through: without a root of its own, IP
and netlink are all there is; no io_uring, which would be a way around; no keyring; no capability,
and none by a setuid program. Not covered: a socket in a folder that may be read; without a root of
its own, names, sizes and times of all files.

Exit code 125 where the kernel refuses. It imports little, since every run starts with it.
"""

import ctypes
import errno
import os
import sys

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """OSError where a call of libc has failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


# --------------------------------------------------------------------------------------------------
# Landlock: docs.kernel.org/userspace-api/landlock.html

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_BLOCK, TRUNCATE, IOCTL_DEV = 1 << 6, 1 << 11, 1 << 14, 1 << 15
READ = EXECUTE | READ_FILE | READ_DIR
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # the others are for folders
# How many rights on files each version knows: moves between folders came with 2, truncate with 3,
# ioctl of devices with 5. TCP came with 4, scopes (abstract sockets, signals) with 6.
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
TCP, SCOPES = 3, 3


class Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def syscall(number: int, *args: object) -> int:
    return check(libc.syscall(ctypes.c_long(number), *args), "Landlock")


def landlock_abi() -> int:
    """The version of Landlock in this kernel; OSError without one."""
    return syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def restrict(
    readable: list[str], writable: list[str], listable: list[str], abi: int, tcp: bool
) -> None:
    """Open nothing but these files and folders from now on; those that are not there are passed
    over."""
    every = (1 << RIGHTS.get(abi, 16)) - 1
    facts = [every, TCP if abi >= 4 and not tcp else 0, SCOPES if abi >= 6 else 0]
    attr = (ctypes.c_uint64 * 3)(*facts)
    size = ctypes.c_size_t(8 if abi < 4 else 16 if abi < 6 else 24)
    rules = ctypes.c_int(syscall(CREATE_RULESET, ctypes.byref(attr), size, ctypes.c_uint32(0)))
    # /dev/stdout opens the log anew
    writable = [*writable, "/proc/self/fd/1", "/proc/self/fd/2"]
    write = every & ~(MAKE_CHAR | MAKE_BLOCK)
    for paths, allowed in ((readable, READ), (writable, write), (listable, READ_DIR)):
        for path in paths:
            allow(rules, path, allowed)
    syscall(RESTRICT_SELF, rules, ctypes.c_uint32(0))


def allow(rules: ctypes.c_int, path: str, allowed: int) -> None:
    try:
        fd = os.open(path, os.O_PATH)
    except OSError:
        return
    allowed = allowed if os.path.isdir(path) else allowed & ON_FILES  # noqa: PTH112  # pathlib loads slowly
    beneath = Beneath(allowed, fd)
    try:
        syscall(ADD_RULE, rules, ctypes.c_int(1), ctypes.byref(beneath), ctypes.c_uint32(0))
    except OSError as error:
        if error.errno != errno.EBADFD:  # a pipe needs no rule
            raise
    os.close(fd)


# --------------------------------------------------------------------------------------------------
# seccomp: a program for the kernel's filter machine, linux/filter.h; jumps count lines

# As linux/audit.h names the machine; socket(2), and add_key(2), request_key(2), keyctl(2) on it
MACHINES = {
    "x86_64": (0xC000003E, 41, (248, 249, 250)),
    "aarch64": (0xC00000B7, 198, (217, 218, 219)),
}
IO_URING_SETUP, X32 = 425, 0x40000000
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x80000000
UNIX, IP, NETLINK = 1, (2, 10), 16  # by the last, glibc lists interfaces


class Line(ctypes.Structure):
    _fields_ = (
        *(("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte)),
        ("k", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.POINTER(Line)))


def filter_calls(families: tuple[int, ...]) -> None:
    """Deny sockets of all families but these, and what leads around that."""
    machine, new_socket, keyrings = MACHINES[os.uname().machine]

    def when(test: int, value: int, action: int) -> list[Line]:
        return [Line(test, 0, 1, value), Line(RETURN, 0, 0, action)]

    lines = [Line(LOAD, 0, 0, MACHINE), Line(EQUAL, 1, 0, machine), Line(RETURN, 0, 0, KILL)]
    lines += [Line(LOAD, 0, 0, NUMBER), *when(AT_LEAST, X32, DENY)]
    for number in (IO_URING_SETUP, *keyrings):
        lines += when(EQUAL, number, DENY)
    lines += [Line(EQUAL, 1, 0, new_socket), Line(RETURN, 0, 0, ALLOW)]
    lines += [Line(LOAD, 0, 0, FIRST_ARGUMENT)]
    for family in families:
        lines += when(EQUAL, family, ALLOW)
    lines += [Line(RETURN, 0, 0, DENY)]
    program = Program(len(lines), (Line * len(lines))(*lines))
    prctl(22, 2, ctypes.byref(program), "seccomp")  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


# --------------------------------------------------------------------------------------------------
# Namespaces

NEW = "/tmp"  # which every system has; what is there can still be reached by what is open
BIND, SAFE, DETACH = 4096 | 16384, 2 | 4, 2  # MS_BIND, MS_REC; MS_NOSUID, MS_NODEV; MNT_DETACH
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
STREAMS = ("stdin", "stdout", "stderr")  # in /dev


def raise_loopback() -> None:
    """A new network has it down: SIOCSIFFLAGS, IFF_UP | IFF_RUNNING of linux/if.h."""
    fd = check(libc.socket(2, 2, 0), "socket")
    check(libc.ioctl(fd, 0x8914, b"lo".ljust(16, b"\0") + b"\x41\0" + bytes(22)), "loopback")
    os.close(fd)


def make_root(paths: list[str]) -> None:
    """Make a root of nothing but these files and folders, and a /dev/shm of its own, by which
    processes share memory."""
    here, links = os.getcwd(), dict[str, str]()  # noqa: PTH109
    # Landlock has the single files of /etc: a hundred mounts take a while
    real = {follow(path, links) for path in paths}
    real = {"/etc" if path.startswith("/etc/") else path for path in real}
    opened = {path: os.open(path, os.O_PATH) for path in sorted(real) if os.path.lexists(path)}
    mount("root", NEW, "tmpfs", SAFE, "mode=755")
    bound = list[str]()
    for path, fd in opened.items():
        if not any(path.startswith(f"{folder}/") for folder in bound) and path != "/dev/shm":
            bind(fd, path)
            bound.append(path)
        os.close(fd)
    links |= {f"/dev/{name}": f"/proc/self/fd/{n}" for n, name in enumerate(STREAMS)}
    for path, target in links.items():
        if not os.path.lexists(NEW + path):
            os.makedirs(os.path.dirname(NEW + path), exist_ok=True)  # noqa: PTH103, PTH120
            os.symlink(target, NEW + path)  # noqa: PTH211
    os.makedirs(f"{NEW}/dev/shm", exist_ok=True)  # noqa: PTH103
    mount("shm", f"{NEW}/dev/shm", "tmpfs", SAFE, "mode=1777")
    os.chdir(NEW)
    dot = ctypes.c_char_p(b".")
    check(libc.syscall(ctypes.c_long(PIVOT_ROOT[os.uname().machine]), dot, dot), "pivot_root")
    check(libc.umount2(dot, DETACH), "umount")  # the old root, which lies on the new one
    os.chdir(here)


def follow(path: str, links: dict[str, str]) -> str:
    """The real path of a path; the links on the way are added."""
    real = ""
    for part in path.strip("/").split("/"):
        real = f"{real}/{part}"
        if os.path.islink(real):  # noqa: PTH114
            links[real] = os.readlink(real)  # noqa: PTH115
            folder = os.path.dirname(real)  # noqa: PTH120
            real = follow(os.path.normpath(os.path.join(folder, links[real])), links)  # noqa: PTH118
    return real


def bind(fd: int, path: str) -> None:
    """Show an open file or folder at its old path in the new root."""
    source, target = f"/proc/self/fd/{fd}", NEW + path
    if os.path.isdir(source):  # noqa: PTH112
        os.makedirs(target, exist_ok=True)  # noqa: PTH103
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    mount(source, target, "", BIND)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = (source.encode(), target.encode(), kind.encode())
    check(libc.mount(*words, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


# --------------------------------------------------------------------------------------------------
# The rest


def prctl(option: int, first: int, second: object, what: str) -> None:
    zero = ctypes.c_ulong(0)
    second = ctypes.c_ulong(second) if isinstance(second, int) else second
    check(libc.prctl(option, ctypes.c_ulong(first), second, zero, zero), what)


def drop_capabilities() -> None:
    """Root's too: one of them alone reads the environment of every process."""
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP, which an ordinary user may not
    libc.prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, none), "capset")


def main() -> None:
    split = sys.argv.index("--")
    options = [option.partition("=") for option in sys.argv[1:split]]
    names = {name for name, _, _ in options}
    paths = {kind: [p for name, _, p in options if name == kind] for kind in ("--read", "--write")}
    most = [int(version) for name, _, version in options if name == "--abi"]
    no_sockets = "--no-sockets" in names
    try:
        prctl(38, 1, 0, "no_new_privs")  # PR_SET_NO_NEW_PRIVS
        if "--loopback" in names:
            raise_loopback()
        if "--namespaces" in names:
            make_root([*paths["--read"], *paths["--write"]])
        if most != [0]:
            abi = min([landlock_abi(), *most])
            listable = ["/"] if "--namespaces" in names else []  # of our own root
            restrict(paths["--read"], paths["--write"], listable, abi, tcp=not no_sockets)
        drop_capabilities()
        families = (*IP, NETLINK, *([UNIX] if "--namespaces" in names else []))
        filter_calls(() if no_sockets else families)
    except (OSError, KeyError) as error:  # KeyError: another machine
        print(f"error: {getattr(error, 'strerror', '') or error}", file=sys.stderr)
        sys.exit(125)
    command = sys.argv[split + 1 :]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(126 if error.errno == errno.EACCES else 127)


if __name__ == "__main__":
    main()
