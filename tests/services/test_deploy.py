"""The files that deploy the service: valid by the schemas of Compose and Kubernetes, and safe as they are."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "services/deploy"
COMPOSE = DEPLOY / "compose.yaml"
OVERLAYS = ("cpu", "gpu")
# Kinds that a cluster learns from operators: what each must have at least.
CUSTOM = {
    "ServiceMonitor": ("monitoring.coreos.com/v1", {"selector", "endpoints"}),
    "ScaledObject": (
        "keda.sh/v1alpha1",
        {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "triggers"},
    ),
    "RayCluster": ("ray.io/v1", {"rayVersion", "headGroupSpec", "workerGroupSpecs"}),
}
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|(?<!PERENNIAL_)KEY(?!S_FILE)")

NEEDED = (
    *("PERENNIAL_IMAGE", "PERENNIAL_DB_PASSWORD"),
    *("PREFECT_SECRET", "MLFLOW_SECRET", "EVIDENTLY_SECRET"),
)


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load(COMPOSE.read_text())


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_compose_files_fit_the_compose_specification(name):
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        DEPLOY / name,
    ]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def docker_compose() -> list[str] | None:
    """Return the command that runs Compose here, if one does."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and not subprocess.run([*command, "version"], capture_output=True).returncode
        ):
            return command
    return None


@pytest.mark.skipif(docker_compose() is None, reason="Docker Compose is not installed here")
@pytest.mark.parametrize("unset", [None, *NEEDED])
def test_compose_takes_the_files_and_nothing_starts_without_its_secrets(unset):
    variables = {name: "perennial:0.1.0" for name in NEEDED if name != unset}
    files = ["-f", COMPOSE, "-f", DEPLOY / "compose.gpu.yaml"]
    checked = subprocess.run(
        [*(docker_compose() or []), *files, "--profile", "tools", "config", "--quiet"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
    )
    assert (checked.returncode == 0) is (unset is None), checked.stderr
    assert unset is None or unset in checked.stderr


def test_compose_has_every_part_each_with_a_health_check(compose):
    services = compose["services"]
    assert {"service", "postgres", "prefect", "worker", "mlflow", "evidently"} <= services.keys()
    for name, service in services.items():
        if "tools" in service.get("profiles", ()):  # a command of one moment
            continue
        assert service["healthcheck"]["test"][0] == "CMD", name
        for other, waits in service.get("depends_on", {}).items():
            assert waits == {"condition": "service_healthy"}, (name, other)


def test_every_image_of_compose_has_a_version(compose):
    for name, service in compose["services"].items():
        image = service["image"]
        assert re.fullmatch(r"\$\{PERENNIAL_IMAGE:\?.*\}|[\w./-]+:v?\d+\.\d+[\w.-]*", image), (name, image)


def test_compose_on_a_gpu_mounts_nothing_twice_and_gives_the_gpu_to_who_computes(compose):
    """Compose appends the list of an override to the list of the base."""
    override = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]
    for name, service in override.items():
        base = compose["services"][name]
        mounts = [entry.partition(":")[0] for entry in base.get("tmpfs", []) + service.get("tmpfs", [])]
        assert len(mounts) == len(set(mounts)), (name, mounts)
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    assert override.keys() == {"service", "worker"}
    (cache,) = override["service"]["tmpfs"]
    assert "exec" in cache and cache.startswith(override["service"]["environment"]["HOME"] + ":")
    (argument,) = override["worker"]["build"]["args"]
    assert f"ARG {argument}=" in (DEPLOY / "Dockerfile").read_text()


def test_compose_listens_on_loopback_only(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_pages_of_compose_are_the_closed_ones_each_with_its_own_secret(compose):
    from flows.common import guarded_pages

    secrets = {}
    for name in ("prefect", "mlflow", "evidently"):
        service = compose["services"][name]
        assert f"flows.common.guarded_pages:make_{name}" in service["command"]
        assert hasattr(guarded_pages, f"make_{name}")
        assert {"--no-access-log", "--no-proxy-headers"} <= {*service["command"]}
        secrets[name] = service["environment"][guarded_pages.SECRET]
    assert len(set(secrets.values())) == 3
    worker = compose["services"]["worker"]["environment"]
    assert worker["PREFECT_API_AUTH_STRING"] == f"perennial:{secrets['prefect']}"
    assert worker["MLFLOW_TRACKING_PASSWORD"] == secrets["mlflow"]
    for variable, name in (("PREFECT_API_URL", "prefect"), ("PERENNIAL_TRACKING_URL", "mlflow")):
        host = compose["services"][name]["environment"][guarded_pages.HOSTS]
        assert worker[variable].startswith(f"http://{host}:")
    text = (ROOT / "docs/how-to/deploy.md").read_text()
    assert all(f"{name}=" in text for name in NEEDED)


def test_a_service_of_the_cluster_is_answered_by_its_name():
    (container,) = pod(manifests(DEPLOY / "kubernetes/base"))["containers"]
    (names,) = [entry["value"] for entry in container["env"] if entry["name"] == "PERENNIAL_HOSTS"]
    service = by_kind(manifests(DEPLOY / "kubernetes/base"))["Service"]["metadata"]["name"]
    assert service in names.split(",")


def test_compose_holds_no_secret_and_no_default_for_one(compose):
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET_NAME.search(variable):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), (name, variable)
    urls = re.findall(r"://[^\s/\"']+@", COMPOSE.read_text())
    assert all(":" not in url.removeprefix("://") for url in urls), "a password in a URL"


def test_compose_keeps_what_must_last_in_named_volumes_and_takes_no_right_it_does_not_need(compose):
    for name, service in compose["services"].items():
        for volume in service.get("volumes", ()):
            source = volume.rpartition(":")[0]
            assert source in compose["volumes"] or name == "worker", (name, volume)
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    assert compose["services"]["service"]["read_only"] is True


def test_the_grace_to_end_is_longer_than_a_request_may_take(compose):
    timeout = yaml.safe_load((ROOT / "params.yaml").read_text())["services"]["request_timeout_s"]
    assert int(compose["services"]["service"]["stop_grace_period"].removesuffix("s")) > timeout
    deployment = yaml.safe_load((DEPLOY / "kubernetes/base/deployment.yaml").read_text())
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > timeout


def test_the_image_of_the_tools_is_pinned_and_runs_as_no_root():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert "FROM python:3.11-slim-bookworm" in lines
    assert [line for line in lines if line.startswith("USER")] == ["USER perennial"]
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line


# Kubernetes ----------------------------------------------------------------------------------------------


def manifests(folder: Path) -> list[dict]:
    """Return the manifests as they are written, before kustomize."""
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        if path.name != "kustomization.yaml" and path.parent.name != "params":
            found += [document for document in yaml.safe_load_all(path.read_text()) if document]
    return found


def rendered(folder: Path) -> list[dict]:
    """Return what kustomize makes of a folder; skips the test where there is no kustomize."""
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if shutil.which(command[0]) is None:
        pytest.skip("neither kubectl nor kustomize is installed here")
    built = subprocess.run([*command, folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def check(document: dict) -> None:
    """Check a manifest against the schema of its kind."""
    import kubernetes_validate

    kind = document["kind"]
    if kind not in CUSTOM:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        return
    version, needed = CUSTOM[kind]
    assert document["apiVersion"] == version
    assert document["metadata"]["name"] == "perennial"
    assert needed <= document["spec"].keys()


def by_kind(documents: list[dict]) -> dict[str, dict]:
    return {document["kind"]: document for document in documents}


def pod(documents: list[dict]) -> dict:
    return by_kind(documents)["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_of_an_overlay_fit_the_schemas_of_kubernetes(overlay):
    documents = rendered(DEPLOY / "kubernetes/overlays" / overlay)
    for document in documents:
        check(document)
    kinds = {"Deployment", "Service", "PodDisruptionBudget", "ScaledObject", "ServiceMonitor"}
    assert by_kind(documents).keys() == kinds


def test_the_manifests_are_whole_before_kustomize_too():
    names = [document["kind"] for document in manifests(DEPLOY / "kubernetes/base")]
    assert sorted(names) == ["Deployment", "PodDisruptionBudget", "Service"]
    for document in manifests(DEPLOY / "kubernetes/components"):
        check(document)


def test_the_worker_keeps_its_checkout_and_reports_where_the_loop_looks():
    documents = manifests(DEPLOY / "kubernetes/worker")
    for document in documents:
        check(document)
    assert sorted(by_kind(documents)) == ["Deployment", "PersistentVolumeClaim"]
    spec = pod(documents)
    (container,) = spec["containers"]
    claim = by_kind(documents)["PersistentVolumeClaim"]["metadata"]["name"]
    assert {"name": "checkout", "persistentVolumeClaim": {"claimName": claim}} in spec["volumes"]
    assert {"name": "checkout", "mountPath": container["workingDir"]} in container["volumeMounts"]
    from stages.common.params.loading import ENVIRONMENT

    named = {entry["name"] for entry in container["env"] if entry["name"].startswith("PERENNIAL_")}
    assert named == {"PERENNIAL_TRACKING_URL", "PERENNIAL_EVENTS_URL"} and named <= ENVIRONMENT.keys()


def test_the_worker_of_compose_reports_where_the_loop_looks(compose):
    from stages.common.params.loading import ENVIRONMENT

    environment = compose["services"]["worker"]["environment"]
    named = {name for name in environment if name.startswith("PERENNIAL_")}
    assert named == {"PERENNIAL_TRACKING_URL", "PERENNIAL_EVENTS_URL"} and named <= ENVIRONMENT.keys()


def ray_groups() -> tuple[dict, dict]:
    spec = by_kind(manifests(DEPLOY / "kubernetes/ray"))["RayCluster"]["spec"]
    (workers,) = spec["workerGroupSpecs"]
    return spec["headGroupSpec"], workers


def test_the_pods_of_the_ray_cluster_fit_the_schemas_of_kubernetes():
    documents = manifests(DEPLOY / "kubernetes/ray")
    assert sorted(by_kind(documents)) == ["NetworkPolicy", "PersistentVolumeClaim", "RayCluster"]
    for document in documents:
        check(document)
    for group in ray_groups():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]})
    workers = ray_groups()[1]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_the_ray_cluster_has_the_version_of_the_lock_and_only_its_workers_train():
    cluster = by_kind(manifests(DEPLOY / "kubernetes/ray"))["RayCluster"]
    assert f"ray=={cluster['spec']['rayVersion']}" in (ROOT / "requirements.lock").read_text().splitlines()
    assert ",ray]" in (DEPLOY / "Dockerfile").read_text()
    head, workers = ray_groups()
    assert head["rayStartParams"]["num-cpus"] == "0"
    # Both bring a command of their own, in which KubeRay's stands.
    assert cluster["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}
    containers = [group["template"]["spec"]["containers"] for group in (head, workers)]
    for (container,) in containers:
        assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
        assert container["image"] == containers[0][0]["image"]
        assert {"secretRef": {"name": "perennial-checkpoints"}} in container["envFrom"]
        variables = {entry["name"]: entry for entry in container["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in variables["RAY_AUTH_TOKEN"]["valueFrom"]
        (port,) = container["ports"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["tcpSocket"]["port"] == port["name"]
    (trainer,) = containers[1]
    assert trainer["ports"][0]["containerPort"] == int(workers["rayStartParams"]["node-manager-port"])
    assert trainer["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_head_of_the_ray_cluster_is_the_worker_of_the_pool():
    (head,) = ray_groups()[0]["template"]["spec"]["containers"]
    (worker,) = pod(manifests(DEPLOY / "kubernetes/worker"))["containers"]
    assert head["args"][0].endswith(" ".join(worker["command"]))
    variables = {entry["name"]: entry for entry in head["env"]}
    assert all(variables[entry["name"]] == entry for entry in worker["env"] if entry["name"] != "PYTHONPATH")
    assert variables["PYTHONPATH"]["value"] == head["workingDir"] == worker["workingDir"]
    assert variables["RAY_ADDRESS"]["value"].endswith(f":{head['ports'][0]['containerPort']}")


def test_kustomize_gives_all_pods_of_the_ray_cluster_the_image_for_gpus():
    documents = rendered(DEPLOY / "kubernetes/ray")
    for document in documents:
        check(document)
    spec = by_kind(documents)["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "perennial-tools:0.1.0-gpu"


def test_only_the_pods_of_the_ray_cluster_reach_it():
    policy = by_kind(manifests(DEPLOY / "kubernetes/ray"))["NetworkPolicy"]["spec"]
    name = by_kind(manifests(DEPLOY / "kubernetes/ray"))["RayCluster"]["metadata"]["name"]
    selector = {"matchLabels": {"ray.io/cluster": name}}  # KubeRay's label
    assert policy == {
        "podSelector": selector,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": selector}]}],
    }


def test_a_misspelt_field_is_found():
    import kubernetes_validate

    broken = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"prots": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        check(broken)


def test_a_pod_is_asked_by_the_right_probes_and_has_no_rights():
    spec = pod(manifests(DEPLOY / "kubernetes/base"))
    (container,) = spec["containers"]
    paths = {
        name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    # A Service called perennial would set PERENNIAL_PORT=tcp://… in the pod.
    assert spec["enableServiceLinks"] is False


def test_secrets_come_from_secrets():
    text = "".join(path.read_text() for path in (DEPLOY / "kubernetes").rglob("*.yaml"))
    assert "kind: Secret" not in text
    assert not re.search(r"://[^\s/]+:[^\s/]+@", text)
    spec = pod(manifests(DEPLOY / "kubernetes/base"))
    variables = {entry["name"]: entry for entry in spec["containers"][0]["env"]}
    assert "secretKeyRef" in variables["PERENNIAL_EVENTS_URL"]["valueFrom"]


def test_a_pod_with_a_gpu_has_its_runtime_and_a_probe_that_sees_a_dead_engine():
    """Before kustomize too, which this machine may lack."""
    (patch,) = [
        document
        for document in manifests(DEPLOY / "kubernetes/overlays/gpu")
        if document["kind"] == "Deployment"
    ]
    spec = patch["spec"]["template"]["spec"]
    assert spec["runtimeClassName"] == "nvidia"
    assert "httpGet" not in spec["containers"][0]["livenessProbe"], "the path is the base's"
    (worker,) = manifests(DEPLOY / "kubernetes/worker-gpu")
    assert worker["spec"]["template"]["spec"]["runtimeClassName"] == "nvidia"
    base = by_kind(manifests(DEPLOY / "kubernetes/worker"))["Deployment"]
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    assert worker["metadata"]["name"] == base["metadata"]["name"]
    assert container["name"] == base["spec"]["template"]["spec"]["containers"][0]["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_worker_on_a_gpu_fits_the_schemas_of_kubernetes():
    documents = rendered(DEPLOY / "kubernetes/worker-gpu")
    for document in documents:
        check(document)
    (container,) = pod(documents)["containers"]
    assert container["image"] == "perennial-tools:0.1.0-gpu"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_gpus_are_asked_for_in_the_gpu_overlay_only():
    limits = {}
    for overlay in OVERLAYS:
        (container,) = pod(rendered(DEPLOY / "kubernetes/overlays" / overlay))["containers"]
        limits[overlay] = container["resources"]["limits"]
        assert re.fullmatch(r"perennial:\d+\.\d+\.\d+[\w-]*", container["image"])
    assert limits["gpu"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits["cpu"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_settings_can_be_laid_over_those_of_the_bento(tmp_path, overlay):
    tree = tmp_path / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", tree)
    shutil.copy2(ROOT / "params.yaml", tree / "components/params")
    chosen = tree / "overlays" / overlay / "kustomization.yaml"
    chosen.write_text(
        chosen.read_text().replace("# - ../../components/params #", "- ../../components/params #")
    )
    documents = rendered(tree / "overlays" / overlay)
    for document in documents:
        check(document)
    name = by_kind(documents)["ConfigMap"]["metadata"]["name"]
    spec = pod(documents)
    assert {"name": "params", "configMap": {"name": name}} in spec["volumes"]
    mounts = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    assert "/home/bentoml/bento/src/params.yaml" in mounts


def test_the_autoscaler_asks_for_figures_that_the_service_shows():
    from services.metrics import get_metrics

    metrics = get_metrics()
    shown = {metric._name for metric in (metrics.waiting, metrics.running)}
    scaler = by_kind(manifests(DEPLOY / "kubernetes/components"))["ScaledObject"]
    asked = set(re.findall(r"perennial_\w+", json.dumps(scaler["spec"]["triggers"])))
    assert asked == shown
