"""`bestroute doctor --config`: faults of a configuration, each really there."""

import asyncio
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bestroute.app import Running
from bestroute.cli.doctor import configuration, machine, ports
from bestroute.cli.doctor.findings import Level
from bestroute.config import Settings
from bestroute.engine import cpus
from tests.doctoring import Doctor, Told

DAY = datetime.timedelta(days=1)
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, tiny_bundle: Path) -> Write:
    """Writes a configuration; the tiny bundle unless it names one."""

    def written(text: str, *, bundle: bool = True) -> Path:
        file = tmp_path / "bestroute.toml"
        first = f"bundle = {json.dumps(str(tiny_bundle))}\n" if bundle else ""
        listen = "" if "[server]" in text else '[server]\nlisten = "127.0.0.1:0"\n'
        file.write_text(first + text + "\n" + listen)
        return file

    return written


async def test_a_good_configuration_is_well(doctor: Doctor, write: Write) -> None:
    done = await doctor("--config", write(""))

    assert (done.code, done.err) == (0, "")
    done.line("ok", "bestroute.toml is valid")
    done.line("ok", "tiny tiny-1 can be served: on cpu its networks give what they gave")
    done.line("ok", "gateway.listen is unset")
    done.line("ok", "Route decides, but Generate is refused")
    assert "answers" not in done.out, "no service was asked for"


async def test_the_service_is_asked_as_well_where_an_address_is_given(
    doctor: Doctor, write: Write, server: Running
) -> None:
    done = await doctor("--config", write(""), "--address", server.address)

    assert done.code == 0
    done.line("ok", f"{server.address} answers")
    done.line("ok", "bestroute.toml is valid")


async def test_the_environment_alone_may_be_the_configuration(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESTROUTE_SERVER__LISTEN", "127.0.0.1:0")
    good = await doctor("--config")
    monkeypatch.setenv("BESTROUTE_SERVER__WORKERS", "none")
    bad = await doctor("--config")

    assert good.code == 0
    good.line("ok", "what the environment and the defaults say is valid")
    assert bad.code == 1
    bad.line("FAIL", "server.workers = 'none'")


# the file


async def test_every_fault_is_a_line(doctor: Doctor, write: Write) -> None:
    done = await doctor(
        "--config", write('log_level = "LOUD"\n[server]\nlisten = "a:1"\nworker = 2')
    )

    assert done.code == 1
    done.line("FAIL", "log_level = 'LOUD'")
    assert 'did you mean "workers"?' in done.line("FAIL", '"server.worker" is not a setting')


async def test_files_that_cannot_be_read_are_told(doctor: Doctor, tmp_path: Path) -> None:
    (broken := tmp_path / "broken.toml").write_text("= 1")

    missing = await doctor("--config", tmp_path / "none.toml")
    unreadable = await doctor("--config", broken)

    assert missing.code == unreadable.code == 1
    assert "examples/bestroute.toml" in missing.line("FAIL", "does not exist")
    unreadable.line("FAIL", "is not a readable TOML file")


async def test_variables_that_name_nothing_are_told(
    doctor: Doctor, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESTROUTE_LISTEN", "0.0.0.0:1")
    monkeypatch.setenv("BESTROUTE_PORT", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("BESTROUTE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("BESTROUTE_TOKEN", "secret-token")
    done = await doctor("--config", write(""))

    assert done.code == 0
    [warning] = done.levels("WARN")
    assert "BESTROUTE_LISTEN is in the environment" in warning
    assert "did you mean BESTROUTE_SERVER__LISTEN?" in warning


async def test_watching_a_file_that_is_none_is_told(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESTROUTE_WATCH_CONFIG", "true")
    monkeypatch.setenv("BESTROUTE_SERVER__LISTEN", "127.0.0.1:0")

    (await doctor("--config")).line("FAIL", "there is no file to watch")


# the bundle


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda bundle: shutil.rmtree(bundle), "can't be read"),
        (lambda bundle: (bundle / "tokenizer.json").unlink(), "is missing"),
        (lambda bundle: (bundle / "tokenizer.json").write_text("{}"), "was altered"),
        (lambda bundle: (bundle / "manifest.json").write_text("{}"), "manifest.json"),
    ],
)
async def test_damaged_bundles_are_told(
    doctor: Doctor,
    write: Write,
    tiny_bundle: Path,
    tmp_path: Path,
    break_it: Callable[[Path], object],
    words: str,
) -> None:
    shutil.copytree(tiny_bundle, bundle := tmp_path / "bundle")
    break_it(bundle)
    done = await doctor("--config", write_with(write, f"bundle = {json.dumps(str(bundle))}"))

    assert done.code == 1
    done.line("FAIL", words)


def write_with(write: Callable[..., Path], text: str) -> Path:
    return write(text, bundle=False)


async def test_another_bundle_than_the_pinned_is_told(doctor: Doctor, write: Write) -> None:
    done = await doctor("--config", write(f'bundle_sha256 = "{"0" * 64}"'))

    assert "bestroute bundle show" in done.line("FAIL", "but bundle_sha256 pins")


async def test_a_canary_is_looked_at_too(doctor: Doctor, write: Write, tmp_path: Path) -> None:
    done = await doctor("--config", write(f"[canary]\nbundle = '{tmp_path / 'none'}'"))

    assert done.code == 1
    done.line("FAIL", "canary.bundle: ")


async def test_networks_that_compute_something_else_are_told(
    doctor: Doctor, write: Write, tiny_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle, bundle := tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["golden"]["router"][0]["probabilities"][0] = 0.123
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    done = await doctor("--config", write_with(write, f"bundle = {json.dumps(str(bundle))}"))

    assert done.code == 1
    assert "outputs differ from the golden ones" in done.line("FAIL", "it can't be served")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
async def test_providers_that_are_missing_are_told(
    doctor: Doctor, write: Write, provider: str
) -> None:
    if "cuda" in machine_providers():
        pytest.skip("this machine has a GPU and its ONNX Runtime")
    done = await doctor("--config", write(f'[engine]\nprovider = "{provider}"'))

    assert done.code == 1
    # What TensorRT is not given, such as networks in FP32, CUDA runs.
    assert "install 'bestroute[gpu]'" in done.line("FAIL", "engine.provider = 'cuda' can't be used")


def machine_providers() -> list[str]:
    from bestroute.execution import PROVIDERS, fault

    return [name for name in PROVIDERS if fault(name) is None]


async def test_caches_that_cannot_be_written_are_told(
    doctor: Doctor, write: Write, tmp_path: Path
) -> None:
    """Below a file: what root may not write either."""
    (tmp_path / "file").write_text("")
    done = await doctor("--config", write(f"[engine]\ncache = '{tmp_path / 'file' / 'x'}'"))

    assert done.code == 1
    done.line("FAIL", "engine.cache = ")


def test_whatever_is_to_be_installed_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every part on that may need a package more, and none of them there."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    settings = Settings.model_validate(
        {
            "engine": {"provider": "kserve", "endpoint": "grpc://127.0.0.1:8001"},
            "tracing": {"endpoint": "http://127.0.0.1:4317"},
            "decision_log": {"directory": "/tmp"},
        }
    )

    told = " ".join(finding.text for finding in configuration.extras(settings))
    extras = re.findall(r"bestroute\[(\w+)\]", told)

    assert set(extras) == {"otel", "log"}
    assert project["optional-dependencies"].keys() >= set(extras)


@pytest.mark.parametrize(
    ("module", "extra", "text"),
    [
        ("pyarrow", "log", "[decision_log]\ndirectory = '/tmp'"),
        ("opentelemetry", "otel", "[tracing]\nendpoint = 'http://127.0.0.1:1'"),
        ("jwt", "jwt", "[security]\njwks_file = '/none'\nissuer = 'a'\naudience = 'b'"),
    ],
)
async def test_extras_that_are_missing_are_told(
    doctor: Doctor,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    extra: str,
    text: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what import takes for missing
    done = await doctor("--config", write(text))

    assert done.code == 1
    done.line("FAIL", f"needs the package {module}: pip install 'bestroute[{extra}]'")


async def test_an_arm_that_is_disabled_has_to_be_one(doctor: Doctor, write: Write) -> None:
    done = await doctor("--config", write('[operations]\ndisabled_arms = ["smal"]'))

    done.line("FAIL", '"small"')


# what Generate needs

SERVED = """
[providers.test]
base_url = "http://127.0.0.1:1/v1"
[models.{}]
provider = "test"
price = {{ input_usd_per_mtok = 1.0, output_usd_per_mtok = 2.0 }}
"""


async def test_models_without_a_provider_are_told(doctor: Doctor, write: Write) -> None:
    done = await doctor("--offline", "--config", write(SERVED.format("small")))

    assert done.code == 0
    assert '[models."medium"]' in done.line("WARN", "no provider serves medium, large")
    done.line("WARN", "no provider serves large, the reference")


async def test_models_that_the_bundle_lacks_are_told(doctor: Doctor, write: Write) -> None:
    done = await doctor("--offline", "--config", write(SERVED.format("smal")))

    assert 'did you mean "small"?' in done.line("FAIL", "not in the bundle")


async def test_unknown_prices_are_told(doctor: Doctor, write: Write) -> None:
    text = SERVED.format("large").partition("price")[0]
    done = await doctor("--offline", "--config", write(text))

    assert '[models."large".price]' in done.line("WARN", 'the price of "large" at test is not')


async def test_providers_that_serve_nothing_are_told(doctor: Doctor, write: Write) -> None:
    text = SERVED.format("large") + '[providers.idle]\nbase_url = "http://127.0.0.1:1/v1"'
    done = await doctor("--offline", "--config", write(text))

    done.line("WARN", "[providers.idle] serves no model")


# ports


def listening(port: int, *, key: str = "server") -> str:
    return f'[{key}]\nlisten = "127.0.0.1:{port}"'


async def test_a_port_in_use_is_told_with_by_whom(doctor: Doctor, write: Write) -> None:
    code = "import socket,sys,time; s=socket.create_server(('127.0.0.1',0));"
    code += "print(s.getsockname()[1],flush=True); time.sleep(60)"
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    port = int(await other.stdout.readline())
    done = await doctor("--config", write(listening(port)))
    other.kill()
    await other.wait()

    assert done.code == 1
    told = done.line("FAIL", f"127.0.0.1:{port} is in use by process {other.pid}: ")
    assert "listen at another port" in told


async def test_another_bestroute_is_told_apart(
    doctor: Doctor, write: Write, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is this process here, whose command may be anything."""
    monkeypatch.setattr(ports, "owner", lambda port: "process 7: bestroute serve")
    port = int(server.address.rpartition(":")[2])
    done = await doctor("--config", write(listening(port)))

    assert done.code == 0
    assert "SIGHUP" in done.line("WARN", "is served by a bestroute already (process 7")


async def test_a_port_whose_owner_is_hidden_is_told(
    doctor: Doctor, write: Write, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "owner", lambda port: None)
    port = int(server.address.rpartition(":")[2])

    (await doctor("--config", write(listening(port)))).line("FAIL", "this user may not see")


async def test_ports_that_clash_are_told(doctor: Doctor, write: Write) -> None:
    port = free_port()
    text = listening(port) + "\nworkers = 2\n" + listening(port - 1, key="metrics")
    done = await doctor("--config", write(text))

    assert done.code == 1
    done.line("FAIL", f"server.listen and metrics.listen of worker 2 are both at port {port}")


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        ("50051", "must be host:port"),
        ("http://127.0.0.1:50051", "must be host:port"),
        ("192.0.2.1:50051", "is no address of this machine"),
        ("127.0.0.1:70000", "ports up to 65535"),
    ],
)
async def test_addresses_that_cannot_be_listened_at_are_told(
    doctor: Doctor, write: Write, listen: str, words: str
) -> None:
    done = await doctor("--config", write(f'[server]\nlisten = "{listen}"'))

    assert done.code == 1
    done.line("FAIL", words)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


# who may call


async def test_a_server_that_is_open_to_all_is_told(doctor: Doctor, write: Write) -> None:
    done = await doctor("--config", write('[server]\nlisten = "0.0.0.0:0"'))

    assert done.code == 0
    done.line("WARN", "whoever can reach 0.0.0.0:0 may call")


async def test_keys_in_the_clear_are_told(doctor: Doctor, write: Write, tmp_path: Path) -> None:
    (keys := tmp_path / "keys.toml").write_text(f'me = "sha256:{"0" * 64}"')
    text = f"[security]\napi_keys_file = '{keys}'\n[server]\nlisten = \"0.0.0.0:0\""
    done = await doctor("--config", write(text))

    done.line("WARN", "travel in the clear")
    done.line("ok", "callers show a key or a token")


async def test_keys_that_are_none_are_told(doctor: Doctor, write: Write, tmp_path: Path) -> None:
    (keys := tmp_path / "keys.toml").write_text('me = "my key"')
    done = await doctor("--config", write(f"[security]\napi_keys_file = '{keys}'"))

    assert done.code == 1
    assert "`bestroute key`" in done.line("FAIL", "api_keys_file")


def certificate(directory: Path, *names: str, begins: float = -1.0, ends: float = 100.0) -> str:
    """The section of the configuration with a certificate of its own; times are in days."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "router")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins * DAY)
        .not_valid_after(now + ends * DAY)
    )
    if names:
        shown = x509.SubjectAlternativeName([x509.DNSName(each) for each in names])
        built = built.add_extension(shown, critical=False)
    pem = built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (directory / "tls.crt").write_bytes(pem)
    (directory / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (directory / "tls.key").chmod(0o600)
    return f"[security]\ncertificate = '{directory}/tls.crt'\nprivate_key = '{directory}/tls.key'\n"


async def test_a_good_certificate_is_well(doctor: Doctor, write: Write, tmp_path: Path) -> None:
    text = certificate(tmp_path, "router", "localhost") + '[server]\nlisten = "localhost:0"'
    done = await doctor("--config", write(text))

    assert (done.code, done.err) == (0, "")
    done.line("ok", "security.certificate is good until")
    done.line("ok", 'is for router, localhost, so for "localhost"')


@pytest.mark.parametrize(
    ("names", "begins", "ends", "level", "words"),
    [
        (("localhost",), -20, -1, "FAIL", "certificate has expired"),
        (("localhost",), 1, 20, "FAIL", "not yet valid"),
        (("localhost",), -20, 5, "WARN", "only; renew it"),
        (("router.example",), -1, 99, "WARN", 'is for router.example, not for "localhost"'),
        ((), -1, 99, "FAIL", "names nobody (no subjectAltName)"),
    ],
)
async def test_certificates_that_clients_refuse_are_told(
    doctor: Doctor,
    write: Write,
    tmp_path: Path,
    names: tuple[str, ...],
    begins: float,
    ends: float,
    level: str,
    words: str,
) -> None:
    text = certificate(tmp_path, *names, begins=begins, ends=ends)
    done = await doctor("--config", write(text + '[server]\nlisten = "localhost:0"'))

    assert done.code == (level == "FAIL")
    done.line(level, words)


async def test_the_name_that_clients_expect_may_be_told(
    doctor: Doctor, write: Write, tmp_path: Path
) -> None:
    file = write(certificate(tmp_path, "router.example"))
    done = await doctor("--config", file, "--tls-server-name", "router.example")

    done.line("ok", 'so for "router.example"')


async def test_files_of_tls_that_cannot_be_used_are_told(
    doctor: Doctor, write: Write, tmp_path: Path
) -> None:
    text = certificate(tmp_path, "localhost")
    (tmp_path / "tls.key").write_text("no key")
    pair = await doctor("--config", write(text))
    (tmp_path / "tls.crt").unlink()
    missing = await doctor("--config", write(text))

    pair.line("FAIL", "are no pair in PEM")
    missing.line("FAIL", "a file of TLS can't be read")


async def test_secrets_that_all_may_read_are_told(
    doctor: Doctor, write: Write, tmp_path: Path
) -> None:
    text = certificate(tmp_path, "localhost")
    (tmp_path / "tls.key").chmod(0o644)

    (await doctor("--config", write(text))).line("WARN", "chmod o= it")


# the machine


async def test_more_threads_than_cpus_are_told(doctor: Doctor, write: Write) -> None:
    done = await doctor("--config", write(f"[engine]\nthreads = {cpus() + 1}"))

    assert done.code == 0
    done.line("WARN", f"1 workers of {cpus() + 1} threads each share {cpus()} CPUs")


def package(directory: Path, name: str, version: str = "1.20.0") -> None:
    """What pip leaves of a package."""
    made = directory / f"{name.replace('-', '_')}-{version}.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("names", "level", "words"),
    [
        (["onnxruntime"], Level.OK, "onnxruntime 1.20.0 is installed"),
        (["onnxruntime-gpu", "onnx", "onnxruntime-tools"], Level.OK, "onnxruntime-gpu 1.20.0"),
        ([], Level.FAIL, "pip install 'bestroute[cpu]'"),
        (
            ["onnxruntime", "onnxruntime-gpu"],
            Level.FAIL,
            "pip uninstall -y onnxruntime onnxruntime-gpu",
        ),
    ],
)
def test_onnx_runtimes_are_counted(
    tmp_path: Path, names: list[str], level: Level, words: str
) -> None:
    for name in names:
        package(tmp_path, name)
    finding = machine.installed(importlib.metadata.distributions(path=[str(tmp_path)]))

    assert finding.level is level
    assert words in finding.text


def test_both_onnx_runtimes_fail_the_command(tmp_path: Path) -> None:
    package(tmp_path, "onnxruntime-gpu")
    done = subprocess.run(
        [sys.executable, "-m", "bestroute", "doctor", "--config", "--json", "--offline"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "BESTROUTE_SERVER__LISTEN": "127.0.0.1:0"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert "are both installed" in found["checks"][0]["finding"]
    assert "address" not in found


def test_few_files_are_told() -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))

    done = subprocess.run(
        [sys.executable, "-m", "bestroute", "doctor", "--address", "127.0.0.1:1"],
        preexec_fn=few,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert "WARN  a process may have 256 files open" in done.stderr
    assert "ulimit -n 512" in done.stderr


def test_who_only_calls_needs_no_onnx_runtime(tmp_path: Path) -> None:
    packages = importlib.metadata.distributions(path=[str(tmp_path)])

    assert machine.installed(packages, serves=False).level is Level.OK


def limits(root: Path, free_mib: int, limit: str = "max", used_mib: int = 0) -> Path:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {free_mib * 1024} kB\n")
    (cgroup := root / "sys/fs/cgroup").mkdir(parents=True)
    (cgroup / "memory.max").write_text(limit + "\n")
    (cgroup / "memory.current").write_text(f"{used_mib * machine.MIB}\n")
    (cgroup / "memory.stat").write_text(f"file 1\ninactive_file {10 * machine.MIB}\n")
    return root


def test_little_memory_is_told(tmp_path: Path) -> None:
    """As the kernel writes it: a machine can't be given less for a test."""
    root = limits(tmp_path, 100)

    assert machine.memory(50 * machine.MIB, root).level is Level.OK
    finding = machine.memory(200 * machine.MIB, root)
    assert finding.level is Level.WARN
    assert "100 MiB of memory are available, and about 200 MiB will be needed" in finding.text


def test_the_containers_limit_counts(tmp_path: Path) -> None:
    root = limits(tmp_path, 10_000, str(256 * machine.MIB), used_mib=200)

    assert machine.available(root) == 66 * machine.MIB
    assert machine.memory(100 * machine.MIB, root).level is Level.WARN
    assert machine.available(tmp_path / "nowhere") is None


async def test_a_bundle_too_large_for_memory_is_told(
    doctor: Doctor, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available", lambda root: 10 * machine.MIB)
    done: Told = await doctor("--config", write(""))

    assert done.code == 0
    done.line("WARN", "10 MiB of memory are available")
