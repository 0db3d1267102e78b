"""What nobody else may: read prompts or keys on a disk, reach a socket, run code out of a checkpoint, join the ring."""

from __future__ import annotations

import ast
import contextlib
import http.client
import io
import json
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from moectl.cli import terminal
from moectl.cli.options import Common
from moectl.engine.answer import read_prompt
from moectl.engine.request import Request
from moectl.errors import MoectlError, UsageError
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import LocalRemote
from moectl.session.session import RankSpec, Session
from moectl.shards.chat.tokenizer import open_tokenizer
from tests.engine.test_lockstep import cut_case
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.ring import process_env, rank_env
from tests.support.running import processes, wait_for
from tests.support.tiny import write_checkpoint
from tests.support.words import ask_chat

PACKAGE = Path(__file__).parent.parent.parent / "moectl"
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

# Code.

LOADERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "torch",
    "yaml",
    "runpy",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"system", "popen", "getoutput", "getstatusoutput", "import_module", "loads_pickle", "torch_load"}
WORDS = {"allow_pickle", "shell", "trust_remote_code", "weights_only"}


def offences(tree: ast.AST) -> Iterator[str]:
    """Yield what would let data become code."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (n.name for n in names if n.name.split(".")[0] in LOADERS)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in LOADERS:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS:
                yield name
            case ast.Call(func=ast.Attribute(attr=name)) if name in ATTRIBUTES:
                yield name
            case ast.keyword(arg=str(word), value=value) if word in WORDS and not _is(value, False):
                yield word
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and key.value in WORDS and not _is(value, False):
                        yield str(key.value)


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_that_is_read_becomes_code() -> None:
    assert {path.name: found for path, tree in TREES.items() if (found := list(offences(tree)))} == {
        "calls.py": ["import_module"],  # of mlx-lm's own parsers, of which it lists the names
        "chat_template.py": ["import_module"],  # of mlx-lm's own templates, of which it lists the names
        "completion.py": ["shell"],  # a key of `completion --json`
        "platform.py": ["system"],  # platform's, which tells what it is
    }


def test_the_rule_finds_what_it_forbids() -> None:
    bad = """
import pickle
from torch import load
eval("1"); exec("1"); os.system("x"); importlib.import_module(name)
np.load(f, allow_pickle=True); subprocess.run("x", shell=True); f(trust_remote_code=flag)
load(d, {"trust_remote_code": True})
"""
    assert len(list(offences(ast.parse(bad)))) == 10
    assert list(offences(ast.parse('re.compile("x"); model.eval(); load(d, {"trust_remote_code": False})'))) == []


def calls(*names: str) -> dict[str, set[str]]:
    """Return which modules call functions of these dotted names."""
    found: dict[str, set[str]] = {name: set() for name in names}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = f"{node.func.value.id}.{node.func.attr}" if isinstance(node.func.value, ast.Name) else ""
                if called in found:
                    found[called].add(str(path.relative_to(PACKAGE)))
    return found


def test_who_may_load_fork_and_run_a_shell() -> None:
    assert calls("mx.load", "hmac.compare_digest") == {
        # behind a check for .safetensors, and as that
        "mx.load": {"engine/network/load.py", "engine/network/joined.py"},
        "hmac.compare_digest": {"server/doors.py", "hosts/onhost/links.py", "hosts/onhost/relay.py"},
    }
    # multiprocessing pickles what passes between a deploy and its own children, through pipes that nobody else has.
    users = {p.name for p in TREES if "import multiprocessing" in p.read_text()}
    assert users == {"fleet.py"}
    shells = {p.name for p in TREES if '"/bin/sh"' in p.read_text()}
    # A ProxyCommand of the user's own configuration, as ssh runs it; and two commands of moectl's, quoted, in a plist.
    assert shells == {"proxy.py", "launchd.py"}


EVIL = "from pathlib import Path\nPath({!r}).write_text('run')\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    write_tokenizer(directory)
    return directory


def change_config(directory: Path, **more: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.mark.parametrize(
    "more",
    [
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
        {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        {"tokenizer_class": "evil.Evil"},
        {"chat_template_type": "../../evil"},
        {"chat_template_type": "..evil"},
        {"tool_parser_type": "evil"},
        {"tool_parser_type": 5},
    ],
    ids=str,
)
def test_no_code_of_a_checkpoint_runs(
    checkpoint: Path, more: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = checkpoint / "mark"
    (checkpoint / "evil.py").write_text(EVIL.format(str(mark)))
    (checkpoint / "config.json").write_text(
        json.dumps(
            {"model_type": "dbrx", "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}}
        )
    )
    change_config(checkpoint, **more)
    monkeypatch.chdir(checkpoint)
    with contextlib.suppress(MoectlError):
        open_tokenizer(checkpoint)
    assert not mark.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.popen('touch mark').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('touch mark') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ raise_exception.__globals__['__builtins__']['open']('mark', 'w') }}",
        "{% include '/etc/passwd' %}",
        "{% set x = messages.append(1) %}{{ x }}",
        "{{ '{0.__class__}'.format(messages) | length and ('{0.__class__.__init__.__globals__}'.format(cycler)) }}",
    ],
)
def test_a_chat_template_is_kept_in_a_sandbox(checkpoint: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(checkpoint, chat_template=template)
    monkeypatch.chdir(checkpoint)
    tokenizer = open_tokenizer(checkpoint)
    said = ""
    with contextlib.suppress(UsageError):  # the template fails, or says nothing
        said = tokenizer.decode(read_prompt(ask_chat(1, "hi", 1), tokenizer, vocab_size=VOCAB_SIZE, max_seq_len=10**5))
    assert not (checkpoint / "mark").exists()
    assert "root:" not in said
    assert "<class" not in said
    assert "builtins" not in said


# Disks, sockets, logs.

MARKS = ("xyzzyprompt", "plughsystem", "frobozzraw", "wombatool")
KEY = "sesame-open-5db1"


def test_a_running_server_keeps_its_secrets(tmp_path: Path) -> None:
    """One real `serve` with two ranks and -v: no prompt, answer or key in a log, and nothing open to others."""
    home, key = tmp_path / "home", tmp_path / "key.txt"
    home.mkdir()
    key.write_text(KEY + "\n")
    env = process_env(HOME=str(home), XDG_STATE_HOME=str(home / "state"), XDG_CACHE_HOME=str(home / "cache"))
    words = [sys.executable, "-m", "moectl", "serve", "--local", "2", "--port", "0", "--json", "-v"]
    errors = tmp_path / "stderr"
    with errors.open("wb") as stderr:
        server = subprocess.Popen(
            [*words, "--api-key-file", str(key)], stdout=subprocess.PIPE, stderr=stderr, env=env, umask=0
        )
    assert server.stdout is not None
    try:
        url = json.loads(server.stdout.readline())["url"]
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        body = {"messages": [{"role": "system", "content": MARKS[1]}, {"role": "user", "content": MARKS[0] * 2}]}
        status, _ = post(port, body, "wrong")
        assert status == 401
        status, answer = post(port, {**body, "max_tokens": 24, "temperature": 0}, KEY)
        assert status == 200
        said = answer["choices"][0]["message"]["content"]
        assert post(port, {"messages": MARKS[2]}, KEY)[0] == 400
        for path, more in OTHERS.items():
            assert post(port, {**more, "max_tokens": 4}, KEY, path)[0] == 200
            assert post(port, {**more, "temperature": MARKS[2]}, KEY, path)[0] == 400
        asked = subprocess.run(
            [sys.executable, "-m", "moectl", "run", "-v", "--local", "2", "--raw", MARKS[2], "--max-tokens", "9"],
            env=env,
            capture_output=True,
            timeout=120,
            check=True,
            umask=0,
        )
        check_modes(home / "state")
        check_modes(Path(env["XDG_RUNTIME_DIR"]) / "moectl")
        told = [errors.read_bytes(), asked.stderr, *command_lines()]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        server.stdout.close()
    told += [errors.read_bytes(), *(p.read_bytes() for p in home.rglob("*") if p.is_file() and "shards" not in p.parts)]
    logs = [p for p in (home / "state").rglob("*.log")]
    assert len(logs) == 2, "each rank has a log"
    assert any(b"request 1" in text for text in told), "the logs say something"
    secrets = [*MARKS, KEY, *([said.strip()] if len(said.strip()) > 7 else [])]
    for secret in secrets:
        ours = [text for text in told if secret.encode() in text and b"\0run\0" not in text]
        assert not ours, secret


_TALK = [{"role": "user", "content": MARKS[0]}]
_SCHEMA = {"type": "object", "properties": {MARKS[3]: {}}}
OTHERS: dict[str, dict[str, Any]] = {
    "/v1/messages": {
        "messages": _TALK,
        "system": MARKS[1],
        "tools": [{"name": MARKS[3], "description": MARKS[2], "input_schema": _SCHEMA}],
    },
    "/v1/responses": {
        "input": [
            *_TALK,
            {"type": "function_call", "call_id": MARKS[2], "name": MARKS[3], "arguments": json.dumps(MARKS)},
            {"type": "function_call_output", "call_id": MARKS[2], "output": MARKS[1]},
        ],
        "tools": [{"type": "function", "name": MARKS[3], "parameters": _SCHEMA}],
    },
}


def post(port: int, body: Mapping[str, object], key: str, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def command_lines() -> list[bytes]:
    """Return what everybody on this machine may read of the processes that this test started."""
    return [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes("moectl")]


def check_modes(directory: Path) -> None:
    """Check that nobody but the user can read, write or enter anything here; made under a umask of 0."""
    found = [directory, *directory.rglob("*")]
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode & 0o077 == 0, f"{path} has mode {mode:o}"
    assert len(found) > 1


ESCAPE = "\x1b]0;title\x07\x1b[2J\x9b5n\rover"


class Screen(io.StringIO):
    """A terminal, as far as anybody asks."""

    def isatty(self) -> bool:
        return True


def test_no_host_and_no_model_gets_hold_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    error = MoectlError(f"it said {ESCAPE}\nand more", hint=f"try\u2028 {ESCAPE}", host="mac1")
    assert str(error) == "mac1: it said  ]0;title [2J 5n over and more"
    assert error.hint is not None
    assert error.hint.isprintable()
    out, log, file = Screen(), Screen(), io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    common = Common(hosts=None, hostfile=None, json=False, quiet=False, verbose=1, color="auto")
    terminal.log_printer(common)("mac1", ESCAPE)
    assert log.getvalue().strip().isprintable()
    for screen in (out, file):
        monkeypatch.setattr("sys.stdout", screen)
        terminal.write_answer(ESCAPE)
    assert out.getvalue().isprintable()
    assert file.getvalue() == ESCAPE  # what goes to a file stays as it is


# The ring.

LISTEN, ESTABLISHED = "0A", "01"


Address = tuple[str, int]


def connections(pids: set[int], state: str) -> set[tuple[Address, Address]]:
    """Return (local, remote) of these processes' TCP sockets in a state, IPv4 and IPv6."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(fd.readlink()).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in inodes and words[3] == state:
                found.add((_read_address(words[1]), _read_address(words[2])))
    return found


def _read_address(text: str) -> Address:
    address, port = text.split(":")
    raw = bytes.fromhex(address)
    return (socket.inet_ntoa(raw[::-1]) if len(raw) == 4 else raw.hex()), int(port, 16)


def test_ring_ports_are_open_on_the_chosen_addresses_and_while_running_only(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    directory = cut_case(source, tmp_path / "two", "hidden", (2, 4), 16)
    worker = (sys.executable, "-m", "moectl", "worker")
    chosen = ("127.0.0.2", "127.0.0.3")
    ranks = [
        RankSpec(Host(f"host{n}"), LocalRemote(), worker, str(directory), (address,), rank_env())
        for n, address in enumerate(chosen)
    ]
    opened: set[tuple[Address, Address]] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            with contextlib.suppress(OSError):  # a worker has gone meanwhile
                opened.update(connections(set(processes("moectl worker")), LISTEN))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with Session(ranks) as session:
            pids = set(processes("moectl worker"))
            assert len(pids) == 2
            assert list(session.generate(Request(1, "hello", 3)))
            listening, joined = connections(pids, LISTEN), connections(pids, ESTABLISHED)
    finally:
        over.set()
        watching.join()
    assert not listening, "once the ranks have joined, nobody else is let in"
    assert {local[0] for local, _ in opened} <= set(chosen), opened
    # Who dials has whatever address leads there; who was dialled was so at the address that was chosen.
    dialled = {end for ends in joined for end in ends if end[0] in chosen}
    assert len(joined) == 2 * len(dialled) > 0, joined
    wait_for(lambda: not processes("moectl worker"))
    for address, port in {local for local, _ in opened} | dialled:
        with pytest.raises(ConnectionRefusedError), socket.create_connection((address, port), 5):
            pass
