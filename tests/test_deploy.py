"""What lies in deploy/ beside the chart: plain manifests, a mesh's objects, documented values."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import kubernetes_validate  # type: ignore[import-untyped]
import yaml  # type: ignore[import-untyped]

from bestroute.processing import processor
from bestroute.v1 import routing_pb2 as pb
from deploy import generate
from tests.charts import (
    DEPLOY,
    KUBECTL,
    ROOT,
    SETS,
    VERSIONS,
    Manifest,
    Release,
    Values,
    needs_helm,
    released,
)

pytestmark = needs_helm


def test_what_is_generated_is_up_to_date() -> None:
    again = "run: .venv/bin/python -m deploy.generate"

    assert generate.MANIFESTS.read_text() == generate.manifests(), again
    assert json.loads(generate.SCHEMA.read_text()) == generate.schema(), again


def test_kustomize_makes_another_of_the_plain_manifests(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "base")
    overlay = tmp_path / "ours"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "resources": ["../base"],
                "namespace": "llm",
                "images": [{"name": "bestroute", "newName": "registry.example/bestroute"}],
                "replicas": [{"name": "bestroute", "count": 5}],
            }
        )
    )

    done = subprocess.run(
        [KUBECTL, "kustomize", str(overlay)], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    manifests = list(yaml.safe_load_all(done.stdout))
    assert {m["metadata"]["namespace"] for m in manifests} == {"llm"}
    [deployment] = [m for m in manifests if m["kind"] == "Deployment"]
    assert deployment["spec"]["replicas"] == 5
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/bestroute:cpu"
    for manifest in manifests:
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


def of_mesh(file: str) -> list[Manifest]:
    return list(yaml.safe_load_all((DEPLOY / "istio" / file).read_text()))


def test_the_mesh_routes_to_the_service_and_repeats_only_what_is_free() -> None:
    rule, routes = of_mesh("traffic.yaml")
    service = released(SETS["istio"]).all("Service")[0]
    assert service["spec"]["ports"][0]["appProtocol"] == "grpc", "or Istio takes it for plain TCP"
    assert rule["spec"]["host"] == service["metadata"]["name"] == routes["spec"]["hosts"][0]
    subsets = {subset["name"]: subset["trafficPolicy"] for subset in rule["spec"]["subsets"]}
    assert subsets["sessions"]["loadBalancer"] == {
        "consistentHash": {"httpHeaderName": "x-bestroute-session"}
    }
    assert subsets["any"]["loadBalancer"]["simple"] == "LEAST_REQUEST"
    methods = {
        f"/{service.full_name}/{method.name}": method.name
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }

    def route(path: str, *, session: bool) -> Manifest:
        """The first that takes a call."""
        for each in routes["spec"]["http"]:
            matches = each.get("match", [{}])
            if any(
                match.get("uri", {"exact": path}) == {"exact": path}
                and (session or "headers" not in match)
                for match in matches
            ):
                return cast(Manifest, each)
        raise AssertionError(path)

    for path, method in methods.items():
        for session, subset in ((True, "sessions"), (False, "any")):
            found = route(path, session=session)
            [target] = found["route"]
            assert target["destination"] == {"host": "bestroute", "subset": subset}
            again = set(found["retries"]["retryOn"].split(","))
            assert "resource-exhausted" not in again
            assert ("unavailable" in again) == (method != "Generate")


def test_the_mesh_lets_callers_call_and_prometheus_scrape() -> None:
    peers, policy = (manifest["spec"] for manifest in of_mesh("security.yaml"))
    release = released(SETS["istio"])
    labels = release.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    ports = {p["name"]: str(p["containerPort"]) for p in release.container["ports"]}

    for spec in (peers, policy):
        assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert peers["mtls"] == {"mode": "STRICT"}
    assert peers["portLevelMtls"].keys() == {ports["metrics"]}
    calls, asking, scrapes = policy["rules"]
    assert calls["from"]
    assert asking["from"]
    assert asking["to"][0]["operation"]["paths"] == [f"/{processor.NAME}/*"]
    assert [rule["to"][0]["operation"]["ports"] for rule in (calls, asking, scrapes)] == [
        [ports["grpc"]],
        [ports["grpc"]],
        [ports["metrics"]],
    ]
    assert (
        f"/{pb.DESCRIPTOR.services_by_name['RoutingService'].full_name}/*"
        in (calls["to"][0]["operation"]["paths"])
    )
    drain = re.search(
        r"terminationDrainDuration: (\d+)s", release.annotations["proxy.istio.io/config"]
    )
    assert drain is not None
    grace = release.pod["terminationGracePeriodSeconds"]
    assert 40 < int(drain[1]) < grace, "the proxy ends after the drain, and before all is killed"


def documented() -> Iterator[Values]:
    """The values that docs/kubernetes.md shows."""
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE):
        if "# values.yaml" in block:
            yield yaml.safe_load(block)


def test_the_values_that_are_documented_can_be_used(tmp_path: Path) -> None:
    shown = list(documented())

    assert len(shown) >= 6
    for values in shown:
        Release(values).settings(tmp_path)
