"""Door 1: trains one run from a YAML file.

deepspeed dstrain/train.py FILE.yaml [key=value ...]
torchrun --nproc_per_node 2 dstrain/train.py FILE.yaml
srun python dstrain/train.py FILE.yaml
python dstrain/train.py FILE.yaml
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# A launcher runs this file as a script, which puts dstrain/ itself on the path; the package lies one level up.
_here = Path(__file__).resolve().parent
sys.path[:] = [str(_here.parent)] + [entry for entry in sys.path if Path(entry or ".").resolve() != _here]

if TYPE_CHECKING:
    from dstrain.engine import Ranks
    from dstrain.lifeline import Lifeline
    from dstrain.run import Outcome, Say, Watch
    from dstrain.settings import Document, RunSettings

_EPILOG = """\
examples
  deepspeed dstrain/train.py search_spaces/smoke.yaml
  deepspeed --num_gpus 4 dstrain/train.py my.yaml --deepspeed_config ds_configs/zero2.json stages.finetune.optim.lr=3e-5
  python dstrain/train.py my.yaml --dry-run
  python dstrain/train.py --explain stages.<name>.optim

exit status
  0 finished   1 failed   2 a mistake in the settings or the data   75 come back: the same command goes on
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="train.py", description="Train one run: MLM pretraining, TAPT and classification through DeepSpeed.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument(
        "file", nargs="?", type=Path, metavar="FILE.yaml", help="settings: the `base` of a run or search file"
    )
    words.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    words.add_argument(
        "--deepspeed_config", type=Path, metavar="JSON", help="DeepSpeed JSON instead of the file's `deepspeed`"
    )
    words.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto goes on where the run folder is; never sets that folder aside and starts anew (not when SLURM requeues)",
    )
    words.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="go on though the text of a run that has begun is not the one it began with",
    )
    words.add_argument(
        "--full-size", action="store_true", help="leave out the file's `when` overrides for this machine"
    )
    words.add_argument(
        "--dry-run", action="store_true", help="show settings, DeepSpeed plan, parameters, tokens and steps, then stop"
    )
    words.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="show every setting (below PREFIX): path, default, unit, bounds, meaning",
    )
    words.add_argument("--quiet", action="store_true", help="only the outcome on standard output")
    words.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # habit of DeepSpeed scripts
    words.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # given by launchers
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    words = parser()
    given = words.parse_intermixed_args(argv)
    if given.explain is None and given.file is None:
        words.error("give a FILE.yaml, or --explain")
    from dstrain.schema import UserError
    from dstrain.stopping import follow_launcher, leave_on_signals, wait_to_be_ended

    leave_on_signals("asked to stop before training began; the same command starts again")
    follow_launcher()
    try:
        return _explain(given.explain) if given.explain is not None else _train(given)
    except UserError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(error, file=sys.stderr)
        else:  # the first has the same to say
            wait_to_be_ended(2)
        return 2


def _explain(prefix: str) -> int:
    from dstrain.schema import UserError, did_you_mean, explain
    from dstrain.settings import RunSettings, SearchSettings

    rows = [*explain(RunSettings), *explain(SearchSettings, "search.")]
    shown = [row for row in rows if _begins(row.address, prefix)]
    if not shown:
        parts = {row.address.partition(".")[0] for row in rows}
        raise UserError(f"--explain {prefix}: no setting begins like that{did_you_mean(prefix, parts)}")
    for row in shown:
        facts = ", ".join(part for part in (f"default {row.default}", row.unit, row.bounds) if part)
        print(f"{row.address}  ({facts})\n    {row.doc}")
    return 0


def _begins(address: str, prefix: str) -> bool:
    """Whether `stages.<name>.objective<mlm>.mask_rate` begins with the prefix, as shown or as a YAML file has it."""
    words = [word.partition("<")[0] for word in address.split(".")]  # <name> becomes "", which stands for any word
    asked = prefix.split(".")
    alike = all(not word or word == want for word, want in zip(words, asked[:-1], strict=False))
    last = words[len(asked) - 1] if len(asked) <= len(words) else None
    return address.startswith(prefix) or (alike and last is not None and (not last or last.startswith(asked[-1])))


def _train(given: argparse.Namespace) -> int:
    import torch

    from dstrain.settings import read_document, run_settings

    overrides = list(given.overrides) + ([f"deepspeed={given.deepspeed_config}"] if given.deepspeed_config else [])
    document = read_document(given.file, overrides, torch.cuda.is_available(), given.full_size)
    settings = run_settings(document)
    if given.dry_run:
        return _dry_run(document, settings)
    return _on_ranks(given, document, settings)


def _dry_run(document: Document, settings: RunSettings) -> int:
    import json

    import torch

    from dstrain.readings import amount
    from dstrain.run import forecast
    from dstrain.schema import dump_yaml
    from dstrain.settings import plain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages = forecast(settings, int(os.environ.get("WORLD_SIZE", "1")), device, print)
    print(dump_yaml(plain(settings)), end="")
    for line in document.precedence:
        print(f"# {line}")
    print(f"\nDeepSpeed plan ({settings.deepspeed_path}):\n{json.dumps(stages[0].plan, indent=1)}\n")
    for stage in stages:
        print(
            f"{stage.name:<10} {stage.parameters:,} parameters  {stage.documents:,} sequences  "
            f"{amount(stage.tokens_per_epoch)} tokens an epoch  {stage.steps:,} steps"
        )
        print(f"           {stage.disk}")
        for note in stage.notes:
            print(f"           {note}")
    return 0


def _on_ranks(given: argparse.Namespace, document: Document, settings: RunSettings) -> int:
    from dstrain.checkpoints import Unsaved, full_disk
    from dstrain.engine import Diverged, join_ranks, leave_ranks
    from dstrain.healing import OutOfMemory, TooLarge
    from dstrain.lifeline import Lifeline
    from dstrain.loop import Interrupted
    from dstrain.schema import UserError
    from dstrain.stopping import SAVED_COME_BACK

    ranks = join_ranks()
    lifeline = Lifeline(ranks)
    try:
        text, status = _summary(settings, _run(given, document, settings, ranks, lifeline), given.file), 0
    except Interrupted as asked:
        anew = " without --resume never" if given.resume == "never" else ""
        text, status = f"{asked}; the same command{anew} goes on from there", SAVED_COME_BACK
    except (Diverged, Unsaved) as error:
        text, status = str(error), 1
    except UserError:
        leave_ranks()
        raise
    except (OutOfMemory, TooLarge) as error:  # of this rank alone, and the others learn of it by its end
        return _tell(0, str(error), SAVED_COME_BACK if isinstance(error, OutOfMemory) else 1)
    except Exception as error:
        what = full_disk(error, settings.folder) or _trace(ranks.rank, ranks.world)
        return _tell(0, lifeline.sentence if lifeline.broke(error) else what, 1)
    ranks.barrier()  # a launcher ends the others as soon as one has left, and rank 0 may still talk to MLflow
    lifeline.leave()
    leave_ranks()
    return _tell(ranks.rank, text, status)


def _run(
    given: argparse.Namespace, document: Document, settings: RunSettings, ranks: Ranks, lifeline: Lifeline
) -> Outcome:
    """The run under watch."""
    from dstrain.run import run_patiently
    from dstrain.schema import UserError

    with ranks.first() as mine:
        if mine:
            say = _say_aside if given.quiet else _say
            anew = given.resume == "never"
            if anew and _is_of_this_job(settings.folder):
                say(f"{settings.folder}: was begun anew by this job, which SLURM has started again; it goes on")
                anew = False
            _claim(settings, ranks, anew, say)
    with _watching(settings, document, ranks.rank == 0, given.quiet) as watch:
        try:
            return run_patiently(settings, ranks, watch, given.accept_changed_data)
        except UserError:
            lifeline.ending()  # others may be gone before what this rank has to track is sent
            raise


def _trace(rank: int, world: int) -> str:
    """The error at hand, as Python tells it."""
    import traceback

    return (f"rank {rank} failed:\n" if world > 1 else "") + traceback.format_exc().rstrip()


_JOB_FILE = "slurm-job"


def _is_of_this_job(folder: Path) -> bool:
    """Whether a run was begun by this very job: SLURM starts the same command again after a time limit, which is no wish to
    start over once more."""
    file = folder / _JOB_FILE
    return file.exists() and file.read_text(encoding="utf-8") == os.environ.get("SLURM_JOB_ID")


def _claim(settings: RunSettings, ranks: Ranks, anew: bool, say: Say) -> None:
    """Makes the run folder once all that can be refused has been: a refused start leaves nothing and moves nothing.

    All text is tokenised here, where a signal still ends the process at once.
    """
    from dstrain.precision import choose
    from dstrain.run import (
        claim,
        has_begun,
        make_ready,
        own_vocabulary,
        run_vocabulary,
        set_aside,
        stage_corpus,
        write_whole,
    )

    if anew or not has_begun(settings.folder):
        precision = choose(settings.precision, ranks.device)
        make_ready(settings, run_vocabulary(settings, say), precision, ranks, say)
    elif (vocabulary := own_vocabulary(settings.folder)) and not (settings.folder / "outcome.json").exists():
        for stage in settings.stages.values():
            stage_corpus(stage, vocabulary, say)
    if anew:
        set_aside(settings.folder)
    claim(settings, say)
    if anew and (job := os.environ.get("SLURM_JOB_ID")):
        write_whole(settings.folder / _JOB_FILE, job)


def _tell(rank: int, text: str, status: int) -> int:
    if rank == 0:
        print(text, file=sys.stderr if status else sys.stdout, flush=True)
    return status


def _summary(settings: RunSettings, outcome: Outcome, file: Path) -> str:
    from dstrain.readings import spoken
    from dstrain.tracking import program_here

    lines = []
    for name, why in outcome.stopped.items():
        metric, _ = settings.stages[name].selection
        best = outcome.best[name]
        lines.append(f"{name}: {why}" + ("" if best is None else f", best valid {spoken(metric, best)}"))
    if outcome.test:
        lines.append("test: " + "  ".join(spoken(name, value) for name, value in outcome.test.items()))
    lines.append(
        f"run folder: {settings.folder}    "
        f"same run again: {program_here('python')} dstrain/train.py {settings.folder}/settings.yaml name=NEW"
    )
    return "\n".join(lines)


class _watching:
    """Rank 0 writes readings, shows and tracks them; the other ranks keep quiet. Closes the tracked run at the end."""

    def __init__(self, settings: RunSettings, document: Document, speaks: bool, quiet: bool) -> None:
        self._settings, self._document, self._speaks, self._quiet = settings, document, speaks, quiet

    def __enter__(self) -> Watch:
        from dstrain.run import Watch
        from dstrain.stopping import stop_on_signals

        stop = stop_on_signals("asked to stop: saving at the end of this step or batch")
        if not self._speaks:
            return Watch(lambda reading: None, _silent, lambda tags: None, stop.is_set, stop.is_set)
        from dstrain.evidence import collect
        from dstrain.readings import Console, JsonLines, fan_out
        from dstrain.settings import ROOT, plain

        say = _say_aside if self._quiet else _say
        for line in self._document.precedence:
            say(line)
        settings = self._settings
        self._tracker = settings.tracking.open(settings.output_dir)
        self._run = self._tracker.run(settings.folder, settings.name, plain(settings), collect(ROOT).tags())
        self._lines = JsonLines(settings.folder)
        report = fan_out(self._lines, Console(quiet=self._quiet))
        return Watch(report, say, self._run.tag, stop.is_set, stop.is_set)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self._speaks:
            return
        status, reason = ending(error)
        from dstrain.run import run_files

        self._lines.close()
        self._run.finish(status, {"stop_reason": reason}, run_files(self._settings.folder))  # type: ignore[arg-type]
        self._tracker.close()


def ending(error: BaseException | None) -> tuple[str, str]:
    """MLflow's word for how a run ended, and the reason in ours."""
    if error is None:
        return "FINISHED", "finished"
    interrupted = type(error).__name__ == "Interrupted" or isinstance(error, KeyboardInterrupt)
    return ("KILLED" if interrupted else "FAILED"), f"{type(error).__name__}: {error}"


def _say(sentence: str) -> None:
    print(sentence, flush=True)


def _say_aside(sentence: str) -> None:
    """Leaves standard output to the outcome; what went wrong on the way is to be seen all the same."""
    print(sentence, file=sys.stderr, flush=True)


def _silent(sentence: str) -> None:
    """Says nothing."""


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written and the ranks have parted. Native threads of torch and gloo are now and then still there when the
    # interpreter takes itself apart, and abort the process: a finished run must not exit with their status.
    os._exit(status)
