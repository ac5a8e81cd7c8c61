"""Where a person finds a tracked run. Imports no vendor."""


def mlflow_place(uri: str, experiment_id: str | None, run_id: str) -> str:
    """Return how to see a run: its page on a server, or the command that opens its database."""
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"{run_id} (mlflow ui --backend-store-uri {uri})"
