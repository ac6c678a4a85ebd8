"""What stands in docker/ holds before anything is built; tests/e2e/test_images.py builds and runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.endpoint import Settings
from serve.engine import Care
from serve.fleet import Fleet
from serve.gateway.telemetry import Telemetry
from serve.state import State
from tests.conftest import tuner

DOCKER = Path(__file__).parents[2] / "docker"
KUBERNETES = ("1.31", "1.36")


def run(*line: Any) -> None:
    done = subprocess.run([str(Path(sys.executable).parent / line[0]), *map(str, line[1:])], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_linted() -> None:
    run("hadolint", "--config", DOCKER / "hadolint.yaml", DOCKER / "Dockerfile")


def test_compose_keeps_to_its_schema_and_every_service_is_locked_down() -> None:
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")
    told = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))
    for name, service in told["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        if build := service.get("build"):
            assert build["target"] in stages
            assert service["read_only"]
    assert set(told["volumes"]) >= {"runs", "cache", "data"}
    grafana = told["services"]["grafana"]["environment"]
    assert (grafana["GF_AUTH_BASIC_ENABLED"], grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"]) == ("false", "true")


def manifests(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a folder with resources and strategic-merge patches."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: list[dict[str, Any]] = []
    for name in told["resources"]:
        path = folder / name
        found += manifests(path) if path.is_dir() else [yaml.safe_load(path.read_text())]
    for patch in told.get("patches", []):
        change = yaml.safe_load((folder / patch["path"]).read_text())
        at = next(
            index
            for index, each in enumerate(found)
            if (each["kind"], each["metadata"]["name"]) == (change["kind"], change["metadata"]["name"])
        )
        found[at] = merged(found[at], change)
    return found


def merged(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(each, dict) and "name" in each for each in old + new):
        named = {each["name"]: each for each in old}
        return list({**named, **{each["name"]: merged(named.get(each["name"]), each) for each in new}}.values())
    return new


@pytest.mark.parametrize("folder", ["base", "gpu"])
@pytest.mark.parametrize("version", KUBERNETES)
def test_the_manifests_keep_to_kubernetes_schemas_and_to_each_other(folder: str, version: str) -> None:
    import kubernetes_validate

    found = manifests(DOCKER / "k8s" / folder)
    for each in found:
        kubernetes_validate.validate(each, version, strict=True)
    by_kind = {each["kind"]: each for each in found}
    pod = by_kind["Deployment"]["spec"]["template"]
    for labels in (
        by_kind["Service"]["spec"]["selector"],
        by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        by_kind["Deployment"]["spec"]["selector"]["matchLabels"],
    ):
        assert labels.items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == set(volumes)
    claims = {each["metadata"]["name"] for each in found if each["kind"] == "PersistentVolumeClaim"}
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] in claims
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == by_kind["Deployment"]["metadata"]["name"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (folder == "gpu")
    # There is time for the load balancer, for requests under way, and for the engines' end.
    (wait,) = [int(each) for each in container["lifecycle"]["preStop"]["exec"]["command"] if each.isdigit()]
    assert pod["spec"]["terminationGracePeriodSeconds"] > wait + Settings().drain_timeout_s
    assert any("secret" in each for each in volumes.values())
    # What a pod is started with are options that there are.
    options = [each for each in container["args"] if each.startswith("--")]
    helped = tuner("serve", "--help", COLUMNS="200").stdout
    assert all(option in helped for option in options)


def exposed(tmp_path: Path) -> dict[str, set[str]]:
    """The series that /metrics has, and their labels."""
    state = State(None)
    registry = Telemetry(Fleet(state, Care(), lambda text: None), tmp_path / "log.jsonl").metrics.registry
    found = {}
    for name, collector in registry._names_to_collectors.items():
        found[name] = {*collector._labelnames, *({"le"} if name.endswith("_bucket") else ())}  # type: ignore[attr-defined]
    state.close()
    return found


def test_each_panel_of_the_dashboard_asks_for_series_and_labels_that_there_are(tmp_path: Path) -> None:
    series = exposed(tmp_path)
    told = json.loads((DOCKER / "grafana" / "dashboards" / "tuner.json").read_text())
    asked = [(panel["title"], target["expr"], target["legendFormat"]) for panel in told["panels"] for target in panel["targets"]]
    asked += [(each["name"], each["query"]["query"], "") for each in told["templating"]["list"]]
    assert len(told["panels"]) >= 6
    for title, expression, legend in asked:
        names = re.findall(r"tuner_\w+", expression)
        assert names, title
        assert [name for name in names if name not in series] == [], f"{title}: nothing exposes these"
        labels = {each.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for each in group.split(",")}
        labels |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", expression)) | set(re.findall(r"{{(\w+)}}", legend))
        assert labels <= set.union(*(series[name] for name in names)), title


def test_a_cluster_scales_on_a_series_that_there_is(tmp_path: Path) -> None:
    text = (DOCKER / "k8s" / "base" / "autoscaling.yaml").read_text()
    (asked, labels), made = re.findall(r"seriesQuery: '(\w+)\{(.*)\}'", text)[0], re.findall(r"name: \{as: (\w+)\}", text)
    series = exposed(tmp_path)
    assert asked in series
    # Kubernetes adds where a pod is.
    assert set(re.findall(r"(\w+)(?:=|!=)", labels)) - {"namespace", "pod"} <= series[asked]
    (metric,) = yaml.safe_load(text)["spec"]["metrics"]
    assert [metric["pods"]["metric"]["name"]] == made


def test_grafana_is_told_of_the_prometheus_that_compose_starts_and_that_panels_ask() -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert source["url"].removeprefix("http://").split(":")[0] in compose
    panels = json.loads((DOCKER / "grafana/dashboards/tuner.json").read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    (provider,) = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/tuner.yaml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]


def test_prometheus_asks_what_compose_names_with_the_key_that_the_container_makes() -> None:
    told = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"][0]
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    host, _, port = told["static_configs"][0]["targets"][0].partition(":")
    assert host in services
    assert services[host]["ports"][0].endswith(f":{port}")
    assert told["authorization"]["credentials_file"] == "/runs/serve/metrics.key"
    assert any(each.endswith(":/runs:ro") for each in services["prometheus"]["volumes"])
