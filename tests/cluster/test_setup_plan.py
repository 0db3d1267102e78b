"""What setup proposes: equal to mlx.distributed_config for equal cables, and what it does better knowingly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from moectl.cli.verbs.setup import file_text, plan_json
from moectl.cluster.doctor.compare import check_backend
from moectl.cluster.doctor.finding import Level
from moectl.cluster.setup.commands import Wish, _needed_limit
from moectl.cluster.setup.machine import Machine, read_machine
from moectl.cluster.setup.plan import SetupPlan, plan_setup
from moectl.errors import HostsError, PlanError
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host, HostList, format_hosts, parse_hosts
from moectl.hosts.mlx_hostfile import to_mlx_json
from moectl.hosts.survey import Survey, read_survey
from moectl.session.backend import choose_backend
from tests.support import cabling
from tests.support.cabling import End
from tests.support.fake_mac import PORTS, ifconfig_text, interfaces, read, record
from tests.support.mlx_config import Generated, Recorded, generate

Cables = list[tuple[End, End]]
RECORDINGS = Path(__file__).parent.parent / "recordings"
DOUBLE = [((0, 1), (1, 3)), ((0, 2), (1, 1))]
MIXED = [((0, 2), (2, 4)), ((2, 1), (1, 3)), ((1, 1), (3, 2)), ((3, 3), (0, 4))]  # a ring 0 2 1 3


def names(count: int) -> list[str]:
    return [f"mac{place + 1}" for place in range(count)]


def given_list(count: int) -> HostList:
    return HostList(tuple(Host(name) for name in names(count)), source="hosts.txt")


def plan(macs: Sequence[Recorded], wish: Wish | None = None, **fields: Any) -> SetupPlan:
    hosts = given_list(len(macs))
    return plan_setup([read(h, mac, **fields) for h, mac in zip(hosts.hosts, macs, strict=True)], hosts, wish or Wish())


def cable_all(count: int, cables: Cables, **options: Any) -> list[Recorded]:
    return [record(mac, cables, **options) for mac in range(count)]


def generated_by_us(macs: Sequence[Recorded], wish: Wish) -> Generated:
    """Return our hostfile and commands in MLX's form."""
    try:
        made = plan(macs, wish)
    except PlanError:
        return Generated(None, {})
    commands = {
        machine.host.name: [" ".join(["sudo", *step.argv]) for step in steps]
        for machine, steps in zip(made.machines, made.steps, strict=True)
    }
    return Generated(json.loads(to_mlx_json(made.hosts, resolve=lambda name: "")), commands)


def generated_by_mlx(macs: Sequence[Recorded], directory: Path, backend: str) -> Generated:
    flags = [] if backend == "auto" else ["--backend", backend]
    return generate(dict(zip(names(len(macs)), macs, strict=True)), directory, *flags)


def studio_pair() -> list[Recorded]:
    """The two Mac Studios of tests/recordings/thunderbolt."""
    files = RECORDINGS / "thunderbolt"
    ports, devices, ifconfig = (
        (files / name).read_text() for name in ("hardware-ports.txt", "ibv_devices.txt", "ifconfig-bridge.txt")
    )
    profiles = [(files / f"studio-pair-{letter}.json").read_text() for letter in "ab"]
    return [Recorded(profile, ports, devices, ifconfig, "192.168.1.181") for profile in profiles]


TOPOLOGIES: dict[str, tuple[list[Recorded], str | None]] = {
    "recorded pair": (studio_pair(), "jaccl"),
    "mesh of 2": (cable_all(2, cabling.mesh(2)), "jaccl"),
    "mesh of 3": (cable_all(3, cabling.mesh(3)), "jaccl"),
    "mesh of 4": (cable_all(4, cabling.mesh(4)), "jaccl"),
    "ring of 3 is a mesh": (cable_all(3, cabling.ring(3)), "jaccl"),
    "ring of 4": (cable_all(4, cabling.ring(4)), "jaccl-ring"),
    "ring of 4 in another order": (cable_all(4, MIXED), "jaccl-ring"),
    "two cables": (cable_all(2, DOUBLE), "jaccl"),
    "mesh of 4 but one cable": (cable_all(4, cabling.mesh(4)[1:]), "jaccl-ring"),
    "mesh of 3 but one cable": (cable_all(3, cabling.mesh(3)[1:]), None),
    "mesh of 4 in two parts": (cable_all(4, [cabling.mesh(4)[0], cabling.mesh(4)[-1]]), None),
    "ring of 4 but one cable": (cable_all(4, cabling.ring(4)[:-1]), None),
    "no cable": (cable_all(2, []), None),
    "mesh of 2 without RDMA": (cable_all(2, cabling.mesh(2), rdma=False), "ring"),
    "mesh of 4 without RDMA": (cable_all(4, cabling.mesh(4), rdma=False), "ring"),
    "ring of 4 without RDMA": (cable_all(4, MIXED, rdma=False), "ring"),
    "two cables without RDMA": (cable_all(2, DOUBLE, rdma=False), "ring"),
}


@pytest.mark.parametrize("wanted", ["auto", "ring", "jaccl", "jaccl-ring"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_equal_to_mlx(name: str, wanted: str, tmp_path: Path) -> None:
    macs, backend = TOPOLOGIES[name]
    theirs = generated_by_mlx(macs, tmp_path, wanted)
    ours = generated_by_us(macs, Wish(backend=wanted))
    assert ours == theirs
    if wanted == "auto":
        assert (ours.hostfile or {}).get("backend") == backend


@st.composite
def cablings(draw: st.DrawFn) -> list[Recorded]:
    """Any cables between 2 to 5 Macs with 6 ports each, whose interfaces have any names."""
    count = draw(st.integers(2, 5))
    ends = draw(st.permutations([(mac, port) for mac in range(count) for port in range(1, 7)]))
    pairs = list(zip(ends[::2], ends[1::2], strict=False))
    cables = [pair for pair in pairs if pair[0][0] != pair[1][0]][: draw(st.integers(1, 12))]
    rdma = draw(st.booleans())
    found = []
    for mac in range(count):
        numbers = draw(st.permutations(range(2, 14)))
        ports = {port: f"en{number}" for port, number in zip(range(1, 7), numbers, strict=False)}
        found.append(record(mac, cables, ports=ports, rdma=rdma))
    return found


@settings(max_examples=60, deadline=None)
@given(cablings(), st.sampled_from(["auto", "ring", "jaccl", "jaccl-ring"]))
def test_equal_to_mlx_for_any_cables(macs: list[Recorded], wanted: str) -> None:
    with TemporaryDirectory() as directory:
        assert generated_by_us(macs, Wish(backend=wanted)) == generated_by_mlx(macs, Path(directory), wanted)


@pytest.mark.parametrize("name", [name for name, (_, backend) in TOPOLOGIES.items() if backend])
def test_hostfiles_of_both_are_read_back_and_choose_the_same_backend(name: str, tmp_path: Path) -> None:
    macs, backend = TOPOLOGIES[name]
    generate(dict(zip(names(len(macs)), macs, strict=True)), tmp_path, "--env", "MLX_METAL_FAST_SYNCH=1", "--env", "A")
    theirs = parse_hosts((tmp_path / "mlx-hosts.json").read_text())
    assert theirs.envs == ("MLX_METAL_FAST_SYNCH=1", "A")
    ours = plan(macs).hosts
    assert (theirs.hosts, theirs.backend) == (ours.hosts, ours.backend)
    text = parse_hosts(format_hosts(ours))
    assert text.hosts == ours.hosts
    assert choose_backend("auto", text.hosts) == choose_backend(ours.backend, ours.hosts) == backend


def test_over_ethernet_equals_mlx(tmp_path: Path) -> None:
    macs = cable_all(3, cabling.mesh(3))
    theirs = generate(dict(zip(names(3), macs, strict=True)), tmp_path, "--over", "ethernet")
    made = plan(macs, Wish(over="ethernet"))
    assert json.loads(to_mlx_json(made.hosts)) == theirs.hostfile
    assert (made.steps, made.shape) == (((), (), ()), "ethernet")
    assert parse_hosts((tmp_path / "mlx-hosts.json").read_text()).hosts == made.hosts.hosts


# What it says, and what it does otherwise than MLX.


@pytest.mark.parametrize(
    ("count", "cables", "message", "hint"),
    [
        (
            3,
            cabling.mesh(3)[1:],
            "neither a mesh nor a ring: no cable between mac1 and mac2",
            "plug a cable from mac1 (free: ports 1, 3, 4) to mac2 (free: ports 1, 3, 4), or use --over ethernet",
        ),
        (4, cabling.ring(4)[:-1], "no cable between mac1 and mac4", "mac4 (free: ports 2, 3, 4)"),
        (4, [cabling.mesh(4)[0]], "no cable between mac1 and mac3, mac2 and mac4, mac3 and mac4", "plug a cable"),
    ],
)
def test_a_broken_mesh_tells_which_cable_is_missing(count: int, cables: Cables, message: str, hint: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan(cable_all(count, cables))
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_mesh_short_of_one_cable_is_a_ring_and_says_what_a_mesh_needs() -> None:
    made = plan(cable_all(4, cabling.mesh(4)[1:]))
    texts = [advice.text for advice in made.advice]
    assert "a ring, and no mesh: no cable between mac1 and mac2; RDMA is faster over a mesh" in texts
    assert "ranks follow the ring: mac1, mac3, mac2, mac4" in texts
    assert [host.name for host in made.hosts.hosts] == ["mac1", "mac3", "mac2", "mac4"]
    with pytest.raises(PlanError, match="no mesh: no cable between mac1 and mac2"):
        plan(cable_all(4, cabling.mesh(4)[1:]), Wish(backend="jaccl"))


@pytest.mark.parametrize(
    ("options", "fields", "why"),
    [
        ({"link_gbit": 40, "idle_gbit": 40}, {}, "generation 4 or older: RDMA needs 5"),
        ({"link_gbit": 40}, {}, "the cable mac1 port 1 to mac2 port 1 runs at 40 Gb/s"),
        ({}, {"version": "26.1"}, "macOS 26.1: RDMA over Thunderbolt needs 26.2 or newer"),
        ({"rdma": False}, {}, "rdma_ctl enable"),
    ],
)
def test_without_rdma_it_is_a_ring_over_tcp_and_says_why(
    options: dict[str, Any], fields: dict[str, Any], why: str
) -> None:
    made = plan(cable_all(2, cabling.mesh(2), **options), **fields)
    assert made.hosts.backend == "ring"
    assert any(why in advice.text for advice in made.advice)
    assert [host.rdma for host in made.hosts.hosts] == [(), ()]
    assert [host.ips for host in made.hosts.hosts] == [("192.168.0.1",), ("192.168.0.2",)]


def test_macs_before_and_after_26_3_get_a_ring_over_tcp() -> None:
    hosts = given_list(2)
    seen = [read(host, mac) for host, mac in zip(hosts.hosts, cable_all(2, cabling.mesh(2)), strict=True)]
    seen = [replace(machine, version=version) for machine, version in zip(seen, [(26, 2), (26, 4)], strict=True)]
    made = plan_setup(seen, hosts, Wish())
    assert (made.hosts.backend, [host.rdma for host in made.hosts.hosts]) == ("ring", [(), ()])
    assert any("RDMA between macOS 26.2 and a newer one" in advice.text for advice in made.advice)
    with pytest.raises(PlanError, match=r"RDMA between macOS 26\.2 and a newer one"):
        plan_setup(seen, hosts, Wish(backend="jaccl"))


def test_rdma_that_is_off_stops_only_who_insists() -> None:
    macs = cable_all(2, cabling.mesh(2), rdma=False)
    with pytest.raises(PlanError, match="RDMA is off") as caught:
        plan(macs, Wish(backend="jaccl"))
    assert "rdma_ctl enable" in (caught.value.hint or "")
    slow = plan(cable_all(2, cabling.mesh(2), link_gbit=40), Wish(backend="jaccl"))
    assert slow.hosts.backend == "jaccl"
    assert any("40 Gb/s" in advice.text for advice in slow.advice)


def test_one_slow_cable_of_a_mesh_leaves_a_ring_of_the_others() -> None:
    macs = cable_all(4, cabling.mesh(4))
    found = []
    for mac, recorded in enumerate(macs):
        document = json.loads(recorded.system_profiler)
        for bus in document["SPThunderboltDataType"]:
            ends = {bus["domain_uuid_key"], *(item["domain_uuid_key"] for item in bus.get("_items", []))}
            if ends == {cabling.domain(0, 2), cabling.domain(2, 1)}:
                bus["receptacle_1_tag"]["current_speed_key"] = "40 Gb/s"
        assert mac in (1, 3) or "40 Gb/s" in json.dumps(document)
        found.append(replace(recorded, system_profiler=json.dumps(document)))
    made = plan(found)
    assert made.hosts.backend == "jaccl-ring"
    assert any("mac1 port 2 to mac3 port 1 runs at 40 Gb/s" in advice.text for advice in made.advice)


def test_networks_that_a_host_uses_already_are_left_out() -> None:
    macs = cable_all(2, cabling.mesh(2), rdma=False)
    lan = interfaces(1) | {"en0": {"inet": ["192.168.0.7/24"]}}
    made = plan([macs[0], replace(macs[1], ifconfig=ifconfig_text(lan))])
    assert made.steps[0][1].argv == ("ifconfig", "en2", "inet", "192.168.1.1", "netmask", "255.255.255.252")
    lan["en0"]["inet"] = ["192.168.0.7/16"]
    made = plan([macs[0], replace(macs[1], ifconfig=ifconfig_text(lan))])
    assert made.steps[0][1].address == "172.16.0.1"


def test_every_command_has_what_undoes_it() -> None:
    used = interfaces(0) | {"en2": {"inet": ["10.9.0.1/24"]}}
    macs = cable_all(2, cabling.mesh(2))
    made = plan(
        [replace(macs[0], ifconfig=ifconfig_text(used)), macs[1]],
        Wish(no_sleep=True, wired_limit_bytes=100 << 30),
        sleep=10,
    )
    assert [(" ".join(step.argv), " ".join(step.undo)) for step in made.steps[0]] == [
        ("ifconfig bridge0 down", "ifconfig bridge0 up"),
        ("ifconfig en2 inet 192.168.0.1 netmask 255.255.255.252", "ifconfig en2 inet 10.9.0.1 netmask 255.255.255.0"),
        ("route change 192.168.0.2 -interface en2", "route delete 192.168.0.2"),
        ("pmset -c sleep 0", "pmset -c sleep 10"),
        ("sysctl iogpu.wired_limit_mb=102400", "sysctl iogpu.wired_limit_mb=0"),
    ]
    assert made.steps[1][1].undo == ("ifconfig", "en2", "inet", "192.168.0.2", "delete")
    assert all(step.why for some in made.steps for step in some)
    assert not any(step.already for some in made.steps for step in some)


def after(machine: Machine, made: SetupPlan, place: int) -> Machine:
    """Return a machine as it is when its steps have been run."""
    found = interfaces(place)
    found["bridge0"]["up"] = False
    for step in made.steps[place]:
        if step.address and step.interface:
            found[step.interface] = {"inet": [f"{step.address}/30"]}
    sections = {"system": "Darwin", "ifconfig": ifconfig_text(found)}
    text = "".join(f"\nmoectl-probe {name}\n{body}\n" for name, body in sections.items())
    return replace(machine, interfaces=read_machine(machine.host, read_survey(text)).interfaces)


@pytest.mark.parametrize("name", [name for name, (_, backend) in TOPOLOGIES.items() if backend])
def test_what_is_in_effect_is_not_done_again(name: str) -> None:
    macs, _ = TOPOLOGIES[name]
    if "recorded" in name:
        macs = cable_all(2, cabling.mesh(2))
    made = plan(macs)
    machines = [after(machine, made, place) for place, machine in enumerate(made.machines)]
    # The hosts file that it wrote is as good a beginning as the first one.
    by_name = {host.name: host for host in made.hosts.hosts}
    again = [replace(machine, host=by_name[machine.host.name]) for machine in machines]
    for some in (machines, again):
        second = plan_setup(some, given_list(len(macs)))
        assert second.to_do == tuple(() for _ in macs)
        assert second.hosts.hosts == made.hosts.hosts


def test_a_connection_by_the_bridge_is_not_cut() -> None:
    macs = cable_all(2, cabling.mesh(2))
    hosts = given_list(2)
    by = [
        read(h, mac, reached_at=at)
        for h, mac, at in zip(hosts.hosts, macs, ("10.0.0.1", "169.254.205.255"), strict=True)
    ]
    made = plan_setup(by, hosts)
    assert [advice.host for advice in made.blockers] == ["mac2"]
    assert "by bridge0 (169.254.205.255)" in made.blockers[0].text


def linux(name: str, *addresses: str) -> Machine:
    lines = "".join(f"{number}: eth{number}    inet {ip}/24\n" for number, ip in enumerate(addresses))
    text = f"\nmoectl-probe system\nLinux\n\nmoectl-probe ip\n1: lo    inet 127.0.0.1/8\n{lines}"
    return read_machine(Host(name), read_survey(text), addresses[-1] if addresses else None)


def test_a_host_that_is_no_mac_leaves_all_as_they_are() -> None:
    macs = cable_all(2, cabling.mesh(2))
    machines = [*(read(Host(name), mac) for name, mac in zip(("mac1", "mac2"), macs, strict=True))]
    others = [*machines, linux("box", "10.0.0.9", "10.1.0.9")]
    hosts = HostList(tuple(machine.host for machine in others))
    made = plan_setup(others, hosts)
    assert (made.shape, made.hosts.backend, made.steps) == ("ethernet", "", ((), (), ()))
    assert [host.ips for host in made.hosts.hosts] == [("10.0.0.1",), ("10.0.0.2",), ("10.1.0.9",)]
    told = [advice for advice in made.advice if advice.host == "box"]
    assert "not a Mac: there is nothing to set up" in told[0].text
    with pytest.raises(PlanError, match="box: no Mac"):
        plan_setup(others, hosts, Wish(backend="jaccl"))
    assert linux("empty").find_address(frozenset()) is None


def test_addresses_of_the_hosts_file_are_kept_where_they_are_no_cables() -> None:
    macs = cable_all(2, cabling.mesh(2))
    hosts = HostList((Host("mac1", ips=("10.7.0.1",), memory_bytes=1 << 36), Host("mac2", user="ada", port=2222)))
    made = plan_setup([read(h, mac) for h, mac in zip(hosts.hosts, macs, strict=True)], hosts)
    assert made.hosts.hosts == (
        Host("mac1", ips=("10.7.0.1",), memory_bytes=1 << 36, rdma=(None, "rdma_en2")),
        Host("mac2", user="ada", port=2222, ips=("10.0.0.2",), rdma=("rdma_en2", None)),
    )


def test_settings_that_nobody_asked_for_are_advice() -> None:
    made = plan(cable_all(2, cabling.mesh(2)), sleep=15)
    texts = [advice.text for advice in made.advice]
    assert any("sleeps after 15 min" in text and "caffeinate" in text for text in texts)
    assert any("gone when a Mac restarts" in text for text in texts)
    assert not any(step.argv[0] in ("pmset", "sysctl") for some in made.steps for step in some)


def test_the_sleep_of_a_macbook_is_that_on_mains_power() -> None:
    battery = "System-wide power settings:\nCurrently in use:\n standby 1\n sleep                1\n"
    custom = "Battery Power:\n sleep         1\nAC Power:\n womp 1\n\n sleep         15\nUPS Power:\n sleep 2\n"
    for sections, minutes in (
        ({"pmset": battery, "pmset_custom": custom}, 15),
        ({"pmset": battery, "pmset_custom": custom.replace("15", "0")}, 0),
        ({"pmset": battery, "pmset_custom": ""}, 1),
        ({"pmset": " SleepDisabled\t\t1\n", "pmset_custom": custom}, 0),
    ):
        assert read_machine(Host("mac1"), Survey(Hardware(os="macOS"), sections)).sleep_minutes == minutes


def test_a_limit_that_macos_would_not_survive_is_refused() -> None:
    with pytest.raises(PlanError, match=r"mac1: .*leaves macOS too little of 128 GiB") as caught:
        plan(cable_all(2, cabling.mesh(2)), Wish(wired_limit_bytes=126 << 30))
    assert "at most 124GiB" in (caught.value.hint or "")


def test_a_limit_is_raised_only_where_a_rank_needs_it() -> None:
    needs = (80 << 30, 110 << 30, 20 << 30, 123 << 30)  # of ranks; macOS 26 lets a GPU have 107.5 of 128 GiB
    made = plan(cable_all(4, MIXED), Wish(needs_bytes=needs))
    limits = [[step.argv[1] for step in steps if step.argv[0] == "sysctl"] for steps in made.steps]
    # The ring is mac1, mac3, mac2, mac4: the second rank is on mac3. What fits in the whole memory gets what is safe.
    assert limits == [
        [],
        [],
        [f"iogpu.wired_limit_mb={int(110 * 1024 / 0.9) + 1}"],
        [f"iogpu.wired_limit_mb={124 * 1024}"],
    ]
    with pytest.raises(PlanError, match=r"mac2: its rank needs 125\.0 GiB, and no limit above 124\.0 GiB is safe"):
        plan(cable_all(2, cabling.mesh(2)), Wish(needs_bytes=(1, 125 << 30)))


@pytest.mark.parametrize(("version", "raised"), [((26, 2), False), ((15, 5), True), (None, True)])
def test_the_limit_in_force_is_that_of_the_version(version: tuple[int, int] | None, raised: bool) -> None:
    """With room to spare, 92 GiB need 102.2: within macOS 26's 107.5, above macOS 15's 96."""
    machine = Machine(Host("mac1"), version=version, memory_bytes=128 << 30)
    assert (_needed_limit(machine, 92 << 30) is not None) == raised


def test_a_port_that_networksetup_does_not_list() -> None:
    macs = cable_all(2, cabling.mesh(2))
    lacking: Mapping[int, str] = {port: name for port, name in PORTS.items() if port != 1}
    with pytest.raises(PlanError) as caught:
        plan([replace(macs[0], hardware_ports=cabling.hardware_ports_text(lacking)), macs[1]])
    assert "mac1: port 1 has no network interface" in (caught.value.hint or "")


def test_a_plan_as_json_and_as_files() -> None:
    made = plan(cable_all(4, cabling.mesh(4)[1:]), Wish(no_sleep=True), sleep=10)
    document = json.loads(json.dumps(plan_json(made, state="planned", written=None)))
    assert (document["schema"], document["state"], document["shape"]) == ("moectl.setup/1", "planned", "ring")
    assert document["missing_of_mesh"] == [["mac1", "mac2"]]
    assert len(document["cables"]) == 5
    assert document["cables"][0] == {
        "ends": [
            {"host": "mac1", "port": "2", "interface": "en3", "rdma": "rdma_en3"},
            {"host": "mac3", "port": "1", "interface": "en2", "rdma": "rdma_en2"},
        ],
        "bit_s": 80 * 10**9,
    }
    commands = document["hosts"][0]["commands"]
    assert [command["needed"] for command in commands] == [True, True, False, True, False, True]
    assert commands[-1]["undo"] == ["pmset", "-c", "sleep", "10"]
    rows = document["hostfile"]["hosts"]
    assert rows[0] == {"host": "mac1", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en3", None, "rdma_en4"]}
    assert parse_hosts(file_text(made, "x.txt")).hosts == parse_hosts(file_text(made, "x.json")).hosts
    with pytest.raises(HostsError, match="cannot hold envs"):
        file_text(replace(made, hosts=replace(made.hosts, envs=("A=1",))), "x.txt")


def test_devices_joined_by_plus_are_several() -> None:
    hosts = parse_hosts("a rdma=-,en2+en3\nb rdma=en2+en3,-")
    assert json.loads(to_mlx_json(hosts, resolve=lambda name: "10.0.0.1"))["hosts"][0]["rdma"] == [None, ["en2", "en3"]]
    with pytest.raises(HostsError, match="rdma has an empty name"):
        parse_hosts("a rdma=-,en2+\nb rdma=en2,-")


def test_what_a_hint_about_the_wired_limit_says_is_planned() -> None:
    macs = cable_all(2, cabling.mesh(2))
    with pytest.raises(PlanError) as caught:
        plan(macs, Wish(wired_limit_bytes=126 << 30))
    assert caught.value.hint == "at most 124GiB: overflow is a kernel panic"
    made = plan(macs, Wish(wired_limit_bytes=124 << 30))
    assert any(step.argv[1:] == (f"iogpu.wired_limit_mb={124 << 10}",) for step in made.steps[0])
    with pytest.raises(PlanError) as caught:
        plan(macs, Wish(needs_bytes=(1, 125 << 30)))
    assert caught.value.hint == "moectl plan shows what would fit; or give a size with --wired-limit"
    assert plan(macs, Wish(wired_limit_bytes=120 << 30)).steps


def test_what_a_hint_about_rdma_says_is_planned() -> None:
    macs = cable_all(2, cabling.mesh(2))
    with pytest.raises(PlanError) as caught:
        plan(macs, Wish(backend="jaccl", over="ethernet"))
    assert caught.value.hint == "moectl setup --backend ring"
    made = plan(macs, Wish(backend="ring", over="ethernet"))
    assert choose_backend(made.hosts.backend or "auto", made.hosts.hosts) == "ring"
    old = cable_all(2, cabling.mesh(2), rdma=False, link_gbit=40, idle_gbit=40)
    with pytest.raises(PlanError) as caught:
        plan(old, Wish(backend="jaccl"))
    assert caught.value.hint == "moectl setup --backend ring needs no RDMA"
    assert plan(old, Wish(backend="ring")).hosts.backend == "ring"


def test_what_the_hint_about_missing_devices_says_writes_them() -> None:
    macs = cable_all(2, cabling.mesh(2))
    found = check_backend(replace(given_list(2), hosts=(Host("mac1", rdma=(None, "rdma_en2")), Host("mac2"))))
    assert found is not None
    assert found.fix == "moectl setup writes rdma= of every host"
    mended = check_backend(plan(macs).hosts)
    assert mended is not None
    assert (mended.level, mended.text) == (Level.OK, "RDMA mesh")
