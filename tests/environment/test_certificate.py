"""A backend is certified on a device by a check that passed there, with what is there now."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import gdn_ops
from command_line import Result, run
from constant_backends import arguments, step_arguments
from gdn_ops import Backend, gated_delta
from gdn_ops.dispatch import registry
from gdn_ops.environment import certificate, provenance
from gdn_ops.environment.certificate import Certificate, issue, record, standing
from gdn_ops.testing import conformance
from processes import printed

SOURCE = """
import torch
from gdn_ops import Forward, Limits
from gdn_ops.backends.naive import Naive

class Kernel(Naive):
    name = "kernel"
    requires = ("numpy",)
    kernels = True
    limits = Limits(devices=("cpu",), dtypes=("float32",))
    factor = 1

    def forward(self, call):
        out = super().forward(call)
        return out._replace(o=out.o * self.factor)
"""


@pytest.fixture(autouse=True)
def nothing_known(
    registry_as_found: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Start without certificates and memories."""
    monkeypatch.setenv("GDN_OPS_CACHE", str(tmp_path / "cache"))
    certificate.reason_against.cache_clear()
    yield tmp_path
    sys.modules.pop("kernel_backend", None)


@pytest.fixture
def kernel(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> type[Backend]:
    """A backend of kernels, in a file of its own, that "auto" tries first on the CPU."""
    (nothing_known / "kernel_backend.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(nothing_known))
    cls: type[Backend] = importlib.import_module("kernel_backend").Kernel
    registry.register_backend(cls)
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("kernel", "torch"))
    return cls


@pytest.fixture
def required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate, "REQUIRED", True)


def check() -> Result:
    return run("check", "--backend", "kernel", "--seconds", "0.1", "--seed", "1")


def passed(cls: type[Backend], **changes: Any) -> Certificate:
    return replace(issue(cls, "cpu", passed=True, examples=7, seconds=1.23, seed=3), **changes)


# What `gdn-ops check` leaves behind.


def test_a_check_that_passes_is_a_certificate(kernel: type[Backend], nothing_known: Path) -> None:
    assert "cpu: not certified" in run("info").output
    result = check()
    assert result.exit_code == 0, result.output
    path = nothing_known / "cache" / "certificates.json"
    cpu = provenance.cpu_model()
    assert f"certificate for {cpu} recorded in {path}" in " ".join(result.output.split())
    (row,) = json.loads(path.read_text())["certificates"]
    assert "error in units of what is allowed" in result.output
    examples = int(re.findall(r"kernel: (\d+) calls in \d+ s, passed", result.output)[0])
    assert (row["backend"], row["device"], row["passed"]) == ("kernel", cpu, True)
    assert (row["examples"], row["seed"]) == (examples, 1)
    assert row["seconds"] > 0
    assert set(row["built_with"]) == {"torch", "gdn_ops", "numpy", "source"}
    assert row["built_with"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{16}", row["built_with"]["source"])
    assert f"cpu: certified on {row['date']}" in run("info").output
    listed = {b["name"]: b for b in json.loads(run("info", "--json").output)["backends"]}
    assert listed["kernel"]["certificates"] == {"cpu": f"certified on {row['date']}"}
    assert listed["torch"]["certificates"] == {"cpu": "not certified"}


def test_what_emulates_is_shown_as_such(
    kernel: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = gdn_ops.Limits(devices=("cuda",), emulated_devices=("cpu",))
    monkeypatch.setattr(kernel, "limits", limits)
    assert "cpu (emulated): not certified" in run("info").output


def test_a_check_that_fails_revokes_the_certificate(
    kernel: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(passed(kernel))
    assert standing(kernel, "cpu").state == "certified"
    monkeypatch.setattr(kernel, "factor", 2)
    result = check()
    assert result.exit_code == 1
    for text in ("FAIL", "the smallest call that fails", "'kernel'", "kernel: ", "failed"):
        assert text in result.output
    assert "failure, no certificate, for" in result.output
    assert standing(kernel, "cpu").state == "failed"
    assert len(certificate.read_certificates()) == 1
    assert "cpu: failed on" in run("info").output


def test_a_check_that_never_ends_leaves_no_certificate(
    kernel: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = passed(kernel, built_with={"torch": "2.0"})
    record(other)
    record(passed(kernel))
    monkeypatch.setattr(conformance, "check", mock.Mock(side_effect=KeyboardInterrupt))
    assert check().exit_code != 0
    assert certificate.read_certificates() == [other]


def test_a_cache_that_cannot_be_written_is_told_and_the_check_counts(
    kernel: type[Backend], nothing_known: Path
) -> None:
    (nothing_known / "cache").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="holds no certificates and is ignored"):
        result = check()
    assert result.exit_code == 0, result.output
    assert "could not be recorded: " in result.output


# What a certificate depends on.


def test_a_certificate_is_stale_when_something_changed(kernel: type[Backend]) -> None:
    then = passed(kernel).built_with | {"torch": "2.0", "source": "0" * 16, "driver": "1.2"}
    record(passed(kernel, built_with=then, date="2026-01-02"))
    now = standing(kernel, "cpu")
    assert now.state == "stale"
    assert str(now) == (
        "stale, certified on 2026-01-02: driver 1.2 is now absent, its source changed, "
        f"torch 2.0 is now {torch.__version__}"
    )


def test_the_source_of_a_backend_is_its_files_and_those_it_derives_from(
    kernel: type[Backend], nothing_known: Path
) -> None:
    from gdn_ops.backends.naive import Naive
    from gdn_ops.backends.torch import Torch

    before = provenance.source_hash(kernel)
    assert before == provenance.source_hash(kernel)
    assert len({before, provenance.source_hash(Naive), provenance.source_hash(Torch)}) == 3
    files = {p.name for p in provenance._source_files(sys.modules[Torch.__module__])}
    assert {"__init__.py", "chunk_forward.py", "segments.py"} <= files
    assert "naive.py" not in files
    assert [p.name for p in provenance._source_files(sys.modules[Naive.__module__])] == ["naive.py"]
    (nothing_known / "kernel_backend.py").write_text(SOURCE + "# changed\n")
    assert provenance.source_hash(kernel) != before
    nameless = type("Kernel", (Backend,), {"__module__": "no.such.module"})
    assert provenance.source_hash(nameless) == "unknown"


def test_a_certificate_of_one_device_is_none_of_another(
    kernel: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    record(passed(kernel))
    monkeypatch.setattr(certificate, "device_name", lambda device: "NVIDIA H200")
    assert str(standing(kernel, "cuda:0")) == "not certified"


def test_certificates_of_other_circumstances_are_kept_up_to_a_number(
    kernel: type[Backend],
) -> None:
    for i in range(certificate.KEPT + 3):
        record(passed(kernel, built_with={"torch": str(i)}))
    record(passed(kernel, device="another"))
    kept = [c.built_with["torch"] for c in certificate.read_certificates()]
    assert kept == [*map(str, range(3, certificate.KEPT + 3)), torch.__version__]


def test_the_driver_is_read_where_the_system_tells_it(
    nothing_known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = nothing_known / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue Mar 1 1:02:03 UTC 2026\n"
        "GCC version:  gcc version 12.2.0\n"
    )

    paths = {"/proc/driver/nvidia/version": version}
    monkeypatch.setattr(provenance, "Path", lambda path: paths.get(path, nothing_known / "absent"))
    assert provenance.driver_version() == "580.159.03"
    version.unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provenance.driver_version() is None


# The file.


@pytest.mark.parametrize(
    "text",
    [
        *(b"no json", b"[]", b"null", b"\xff\xfe\x00"),
        b'{"schema": 2, "certificates": []}',
        b'{"schema": 1}',
        b'{"schema": 1, "certificates": [{"backend": "kernel"}]}',
        b'{"schema": 1, "certificates": ["kernel"]}',
        b"of the wrong type",
    ],
)
def test_a_corrupted_file_is_told_ignored_and_replaced(text: bytes, kernel: type[Backend]) -> None:
    path = record(passed(kernel))
    message = re.escape(f"{path} holds no certificates and is ignored (")
    if text == b"of the wrong type":
        text = path.read_bytes().replace(b'"passed": true', b'"passed": "true"')
        message += re.escape("TypeError: passed is 'true'")
    path.write_bytes(text)
    with pytest.warns(UserWarning, match=message + ".*; the next check replaces it"):
        assert certificate.read_certificates() == []
    with pytest.warns(UserWarning, match=message):
        record(passed(kernel))
    assert certificate.read_certificates() == [passed(kernel)]


def test_a_write_that_breaks_off_leaves_the_old_file(
    kernel: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = record(passed(kernel))
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        record(passed(kernel, examples=99))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_cache_is_where_the_environment_says(
    nothing_known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert certificate.cache_folder() == nothing_known / "cache"
    monkeypatch.delenv("GDN_OPS_CACHE")
    assert certificate.cache_folder() == Path("/x/gdn_ops")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert certificate.cache_folder() == Path.home() / ".cache" / "gdn_ops"


# GDN_OPS_REQUIRE_CERTIFIED.


def test_auto_passes_over_an_uncertified_kernel_backend_only_if_asked(
    kernel: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gdn_ops.explain(**arguments()).backend == "kernel"
    monkeypatch.setattr(certificate, "REQUIRED", True)
    explained = gdn_ops.explain(**arguments())
    assert explained.backend == "torch"
    version = importlib.import_module("numpy").__version__
    assert dict(explained.reasons)["kernel"] == (
        f"not certified on {provenance.cpu_model()} with numpy {version}: "
        "run gdn-ops check --backend kernel",
    )
    assert gdn_ops.explain(**arguments(), backend="kernel").backend == "kernel"
    pinned = gated_delta(**arguments(), backend="kernel")
    torch.testing.assert_close(pinned, gated_delta(**arguments()))
    record(passed(kernel))
    assert gdn_ops.explain(**arguments()).backend == "kernel"


def test_the_reasons_for_a_gpu_are_these(monkeypatch: pytest.MonkeyPatch) -> None:
    class Triton(Backend):
        name = "triton"
        requires = ("triton",)
        limits = gdn_ops.Limits(devices=("cuda",))
        kernels = True

    for module in (certificate, provenance):
        monkeypatch.setattr(module, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(provenance, "package_version", lambda package: "3.6.0")
    monkeypatch.setattr(provenance, "driver_version", lambda: "580.1")
    reason = certificate.reason_against.__wrapped__
    cure = ": run gdn-ops check --backend triton"
    assert reason(Triton, "cuda:0") == f"not certified on NVIDIA H200 with triton 3.6.0{cure}"
    made = issue(Triton, "cuda", passed=True, examples=1, seconds=1, seed=0)
    assert made.built_with["driver"] == "580.1"
    record(replace(made, passed=False, date="2026-11-21"))
    assert reason(Triton, "cuda:0") == (
        f"failed its check on NVIDIA H200 with triton 3.6.0 on 2026-11-21{cure}"
    )
    record(made)
    assert reason(Triton, "cuda:0") is None
    monkeypatch.setattr(provenance, "package_version", lambda package: "3.7.1")
    assert reason(Triton, "cuda:0") == (
        f"its certificate for NVIDIA H200 is stale (triton 3.6.0 is now 3.7.1){cure}"
    )


def test_the_environment_asks_for_certificates() -> None:
    code = "from gdn_ops.environment import certificate; print(certificate.REQUIRED)"
    for value, answer in (("1", "True"), ("", "False")):
        assert printed(code, GDN_OPS_REQUIRE_CERTIFIED=value) == answer


def test_the_file_is_read_once_per_process(
    kernel: type[Backend], required: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = mock.Mock(wraps=certificate.read_certificates)
    monkeypatch.setattr(certificate, "read_certificates", read)
    for _ in range(3):
        gated_delta(**arguments())
    read.assert_called_once()


def test_a_compiled_step_passes_over_it_too(kernel: type[Backend], required: None) -> None:
    token = step_arguments(state=torch.randn(1, 4, 8, 6))
    step = torch.compile(gdn_ops.gated_delta_step, backend="eager", fullgraph=True)
    expected = gdn_ops.gated_delta_step(**token, backend="torch")
    torch.testing.assert_close(step(**token), expected)


def test_every_backend_that_emulates_says_that_it_brings_kernels() -> None:
    backends = [registry.get_backend(name) for name in registry.known_backends()]
    emulating = [b for b in backends if isinstance(b, Backend) and b.limits.emulated_devices]
    assert [b.name for b in emulating if not b.kernels] == []


def test_a_user_without_a_home_has_a_temporary_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GDN_OPS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("no home")))
    assert certificate.cache_folder() == Path(tempfile.gettempdir()) / f"gdn_ops-{os.getuid()}"
