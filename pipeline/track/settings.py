"""What a process needs to know to report for a stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.track import journal, state
from pipeline.track.endpoint import Endpoint, find_endpoint
from pipeline.track.sender import Sender

PIPELINE = "pipeline"


@dataclass(frozen=True)
class TrackSettings:
    """All that a worker needs to report for a stage; small and picklable.

    Attributes:
        run_folder: local path of `runs/<name>`, the same for driver and workers of one machine.
        stage: name of the run that is reported to.
        uri: address; "" = MLFLOW_TRACKING_URI or the local server; "none" = the journal only.
        server_folder: where the local server keeps its data.
        shown: what to call the run folder; "" = its path.
        key: mark of the run folder, by which its runs are found.
        pipeline_run_id, run_id: known ids; "" where the server was not there yet.
        above: the run whose page shows this one's headline metrics.
        system_metrics: sample CPU, memory and GPU of this machine.
        score: metric that decides, first of the charts; "" = the k-NN.
    """

    run_folder: str
    stage: str
    experiment: str = "raydino"
    uri: str = ""
    server_folder: str = ""
    shown: str = ""
    key: str = ""
    pipeline_run_id: str = ""
    run_id: str = ""
    above: str = PIPELINE
    system_metrics: bool = False
    score: str = ""

    def set_aside(self) -> None:
        """Renames the journal that another run of the same name left on this machine."""
        folder = Path(self.run_folder)
        if self.key and state.key_of(folder) not in ("", self.key):
            for name in (journal.FILE_NAME, state.FILE_NAME):
                if (folder / name).exists():
                    (folder / name).replace(folder / f"{name}.{journal.now_ms()}")

    def endpoint(self, nodes: int = 1) -> Endpoint | None:
        """Where to send to; None if nothing is to be sent. Nothing is asked or started.

        Raises:
            PipelineError: the address is not one of a server.
        """
        local = self.server_folder or Path(self.run_folder).parent / "mlflow"
        return find_endpoint(self.uri, Path(local), nodes)

    def sender(self, nodes: int = 1) -> Sender | None:
        """A sender for this folder, not started; None if nothing is to be sent.

        Raises:
            PipelineError: the address is not one of a server.
        """
        folder, where = Path(self.run_folder), self.endpoint(nodes)
        runs = {PIPELINE: self.pipeline_run_id, self.stage: self.run_id}
        return Sender(folder, where, self.key, runs, self.shown) if where else None
