"""What a worker tells of its system and its mlx before the ranks join."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moectl.engine.group import has_jaccl, read_wheel
from moectl.planner.this_machine import read_macos


def test_the_wheel_of_mlx_that_is_installed_here() -> None:
    start = "macosx_" if sys.platform == "darwin" else "manylinux_"
    assert read_wheel().startswith(start)


@pytest.mark.parametrize(
    ("wheels", "tag"),
    [
        ({"mlx-metal": "py3-none-macosx_15_0_arm64", "mlx": "cp312-cp312-macosx_26_0_arm64"}, "macosx_15_0_arm64"),
        ({"mlx": "cp311-cp311-manylinux_2_35_aarch64"}, "manylinux_2_35_aarch64"),
        ({"mlx": None}, ""),  # made by another tool than pip
        ({}, ""),
    ],
)
def test_the_wheel_that_holds_the_libraries_counts(
    monkeypatch: pytest.MonkeyPatch, wheels: dict[str, str | None], tag: str
) -> None:
    def find(name: str) -> Any:
        if name not in wheels:
            raise importlib.metadata.PackageNotFoundError(name)
        text = wheels[name] and f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {wheels[name]}\n\n"
        return SimpleNamespace(read_text=lambda file: text)

    monkeypatch.setattr(importlib.metadata, "distribution", find)
    assert read_wheel() == tag


def test_macos_is_asked_of_its_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "sw_vers"
    tool.write_text('#!/bin/sh\n[ "$1" = -productVersion ] && echo 26.2\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert read_macos() is None or sys.platform == "darwin"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert read_macos() == "26.2"
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_macos() == ""


@pytest.mark.skipif(sys.platform == "darwin", reason="says what is true elsewhere")
def test_rdma_is_on_macs_only() -> None:
    assert has_jaccl() is False
