"""What does an attention kind cost in quality? Every kind trains with one small budget and several seeds, beside SDPA.

    python -m benchmarks.quality [--corpus imdb sci_review] [--kinds sdpa favor lsh] [--seeds 3] [--out runs/quality]
                                 [--json FILE] [--plot PNG] [--dry-run] [--only-finished]

A corpus is a search file, benchmarks/quality/CORPUS.yaml: its `space` names the kinds and a few learning rates. With the
base's seed each kind trains at each rate, the validation split chooses one, and further seeds train at that rate; the test
split chooses nothing. A run is `python dstrain/train.py OUT/NAME.yaml`, one after another; a finished run is not run again.

Reported per kind: macro-F1 on test, mean over seeds with a 95 % t interval, and the difference to SDPA with a 95 %
paired bootstrap interval: each draw takes test documents and seeds with replacement, the same for both kinds.

Shapes: S seeds, D test documents, K classes, B draws of the bootstrap.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from dstrain.engine import Ranks
from dstrain.loop import evaluate
from dstrain.metrics import Tally
from dstrain.model.encoder import Encoder
from dstrain.objective import Objective, Task
from dstrain.run import read_record, read_weights, run_vocabulary, stage_corpus, write_whole
from dstrain.schema import UserError, did_you_mean, dump_yaml, read_yaml
from dstrain.search import Candidate, brief, plan_search
from dstrain.settings import ROOT, RunSettings, load_run, plain, read_document

RECIPES = Path(__file__).with_suffix("")
KIND = "encoder.attention"
"""The address in a recipe's space that tells kinds apart; all its other addresses are searched alike for each kind."""
BASELINE = "sdpa"
MARGIN = 0.01
"""A kind whose F1 lies within one point of SDPA's has paid nothing."""
DRAWS = 4000
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t with 1, 2 ... 9 degrees of freedom."""
MOST_SEEDS = len(_T975) + 1
FEWEST_SEEDS = 3
"""With fewer pairs of seeds there is no verdict."""

Say = Callable[[str], None]


# ------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Kind:
    """A kind of attention on a corpus: one candidate for each learning rate of the recipe."""

    corpus: str
    label: str
    candidates: tuple[Candidate, ...]
    out: Path

    def run(self, candidate: Candidate, number: int) -> RunSettings:
        """The run of one candidate with seed number 0, 1, ... after the recipe's own."""
        rest = {address: value for address, value in candidate.trial.overrides.items() if address != KIND}
        words = [self.corpus, *self.label.split(), *(f"{value}" for value in rest.values())]
        seed = candidate.settings.seed + number
        name = f"{'-'.join(words)}-s{seed}"
        return candidate.settings.model_copy(update={"name": name, "output_dir": self.out, "seed": seed})

    def choose(self) -> Candidate:
        """The candidate with the best validation metric at the first seed; the first one where they tie."""
        return max(self.candidates, key=lambda candidate: _valid(self.run(candidate, 0)))

    @property
    def searched(self) -> bool:
        """Whether all of the first seed's runs are finished."""
        return all(finished(self.run(candidate, 0)) for candidate in self.candidates)

    def runs(self, seeds: int) -> Iterator[RunSettings]:
        """All runs in the order they are needed; the choice is made when the first seed's runs have been taken."""
        for candidate in self.candidates:
            yield self.run(candidate, 0)
        if self.searched:
            chosen = self.choose()
            yield from (self.run(chosen, number) for number in range(1, seeds))


def read_kinds(corpus: str, out: Path, overrides: Sequence[str] = ()) -> list[Kind]:
    """The kinds of benchmarks/quality/CORPUS.yaml, SDPA among them. Raises UserError with what is wrong."""
    file = RECIPES / f"{corpus}.yaml"
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if corpus not in known:
        raise UserError(f"--corpus {corpus}: there is no {file.name} in {RECIPES.name}/{did_you_mean(corpus, known)}")
    search = plan_search(read_document(file, overrides, torch.cuda.is_available()))
    groups: dict[str, list[Candidate]] = {}
    for candidate in search.candidates:
        groups.setdefault(brief(candidate.trial.overrides.get(KIND)), []).append(candidate)
    if BASELINE not in groups:
        raise UserError(f"{file}: space.{KIND}: has no {{kind: {BASELINE}}}; add it, everything is compared with it")
    return [Kind(corpus, label, tuple(candidates), out) for label, candidates in groups.items()]


def finished(run: RunSettings) -> bool:
    """Whether the run has ended. Raises UserError when the folder holds an end of a run with other settings."""
    if not (run.folder / "outcome.json").exists():
        return False
    there = load_run(run.folder / "settings.yaml")
    if there.model_copy(update={"output_dir": run.output_dir}) != run:
        raise UserError(
            f"{run.folder}: is finished, with other settings than this command's; remove it, or give another --out"
        )
    return True


def train(run: RunSettings, say: Say) -> None:
    """Trains a run to its end as its user would, from where it was interrupted; nothing happens to a finished one."""
    if finished(run):
        return
    file = run.output_dir / f"{run.name}.yaml"
    write_whole(file, dump_yaml({"base": plain(run)}))
    say(f"training {run.name}")
    status = subprocess.run([sys.executable, str(ROOT / "dstrain/train.py"), str(file), "--quiet"], check=False)
    if status.returncode:
        raise UserError(f"{run.name}: training ended with status {status.returncode}; the same command goes on")


def _valid(run: RunSettings) -> float:
    best = read_record(run.folder / "outcome.json")["best"][_last(run)]
    return -math.inf if best is None else float(best)


def _last(run: RunSettings) -> str:
    return list(run.stages)[-1]


# ------------------------------------------------------------------------------------------------- what was guessed


class Guesses(NamedTuple):
    """A run's answers on the test split."""

    truth_D: np.ndarray
    guess_D: np.ndarray


class _Remembering:
    """An objective for `evaluate` whose tally can be read afterwards: figures alone cannot be resampled."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.head, self.batch, self.loss = objective.head, objective.batch, objective.loss
        self.running_tally = objective.running_tally
        self.tallied: Tally | None = None

    def tally(self, split: Any, device: torch.device) -> Tally:
        """The objective's own."""
        self.tallied = self._objective.tally(split, device)
        return self.tallied


def guesses(run: RunSettings, say: Say) -> Guesses:
    """What the weights a finished run kept answer on test; computed once and kept in its folder."""
    file = run.folder / "test-guesses.npy"
    if not file.exists():
        write = _guess(run, say)
        draft = file.with_suffix(".draft.npy")
        np.save(draft, np.stack(write))
        draft.rename(file)
    return Guesses(*np.load(file))


def _guess(run: RunSettings, say: Say) -> Guesses:
    name, stage = _last(run), run.stages[_last(run)]
    vocabulary = run_vocabulary(run, say)
    corpus = stage_corpus(stage, vocabulary, say)
    objective = stage.objective.build(corpus, vocabulary, run.encoder, run.seed)
    task = Task(Encoder(run.encoder, vocabulary.size, run.seed), objective)
    task.load_state_dict(read_weights(run.folder / "stages" / name / "best.safetensors"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task.to(device)
    split, witness = corpus.splits["test"], _Remembering(objective)
    with torch.inference_mode():
        figures = evaluate(task, witness, split, stage.tokens_per_batch, Ranks(0, 1, device, "benchmark"))
    reported = read_record(run.folder / "outcome.json")["test"]["f1_macro"]
    if abs(figures["f1_macro"] - reported) > MARGIN / 10:
        say(f"{run.name}: its weights now give a test F1 of {figures['f1_macro']:.4f}, not {reported:.4f} as trained")
    assert witness.tallied is not None and split.labels is not None
    columns = len(corpus.label_names) + 1  # a column for each class, and how often a document was seen
    table = witness.tallied.sums[2:].view(-1, columns).cpu().numpy()
    truth_D = np.zeros(len(table), np.int64)
    truth_D[split.document] = split.labels
    return Guesses(truth_D, table[:, :-1].argmax(1))


# ----------------------------------------------------------------------------------------------------- statistics


def macro_f1(confusion_BKK: np.ndarray) -> np.ndarray:
    """(B) macro-F1 of confusion counts (rows truth, columns guess), as `dstrain.metrics.scores` defines it."""
    right_BK = np.diagonal(confusion_BKK, axis1=1, axis2=2)
    both_BK = confusion_BKK.sum(1) + confusion_BKK.sum(2)
    f1_BK = 2 * right_BK / np.maximum(both_BK, 1)
    return f1_BK.sum(1) / (both_BK > 0).sum(1)


def f1_draws(answers: Sequence[Guesses], draws_BD: np.ndarray, seeds_BS: np.ndarray) -> np.ndarray:
    """(B) the mean F1 of a kind in every draw: how often each document, and each seed, was drawn."""
    f1_SB = np.stack([_f1_of(each, draws_BD) for each in answers])
    return (seeds_BS.T * f1_SB).sum(0) / seeds_BS.sum(1)


def _f1_of(answer: Guesses, draws_BD: np.ndarray) -> np.ndarray:
    classes = int(max(answer.truth_D.max(), answer.guess_D.max())) + 1
    cells_DC = np.eye(classes**2)[answer.truth_D * classes + answer.guess_D]
    return macro_f1((draws_BD @ cells_DC).reshape(-1, classes, classes))


def paired_difference(
    kind: Sequence[Guesses], baseline: Sequence[Guesses], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """(difference of the mean F1, lower, upper end of its 95 % bootstrap interval); documents and seeds are paired."""
    assert len(kind) == len(baseline) and all((each.truth_D == baseline[0].truth_D).all() for each in kind)
    random, documents = np.random.default_rng(seed), len(kind[0].truth_D)
    draws_BD = random.multinomial(documents, np.full(documents, 1 / documents), draws).astype(float)
    seeds_BS = random.multinomial(len(kind), np.full(len(kind), 1 / len(kind)), draws).astype(float)
    once = np.ones((1, documents)), np.ones((1, len(kind)))
    drawn_B = f1_draws(kind, draws_BD, seeds_BS) - f1_draws(baseline, draws_BD, seeds_BS)
    low, high = np.quantile(drawn_B, (0.025, 0.975))
    return float(f1_draws(kind, *once)[0] - f1_draws(baseline, *once)[0]), float(low), float(high)


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % t interval of the mean over seeds; nan for a single seed."""
    if len(values) < 2:
        return math.nan
    return _T975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


Verdict = Literal["within a point", "loses more", "undecided", "too few seeds"]


def verdict(low: float, high: float, pairs: int) -> Verdict:
    """What an interval of the difference to SDPA over so many pairs of seeds says about losing at most a point.

    One or two seeds cannot show how much seeds differ: their interval is one of documents alone and decides nothing.
    """
    if pairs < FEWEST_SEEDS:
        return "too few seeds"
    return "within a point" if low >= -MARGIN else "loses more" if high < -MARGIN else "undecided"


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Row:
    """A kind on a corpus. F1 and differences are shares, not points."""

    corpus: str
    kind: str
    chosen: dict[str, Any]
    """What the validation split chose: the learning rate."""
    valid_of_choices: dict[str, float]
    """Validation metric of every choice at the first seed."""
    seeds: list[int]
    f1: list[float]
    """Test macro-F1 of each seed."""
    valid: list[float]
    minutes: float
    """Mean training time of a run, evaluations left out, on whatever else the machine did."""
    documents: int
    commits: list[str]
    pairs: int = 0
    """Seeds that SDPA has as well; the difference is over these alone, so it need not be that of the two means."""
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""
    mean: float = field(init=False)
    half_interval: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", statistics.fmean(self.f1))
        object.__setattr__(self, "half_interval", half_interval(self.f1))


def rows_of(kinds: Sequence[Kind], seeds: int, say: Say) -> list[Row]:
    """The rows of one corpus, from the finished runs; a kind compares over the seeds that SDPA has as well."""
    done = {kind.label: _done(kind, seeds) for kind in kinds}
    baseline = {run.seed: run for run in done.get(BASELINE, [])}
    rows = []
    for kind in kinds:
        runs = done[kind.label]
        if not runs:
            continue
        pairs = [(run, baseline[run.seed]) for run in runs if run.seed in baseline]
        compared: dict[str, Any] = {}
        if pairs and kind.label != BASELINE:
            ours, theirs = ([guesses(run, say) for run in side] for side in zip(*pairs, strict=True))
            difference, low, high = paired_difference(ours, theirs)
            compared = {"difference": difference, "low": low, "high": high, "pairs": len(pairs)}
            compared["verdict"] = verdict(low, high, len(pairs))
        rows.append(_row(kind, runs, compared, say))
    return rows


def _done(kind: Kind, seeds: int) -> list[RunSettings]:
    if not kind.searched:
        return []
    chosen = kind.choose()
    return [run for number in range(seeds) if finished(run := kind.run(chosen, number))]


def _row(kind: Kind, runs: Sequence[RunSettings], compared: dict[str, Any], say: Say) -> Row:
    chosen = kind.choose()
    outcomes = [read_record(run.folder / "outcome.json") for run in runs]
    return Row(
        corpus=kind.corpus,
        kind=kind.label,
        chosen={address: value for address, value in chosen.trial.overrides.items() if address != KIND},
        valid_of_choices={each.changes: _valid(kind.run(each, 0)) for each in kind.candidates},
        seeds=[run.seed for run in runs],
        f1=[outcome["test"]["f1_macro"] for outcome in outcomes],
        valid=[_valid(run) for run in runs],
        minutes=statistics.fmean(map(_minutes, runs)),
        documents=len(guesses(runs[0], say).truth_D),
        commits=sorted({_commit(run) for run in runs}),
        **compared,
    )


def _minutes(run: RunSettings) -> float:
    stages = [read_record(run.folder / "stages" / name / "done.json") for name in run.stages]
    return sum(stage["seconds"] for stage in stages) / 60


def _commit(run: RunSettings) -> str:
    code = read_yaml(run.folder / "environment.txt")["code"]
    return f"{code['commit'][:12]}{' with changes' if code['dirty'] else ''}"


def table(rows: Sequence[Row]) -> str:
    """The rows as text, in F1 points."""
    lines = [
        f"{'corpus':<11} {'kind':<20} {'chosen':<10} {'seeds':>5} {'valid':>6} {'test F1':>8} {'95 %':>6}  "
        f"{'- sdpa':>6}  {'95 %':<16} {'pairs':>5} {'':<14} {'min/run':>7}"
    ]
    for row in rows:
        against = f"{'':>6}  {'':<16} {'':>5} {'':<14}"
        if row.difference is not None and row.low is not None and row.high is not None:
            interval = f"[{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
            against = f"{100 * row.difference:>+6.1f}  {interval:<16} {row.pairs:>5} {row.verdict:<14}"
        chosen = " ".join(map(str, row.chosen.values()))
        lines.append(
            f"{row.corpus:<11} {row.kind:<20} {chosen:<10} {len(row.f1):>5} {100 * statistics.fmean(row.valid):>6.1f} "
            f"{100 * row.mean:>8.1f} {100 * row.half_interval:>6.1f}  {against} {row.minutes:>7.1f}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], file: Path) -> None:
    """A panel per corpus: every seed's F1, the mean with its interval, and the point below SDPA that may be lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    corpora = list(dict.fromkeys(row.corpus for row in rows))
    figure, panels = pyplot.subplots(1, len(corpora), figsize=(max(6.0, 4.6 * len(corpora)), 3.6), squeeze=False)
    for panel, corpus in zip(panels[0], corpora, strict=True):
        mine = [row for row in rows if row.corpus == corpus]
        for place, row in enumerate(mine):
            points = [100 * value for value in row.f1]
            panel.plot([place] * len(points), points, "o", color="0.6", markersize=5, zorder=2)
            error = 100 * row.half_interval
            panel.errorbar(
                place + 0.15, 100 * row.mean, yerr=None if math.isnan(error) else error, fmt="D", color="C0",
                capsize=4, markersize=5, zorder=3,
            )  # fmt: skip
            if row.kind == BASELINE:
                panel.axhspan(100 * (row.mean - MARGIN), 100 * row.mean, color="C2", alpha=0.2, zorder=1)
        panel.set_xticks(range(len(mine)), [row.kind.replace(" ", "\n") for row in mine])
        panel.set_xlim(-0.5, len(mine) - 0.5)
        panel.set_title(f"{corpus} ({mine[0].documents} test documents)", fontsize=10)
        panel.set_ylabel("test macro-F1 (points)")
        panel.grid(axis="y", color="0.9")
    figure.suptitle("grey: seeds; blue: mean, 95 % over seeds; green: at most one point below SDPA", fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Trains every attention kind alike and compares test F1 with SDPA's.")
    parser.add_argument("--corpus", nargs="+", default=["imdb", "sci_review"], metavar="NAME", help="recipes to run")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="kinds of the recipe besides sdpa (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind at its rate (default 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="where run folders lie")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to every recipe")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the rows")
    parser.add_argument("--dry-run", action="store_true", help="say which runs there are, train none")
    parser.add_argument("--only-finished", action="store_true", help="train nothing: the table of what is finished")
    given = parser.parse_args(arguments)
    try:
        return _main(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _main(given: argparse.Namespace) -> int:
    if not 1 <= given.seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {given.seeds}: give 1 to {MOST_SEEDS}")
    if given.plot and given.plot.suffix != ".png":  # said before hours of training, not after
        raise UserError(f"--plot {given.plot}: give a name that ends in .png")
    corpora = [_selected(read_kinds(corpus, given.out, given.set), given.kinds) for corpus in given.corpus]
    if given.dry_run:
        for run in (run for kinds in corpora for kind in kinds for run in kind.runs(given.seeds)):
            print(f"{'finished' if finished(run) else 'to train'}  {run.name}")
        return 0
    rows = []
    for kinds in corpora:
        if not given.only_finished:
            for kind in kinds:
                for run in kind.runs(given.seeds):
                    train(run, _say)
        rows += rows_of(kinds, given.seeds, _say)
    if not rows:
        raise UserError(
            f"{given.out}: holds no kind of which every learning rate is finished; train without --only-finished"
        )
    print(table(rows))
    if given.json:
        write_whole(given.json, json.dumps({"machine": _machine(), "rows": [asdict(row) for row in rows]}, indent=1))
    if given.plot:
        draw(rows, given.plot)
    return 0


def _selected(kinds: Sequence[Kind], wanted: Iterable[str] | None) -> list[Kind]:
    if wanted is None:
        return list(kinds)
    labels = [kind.label for kind in kinds]
    for label in wanted:
        if label not in labels:
            raise UserError(f"--kinds {label}: {kinds[0].corpus} has {', '.join(labels)}{did_you_mean(label, labels)}")
    return [kind for kind in kinds if kind.label == BASELINE or kind.label in wanted]


def _machine() -> dict[str, Any]:
    from benchmarks.measure import environment

    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads())


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
