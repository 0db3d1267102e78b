"""The lines and the document of doctor, from findings made by hand."""

from __future__ import annotations

import json

from moectl.cli.verbs.doctor import doctor_json, doctor_text, summary_text
from moectl.cluster.doctor.diagnose import Diagnosis, HostReport, PairReport
from moectl.cluster.doctor.finding import Level, fail, ok, skip, warn
from moectl.hosts.hostfile import Host

MAC1, MAC2, MAC3 = Host("mac1"), Host("mac2", "ada"), Host("mac3")
DIAGNOSIS = Diagnosis(
    "hosts.txt",
    (
        HostReport(MAC1, 0, (ok("ssh", "ssh 0.8 ms", latency_s=8e-4), ok("system", "macOS 26.2"))),
        HostReport(MAC2, 1, (ok("ssh", "ssh 0.9 ms"), warn("sleep", "sleeps", "pmset"), fail("disk", "full", "rm"))),
        HostReport(MAC3, 2, (fail("ssh", "no answer", None),)),
    ),
    (PairReport(MAC1, MAC2, (ok("tcp", "9.4 Gb/s 0.11 ms"), ok("collective", "sum 30 µs"))),),
    (ok("backend", "ring over TCP"), skip("links", "links with mac3: it could not be looked at")),
)


def test_good_news_share_a_line_and_bad_news_have_their_own() -> None:
    assert doctor_text(DIAGNOSIS, width=80).split("\n") == [
        "mac1      ok    ssh 0.8 ms · macOS 26.2",
        "ada@mac2  ok    ssh 0.9 ms",
        "ada@mac2  FAIL  full",
        "                fix: rm",
        "ada@mac2  warn  sleeps",
        "                fix: pmset",
        "mac3      FAIL  no answer",
        "links     ok    mac1-mac2 9.4 Gb/s 0.11 ms · mac1-mac2 sum 30 µs",
        "cluster   ok    ring over TCP",
        "cluster   skip  links with mac3: it could not be looked at",
        "6 ok, 1 warning, 2 failures, 1 skipped",
    ]


def test_lines_break_between_words_only() -> None:
    assert doctor_text(DIAGNOSIS, width=40).split("\n")[:2] == [
        "mac1      ok    ssh 0.8 ms · macOS 26.2",
        "ada@mac2  ok    ssh 0.9 ms",
    ]
    assert "                macOS 26.2" in doctor_text(DIAGNOSIS, width=30).split("\n")


def test_levels_are_painted_and_nothing_else() -> None:
    plain = doctor_text(DIAGNOSIS, width=40)
    painted = doctor_text(DIAGNOSIS, width=40, paint=lambda level, word: f"<{word}>")
    assert "<FAIL>  full" in painted
    assert painted.replace("<", "").replace(">", "") == plain


def test_verbose_gives_each_check_a_line() -> None:
    lines = doctor_text(DIAGNOSIS, width=80, verbose=True).split("\n")
    assert lines[:2] == ["mac1      ok    ssh 0.8 ms", "mac1      ok    macOS 26.2"]


def test_the_document() -> None:
    document = json.loads(json.dumps(doctor_json(DIAGNOSIS, fast=False)))
    assert document["schema"] == "moectl.doctor/1"
    assert document["ok"] is False
    assert document["counts"] == {"skip": 1, "ok": 6, "warn": 1, "fail": 2}
    assert document["hosts"][0]["checks"][0] == {
        "check": "ssh",
        "level": "ok",
        "text": "ssh 0.8 ms",
        "fix": None,
        "values": {"latency_s": 8e-4},
    }
    assert [(p["a"], p["b"], len(p["checks"])) for p in document["pairs"]] == [("mac1", "ada@mac2", 2)]
    assert document["cluster"][1]["level"] == "skip"


def test_the_summary_of_good_news() -> None:
    good = Diagnosis("this machine", DIAGNOSIS.hosts[:1])
    assert summary_text(good) == "2 ok, 0 warnings, 0 failures"
    assert good.count(Level.FAIL) == 0
