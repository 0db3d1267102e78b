"""Host lists: the grammar of hosts.txt, --hosts and MLX's JSON, its errors, and the order in which lists are found."""

from __future__ import annotations

import io
import json
import re
import string
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from mlx._distributed_utils.common import Hostfile

from moectl.errors import HostsError
from moectl.hosts.hostfile import (
    KEYS,
    Host,
    HostList,
    find_hosts,
    format_hosts,
    parse_host_string,
    parse_hosts,
    parse_size,
    read_hosts,
)
from moectl.hosts.mlx_hostfile import find_own_address, resolve_address, to_mlx_json
from moectl.hosts.mlx_rows import BACKENDS

EXAMPLE = """\
# four Mac Studios on a 10 GbE switch
mac1  ip=10.0.0.1
mac2  ip=10.0.0.2  memory=120GB             # keep some for the desktop
ada@mac3.local:2222  ip=10.0.0.3,10.0.1.3  python=/opt/venv/bin/python

mac4  ip=10.0.0.4  dir=/Volumes/fast#1/moectl chip=M2-Ultra price=3999.5
"""


def test_reads_the_manual_pages_example() -> None:
    hosts = parse_hosts(EXAMPLE).hosts
    assert hosts == (
        Host("mac1", ips=("10.0.0.1",)),
        Host("mac2", ips=("10.0.0.2",), memory_bytes=120_000_000_000),
        Host("mac3.local", user="ada", port=2222, ips=("10.0.0.3", "10.0.1.3"), python="/opt/venv/bin/python"),
        Host("mac4", ips=("10.0.0.4",), dir="/Volumes/fast#1/moectl", chip="M2-Ultra", price=3999.5),
    )


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("[fe80::1]:22", Host("fe80::1", port=22)),
        ("[::1]", Host("::1")),
        ("ada@[2001:db8::7]:2222", Host("2001:db8::7", user="ada", port=2222)),
        ("192.168.1.5:22", Host("192.168.1.5", port=22)),
        ("ada@corp@gate", None),
        ("my_mac-1.local", Host("my_mac-1.local")),
    ],
)
def test_reads_addresses(text: str, host: Host | None) -> None:
    if host is None:
        with pytest.raises(HostsError):
            parse_hosts(text)
    else:
        assert parse_hosts(text).hosts == (host,)
        assert parse_host_string(text).hosts == (host,)
        assert host.address == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mac1\nmac2\n# x\nmac3 memroy=1GB", "hosts.txt:4: unknown key 'memroy'. Did you mean 'memory'?"),
        ("mac1 colour=red", "hosts.txt:1: unknown key 'colour'."),
        ("mac1 ip", "hosts.txt:1: expected key=value, found 'ip'"),
        ("mac1 ip=", "hosts.txt:1: ip has no value"),
        ("mac1 ip=10.0.0.1 ip=10.0.0.2", "hosts.txt:1: ip is given twice"),
        ("mac1 ip=10.0.0.300", "hosts.txt:1: '10.0.0.300' is not an IP address"),
        ("mac1 memory=lots", "hosts.txt:1: memory: 'lots' is not a size"),
        ("mac1 price=nan", "hosts.txt:1: price 'nan' is not a number"),
        ("mac1 price=-1", "hosts.txt:1: price '-1' is not a number"),
        ("mac1\n\nMAC1", "hosts.txt:3: MAC1 is listed twice, first on line 1"),
        ("localhost\n127.0.0.1", "hosts.txt:2: 127.0.0.1 is listed twice, first on line 1"),
        ("mac1:0", "hosts.txt:1: port '0' is not between 1 and 65535"),
        ("mac1:ssh", "hosts.txt:1: port 'ssh' is not between 1 and 65535"),
        ("-oProxyCommand=x", "hosts.txt:1: '-oProxyCommand=x' is not a host"),
        ("2001:db8::5:22", "hosts.txt:1: '2001:db8::5:22' may end in a port or not"),
        ("fe80::1%en0:22", "hosts.txt:1: 'fe80::1%en0:22' may end in a port or not"),
        ("mac1:22:23", "hosts.txt:1: 'mac1:22:23' is not a host"),
        ("[mac1]", "hosts.txt:1: '[mac1]' is not a host"),
        ("# nothing", "hosts.txt lists no host"),
        ("", "hosts.txt lists no host"),
        ("a rdma=-,en2\nb rdma=en2", "hosts.txt: rdma of b has 1 entries, there are 2 hosts"),
        ("a rdma=-,en2\nb rdma=en2,en2", "hosts.txt: rdma of b names a device towards itself (entry 2)"),
    ],
)
def test_names_the_line_and_the_mistake(text: str, message: str) -> None:
    with pytest.raises(HostsError) as caught:
        parse_hosts(text)
    assert str(caught.value) == message
    assert caught.value.exit_code == 4


def test_rdma_rows_take_dash_null_and_nothing_for_oneself() -> None:
    hosts = parse_hosts("a rdma=-,rdma_en2,rdma_en3\nb rdma=rdma_en2,null,rdma_en3\nc rdma=rdma_en2,rdma_en3,").hosts
    assert [h.rdma for h in hosts] == [
        (None, "rdma_en2", "rdma_en3"),
        ("rdma_en2", None, "rdma_en3"),
        ("rdma_en2", "rdma_en3", None),
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("120GB", 120 * 10**9),
        ("64GiB", 64 * 2**30),
        ("1.5TB", 1_500_000_000_000),
        ("4194304", 4194304),
        ("7kb", 7000),
        ("0.1MiB", 104857),
    ],
)
def test_reads_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1e9", "-1GB", "1 XB", "0GB", "1.GB", "٣GB"])
def test_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(HostsError):
        parse_size(text)


def test_only_a_bare_local_name_means_no_ssh() -> None:
    local = [h.is_local for h in parse_hosts("localhost").hosts + parse_hosts("127.0.0.1\n[::1]:22").hosts]
    assert local == [True, True, False]
    assert not parse_hosts("ada@localhost").hosts[0].is_local


def test_reads_mlx_hostfiles_with_our_keys_riding_along() -> None:
    text = json.dumps(
        {
            "backend": "jaccl",
            "envs": ["MLX_METAL_FAST_SYNCH=1"],
            "hosts": [
                {"ssh": "ada@mac1", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"], "memory": "120GB"},
                {"ssh": "mac2", "ips": [], "rdma": ["rdma_en2", None], "dir": "/Volumes/my disk", "python": "/p"},
            ],
        }
    )
    found = parse_hosts(text, "hosts.json")
    assert (found.backend, found.envs, found.source) == ("jaccl", ("MLX_METAL_FAST_SYNCH=1",), "hosts.json")
    assert found.hosts == (
        Host("mac1", user="ada", ips=("10.0.0.1",), rdma=(None, "rdma_en2"), memory_bytes=120 * 10**9),
        Host("mac2", rdma=("rdma_en2", None), dir="/Volumes/my disk", python="/p"),
    )
    assert parse_hosts('  [{"ssh": "mac1"}]').hosts == (Host("mac1"),)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"hosts": 1}',
        '{"hosts": [1]}',
        '{"hosts": [{"ssh": 1}]}',
        '{"hosts": [{"ssh": "a", "ips": "10.0.0.1"}]}',
        '{"hosts": [{"ssh": "a", "ips": ["x"]}]}',
        '{"hosts": [{"ssh": "a", "rdma": [["en1", "en2"]]}]}',
        '{"hosts": [{"ssh": "a", "memory": true}]}',
        '{"hosts": [{"ssh": "a", "dir": 3}]}',
        '{"hosts": [{"ssh": "a"}, {"ssh": "a"}]}',
        '{"backend": "telepathy", "hosts": [{"ssh": "a"}]}',
        '{"envs": ["no value"], "hosts": [{"ssh": "a"}]}',
        "[" * 100_000,
    ],
)
def test_refuses_damaged_json(text: str) -> None:
    with pytest.raises(HostsError):
        parse_hosts(text)


# MLX does not close the file that it reads.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_writes_what_mlx_itself_reads(tmp_path: Path) -> None:
    hosts = parse_hosts("localhost rdma=-,en2\nada@mac2 ip=10.0.0.2,10.0.1.2 rdma=en2,- memory=1GiB")
    path = tmp_path / "hosts.json"
    path.write_text(to_mlx_json(hosts, find_own={"10.0.0.2": "10.0.0.7"}.__getitem__))
    read = Hostfile.from_file(path).hosts
    assert [(h.ssh_hostname, h.ips, h.rdma) for h in read] == [
        ("127.0.0.1", ["10.0.0.7"], [None, "en2"]),
        ("ada@mac2", ["10.0.0.2", "10.0.1.2"], ["en2", None]),
    ]
    again = read_hosts(str(path))
    assert again.hosts[1].memory_bytes == 2**30
    assert again.hosts[0].is_local


def test_mlx_gets_an_address_of_this_machine_that_others_can_reach() -> None:
    alone = json.loads(to_mlx_json(parse_hosts("localhost")))
    assert alone["hosts"][0]["ips"] == ["127.0.0.1"]
    given = json.loads(to_mlx_json(parse_hosts("localhost ip=10.0.0.1\nmac2 ip=10.0.0.2")))
    assert given["hosts"][0]["ips"] == ["10.0.0.1"]
    near = json.loads(to_mlx_json(parse_hosts("localhost\nnode ip=127.0.0.2")))  # by the way that this machine knows
    assert near["hosts"][0]["ips"] == [find_own_address("127.0.0.2")]
    text = "localhost\nmac2 ip=2001:db8::1%nowhere"
    with pytest.raises(HostsError, match="the address by which 2001:db8::1%nowhere reaches this machine") as caught:
        to_mlx_json(parse_hosts(text))
    hint = re.search("'(.*)'", caught.value.hint or "")
    assert hint is not None
    assert json.loads(to_mlx_json(parse_hosts(text.replace("localhost", hint[1]))))["hosts"][0]["ips"] == ["10.0.0.1"]


@pytest.mark.parametrize("text", ["::1", "fe80::1", "2001:db8::5", "fe80::1%en0", "2001:db8:0:0:0:0:0:5", "fe80::a:b"])
def test_reads_a_bare_ipv6_address_where_it_can_only_be_one(text: str) -> None:
    for user in ("", "ada@"):
        [host] = parse_hosts(user + text).hosts
        assert host == Host(text, user=user[:-1] or None)
        assert parse_host_string(user + text).hosts == (host,)
        assert host.address == f"{user}[{text}]"


@pytest.mark.parametrize("text", ["2001:db8::5:22", "ada@2001:db8::5:22", "fe80::1%en0:22", "2001:db8:0:0:0:0:0:5:22"])
def test_an_address_that_may_end_in_a_port_has_a_hint_that_can_be_followed(text: str) -> None:
    with pytest.raises(HostsError) as caught:
        parse_hosts(text)
    for written in (caught.value.hint or "").removeprefix("write ").split(", or "):
        [host] = parse_hosts(written).hosts
        assert (
            f"{host.user or ''}{'@' * (host.user is not None)}{host.name}{f':{host.port}' * (host.port is not None)}"
            == text
        )


def test_reads_the_file_of_mlxs_ring() -> None:
    hosts = parse_hosts(
        '[["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5000"], ["mac3.local:5000"], ["[fe80::1]:5000"]]'
    )
    assert hosts.hosts == (
        Host("10.0.0.1", ips=("10.0.0.1", "10.0.1.1")),
        Host("10.0.0.2", ips=("10.0.0.2",)),
        Host("mac3.local"),
        Host("fe80::1", ips=("fe80::1",)),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[["10.0.0.1:5000"], ["10.0.0.1:5001"]]', "hosts.txt: hosts[1]: 10.0.0.1 is listed twice, first on line 1"),
        ('[["10.0.0.1:0"]]', "hosts.txt: rank 0: '10.0.0.1:0' is not address:port"),
        ('[[null, "en2"], ["en2", null]]', "hosts.txt: rank 0: these are RDMA devices (MLX_IBV_DEVICES), not hosts"),
        ("[[1]]", "hosts.txt: rank 0: [1] has no addresses with ports, as MLX's ring file has"),
        ("[[]]", "hosts.txt: rank 0: needs a list of addresses, as every rank of MLX's ring file"),
        ('["mac1", "mac2"]', "hosts.txt: hosts[0]: needs a string 'ssh'"),
    ],
)
def test_names_what_is_wrong_with_a_list_of_mlx(text: str, message: str) -> None:
    with pytest.raises(HostsError) as caught:
        parse_hosts(text)
    assert str(caught.value) == message
    assert caught.value.hint
    if "write each host as " in caught.value.hint:
        row = caught.value.hint.removeprefix("write each host as ")
        assert parse_hosts(f"[{row}]").hosts[0].name == "mac1"


def test_mlx_hostfiles_cannot_hold_a_port() -> None:
    with pytest.raises(HostsError, match="cannot hold a port") as caught:
        to_mlx_json(parse_hosts("ada@mac3:2222 ip=10.0.0.3"))
    assert caught.value.hint is not None
    assert "Port 2222" in caught.value.hint


def test_resolves_names_or_says_how_to_help() -> None:
    assert resolve_address("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(HostsError) as caught:
        resolve_address("no-such-host.invalid")
    assert caught.value.hint == "write 'no-such-host.invalid ip=…'"


def test_the_list_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, host: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(host)
        return str(path)

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)

    def name(**kw: str) -> str | None:
        found = find_hosts(**kw)
        return found.hosts[0].name if found else None

    assert name() is None
    write("config/moectl/hosts.txt", "xdg")
    assert name() == "xdg"
    write("hosts.txt", "here")
    assert name() == "here"
    monkeypatch.setenv("MOECTL_HOSTFILE", write("env.txt", "environment"))
    assert name() == "environment"
    assert name(hostfile=write("flag.txt", "flag")) == "flag"
    assert name(hostfile=write("flag.txt", "flag"), hosts="a,b") == "a"


def test_reads_stdin_for_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"mac1\nmac2 ip=10.0.0.2\n")))
    assert [h.name for h in read_hosts("-").hosts] == ["mac1", "mac2"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"mac\xff")))
    with pytest.raises(HostsError, match=r"^stdin is not a text file in UTF-8$"):
        read_hosts("-")
    sys.stdin.close()
    with pytest.raises(HostsError, match=r"^cannot read stdin: .*closed"):
        read_hosts("-")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(HostsError, match=r"^cannot read stdin: it is closed$"):
        read_hosts("-")


@pytest.mark.parametrize("path", ["~no-such-user/hosts.txt", "a\0b"])
def test_paths_that_cannot_be_are_hosts_errors(path: str) -> None:
    with pytest.raises(HostsError, match="cannot read"):
        read_hosts(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_unreadable_files_are_hosts_errors(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "hosts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HostsError):
        read_hosts(str(path))


@pytest.mark.parametrize("text", ["a,,b", "a,a", "", "a b"])
def test_refuses_bad_host_strings(text: str) -> None:
    with pytest.raises(HostsError):
        parse_host_string(text)


PIECES = st.sampled_from(
    [
        "mac1",
        "mac2",
        "ada@",
        ":22",
        "[::1]",
        " ",
        "\n",
        "#",
        "ip=",
        "10.0.0.1",
        ",",
        "memory=",
        "1GB",
        "rdma=",
        "-",
        "{",
        "[",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES).map("".join), st.from_regex(r"\[?\{.*", fullmatch=True)))
def test_any_text_is_a_host_list_or_a_hosts_error(text: str) -> None:
    try:
        hosts = parse_hosts(text)
    except HostsError:
        return
    assert parse_hosts(format_hosts(hosts)).hosts == hosts.hosts


WORDS = st.text(string.ascii_letters + string.digits + "/._-+%$'", min_size=1, max_size=12)
IPS = st.ip_addresses().map(str)
HOSTS = st.builds(
    Host,
    name=st.one_of(st.from_regex(r"[a-z0-9_][a-z0-9._-]{0,9}", fullmatch=True), st.ip_addresses(v=6).map(str)),
    user=st.none() | st.from_regex(r"[a-z_][a-z0-9_.-]{0,7}", fullmatch=True),
    port=st.none() | st.integers(1, 65535),
    ips=st.lists(IPS, max_size=3).map(tuple),
    memory_bytes=st.none() | st.integers(2**20, 2**50),
    chip=st.none() | WORDS,
    price=st.none() | st.floats(0, 1e9),
    python=st.none() | WORDS.filter(lambda word: not word.startswith("-")),
    dir=st.none() | WORDS,
)
LISTS = st.lists(
    HOSTS, min_size=1, max_size=5, unique_by=lambda h: ("localhost" if h.is_local else h.name.lower(), h.port)
).map(lambda hosts: HostList(tuple(hosts)))


@given(LISTS)
def test_every_host_list_survives_being_written_and_read(hosts: HostList) -> None:
    assert parse_hosts(format_hosts(hosts)).hosts == hosts.hosts


@pytest.mark.parametrize(
    ("wrong", "hint", "right"),
    [
        ("mac1 memory=much", "write for example 120GB (10^9) or 112GiB (2^30)", "mac1 memory=120GB"),
        ("mac1 memory=0GB", "write for example 120GB (10^9) or 112GiB (2^30)", "mac1 memory=112GiB"),
        ("mac1 memory=96", "did you mean 96GB?", "mac1 memory=96GB"),
        ("mac1 python=-c", "write python=./-c", "mac1 python=./-c"),
        ("mac1 price=cheap", "write price=3999", "mac1 price=3999"),
        ("!ada@mac1", "write user@host", "ada@mac1"),
        ("mac1 ip=mac1.local", "write ip=10.0.0.1 or ip=10.0.0.1,10.0.1.1", "mac1 ip=10.0.0.1,10.0.1.1"),
        ("mac1\nmac1", "each host is one rank: list it once", "mac1"),
        ("# none", "write one host per line", "mac1"),
        ("mac1 size=1", f"keys are {', '.join(KEYS)}", "".join(["mac1 ", *(f"{key}=1 " for key in ("price", "dir"))])),
        (
            "mac1 rdma=rdma_en2\nmac2",
            "one entry per rank in list order, '-' for the host itself",
            "mac1 rdma=-,rdma_en2\nmac2",
        ),
        ("mac1 rdma=rdma_en2,-\nmac2", "write '-' there", "mac1 rdma=-,-\nmac2"),
        (
            "mac1 rdma=-,rdma_en2+\nmac2",
            "write rdma=-,rdma_en2 or rdma=-,rdma_en2+rdma_en3",
            "mac1 rdma=-,rdma_en2+rdma_en3\nmac2",
        ),
        ('{"ranks": []}', '{"hosts": [{"ssh": "mac1", "ips": []}]}', '{"hosts": [{"ssh": "mac1", "ips": []}]}'),
        (
            '{"backend": "mpi2", "hosts": [{"ssh": "mac1"}]}',
            f"MLX knows {', '.join(BACKENDS[2:])}",
            f'{{"backend": "{BACKENDS[-1]}", "hosts": [{{"ssh": "mac1"}}]}}',
        ),
        ('{"hosts": ["mac1"]}', 'write each host as {"ssh": "mac1", "ips": []}', '[{"ssh": "mac1", "ips": []}]'),
        (
            '[["mac1", 5000]]',
            'write each host as {"ssh": "mac1", "ips": ["10.0.0.1"]}',
            '[{"ssh": "mac1", "ips": ["10.0.0.1"]}]',
        ),
        ('[["10.0.0.1:port"]]', 'write for example "10.0.0.1:5000"', '[["10.0.0.1:5000"]]'),
    ],
)
def test_what_a_hint_says_to_write_is_taken(wrong: str, hint: str, right: str) -> None:
    with pytest.raises(HostsError) as refused:
        parse_hosts(wrong)
    assert refused.value.hint == hint
    assert parse_hosts(right).hosts


def test_what_the_hint_for_an_empty_name_says_is_taken() -> None:
    with pytest.raises(HostsError) as refused:
        parse_host_string("mac1,,mac2")
    assert refused.value.hint == "write --hosts mac1,mac2"
    assert len(parse_host_string("mac1,mac2").hosts) == 2
