"""One rank of `dstrain/train.py` that dies where it is told to. The program knows nothing of it.

    DSTRAIN_FAULT='{"moment": "step", "event": 3, "kind": "sigkill"}' python benchmarks/faults_victim.py FILE.yaml [key=value ...]

Functions of the program are wrapped from outside, events are counted at them, and at the wanted one the process is struck;
then train.py's own file runs as it does for everybody. In DSTRAIN_FAULT_OUT it leaves what the harness asks for: the events
counted, where it was struck, and every tensor of the engine at each stage's end.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOOR = ROOT / "dstrain" / "train.py"
sys.path[:] = [str(ROOT)] + [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]

EXITS_WITH = 17
MOMENTS = {
    "vocabulary": "while the vocabulary is trained and kept",
    "tokenisation": "while the shared cache is filled",
    "step": "between the micro-batches of an optimizer step, and before the weights move",
    "evaluation": "before, in and after an evaluation",
    "checkpoint": "between the files of a checkpoint, before and after each rename",
    "between": "between stages: around the best weights, the end of a stage, its engine, the outcome",
}
"""Where events are counted."""


class Injected(RuntimeError):
    """The exception that is raised on purpose."""


class Striker:
    """Counts events and strikes at the wanted one."""

    def __init__(self, plan: dict[str, Any], out: Path) -> None:
        self._plan, self._out = plan, out
        self.counts: Counter[str] = Counter()
        self.stage = "start"
        self.inside = ""
        """evaluation or tokenisation, while one is under way."""
        self.begun: list[float] = []
        """When each optimizer step began, by a clock that processes have in common."""

    def event(self, moment: str) -> None:
        """Something happened at which a process may die."""
        self.counts[moment] += 1
        if self._plan.get("moment") == moment and self._plan["event"] == self.counts[moment]:
            # Beside the main thread, that may just now be past its look at whether it is asked to stop.
            spare = int(threading.current_thread() is not threading.main_thread())
            self.note("struck", {"stage": self.stage, "moment": moment, "at": time.monotonic(), "spare": spare})
            self._strike(self._plan["kind"])

    def _strike(self, kind: str) -> None:
        if kind == "exception":
            raise Injected("a fault of the harness")
        if kind == "exit":
            os._exit(EXITS_WITH)
        os.kill(os.getpid(), {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigusr1": signal.SIGUSR1}[kind])

    def note(self, name: str, what: dict[str, Any]) -> None:
        """Leaves a word for the harness; a kill of this process does not undo it."""
        (self._out / f"{name}.rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(what))

    def around(self, owner: Any, name: str, moment: str) -> None:
        """An event before each call of a function, and one after."""
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.event(moment)
            done = real(*args, **kwargs)
            self.event(moment)
            return done

        setattr(owner, name, wrapped)

    def during(self, owner: Any, name: str, moment: str) -> None:
        """Marks the time of a call, so that what is wrapped by `within` counts; an event at its start and end too."""
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._inside(moment):
                self.event(moment)
                done = real(*args, **kwargs)
                self.event(moment)
                return done

        setattr(owner, name, wrapped)

    def within(self, owner: Any, name: str, moment: str) -> None:
        """An event at each call of a function while a `during` of that moment is under way."""
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.inside == moment:
                self.event(moment)
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    @contextmanager
    def _inside(self, moment: str) -> Iterator[None]:
        before, self.inside = self.inside, moment
        try:
            yield
        finally:
            self.inside = before

    def files(self) -> None:
        """Events around what makes a file's name or bytes last, by the place it happens in."""
        import torch

        def moment_of(path: str) -> str:
            name = Path(path).name
            if "checkpoint" in path:
                return "checkpoint"
            if name.startswith(("done.json", "outcome.json", "best.")):
                return "between"
            if "/vocabularies/" in path:
                return "vocabulary"
            return "tokenisation" if "/tokens/" in path or "/memos/" in path else ""

        def path_of(given: Any) -> str:
            if isinstance(given, int):  # a file that is open
                return os.readlink(f"/proc/self/fd/{given}")
            return os.fspath(given) if isinstance(given, (str, os.PathLike)) else ""

        def wrap(owner: Any, name: str, place: int) -> None:
            real = getattr(owner, name)

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                moment = moment_of(str(path_of(args[place]))) if len(args) > place else ""
                if moment:
                    self.event(moment)
                done = real(*args, **kwargs)
                if moment:
                    self.event(moment)
                return done

            setattr(owner, name, wrapped)

        for name in ("rename", "replace", "fsync"):
            wrap(os, name, 0)
        wrap(torch, "save", 1)

    def take_place(self) -> None:
        """Wraps the program."""
        from dstrain import loop, run
        from dstrain.data import cache, vocabulary
        from dstrain.engine import Engine
        from dstrain.healing import Healer
        from dstrain.objective import Task

        self.files()
        self.around(vocabulary, "train", "vocabulary")
        self.around(cache, "_write_split", "tokenisation")
        self.around(Engine, "backward", "step")
        self.during(loop, "evaluate", "evaluation")
        run.evaluate = loop.evaluate
        self.within(Task, "forward", "evaluation")
        self.around(Engine, "close", "between")
        self.around(run, "inherit", "between")
        run.fit = self._recorded(run.fit)
        Healer.step = self._dated(Healer.step)  # type: ignore[method-assign]

    def _dated(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Optimizer steps; when each begins is kept."""

        def dated(*args: Any, **kwargs: Any) -> Any:
            self.begun.append(time.monotonic())
            return step(*args, **kwargs)

        return dated

    def _recorded(self, fit: Callable[..., Any]) -> Callable[..., Any]:
        """The loop; what the engine holds when a stage has come to its end is kept for a comparison."""
        from dstrain.loop import Site

        def recorded(engine: Any, *args: Any, **kwargs: Any) -> Any:
            site = next(given for given in (*args, *kwargs.values()) if isinstance(given, Site))
            self.stage = site.name
            self.note("stage", {"stage": self.stage})
            progress = fit(engine, *args, **kwargs)
            keep_tensors(engine, self._out / f"{site.name}.rank{os.environ.get('RANK', '0')}.safetensors")
            return progress

        return recorded


def keep_tensors(engine: Any, file: Path) -> None:
    """Every tensor and number of a stage's end: weights, fp32 copies, moments, counts, loss scale. Collective."""
    import torch
    from safetensors.torch import save_file

    found = {f"weights/{name}": tensor for name, tensor in engine.weights().items()}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value.detach().cpu().clone().contiguous()
        elif isinstance(value, (bool, int, float)):
            found[name] = torch.tensor(float(value), dtype=torch.float64)
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}/{key}")
        elif isinstance(value, (list, tuple)):
            for place, inner in enumerate(value):
                walk(inner, f"{name}/{place}")

    walk(engine._ds.optimizer.state_dict(), "optimizer")
    walk(engine.loss_scale, "loss_scale")
    draft = file.with_suffix(".draft")
    save_file(found, draft)
    draft.rename(file)


def be_victim(words: Sequence[str]) -> None:
    """Runs train.py with these words to its end, or to another."""
    out = Path(os.environ["DSTRAIN_FAULT_OUT"])
    out.mkdir(parents=True, exist_ok=True)
    striker = Striker(json.loads(os.environ.get("DSTRAIN_FAULT", "{}")), out)
    striker.take_place()
    real_exit = os._exit

    def leave(status: int) -> None:
        striker.note("events", {"status": status, "begun": striker.begun, **striker.counts})
        real_exit(status)

    os._exit = leave  # type: ignore[assignment]
    sys.argv[:] = [str(DOOR), *words]
    runpy.run_path(str(DOOR), run_name="__main__")


if __name__ == "__main__":
    be_victim(sys.argv[1:])
