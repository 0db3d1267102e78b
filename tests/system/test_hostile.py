"""Hostile words on their way to a host: names, paths, models, prompts arrive as they are, or are refused.

The commands are the generated ones, and really run: by every login shell that is here, and by a real sshd.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from moectl.cluster.deploy import provision
from moectl.cluster.deploy.provision import inspect_host
from moectl.cluster.deploy.task import HostResult, HostTask
from moectl.errors import CheckpointError, CommandFailed, HostError, HostsError, MoectlError
from moectl.hosts.connect import make_remote
from moectl.hosts.hostfile import Host, parse_host_string, parse_hosts
from moectl.hosts.remote import LocalRemote
from moectl.hosts.ssh.remote import SSHRemote, quote_command
from moectl.model.manifest import FileEntry
from moectl.session.deployment import DeployedRank, Deployment, decode_deployment, encode_deployment
from tests.support import hub_client
from tests.support.hub import Hub
from tests.support.mutation import refuse_or_accept
from tests.support.sshd import Server
from tests.support.tiny import write_checkpoint

PIECES = [
    *("'", '"', "`", "$", "\\", ";", "&", "|", "<", ">", "(", ")", "{", "}", "[", "]", "*", "?", "!", "#", "~", "^"),
    *("\n", "\r", "\t", " ", "=", "%", ",", "-", "--", "..", "/", "@", ":", "\x1b[2J", "\x7f", "\u202e"),
    *("$(touch pwned)", "`touch pwned`", ";touch pwned;", "\\'; touch pwned; '", "${IFS}", "$HOME", "%h", "%%"),
    *("-oProxyCommand=touch pwned", "--", "=ls", "~root", "\N{SNOWMAN}", "\U0001f600", "ü", "a", "b", ""),
]
words = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6).map("".join).filter(lambda w: "\0" not in w)
encodable = words.filter(lambda w: not any(0xD800 <= ord(c) < 0xE000 for c in w))
relaxed = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
SHELLS = [shell for shell in ("sh", "dash", "bash", "zsh", "fish", "csh", "tcsh") if shutil.which(shell)]
# These print what they got, in a way that hides nothing: each word, or each variable, with a NUL behind it.
PRINT, ENV = ("/usr/bin/printf", r"%s\0", "first"), ("/usr/bin/env", "-0")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to work in, which has to be empty in the end."""
    empty = tmp_path / "here"
    empty.mkdir()
    monkeypatch.chdir(empty)
    yield empty
    assert list(empty.iterdir()) == []
    assert not Path("~/pwned").expanduser().exists()


# Commands.


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_hands_on_what_was_meant(shell: str, here: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a=b 'c\\'"  # env would take the first for a variable, a careless shell trip over the others
    odd.mkdir()
    (odd / "printf").symlink_to("/usr/bin/printf")

    @settings(relaxed, max_examples=25)
    @given(st.lists(encodable, max_size=4), encodable)
    def run(sent: list[str], value: str) -> None:
        def said(argv: Sequence[str], env: Mapping[str, str] | None) -> list[str]:
            line = quote_command(argv, env)
            return subprocess.run([shell, "-c", line], capture_output=True, check=True).stdout.decode().split("\0")

        assert said([*PRINT, *sent], None) == ["first", *sent, ""]
        assert said([str(odd / "printf"), *PRINT[1:], *sent], {"MOECTL_WORD": value}) == ["first", *sent, ""]
        assert f"MOECTL_WORD={value}" in said(ENV, {"MOECTL_WORD": value})

    run()


def test_a_real_sshd_hands_on_what_was_meant(ssh_host: Host, here: Path) -> None:
    remote = SSHRemote(ssh_host)

    @settings(relaxed, max_examples=25)
    @given(st.lists(encodable, max_size=4), encodable)
    def run(sent: list[str], value: str) -> None:
        assert remote.run([*PRINT, *sent]).stdout.decode().split("\0") == ["first", *sent, ""]
        process = remote.start(ENV, env={"MOECTL_WORD": value})
        assert f"MOECTL_WORD={value}" in process.stdout.read().decode().split("\0")
        assert process.wait(60) == 0

    run()
    remote.close()


@pytest.mark.parametrize("where", ["local", "ssh"])
@pytest.mark.parametrize(
    ("argv", "env"),
    [
        (["-c", "true"], {}),
        (["true", "a\0b"], {}),
        (["true"], {"A": "a\0b"}),
        (["true"], {"-S touch pwned": ""}),
        (["true"], {"A=B": ""}),
        (["true", "\ud800"], {}),
        ([], {}),
    ],
)
def test_what_cannot_arrive_is_refused(
    argv: list[str], env: dict[str, str], where: str, ssh_host: Host, here: Path
) -> None:
    remote = LocalRemote() if where == "local" else SSHRemote(ssh_host)
    with pytest.raises(CommandFailed):
        remote.start(argv, env=env)
    remote.close()


# Hosts files: what a ProxyCommand makes of a name goes to a shell.


@given(words, words, words)
def test_no_host_that_is_read_means_anything_to_a_shell(name: str, user: str, zone: str) -> None:
    for text in (name, f"{user}@{name}", f"{user}@mac1", f"[fe80::1%{zone}]:22", json.dumps([{"ssh": name}])):
        for read in (parse_hosts, parse_host_string):
            try:
                hosts = read(text).hosts
            except HostsError:
                continue
            for host in hosts:
                assert re.fullmatch(r"[\w.:%@\[\]+-]+", host.address), host.address
                assert not host.address.startswith("-")
                assert not host.name.startswith("-")


@pytest.mark.parametrize("user", ["$(touch${IFS}pwned)", "`id`", "a;id", "a'b", "-oX", "a|b", "a&", 'a"', "a\\"])
def test_users_that_a_shell_would_run_are_refused(user: str) -> None:
    with pytest.raises(HostsError, match="is not a user name"):
        parse_hosts(f"{user}@mac1")
    with pytest.raises(HostsError):
        parse_hosts(json.dumps([{"ssh": f"{user}@mac1"}]))


def test_a_proxy_command_gets_names_as_they_are(sshd: Server, here: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    sshd.add_alias("mac*", f"ProxyCommand echo %n %r %h %p >>{log}; false", "HostName %h", base=False)
    hosts = ["mac1", "ada.x@mac2", "a-b+c@mac.three-4:99"]
    for text in hosts:
        with pytest.raises(HostError):
            SSHRemote(parse_host_string(text).hosts[0]).run(["true"])
    assert log.read_text().splitlines()[1:] == ["mac2 ada.x mac2 22", "mac.three-4 a-b+c mac.three-4 99"]


def test_a_record_with_a_hostile_host_is_refused() -> None:
    good = Deployment("x", "/x", (DeployedRank(Host("mac1")),), "ring", ("A=b",))
    assert decode_deployment(encode_deployment(good)) == good
    for host in (
        Host("-oProxyCommand=id"),
        Host("mac1", user="$(id)"),
        Host("mac1\n"),
        Host("mac1", ips=("fe80::1%$(id)",)),
        Host("mac1", python="-c"),
        Host("mac1", dir="a\0b"),
    ):
        with pytest.raises((HostsError, ValueError)):
            decode_deployment(encode_deployment(replace(good, ranks=(DeployedRank(host),))))
    with pytest.raises(HostsError, match="not NAME=VALUE"):
        decode_deployment(encode_deployment(replace(good, envs=("-S id=1",))))


# The whole way of `deploy`: dir=, python=, the shard set's name and its files.


def survey(host: Host, shards: Path, name: str, file: str) -> provision.Look:
    wheel = shards / "moectl.whl"
    wheel.write_bytes(b"")
    entry = FileEntry(1, "0" * 64)
    task = HostTask(
        0, host, shards, name, {file: entry}, {"moectl": "0"}, "", {wheel: entry}, dry_run=True, verify=False
    )
    with closing(make_remote(host)) as remote:
        return inspect_host(task, remote)


def test_hostile_paths_reach_a_host_as_they_are(ssh_host: Host, here: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()

    @settings(relaxed, max_examples=6)
    @given(encodable, encodable, encodable)
    def run(directory: str, name: str, file: str) -> None:
        root = str(tmp_path / "root") + directory.replace("..", "")
        try:
            look = survey(replace(ssh_host, dir=root), tmp_path / "set", name.replace("/", ""), file.lstrip("/"))
        except MoectlError:
            return  # refused
        found = look.result
        assert isinstance(found, HostResult)
        assert found.root == os.path.abspath(root)  # noqa: PTH100 - as the host does it
        assert found.copied_bytes == 1

    run()


@pytest.mark.parametrize("python", ["$(touch pwned)", "a b", "`touch pwned`", "x;touch pwned", "'\n", "~/no such"])
def test_hostile_pythons_are_not_run_by_a_shell(python: str, ssh_host: Host, here: Path, tmp_path: Path) -> None:
    with pytest.raises(MoectlError, match="no python"):
        survey(replace(ssh_host, python=python), tmp_path, "set", "file")


# Models.


@relaxed
@given(words)
def test_hostile_model_names_are_refused_or_sought(name: str) -> None:
    from moectl.shards.source.checkpoint import open_checkpoint

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        refuse_or_accept(
            lambda data: open_checkpoint(data.decode("utf-8", "surrogatepass")).close(),
            name.encode("utf-8", "surrogatepass"),
        )


def test_hostile_file_names_in_a_repository(tmp_path: Path, here: Path) -> None:
    source = write_checkpoint(tmp_path / "model", files=1, n_layers=1)
    hub = Hub()
    try:
        repo = hub.add("some/model", source)
        good = {name for name in repo.files if not name.endswith((".safetensors", ".index.json"))}
        hostile = [
            "tokenizer$(id).json",
            "tokenizer\n.json",
            "../tokenizer.json",
            "-tokenizer.json",
            "tokenizer`id`.json",
        ]
        hostile += [
            "tokenizer\\..\\x.json",
            "tokenizer\0.json",
            "tokenizer\x1b[2J.json",
            "tokenizer'.json",
            "/vocab.json",
        ]
        unpickled = ["vocab.bin", "tokenizer_x.py", "tokenizer.pkl", "tokenizer.pickle", "vocab.npz", "tokenizer.so"]
        repo.files |= dict.fromkeys([*hostile, *unpickled], b"{}")
        repo.promise()
        with hub_client.start_client({"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}) as pool:
            assert set(pool.submit(hub_client.list_sidecars, "some/model").result()) == good
            repo.commit = "../../../outside"
            with pytest.raises(CheckpointError, match="which is not a commit"):
                pool.submit(hub_client.list_sidecars, "some/model").result()
    finally:
        hub.close()
