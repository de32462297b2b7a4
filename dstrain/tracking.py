"""MLflow, and the only module that knows it: a follower that carries run folders into a tracking store.

Training never talks to MLflow. It writes `readings.jsonl` in the run folder (`dstrain.readings`); one background thread
per process reads what was appended and sends it. Two small files make that safe against kills and lost servers:

    tracking.json   what the run says about itself: store, name, parent, params, tags, how it ended. Written ahead.
    mlflow.json     how far MLflow has got: run id, bytes of readings.jsonl sent, revision of tracking.json sent.

Sending is idempotent: a metric row is (key, step, time, value) with the time of the JSON line, and MLflow keeps one of
equal rows; steps that a store has already when a run is looked up there are passed over, since a run that lost power has
computed them again, at another time; a run is found again by its tag `dstrain.key` when the answer to its creation got lost.
So everything may be sent twice, by this process or by `python -m dstrain.tracking FOLDER`, and stands in the store once.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import logging
import os
import re
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

from dstrain.ledger import (
    WANTED_FILE,
    Sent,
    Wanted,
    begins_line,
    locked,
    read_record,
    size_of,
    whole_lines,
    write_record,
)
from dstrain.readings import READINGS_FILE, Say, from_line, say_aloud
from dstrain.schema import Settings, UserError, flatten, setting

Status = Literal["FINISHED", "FAILED", "KILLED"]

SENT_FILE = "mlflow.json"
ARTIFACTS_FOLDER = "mlflow-artifacts"
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100  # MLflow's limits, and the two below
PARAM_CHARACTERS, TAG_CHARACTERS = 6000, 8000
KEY_CHARACTERS = 250
LAST_ATTEMPTS = 3
LONGEST_PAUSE_SECONDS = 60.0
KEY_TAG = "dstrain.key"
REASONS = re.compile(
    r"Connection refused|timed out|Name or service not known|database is locked|"
    r"readonly database|unable to open database file|database or disk is full|No space left on device"
)
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")
# A dead server must cost seconds, not the four minutes of MLflow's own retries: the follower tries again by itself.
SHORT_AND_QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class TrackingSettings(Settings):
    """Where the runs are tracked."""

    enabled: bool = True
    """False: nothing goes to MLflow; the run folder still holds every reading."""

    uri: str | None = None
    """MLflow store; by default MLFLOW_TRACKING_URI, else sqlite:///<output_dir>/mlflow.db."""

    experiment: str = setting("dstrain", min_length=1, max_length=500)
    """MLflow experiment that the runs belong to."""

    def open(self, output_dir: Path, say: Say = say_aloud) -> Tracker:
        """The tracker of this process; nothing is sent before its first run."""
        return Tracker(self.uri, self.experiment, output_dir, enabled=self.enabled, say=say)


def store_uri(uri: str | None, output_dir: Path) -> str:
    """The store that is meant: the setting, else MLFLOW_TRACKING_URI, else SQLite in the output folder."""
    wanted = uri or os.environ.get("MLFLOW_TRACKING_URI") or _sqlite(output_dir / "mlflow.db")
    path = _sqlite_path(wanted)
    return _sqlite(path) if path else wanted


def _sqlite(path: Path) -> str:
    return f"sqlite:///{path.absolute()}"


def _sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """The store's address as it may stand in a log or a file: `user:***@host`."""
    return re.sub(r"(?<=://)([^/@:]*):[^/@]*@", r"\1:***@", uri)


# ------------------------------------------------------------------------------------------- what is tracked


def as_params(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as MLflow parameters: `a.b.c` keys; text as it is, everything else (numbers, lists, null) as JSON."""
    return {_clean(key): _text(value) for key, value in flatten(settings).items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _clean(key: str) -> str:
    """A key made of the characters MLflow takes and at most as long; it refuses `..` or nothing between slashes."""
    words = re.sub(r"[^\w.\-/ :]", "_", key).split("/")
    return "/".join("_" if word.strip(".") == "" else word for word in words)[:KEY_CHARACTERS]


def _source_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags by which MLflow's own pages name user and source."""
    found = {"mlflow.source.name": Path(sys.argv[0] or "python").name, "mlflow.source.type": "LOCAL"}
    if "SLURM_JOB_ID" in os.environ:
        found["mlflow.source.type"] = "JOB"
    with contextlib.suppress(Exception):  # a container's user may have no name
        found["mlflow.user"] = getpass.getuser()
    if "git_commit" in tags:
        found["mlflow.source.git.commit"] = tags["git_commit"]
    return found


def sent_of(folder: Path) -> Sent:
    """How far the store has got with a run folder: nothing, when its `mlflow.json` cannot be read."""
    return read_record(folder / SENT_FILE, Sent) or Sent()


# ------------------------------------------------------------------------------------------ the follower


@dataclass(eq=False)
class TrackedRun:
    """One run folder that the tracker follows. All methods return at once and never raise."""

    tracker: Tracker
    folder: Path
    wanted: Wanted
    sent: Sent
    bytes_seen: int = field(init=False)  # of readings.jsonl; may end within a line that is being written

    def __post_init__(self) -> None:
        self.bytes_seen = self.sent.offset

    @property
    def experiment_id(self) -> str | None:
        """The id of its experiment in the store, once it has one."""
        return self.sent.experiment_id or None

    @property
    def run_id(self) -> str | None:
        """The id in the store, once it has one (wait for it with `Tracker.flush`)."""
        return self.sent.run_id or None

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Sets tags of the run."""
        self.tracker.change(self, tags)

    def finish(self, status: Status, tags: Mapping[str, Any] | None = None, artifacts: Iterable[Path] = ()) -> None:
        """Ends the run in the store, after all its readings, with last tags and with files to keep there."""
        files = [os.path.relpath(path, self.folder) for path in artifacts]
        self.tracker.change(self, tags or {}, status=status, ended=time.time(), artifacts=files)

    def is_due(self) -> bool:
        """True while the store lacks something that the run folder has; costs one `stat`."""
        return self.sent.revision < self.wanted.revision or self.bytes_seen != size_of(self.folder / READINGS_FILE)


class Tracker:
    """The one follower of a process: a daemon thread that sends what run folders hold.

    `uri` as in `TrackingSettings`. `say` gets one sentence when the store fails and one when it is back. The thread
    costs one `stat` per open run and interval; it imports mlflow at the first run. Not `enabled`, it does nothing.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        output_dir: Path,
        *,
        enabled: bool = True,
        say: Say = say_aloud,
        interval_seconds: float = 1.0,
    ) -> None:
        self.uri = store_uri(uri, output_dir)
        self.experiment = experiment
        self.output_dir = output_dir
        self._is_default = self.uri == _sqlite(output_dir / "mlflow.db")
        self._enabled = enabled
        self._say = say
        self._said_unwritable = False
        self._interval = interval_seconds
        self._runs: list[TrackedRun] = []  # open, or ended and not wholly sent
        self._changing = threading.Lock()  # of _runs and each run's `wanted`; never held while anything is sent
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._delivered = 0
        self._thread: threading.Thread | None = None

    def run(
        self,
        folder: Path,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        parent: TrackedRun | None = None,
    ) -> TrackedRun:
        """Follows a run folder from now on; a folder that was tracked before goes on as the same MLflow run.

        `params` are settings, nested or flat; `tags` such as `Evidence.tags()`. Returns at once and never raises.
        """
        said = {_clean(key): _text(value) for key, value in tags.items()}
        before = read_record(folder / WANTED_FILE, Wanted)
        wanted = Wanted(
            key=before.key if before else uuid.uuid4().hex,
            revision=before.revision if before else 0,
            uri=None if self._is_default else without_password(self.uri),
            experiment=self.experiment,
            output_dir=os.path.relpath(self.output_dir, folder),
            name=name,
            parent=os.path.relpath(parent.folder, folder) if parent else None,
            started=before.started if before else time.time(),
            params=as_params(params),
            tags=_source_tags(said),
        )
        run = TrackedRun(self, folder, wanted, sent_of(folder))
        if self._enabled:
            with self._changing:
                self._runs = [other for other in self._runs if other.folder != folder]  # of an attempt before
                if self._thread is None:
                    self._thread = threading.Thread(target=self._follow, name="dstrain-tracking", daemon=True)
                    self._thread.start()
            self.change(run, said)
        return run

    def change(self, run: TrackedRun, tags: Mapping[str, Any], **fields: Any) -> None:
        """Sets tags and fields of what a run wants, writes that ahead, and wakes the thread."""
        if not self._enabled:
            return
        said = {_clean(key): _text(value) for key, value in tags.items()}
        with self._changing:
            run.wanted = replace(
                run.wanted, revision=run.wanted.revision + 1, tags={**run.wanted.tags, **said}, **fields
            )
            try:
                run.folder.mkdir(parents=True, exist_ok=True)
                write_record(run.folder / WANTED_FILE, run.wanted)
            except OSError as error:  # only a replay by another process would need the file
                if not self._said_unwritable:
                    self._said_unwritable = True
                    path = run.folder / WANTED_FILE
                    self._say(f"{path}: cannot be written ({error.strerror}); the run is tracked from memory")
            if run not in self._runs:
                self._runs.append(run)
        self._wake.set()

    def flush(self, timeout_seconds: float) -> bool:
        """Waits until all that is written now is in the store; False when that took too long."""
        deadline = time.monotonic() + timeout_seconds
        while self._unsent():
            if time.monotonic() > deadline:
                return False
            self._wake.set()
            time.sleep(0.02)
        return True

    def close(self, timeout_seconds: float = 30.0, patient: bool = False) -> bool:
        """Sends the rest and stops; True when nothing is unsent.

        A store that fails now is tried three times, not longer than `timeout_seconds`; then what is unsent is said,
        with the command that sends it later. `patient`: that much longer after every run that got through.
        """
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            delivered = -1
            while self._thread.is_alive() and delivered < self._delivered:
                delivered = self._delivered
                self._thread.join(timeout_seconds)
                if not patient:
                    break
        unsent = self._unsent()
        if unsent:
            waiting = sum(size_of(run.folder / READINGS_FILE) - run.sent.offset for run in unsent)
            command = shlex.join([program_here("python"), "-m", "dstrain.tracking", str(_common_folder(unsent))])
            self._say(
                f"{len(unsent)} run(s) are not wholly in MLflow at {without_password(self.uri)} "
                f"({waiting} bytes of readings wait in their folders); send them later with: {command}"
            )
        return not unsent

    def _unsent(self) -> list[TrackedRun]:
        with self._changing:
            return [run for run in self._runs if run.is_due()]

    def _follow(self) -> None:
        """The thread: a pass over the open runs per interval, with longer and longer pauses while the store fails."""
        courier = Courier(self.uri, self.experiment, self.output_dir, self._say)
        pause, attempts_left = 0.0, LAST_ATTEMPTS
        while True:
            if not self._closing.wait(pause):
                self._wake.wait(self._interval)
            self._wake.clear()
            closing = self._closing.is_set()
            if self._pass(courier):
                pause = 0.0
            else:
                pause = min(LONGEST_PAUSE_SECONDS, max(1.0, 2 * pause))
                attempts_left -= closing
                if closing and attempts_left:
                    time.sleep(0.2)
                    continue
            if closing:
                return

    def _pass(self, courier: Courier) -> bool:
        """Sends what is due; False when something failed. Two failures in a row are the store's, not a run's."""
        failed: list[TrackedRun] = []
        for run in self._unsent():
            size = size_of(run.folder / READINGS_FILE)
            if courier.deliver(run.folder, run.wanted, run.sent):
                run.bytes_seen = size
                self._delivered += 1
                continue
            failed.append(run)
            if len(failed) == 2:
                break
        with self._changing:
            over = [run for run in self._runs if run.wanted.ended and not run.is_due()]
            # What failed goes to the end, so that one run the store will not have does not keep back the others.
            self._runs = [run for run in self._runs if run not in over and run not in failed] + failed
        return not failed


def _common_folder(runs: Sequence[TrackedRun]) -> Path:
    return Path(os.path.commonpath([run.folder.absolute() for run in runs]))


# --------------------------------------------------------------------------------------------- the store


class Courier:
    """Brings run folders to one store; used by one thread. Opens it (and imports mlflow) at the first delivery."""

    def __init__(self, uri: str, experiment: str, output_dir: Path, say: Say) -> None:
        self.uri = uri
        self.experiment = experiment
        self.output_dir = output_dir
        self._say = say
        self._client: Any = None
        self._experiment_id = ""
        self._attached: dict[str, dict[str, int]] = {}  # by key of a run in the store: the last step it had of each metric
        self._is_down = False
        self._said: set[str] = set()

    def deliver(self, folder: Path, wanted: Wanted, sent: Sent) -> bool:
        """Sends what the store lacks of a run and writes down how far it got; False when the store failed."""
        try:
            with locked(folder / f".{SENT_FILE}.lock"):
                self._advance(folder, wanted, sent)
        except Exception as error:  # whatever goes wrong with logging, training goes on
            self._client = None  # it may come back as another store: look before going on
            self._attached.clear()
            if not self._is_down:
                self._is_down = True
                self._say(
                    f"MLflow at {without_password(self.uri)} fails ({_reason(error)}); training goes on, "
                    f"readings wait in the run folders and are sent when it is back"
                )
            return False
        if self._is_down:
            self._is_down = False
            self._say(f"MLflow at {without_password(self.uri)} is back; what waited is being sent")
        return True

    def _advance(self, folder: Path, wanted: Wanted, sent: Sent) -> None:
        self._open()
        if wanted.key not in self._attached or not sent.run_id:
            self._attach(folder, wanted, sent)
        if sent.revision < wanted.revision:
            self._send_facts(folder, wanted, sent)
        self._send_readings(folder, sent, self._attached[wanted.key])
        if sent.revision < wanted.revision:
            if wanted.ended is not None:
                self._send_artifacts(folder, wanted, sent)
                self._client.set_terminated(sent.run_id, wanted.status, round(wanted.ended * 1000))
                del self._attached[wanted.key]  # a search would keep those of every trial it has known
            sent.revision = wanted.revision
            self._keep(folder, sent)

    def _open(self) -> None:
        """The client, the schema of a new database, and the experiment."""
        if self._client is not None:
            return
        for name, value in SHORT_AND_QUIET.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        # MLflow reads its level when it is imported, which another library may have done before.
        logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
        if not self.uri.startswith("http"):
            from mlflow.store.db import utils as database

            database.MAX_RETRY_COUNT = 1  # of ten with doubling pauses, 100 s in all
        path = _sqlite_path(self.uri)
        # Processes that make the tables of an empty database at the same time break each other.
        with locked(path.with_name(f".{path.name}.lock") if path else self.output_dir / f".{SENT_FILE}.lock"):
            if path and not size_of(path):
                _make_tables(path)
            client = MlflowClient(self.uri)
            self._experiment_id = self._experiment_of(client)
        self._client = client

    def _experiment_of(self, client: Any) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            # A database knows no place for files but the working directory; a server has its own.
            place = None if self.uri.startswith("http") else (self.output_dir / ARTIFACTS_FOLDER).absolute().as_uri()
            try:
                return str(client.create_experiment(self.experiment, artifact_location=place))
            except Exception:
                found = client.get_experiment_by_name(self.experiment)  # another process was first
                if found is None:
                    raise
        return str(found.experiment_id)

    def _attach(self, folder: Path, wanted: Wanted, sent: Sent) -> None:
        """Finds the run in the store, by its id or by its key, or makes it."""
        address = without_password(self.uri)
        if not sent.run_id:
            sent.become(sent_of(folder))  # a replay in another process may have made it
        if sent.uri != address or sent.key != wanted.key or not self._is_active(sent.run_id):
            ours = f"tags.`{KEY_TAG}` = '{wanted.key}'"
            same = self._client.search_runs([self._experiment_id], ours, max_results=1)
            run_id = same[0].info.run_id if same else self._create(folder, wanted)
            sent.become(Sent(address, wanted.key, self._experiment_id, run_id))
            self._keep(folder, sent)
            if not same:
                self._attached[wanted.key] = {}
                return
        self._attached[wanted.key] = self._last_steps(sent.run_id)

    def _last_steps(self, run_id: str) -> dict[str, int]:
        """How far the store has got with each metric of a run."""
        return {metric.key: metric.step for metric in self._client.get_run(run_id).data.to_proto().metrics}

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(run_id) and self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _create(self, folder: Path, wanted: Wanted) -> str:
        tags = {KEY_TAG: wanted.key, **self._parent_tag(folder, wanted)}
        run = self._client.create_run(self._experiment_id, round(wanted.started * 1000), tags, wanted.name)
        return str(run.info.run_id)

    def _parent_tag(self, folder: Path, wanted: Wanted) -> dict[str, str]:
        if wanted.parent is None:
            return {}
        parent_folder = Path(os.path.normpath(folder / wanted.parent))
        parent = read_record(parent_folder / WANTED_FILE, Wanted)
        sent = sent_of(parent_folder)
        if parent is None:
            self._say_once(f"{parent_folder}: its {WANTED_FILE} is gone, so {folder} stands in MLflow without a parent")
            return {}
        if parent.key not in self._attached:
            self._attach(parent_folder, parent, sent)
        return {"mlflow.parentRunId": sent.run_id}

    def _send_facts(self, folder: Path, wanted: Wanted, sent: Sent) -> None:
        """Name, status, tags and params; a param that a resumed run has changed (MLflow keeps the first) is a tag."""
        run = self._client.get_run(sent.run_id)
        there = run.data.params
        params = {key: value[:PARAM_CHARACTERS] for key, value in wanted.params.items()}
        changed = {key: value for key, value in params.items() if there.get(key, value) != value}
        if changed:
            self._say_once(
                f"{folder}: resumed with other settings ({', '.join(sorted(changed))}); "
                f"MLflow keeps the first values, the new ones are its tags resumed.*"
            )
        resumed = {f"resumed.{key}": value for key, value in changed.items()}
        tags = {**wanted.tags, **self._parent_tag(folder, wanted), **resumed}
        reopened = wanted.ended is None and run.info.status != "RUNNING"
        if reopened or wanted.name != run.info.run_name:
            self._client.update_run(sent.run_id, "RUNNING" if reopened else None, wanted.name)
        from mlflow.entities import Param, RunTag

        new_params = [Param(key, value) for key, value in params.items() if key not in there]
        for some in _portions(new_params, PARAMS_PER_BATCH):
            self._log(sent.run_id, params=some)
        all_tags = [RunTag(_clean(key), value[:TAG_CHARACTERS]) for key, value in tags.items()]
        for some in _portions(all_tags, PARAMS_PER_BATCH):
            self._log(sent.run_id, tags=some)

    def _send_readings(self, folder: Path, sent: Sent, last_steps: Mapping[str, int]) -> None:
        path = folder / READINGS_FILE
        if not begins_line(path, sent.offset):  # it is not the file that was sent: power was cut
            sent.offset = 0
        while lines := whole_lines(path, sent.offset):
            rows = [row for line in lines for row in self._rows(path, line) if row.step > last_steps.get(row.key, -1)]
            for some in _portions(rows, METRICS_PER_BATCH):
                self._log(sent.run_id, metrics=some)
            sent.offset += sum(map(len, lines))
            self._keep(folder, sent)

    def _rows(self, path: Path, line: bytes) -> list[Any]:
        from mlflow.entities import Metric

        try:
            reading, written = from_line(line)
        except ValueError as error:
            self._say_once(f"{path}: a line is passed over: {error}")
            return []
        source = f"{reading.stage}/{reading.split}"
        # Values first: MLflow's comparison page opens with the metric that a run logged first.
        counted = {f"{source}/tokens": float(reading.tokens), f"{source}/seconds": reading.seconds}
        values = reading.keyed() | {key: value for key, value in counted.items() if key not in reading.keyed()}
        return [Metric(_clean(key), value, round(written * 1000), reading.step) for key, value in values.items()]

    def _log(self, run_id: str, **batch: list[Any]) -> None:
        """One log_batch; of a batch that the store refuses, all but the items it will never take."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(run_id, **batch)
            return
        except MlflowException as error:
            if error.error_code not in REFUSALS or not self._is_active(run_id):
                raise
            reason = _reason(error)
        ((kind, items),) = batch.items()
        if len(items) == 1:
            self._say_once(f"MLflow will not take {kind} {items[0].key!r} ({reason}); it stands in the run folder only")
            return
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            self._log(run_id, **{kind: half})

    def _send_artifacts(self, folder: Path, wanted: Wanted, sent: Sent) -> None:
        for name in wanted.artifacts:
            path = folder / name
            if path.is_file():
                self._client.log_artifact(sent.run_id, str(path))
            else:
                self._say_once(f"{path}: no such file; it cannot be kept in MLflow")

    def _keep(self, folder: Path, sent: Sent) -> None:
        try:
            write_record(folder / SENT_FILE, sent)
        except OSError as error:  # after a kill the same rows would be sent again, which changes nothing
            self._say_once(f"{folder / SENT_FILE}: cannot be written ({error.strerror}); tracking goes on from memory")

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self._say(sentence)


def _make_tables(path: Path) -> None:
    """Makes a SQLite store beside its place and moves it there whole.

    A kill in the middle of MLflow's many migrations leaves a database that MLflow can neither use nor mend.
    """
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    draft = path.with_name(f".{path.name}.draft")
    for leftover in (draft, draft.with_name(f"{draft.name}-journal")):
        leftover.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_sqlalchemy_engine(_sqlite(draft))
    _initialize_tables(engine)
    engine.dispose()
    os.replace(draft, path)


def _portions(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: MLflow wraps a refused connection in half a page."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    known = REASONS.search(text)
    return known.group(0) if known else text[:200]


# ------------------------------------------------------------------------------------------------ replay


def replay(folders: Sequence[Path], say: Say = say_aloud) -> bool:
    """Sends what the store lacks of all run folders at or below `folders`; True when nothing is left.

    Raises UserError when there is no run folder, or a store's password is not at hand.
    """
    found = sorted({path.parent for folder in folders for path in folder.rglob(WANTED_FILE)})
    runs = [(folder, wanted) for folder in found if (wanted := read_record(folder / WANTED_FILE, Wanted))]
    if not runs:
        places = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{places}: no {WANTED_FILE} there or below; give a run's folder or its output_dir")
    if elsewhere := os.environ.get("MLFLOW_TRACKING_URI"):
        say(f"sending to MLFLOW_TRACKING_URI, {without_password(elsewhere)}, wherever the runs have begun")
    couriers: dict[tuple[str, str, Path], Courier] = {}
    unsent = 0
    for folder, wanted in runs:
        output_dir = Path(os.path.normpath(folder / wanted.output_dir))
        address = (_uri_of(folder, wanted, output_dir), wanted.experiment, output_dir)
        courier = couriers.setdefault(address, Courier(*address, say))
        unsent += not courier.deliver(folder, wanted, sent_of(folder))
    say(f"{len(runs) - unsent} of {len(runs)} runs are wholly in MLflow")
    return not unsent


def _uri_of(folder: Path, wanted: Wanted, output_dir: Path) -> str:
    """The store to send to: MLFLOW_TRACKING_URI, else the one that the run began with, which may be gone."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return store_uri(None, output_dir)
    if wanted.uri is None:
        return _sqlite(output_dir / "mlflow.db")
    if "***" in wanted.uri:
        raise UserError(f"{folder}: {wanted.uri} needs its password; set MLFLOW_TRACKING_URI to that address with it")
    return wanted.uri


# --------------------------------------------------------------------------------------------- the UI


@dataclass(frozen=True)
class UiLinks:
    """Addresses of the UI's pages that compare chosen runs."""

    compare: str
    curves: str


def ui_links(base_url: str, experiment_id: str, run_ids: Sequence[str], metric: str) -> UiLinks:
    """Links to the comparison (parallel coordinates, scatter) and to the curves of `metric`, of just these runs."""
    page = f"{base_url.rstrip('/')}/#"
    runs = {"runs": json.dumps(list(run_ids)), "experiments": json.dumps([experiment_id])}
    curves = {
        **runs,
        "metric": json.dumps(metric),
        "plot_metric_keys": json.dumps([metric]),
        "plot_layout": json.dumps({"autosize": True, "xaxis": {}, "yaxis": {}}),
        "x_axis": "step",
        "y_axis_scale": "linear",
        "line_smoothness": "1",
        "show_point": "false",
    }
    compare, metric_page = (urlencode(query, quote_via=quote) for query in (runs, curves))
    return UiLinks(f"{page}/compare-runs?{compare}", f"{page}/metric?{metric_page}")


def ui_command(uri: str, port: int = 5000) -> str:
    """The command that opens the UI on a store; for a tracking server, which is its own UI, its address."""
    if uri.startswith("http"):
        return without_password(uri)
    path = _sqlite_path(uri)
    store = f"sqlite:///{_from_here(path)}" if path else without_password(uri)
    return shlex.join([program_here("mlflow"), "ui", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(port)])


def program_here(name: str) -> str:
    """What to type for a program of this environment, which may not be activated: then PATH does not name it, though
    DeepSpeed's import puts it there for this process."""
    own = Path(sys.executable).with_name(name)
    activated = sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix
    return name if activated or not own.exists() else str(_from_here(own))


def _from_here(path: Path) -> Path:
    """The path as it is shortest to type: relative where it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(words: Sequence[str] | None = None) -> int:
    """`python -m dstrain.tracking FOLDER ...`: sends what MLflow lacks. Exit status 0, 1 (store fails), 2 (mistake)."""
    parser = argparse.ArgumentParser(
        prog="python -m dstrain.tracking",
        description="Send readings that a tracking store has not got yet: the store that MLFLOW_TRACKING_URI names, "
        "else that which each run began with.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder, or one above several")
    try:
        return 0 if replay(parser.parse_args(words).folders) else 1
    except UserError as error:
        say_aloud(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
