"""Compare what a run needs with what a cluster has, before anything waits. Pure: numbers in, messages out."""

from collections.abc import Mapping, Sequence

from hyperscale.config.cluster import ClusterSettings
from hyperscale.config.tracking import TrackingSettings
from hyperscale.tracking import trackers


def required_resources(cluster: ClusterSettings) -> dict[str, float]:
    """Return the totals that all workers need, by Ray's resource names."""
    required = {"CPU": cluster.workers * cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        required["GPU"] = cluster.workers * cluster.gpus_per_worker
    return required


def shortfall(cluster: ClusterSettings, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Return what a cluster lacks, or None if the workers fit.

    Args:
        nodes: per node its resources, in total (not what is free now). A worker must fit on one node as a whole.
    """
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    each = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    places = sum(_workers_on(node, each) for node in nodes)
    if places >= cluster.workers:
        return None
    there = ", ".join(f"{amount:g} {name}" for name, amount in total.items() if amount or each[name])
    amounts = ", ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)
    fitting = f"set cluster.workers={places}" if places else f"lower cluster.{_scarcest(nodes, each)}"
    on = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    return (
        f"cluster.workers {cluster.workers} with {amounts} each do not fit: the cluster has {there} on {on}, "
        f"room for {places}. {fitting[0].upper()}{fitting[1:]}, or add nodes"
    )


def _workers_on(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in each.items() if amount)


def _scarcest(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> str:
    missing = [name for name, amount in each.items() if amount and all(node.get(name, 0.0) < amount for node in nodes)]
    return "gpus_per_worker (0 = run on CPUs)" if "GPU" in missing else "cpus_per_worker"


def several_nodes_problem(output: str, tracking: TrackingSettings, blind_nodes: Sequence[str]) -> str | None:
    """Return why a run cannot span nodes, or None.

    Args:
        blind_nodes: nodes that do not see the run folder.
    """
    if blind_nodes:
        return (
            f"output={output} is private to this node: {', '.join(sorted(blind_nodes))} cannot see it. "
            "Use a folder that all nodes mount (NFS, a shared volume) or a URI such as s3://bucket/run"
        )
    return trackers.several_nodes_problem(tracking)


def ephemeral_output_problem(output: str) -> str | None:
    """Return a message if Ray would delete the run folder with a job's working directory, else None."""
    if "working_dir_files" not in output.split("/"):
        return None
    return (
        f"output={output} lies in the job's working directory, which Ray deletes after the job. Give an absolute path "
        "that stays, on a disk that all nodes share, or a URI such as s3://bucket/run: output=/shared/runs/NAME"
    )
