"""The files for operators: linted, and every flag in them is one that its program takes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava.core.config import parse
from llava.serve.controller import ControllerSettings
from llava.serve.model_worker import ALIASES, REFUSED, WorkerSettings, translated
from llava.serve.options import ServeSettings

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
UNIT = ROOT / "scripts" / "m2f2-serve.service"
READERS = {"llava.serve.controller": ControllerSettings, "llava.serve.model_worker": WorkerSettings}
WANTED = {"DynamicUser": "yes", "ProtectSystem": "strict", "NoNewPrivileges": "yes", "CapabilityBoundingSet": ""}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)


def instruction(name: str) -> list[str]:
    """Give what follows an instruction in the Dockerfile, each time it is there, without continued lines."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{name}\s+(.*)$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return found


def test_the_dockerfile_passes_its_linter() -> None:
    found = run(TOOLS / "hadolint", ROOT / "Dockerfile")
    assert found.returncode == 0, found.stdout


def test_the_image_runs_as_nobody_s_root_and_checks_its_health() -> None:
    assert instruction("USER") == ["10001"] and "/health" in instruction("HEALTHCHECK")[0]
    command = json.loads(instruction("ENTRYPOINT")[0]) + json.loads(instruction("CMD")[0])
    assert command[:2] == ["m2f2", "serve"]
    settings = parse(ServeSettings, command[2:])
    assert settings.keys and settings.log_json and settings.model_path == ["/srv/model"]
    copied = {word for line in instruction("COPY") for word in line.split()[:-1] if not word.startswith(("--", "/"))}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept and all((ROOT / name).exists() for name in kept)


def test_the_compose_file_is_of_the_specification() -> None:
    found = run(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / "compose.yaml")
    assert found.returncode == 0, found.stdout


def test_every_service_is_contained_and_takes_its_flags(services: dict[str, Any]) -> None:
    assert set(services) == {"serve", "controller", "worker-1", "worker-2"}
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        if "entrypoint" in service:
            assert service["profiles"] == ["cluster"] and "M2F2_WORKER_SECRET" in service["environment"]
            settings: Any = parse(
                READERS[service["entrypoint"][-1]], list(translated(service["command"], ALIASES, REFUSED))
            )
            assert settings.port in (21001, 21002)
            assert name == "controller" or settings.address == f"http://{name}:21002"


def unit() -> RawConfigParser:
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return parser


def test_the_unit_is_hardened_and_takes_its_flags() -> None:
    service = unit()["Service"]
    assert {key: service[key] for key in WANTED} == WANTED
    assert service["Restart"] == "on-failure" and service["MemoryMax"]
    program, command, *words = shlex.split(service["ExecStart"])
    assert program.endswith("/m2f2") and command == "serve"
    settings = parse(ServeSettings, words)
    assert settings.keys == "%d/keys.json" and settings.host == "127.0.0.1"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name  # with a program that is here
    copy.write_text(UNIT.read_text().replace("/opt/m2f2/bin/m2f2", sys.executable))
    found = run("systemd-analyze", "verify", copy)
    assert found.returncode == 0 and "Unknown" not in found.stderr, found.stderr
    assert run("systemd-analyze", "security", "--offline=true", "--threshold=25", copy).returncode == 0
