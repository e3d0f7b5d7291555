"""MLflow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import cmkit
from cmkit_trackers.telling import Telling, flat, need


class MLflow(cmkit.Tracker):
    """A run of MLflow under the run's own name: in a SQLite file of the run's folder, unless told
    of a server. `mlflow ui --backend-store-uri sqlite:///FILE` shows it; the file is
    `trackers/mlflow/mlflow.db`."""

    uri: str | None = None
    """The tracking server or store, such as "http://localhost:5000"; absent = the SQLite file."""
    experiment: str = "cmkit"
    """The experiment."""

    def check(self) -> None:
        need("mlflow")

    def start(self, run: cmkit.RunInfo) -> cmkit.Listener:
        """The run of this name, gone on with where it is there."""
        return Run(run, self)


class Run(Telling):
    """One start of the run, by MLflow's client, which keeps no state of the process."""

    def __init__(self, run: cmkit.RunInfo, options: MLflow):
        if not options.uri:  # else it tells its makers that it is used
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        super().__init__(run)
        store = options.uri or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=store)
        found = self.client.get_experiment_by_name(options.experiment)
        place = None if options.uri else (run.folder.resolve() / "artifacts").as_uri()
        if found:
            number = found.experiment_id
        else:
            number = self.client.create_experiment(options.experiment, artifact_location=place)
        named = f"tags.cmkit_run = '{run.name}'"
        earlier = self.client.search_runs([number], named, max_results=1)
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"cmkit_run": run.name}
            self.id = self.client.create_run(number, run_name=run.name, tags=tags).info.run_id
            for key, value in flat(run.recipe).items():
                self.client.log_param(self.id, key, str(value)[:500])

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, now, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.client.log_artifact(self.id, str(path), name)

    def close(self) -> None:
        self.client.set_terminated(self.id)
