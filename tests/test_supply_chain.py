"""What comes from outside is data, never code; and what is installed is looked up.

That nothing is unpickled or evaluated is read off the source, and seen while a server does all that
it does. What bundles may hold is in `test_bundle`.
"""

import ast
import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import bestroute
import bestroute_export
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.upstreams import Upstream

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

PACKAGES = [Path(package.__path__[0]) for package in (bestroute, bestroute_export)]
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle"}
NAMES = {"eval", "exec", "compile", "__import__"}
"""Functions; `compile` of a module, such as `re`, is another."""
METHODS = {"read_pickle", "to_pickle", "unsafe_load", "full_load"}
LOADERS = {"joblib", "yaml", "torch.jit", "torch.hub"}
"""Modules whose `load` runs what the file says."""


def dotted(node: ast.expr) -> str:
    """A name such as `torch.load`, as it is written."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Whatever in a module could make code of data."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES:
                    yield module
                elif module in LOADERS:
                    yield from (f"{module}.{n.name}" for n in names if n.name in ("load", "dump"))
            case ast.Call(func=func, keywords=keywords):
                name = dotted(func)
                told = {k.arg: ast.unparse(k.value) for k in keywords}
                module, _, last = name.rpartition(".")
                if name in NAMES or last in METHODS or (module in LOADERS and last == "load"):
                    yield name
                if name == "torch.load" and told.get("weights_only") != "True":
                    yield "torch.load without weights_only=True"
                if told.get("allow_pickle", "False") != "False":
                    yield f"{name} with allow_pickle"


def test_no_module_makes_code_of_data() -> None:
    sources = [path for package in PACKAGES for path in package.rglob("*.py")]
    assert len(sources) > 100

    found = {
        f"{path.name}: {what}"
        for path in sources
        for what in unsafe(ast.parse(path.read_text(encoding="utf-8")))
    }

    assert found == set()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import dill.session",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "pd.read_pickle(path)",
        "joblib.load(path)",
        "from joblib import load",
    ],
)
def test_it_would_be_found(code: str) -> None:
    assert list(unsafe(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "re.compile(text)",
        "model.eval()",
        "from joblib import Parallel",
        "json.load(file)",
    ],
)
def test_what_is_safe_is_not_taken_for_unsafe(code: str) -> None:
    assert not list(unsafe(ast.parse(code)))


WATCHED = """
import pickle, sys

def watch(event, arguments):
    if event == "pickle.find_class":
        print("UNPICKLED", *arguments, file=sys.stderr, flush=True)

def watched(function):
    def call(*arguments, **options):
        print("UNPICKLED by", function, file=sys.stderr, flush=True)
        return function(*arguments, **options)
    return call

sys.addaudithook(watch)
pickle.load, pickle.loads = watched(pickle.load), watched(pickle.loads)
"""


async def until_served(stub: "RoutingServiceAsyncStub", version: str) -> None:
    """If it never is, the test times out."""
    while (await stub.ListArms(pb.ListArmsRequest())).bundle_version != version:  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # what another process does has no event


async def test_serving_reloading_and_every_rpc_unpickle_nothing(
    tmp_path: Path, upstream: Upstream
) -> None:
    bundle, config = tmp_path / "bundle", tmp_path / "bestroute.toml"
    bundle.mkdir()
    tiny.write(bundle)
    models = "".join(f'[models.{m.name}]\nprovider = "test"\n' for m in tiny.MODELS)
    config.write_text(
        f'bundle = "{bundle}"\n[server]\nlisten = "127.0.0.1:0"\n'
        f'[decision_log]\ndirectory = "{tmp_path / "log"}"\n'
        f'[providers.test]\nbase_url = "{upstream.url}"\n{models}'
    )
    serve = (
        f"from bestroute.cli import main; sys.exit(main(['serve', '--config', {str(config)!r}]))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", f"{WATCHED}\n{serve}", stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    log: list[str] = []

    async def read_until(pattern: str) -> str:
        assert process.stderr is not None
        while line := (await process.stderr.readline()).decode():
            log.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise AssertionError("".join(log))

    try:
        address = await read_until(r"serves bundle .* on (\S+:\d+)")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            routed = await stub.Route(pb.RouteRequest(prompt="easy"))
            await stub.Score(pb.ScoreRequest(prompt="easy", responses=["good", "bad"]))
            arm = pb.Arm(model="small", samples=3)
            generate = pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"), arm=arm)
            assert [event async for event in stub.Generate(generate)]
            streamed = pb.RouteStreamRequest(request=pb.RouteRequest(prompt="hard"))
            assert [answer async for answer in stub.RouteStream(iter([streamed]))]
            await stub.Feedback(pb.FeedbackRequest(decision_id=routed.decision_id, quality=1.0))
            tiny.write(bundle, version="tiny-2")
            process.send_signal(signal.SIGHUP)
            await until_served(stub, "tiny-2")
        process.send_signal(signal.SIGTERM)
        log.append((await process.stderr.read()).decode())
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert "UNPICKLED" not in "".join(log)


def test_the_watch_sees_what_is_unpickled() -> None:
    """By name, by a copied name, and by a library."""
    ways = """
import pathlib
pickle.loads(pickle.dumps(1))
from pickle import Unpickler
import io
Unpickler(io.BytesIO(pickle.dumps(pathlib.PurePath("a")))).load()
"""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED + ways], capture_output=True, text=True, check=True
    )

    assert done.stderr.count("UNPICKLED") >= 2


# The audit


def audit() -> ModuleType:
    spec = spec_from_file_location("audit", Path(__file__).parents[1] / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KNOWN = {"id": "CVE-1", "fix_versions": ["2.0"]}


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "no advisories against any of 1"),
        ([{"name": "a", "version": "1", "vulns": [KNOWN]}], 1, "a 1: CVE-1, fixed in: 2.0"),
        # pip-audit itself calls these two clean.
        ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "?"}], 75, "b"),
        ([{"name": "a", "skip_reason": "not found"}], 75, "NOT AUDITED"),
        ([], 75, "NOT AUDITED"),
        (
            [{"name": "a", "version": "1", "vulns": [KNOWN]}, {"name": "b", "skip_reason": "?"}],
            1,
            "a 1",
        ),
    ],
)
def test_what_is_not_known_is_not_called_clean(
    capsys: pytest.CaptureFixture[str], found: list[dict[str, Any]], code: int, said: str
) -> None:
    assert audit().verdict(found) == code
    assert said in capsys.readouterr().out


def test_the_bill_is_of_what_serving_needs() -> None:
    names = audit().needed("bestroute", audit().EXTRAS)

    assert {"grpcio", "protobuf", "onnxruntime", "tokenizers", "pydantic-core", "aiohttp"} <= names
    assert not {"torch", "pytest", "mypy", "ray", "pip-audit"} & names


def test_a_bill_is_pruned_to_names() -> None:
    bill = {
        "metadata": {"component": {"bom-ref": "root"}},
        "components": [{"name": n, "bom-ref": f"{n}==1"} for n in ("A_b", "test-tool")],
        "dependencies": [
            {"ref": "root", "dependsOn": ["A_b==1", "test-tool==1"]},
            {"ref": "test-tool==1"},
        ],
    }

    pruned = audit().pruned(bill, {"a-b"})

    assert [component["name"] for component in pruned["components"]] == ["A_b"]
    assert pruned["dependencies"] == [{"ref": "root", "dependsOn": ["A_b==1"]}]
