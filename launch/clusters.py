"""Commands and job files for gcloud, sbatch and kubectl."""

import argparse
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

PORT = 1234
"""Port of the JAX coordinator in pod 0."""
GRACE = 300
"""Seconds that a pod has for saving after SIGTERM."""


def tpu(
    arguments: argparse.Namespace, command: Sequence[str], logs: str
) -> tuple[list[str], list[str]]:
    """Returns the gcloud commands that start and stop the command on all workers of a TPU VM.

    JAX discovers the workers by itself. Worker 0 writes to the terminal, the others into `logs`;
    when a worker fails, the end of its log is printed.
    """
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", arguments.name]
    ssh += ["--zone", arguments.zone]
    ssh += ["--project", arguments.project] if arguments.project else []
    note = f"/tmp/{re.sub('[^A-Za-z0-9]', '_', arguments.name)}.$USER.pid"
    number = "http://metadata.google.internal/computeMetadata/v1/instance/attributes"
    log = f"{shlex.quote(logs)}/process_$w.log"
    script = (
        f"cd {shlex.quote(arguments.directory)} && mkdir -p {shlex.quote(logs)} && "
        f"w=$(curl -sf -H Metadata-Flavor:Google {number}/agent-worker-number) || exit 1; "
        f"exec 3>&2; [ $w = 0 ] || exec >> {log} 2>&1; "
        f"{shlex.join(command)} < /dev/null & echo $! > {note}; wait $!; status=$?; "
        "[ $status = 0 ] || { echo worker $w: exit status $status >&3; "
        f"[ $w = 0 ] || tail -n 15 {log} >&3; }}; exit $status"
    )
    every = ["--worker=all", f"--command={script}"]
    return [*ssh, *every], [*ssh, "--worker=all", f"--command=kill $(cat {note})"]


def slurm(arguments: argparse.Namespace, command: Sequence[str], logs: str) -> str:
    """Returns a script for sbatch: one process per GPU, or one per node without GPUs.

    JAX reads the processes and its GPU from SLURM's variables. SLURM sends SIGTERM two minutes
    before the time limit. Raises ValueError if --gpus-per-node has no number.
    """
    tasks = 1
    if arguments.gpus_per_node:
        if not re.fullmatch(r"(?:[\w.-]+:)?[1-9]\d*", arguments.gpus_per_node):
            raise ValueError(
                f"argument --gpus-per-node: {arguments.gpus_per_node!r}: expected N or TYPE:N"
            )
        tasks = int(arguments.gpus_per_node.rpartition(":")[2])
    options = {
        "job-name": arguments.name,
        "nodes": arguments.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": arguments.gpus_per_node,
        "cpus-per-task": arguments.cpus_per_task,
        "time": arguments.time,
        "partition": arguments.partition,
        "output": f"{logs}/slurm_%j.log",
        "open-mode": "append",
        "signal": "TERM@120",
    }
    lines = [
        f"#SBATCH --{name}={shlex.quote(str(value))}"
        for name, value in options.items()
        if value is not None
    ]
    srun = ["srun", "--kill-on-bad-exit=1", "--open-mode=append", f"--output={logs}/process_%t.log"]
    # srun does not inherit --cpus-per-task from the job.
    srun += [f"--cpus-per-task={arguments.cpus_per_task}"] if arguments.cpus_per_task else []
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "",
            shlex.join([*srun, *command]),
            "status=$?",
            f"[ $status = 0 ] || tail -n 15 {shlex.quote(logs)}/process_*.log",
            "exit $status",
            "",
        ]
    )


def k8s(arguments: argparse.Namespace, command: Sequence[str]) -> str:
    """Returns the manifest of a JobSet that runs the command in one pod per node.

    If a pod fails, the JobSet restarts all pods, and the run resumes. Exit status 2 (a user error)
    is not retried. Raises ValueError if a name or value is not in Kubernetes' form.
    """
    name = arguments.name
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError(
            f"argument --name: {name!r}: expected at most 40 of a-z, 0-9 and -, a letter first"
        )
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    container = {
        "name": "main",
        "image": arguments.image,
        # Kubernetes expands $(NAME) in commands; $$ is an escaped dollar sign.
        "command": [word.replace("$(", "$$(") for word in command],
        "env": [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-workers-0-0.{name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(arguments.nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            {"name": "PYTHONUNBUFFERED", "value": "1"},
        ],
        "ports": [{"containerPort": PORT}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "containers": [container],
    }
    _add_devices(arguments, pod, container)
    _add_claim(arguments, pod, container)
    wrong = {"containerName": "main", "operator": "In", "values": [2]}
    job = {
        "completionMode": "Indexed",
        "parallelism": arguments.nodes,
        "completions": arguments.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": wrong}]},
        "template": {"spec": pod},
    }
    final = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    place = {"namespace": arguments.namespace} if arguments.namespace else {}
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, **place},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": arguments.restarts, "rules": [final]},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return "\n".join(to_yaml(manifest))


def _add_devices(arguments: argparse.Namespace, pod: dict, container: dict) -> None:
    if arguments.gpus_per_node:
        container["resources"] = {"limits": {"nvidia.com/gpu": arguments.gpus_per_node}}
        # NCCL needs shared memory; a container's default is 64 MB.
        memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
        pod.setdefault("volumes", []).append(memory)
        mount = {"name": "shm", "mountPath": "/dev/shm"}
        container.setdefault("volumeMounts", []).append(mount)
    if arguments.tpu:
        parts = arguments.tpu.split("/")
        if len(parts) != 3 or not parts[2].isdecimal():
            raise ValueError(
                f"argument --tpu: {arguments.tpu!r}: expected TYPE/TOPOLOGY/CHIPS, like "
                "tpu-v5-lite-podslice/4x4/4"
            )
        kind, topology, chips = parts
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": kind,
            "cloud.google.com/gke-tpu-topology": topology,
        }
        container["resources"] = {"limits": {"google.com/tpu": int(chips)}}


def _add_claim(arguments: argparse.Namespace, pod: dict, container: dict) -> None:
    if not arguments.claim:
        return
    claim, _, folder = arguments.claim.partition(":")
    if not (claim and folder.startswith("/")):
        raise ValueError(f"argument --claim: {arguments.claim!r}: expected CLAIM:/FOLDER")
    volume = {"name": "shared", "persistentVolumeClaim": {"claimName": claim}}
    pod.setdefault("volumes", []).append(volume)
    container.setdefault("volumeMounts", []).append({"name": "shared", "mountPath": folder})


def to_yaml(value: Any, indent: str = "") -> list[str]:
    """Returns lines of YAML for mappings, lists, strings (as in JSON), numbers and booleans."""
    lines = []
    pairs = value.items() if isinstance(value, Mapping) else ((None, one) for one in value)
    for key, one in pairs:
        head = f"{indent}- " if key is None else f"{indent}{key}: "
        if isinstance(one, Mapping | list) and one:
            below = to_yaml(one, indent + "  ")
            if key is None:
                lines += [head + below[0].lstrip(" "), *below[1:]]
            else:
                lines += [head.rstrip(), *below]
        else:
            lines.append(head + json.dumps(one, ensure_ascii=False))
    return lines


def follow(arguments: argparse.Namespace, logs: str) -> str:
    """Returns instructions for reading process 0's output of a submitted job, and stopping it."""
    if arguments.where == "slurm":
        return f"process 0: tail -F {shlex.quote(logs)}/process_0.log; to stop: scancel JOB"
    space = f"-n {arguments.namespace} " if arguments.namespace else ""
    labels = f"jobset.sigs.k8s.io/jobset-name={arguments.name}"
    return (
        f"process 0: kubectl {space}logs -f -l {labels},batch.kubernetes.io/job-completion-index=0"
        f"; to stop: kubectl {space}delete jobset {arguments.name}"
    )
