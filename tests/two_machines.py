"""Two machines on one computer: network namespaces with a cable between them, and host names and processes of their own.

They share the disk, as machines of a cluster share a folder. A machine can be switched off, and the cable unplugged.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runs import ROOT

NEEDED = ("ip", "unshare", "hostname", "mount")
PORT = 29400
SECONDS_TO_START = 90


def describe_missing() -> str:
    """Return why no network namespaces can be made here, or an empty string if they can."""
    if missing := [name for name in NEEDED if not shutil.which(name)]:
        return f"needs the commands {', '.join(missing)}"
    name = f"probe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"needs network namespaces, which root may create ({done.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


@dataclass
class Launched:
    """A torchrun on a machine, and the files with what it and its ranks write."""

    process: "subprocess.Popen[bytes]"
    out: Path
    err: Path

    def wait(self, seconds: float) -> int:
        """Return its exit code; it is an error if it has not ended after this many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {seconds} s: {self.read()[-3000:]}") from None

    def read(self) -> str:
        """Return all that was written so far."""
        return self.out.read_text() + self.err.read_text()


@dataclass
class Machine:
    """A network namespace with one interface, `eth0`."""

    name: str
    address: str
    known: list[tuple[str, str]]  # the names and addresses of all machines
    launched: list[Launched] = field(default_factory=list)

    def torchrun(self, folder: Path, options: list[str], words: list[str]) -> Launched:
        """Start torchrun with one process in `folder`, under a host name and in a process namespace of its own."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
        command += [*options, str(ROOT / "train.py"), *words]
        hosts = folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self.known))
        inside = f'hostname {self.name} && mount --bind {hosts} /etc/hosts && exec "$@"'
        namespaces = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--pid", "--fork", "--kill-child"]
        out, err = (folder / f"{self.name}.{len(self.launched)}.{name}" for name in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
            process = subprocess.Popen(
                [*namespaces, "--mount-proc", "sh", "-c", inside, "sh", *command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self.launched.append(Launched(process, out, err))
        return self.launched[-1]

    def switch_off(self) -> None:
        """Kill every process of the machine with SIGKILL: the kernel does so when the first of a namespace ends."""
        for launched in self.launched:
            if launched.process.poll() is None:
                launched.process.kill()
                launched.process.wait()

    def plug(self, state: str) -> None:
        """Set the interface `up`, or `down` as if the cable was unplugged."""
        run_ip("-n", self.name, "link", "set", "eth0", state)

    def bytes_sent(self) -> int:
        """Return how many bytes the machine has sent over its interface."""
        shown = json.loads(run_ip("-n", self.name, "-s", "-j", "link", "show", "eth0"))
        return int(shown[0]["stats64"]["tx"]["bytes"])


def run_ip(*words: str) -> str:
    """Run `ip` and return what it writes."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Yield two machines with a cable between them; remove both in the end, with all their processes."""
    subnet = f"10.{os.getpid() % 200 + 20}.7"
    known = [(f"node{number}-{os.getpid()}", f"{subnet}.{number}") for number in (1, 2)]
    machines = tuple(Machine(name, address, known) for name, address in known)
    try:
        for machine in machines:
            run_ip("netns", "add", machine.name)
        first, second = machines
        run_ip("-n", first.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second.name)
        for machine in machines:
            run_ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "eth0")
            for name in ("lo", "eth0"):
                run_ip("-n", machine.name, "link", "set", name, "up")
        yield first, second
    finally:
        for machine in machines:
            machine.switch_off()
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)


def wait_until(is_so: Callable[[], object], what: Callable[[], str], seconds: float = SECONDS_TO_START) -> None:
    """Wait until `is_so` returns something true; `what` describes the state if that takes too long."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)
