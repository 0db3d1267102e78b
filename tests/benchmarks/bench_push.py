"""Push one large random file to a real sshd on this machine: moectl's put against scp, in turns, same cipher.

    python -m tests.benchmarks.bench_push [MEGABYTES] [ROUNDS]

moectl's figure includes what scp does not do: hashing on the host, fsync and the rename.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moectl.hosts.hostfile import Host
from moectl.hosts.ssh.remote import SSHRemote
from tests.support.sshd import Server, run_sshd


def write_random(path: Path, megabytes: int) -> str:
    """Write a file of 10⁶ · megabytes random bytes; return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as f:
        for _ in range(megabytes):
            block = os.urandom(1_000_000)
            digest.update(block)
            f.write(block)
    return digest.hexdigest()


def time_put(remote: SSHRemote, source: Path, target: Path, sha256: str) -> float:
    """Return the seconds of one verified push."""
    started = time.perf_counter()
    remote.put(source, str(target), sha256=sha256)
    return time.perf_counter() - started


def time_scp(server: Server, source: Path, target: Path) -> float:
    """Return the seconds of one copy by scp."""
    cipher = ["-c", "aes128-gcm@openssh.com", "-F", str(server.config)]
    started = time.perf_counter()
    subprocess.run(["scp", "-q", *cipher, str(source), f"bench:{target}"], check=True)
    return time.perf_counter() - started


def main(megabytes: int = 1000, rounds: int = 3) -> None:
    """Print MB/s of both and their ratio, best of `rounds`."""
    with tempfile.TemporaryDirectory() as scratch, run_sshd(Path(scratch) / "sshd") as server:
        server.add_alias("bench")
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        sha256 = write_random(source, megabytes)
        put_s, scp_s = [], []
        for _ in range(rounds):
            target.unlink(missing_ok=True)
            # A connection each time, as scp makes one.
            remote = SSHRemote(Host("bench", python=sys.executable), config=str(server.config))
            put_s.append(time_put(remote, source, target, sha256))
            remote.close()
            target.unlink()
            scp_s.append(time_scp(server, source, target))
    put, scp = megabytes / min(put_s), megabytes / min(scp_s)
    print(f"{megabytes} MB, best of {rounds}, same cipher; moectl verifies, scp does not")
    print(f"moectl {put:.0f} MB/s, scp {scp:.0f} MB/s, ratio {put / scp:.2f}")
    print("moectl", *(f"{megabytes / s:.0f}" for s in put_s), "| scp", *(f"{megabytes / s:.0f}" for s in scp_s))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
