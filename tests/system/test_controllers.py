"""Controllers as a user starts them: kept, stopped, killed, shared; served in the foreground and in the background."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from moectl.demo import demo_dir
from moectl.errors import RemoteError
from moectl.server.client import Client, find_running, is_running
from tests.support.ring import process_env, rank_env
from tests.support.running import wait_for, workers
from tests.support.terminal import Terminal


def moectl(*words: str, check: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "moectl", *words], capture_output=True, text=True, env=process_env(**env), timeout=120
    )
    assert done.returncode == check, done.stderr
    return done


@pytest.fixture
def _nothing_left() -> Iterator[None]:
    yield
    moectl("stop", "--now")
    wait_for(lambda: not workers())


QUESTION = ("run", "--local", "2", "What is expert parallelism?")


@pytest.mark.usefixtures("_nothing_left")
def test_run_keeps_the_model_and_stop_unloads_it() -> None:
    first = moectl(*QUESTION, "--keep-alive", "5m", "--stats")
    assert "Loading " in first.stderr
    [path] = find_running()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    described = Client(path).describe()
    assert (described["hosts"], described["running"], len(workers())) == (["localhost"] * 2, 0, 2)
    second = moectl(*QUESTION, "--keep-alive", "-1")
    assert second.stdout == first.stdout
    assert "Loading " not in second.stderr
    assert Client(path).describe()["pid"] == described["pid"]
    again = json.loads(moectl(*QUESTION, "--keep-alive", "-1", "--json").stdout)
    assert again["stats"]["cached_tokens"] > again["stats"]["prompt_tokens"] / 2
    other = moectl(*QUESTION, "--dtype", "bfloat16", check=8)
    assert "is loaded with the device's own dtype" in other.stderr
    assert "moectl stop" in moectl("bench", "--local", "2", check=8).stderr
    stopped = moectl("stop")
    assert stopped.stdout.startswith("Stopped 2 workers, ")
    assert not find_running()
    assert moectl("stop").stdout == "Nothing is running.\n"
    assert json.loads(moectl("stop", "--json").stdout) == {"schema": "moectl.stop/1", "workers": 0, "memory_bytes": 0}


@pytest.mark.usefixtures("_nothing_left")
def test_a_controller_that_was_killed_leaves_no_worker_and_no_obstacle() -> None:
    answer = moectl(*QUESTION, "--keep-alive", "-1").stdout
    [path] = find_running()
    os.kill(Client(path).describe()["pid"], signal.SIGKILL)
    wait_for(lambda: not workers())
    assert path.exists()  # stale
    assert not is_running(path)
    assert moectl("stop").stdout == "Nothing is running.\n"
    assert moectl(*QUESTION, "--keep-alive", "5m").stdout == answer
    assert find_running()
    assert moectl(*QUESTION, "--keep-alive", "0").stdout == answer  # which is said before it unloads
    wait_for(lambda: not find_running() and not workers())


def test_a_refusal_does_not_keep_the_model() -> None:
    refused = moectl("run", "--local", "1", "--keep-alive", "0", "word " * 5000, check=2)
    assert "the model's context" in refused.stderr
    assert not find_running()


@pytest.mark.usefixtures("_nothing_left")
def test_two_that_start_at_once_share_one() -> None:
    command = [sys.executable, "-m", "moectl", "run", "--local", "1", "Hello", "--keep-alive", "1m"]
    env = process_env()
    moectl("run", "--local", "1", "Hello", "--keep-alive", "0")  # so that the shard set is there
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert (len(find_running()), len(workers())) == (1, 1)


@pytest.mark.long  # over fakes: tests/session/test_session.py::test_who_does_not_answer_is_named_and_no_stall
@pytest.mark.usefixtures("_nothing_left")
def test_a_frozen_worker_and_a_long_prompt_do_not_hold_the_controller() -> None:
    moectl("run", "--local", "1", "Hello", "--keep-alive", "-1", "--no-restart")
    [path], [worker] = find_running(), workers()
    os.kill(worker, signal.SIGSTOP)
    long = "word " * 12_900  # all but fills the pipe to it
    with pytest.raises(RemoteError, match="has not answered for 4 s"):  # no process: it might come too late
        list(Client(path).complete({"prompt": long}))
    wait_for(lambda: not is_running(path))


@pytest.mark.usefixtures("_nothing_left")
def test_a_controller_that_loads_is_stopped() -> None:
    command = [sys.executable, "-m", "moectl", "run", "--local", "2", "Hello", "--keep-alive", "1m"]
    with subprocess.Popen(command, env=process_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as starting:
        wait_for(lambda: bool(workers()))
        moectl("stop", "--now")
        _, stderr = starting.communicate(timeout=60)
    assert starting.returncode != 0, stderr
    wait_for(lambda: not workers())


@pytest.mark.long
def test_guessing_and_small_steps_change_no_answer() -> None:
    plain = moectl(*QUESTION)
    assert not find_running()  # keep alive for 0 s
    wait_for(lambda: not workers())
    guessed = moectl(*QUESTION, "--speculate", "8", "--prefill-step", "16", "--stats")
    assert guessed.stdout == plain.stdout


def test_what_goes_wrong_in_the_background_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    moectl("shard", str(demo_dir()), "--nodes", "1", "-o", str(directory))
    weights = directory / "rank-0" / "layer-000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    failed = moectl("run", "--shards", str(directory), "Hello", check=7)
    assert "layer-000.safetensors" in failed.stderr
    assert not find_running()


def test_run_without_a_prompt_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_env().items():
        monkeypatch.setenv(name, value)
    words = [
        sys.executable,
        "-W",
        "default",
        "-m",
        "moectl",
        "run",
        "--local",
        "1",
        "--model",
        str(demo_dir()),
        "--stats",
    ]
    with Terminal(words, tmp_path) as terminal:
        terminal.wait(lambda: any("on 1 rank of this machine. /? for help" in line for line in terminal.lines))
        terminal.wait(lambda: terminal.lines[-1].startswith(">>>"))
        terminal.type("What is expert parallelism?\r")
        terminal.wait(lambda: any("prompt tokens at" in line for line in terminal.lines))
        terminal.wait(lambda: terminal.lines[-1].startswith(">>>"))
        terminal.type("/bye\r")
        assert terminal.end() == 0
    assert not find_running()


@pytest.fixture
def served() -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "moectl", "serve", "--local", "2", "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=process_env(),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    yield process, json.loads(line)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    wait_for(lambda: not workers())


def test_serving_openais_client(served: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    api = openai.OpenAI(base_url=served[1]["url"], api_key="none", max_retries=0)
    name = api.models.list().data[0].id
    assert name == served[1]["model"]
    asked: dict[str, Any] = {
        "model": name,
        "messages": [{"role": "user", "content": "What is expert parallelism?"}],
        "temperature": 0,
        "max_tokens": 40,
    }
    whole = api.chat.completions.create(**asked)
    with api.chat.completions.create(**asked, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert moectl(*QUESTION, "--max-tokens", "40").stdout == f"{text}\n"  # run attaches to the same controller
    assert "Error: moectl-demo-bf16-hidden-2 is loaded already" in moectl("serve", "--local", "2", check=8).stderr
    with pytest.raises(openai.BadRequestError, match="context"):
        api.completions.create(model=name, prompt="word " * 5000)
    with api.chat.completions.create(**{**asked, "max_tokens": 400}, stream=True, extra_body={"ignore_eos": True}) as s:
        for _ in s:
            break
    [path] = find_running()
    wait_for(lambda: Client(path).describe()["running"] == 0)
    assert api.chat.completions.create(**asked).choices[0].message.content == text


def test_what_is_no_api_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    assert "exclude each other" in moectl("serve", "--api-key", "a", "--api-key-file", str(key), check=2).stderr
    assert "cannot be read" in moectl("serve", "--api-key-file", str(key), check=2).stderr
    key.write_text("\n \n")
    assert "not empty" in moectl("serve", "--api-key-file", str(key), check=2).stderr
    assert "without an API key" in moectl("serve", "--local", "1", "--host", "0.0.0.0", check=2).stderr


@pytest.mark.usefixtures("_nothing_left")
def test_a_detached_server() -> None:
    found = json.loads(moectl("serve", "--local", "1", "--port", "0", "-d", "--api-key", "sesame", "--json").stdout)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=found["url"], api_key="wrong", max_retries=0).models.list()
    api = openai.OpenAI(base_url=found["url"], api_key="sesame", max_retries=0)
    assert api.models.list().data[0].id == found["model"]
    assert moectl("stop").stdout.startswith("Stopped 1 worker, ")


@pytest.mark.usefixtures("_nothing_left")
def test_a_detached_server_lets_in_what_its_flags_say() -> None:
    page, other, name = "http://localhost:3000", "http://evil.example", "host.docker.internal"
    words = ("serve", "--local", "1", "--port", "0", "-d", "--json", "--allow-origin", page, "--allow-host", name)
    url = json.loads(moectl(*words).stdout)["url"]
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with httpx2.Client() as http:
        for origin, status in ((page, 200), (other, 403)):
            assert (
                http.options(f"{url}/chat/completions", headers={**preflight, "origin": origin}).status_code == status
            )
        found = http.get(f"{url}/models", headers={"host": f"{name}:8080", "origin": page})
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, page)
        assert http.get(f"{url}/models", headers={"host": "other.example"}).status_code == 403
        prompts: list[Any] = ["word " * 5000, "x" * 3_000_000, [5] * 3000]
        asked = [({"prompt": prompt}, "completions", "prompt") for prompt in prompts]
        asked += [({"messages": [{"role": "user", "content": p}]}, "chat/completions", "messages") for p in prompts[:2]]
        for body, path, param in asked:
            for stream in (False, True):
                reply = http.post(f"{url}/{path}", json={**body, "stream": stream, "max_tokens": 32_000}, timeout=60)
                error = reply.json()["error"]
                assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
        greedy, zero = (
            http.post(f"{url}/completions", json={"prompt": "What is", "max_tokens": 8, **how}, timeout=60).json()
            for how in ({"temperature": 0}, {"top_p": 0, "temperature": 1, "stop": [""]})
        )
        assert greedy["choices"][0]["text"] == zero["choices"][0]["text"] != ""
    assert moectl("stop").stdout.startswith("Stopped 1 worker, ")


@pytest.mark.parametrize("flag", ["--allow-origin", "--allowed-origins"])
def test_all_origins_need_a_key(flag: str) -> None:
    told = moectl("serve", "--local", "1", flag, "*", check=2).stderr
    assert told.startswith("Error: --allow-origin '*' needs an API key")
    assert "Hint: add --api-key-file FILE" in told
