"""An export is the run's model, whole or not at all, from any ZeRO stage, and nothing in it or read for it is code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Told, tiny_run, train_here
from distributed.test_ranks import run_ranks, write_run
from safetensors.torch import load_file, save_file

from benchmarks.forker import Forker
from dstrain import __version__, export
from dstrain.card import Judged, bare, bootstrap, wilson
from dstrain.checkpoints import checksum
from dstrain.consolidate import consolidate, find
from dstrain.data.cache import Corpus, cache_home, open_corpus
from dstrain.data.corpora import CorpusSettings
from dstrain.data.vocabulary import Vocabulary
from dstrain.engine import Ranks, join_ranks
from dstrain.export import judge_documents, load_model, main
from dstrain.metrics import scores
from dstrain.model.encoder import Encoder
from dstrain.objective import Task
from dstrain.schema import UserError

FIRST_IS_BEST = {"stages__pretrain": None, "stages__finetune__min_delta": 10.0}
"""No later evaluation wins, and the last one leaves no checkpoint: best weights and checkpoint are of one step."""
KINDS: dict[str, dict[str, Any]] = {
    "sdpa": {"kind": "sdpa"},
    "favor": {"kind": "favor", "nb_features": 32, "redraw_interval": 3},
    "lsh": {"kind": "lsh", "chunk_size": 8},
}


def silent(sentence: str) -> None:
    """Says nothing."""


def vocabulary_of(run: Path) -> Vocabulary:
    return Vocabulary.load(run / "vocabulary")


def corpus_of(told: Told, stage: str = "finetune") -> Corpus:
    settings = told.settings.stages[stage]
    return open_corpus(settings.corpus, vocabulary_of(told.settings.folder), settings.max_length, cache_home(), silent)


def run_task(told: Told, stage: str = "finetune") -> Task:
    """The task that the run judged the test split with, made as `run` makes it."""
    settings, vocabulary = told.settings, vocabulary_of(told.settings.folder)
    objective = settings.stages[stage].objective.build(
        corpus_of(told, stage), vocabulary, settings.encoder, settings.seed
    )
    task = Task(Encoder(settings.encoder, vocabulary.size, settings.seed), objective)
    task.load_state_dict(load_file(settings.folder / "stages" / stage / "best.safetensors"))
    return task.eval()


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence that the door says, with status 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    return said.err.rstrip()


@pytest.fixture(scope="module")
def trained(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """A finished run of two stages; tests copy what they change."""
    before = dict(os.environ)
    torch.set_num_threads(1)
    yield train_here(tiny_run(small_corpus, tmp_path_factory.mktemp("runs")), join_ranks())
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(trained: Told, tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(trained.settings.folder, tmp_path / "run"))


@pytest.fixture
def exported(trained: Told, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """An export that a test may spoil."""
    assert main([str(trained.settings.folder), str(tmp_path / "model")]) == 0
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------- the same model


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_answers_like_the_runs_own_model_to_the_last_bit(
    kind: str, small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    changes: dict[str, Any] = {"encoder__attention": KINDS[kind], "stages__pretrain": None, "seed": 3}
    told = train_here(tiny_run(small_corpus, tmp_path, **changes), ranks)
    assert main([str(told.settings.folder), str(tmp_path / "model")]) == 0
    model, own, corpus = load_model(tmp_path / "model"), run_task(told), corpus_of(told)
    test = corpus.splits["test"]
    for row in range(len(test)):
        ids = test.gather(np.array([row]))
        mine = model.logits([ids])
        with torch.no_grad():
            _, theirs = own(told_batch(ids))
        assert torch.equal(mine, theirs)
    judged = judge_documents(model.task, find(told.settings.folder, None, "best"), model.vocabulary)
    assert told.outcome is not None
    for name, figure in judged.figures().items():
        assert figure == told.outcome.test[name]
    assert model.config.label_names == ("net", "text")


def told_batch(ids: np.ndarray) -> Any:
    from dstrain.packed import Batch, Sequences

    return Batch(torch.from_numpy(ids), Sequences.of([len(ids)]), torch.tensor([0]), 1)


def test_text_becomes_the_tokens_that_the_run_read(trained: Told, exported: Path, small_corpus: Path) -> None:
    from dstrain.data.files import TableSettings, read_table

    model, test = load_model(exported), corpus_of(trained).splits["test"]
    texts = read_table(small_corpus / "test.csv", TableSettings()).texts
    assert len(texts) == test.num_documents
    for row, text in enumerate(texts):
        (mine,) = model.cut(model.ids(text))
        assert np.array_equal(mine, test.gather(np.array([row])))


def test_windows_are_cut_as_the_corpus_cuts_them(trained: Told, exported: Path, small_corpus: Path) -> None:
    from dstrain.data.files import TableSettings, read_table

    given = CorpusSettings(path=small_corpus, long_documents="window", window_overlap=5)
    test = open_corpus(given, vocabulary_of(trained.settings.folder), 24, cache_home(), silent).splits["test"]
    whole = load_model(exported)
    config = whole.config.model_copy(update={"max_length": 24, "long_documents": "window", "window_overlap": 5})
    model = export.Model(config, whole.vocabulary, whole.task, whole.device)
    texts = read_table(small_corpus / "test.csv", TableSettings()).texts
    mine = [part for text in texts for part in model.cut(model.ids(text))]
    assert len(mine) == len(test) > len(texts)
    assert all(np.array_equal(part, test.gather(np.array([row]))) for row, part in enumerate(mine))


def test_masked_words_get_the_logits_that_the_head_is_trained_with(trained: Told, tmp_path: Path) -> None:
    assert main([str(trained.settings.folder), str(tmp_path / "model"), "--stage", "pretrain"]) == 0
    model = load_model(tmp_path / "model")
    ids = model.ids("the [MASK] of a [MASK] value")
    places = np.flatnonzero(ids == model.vocabulary.mask)
    assert len(places) == 2 and model.fills_masks
    logits = model.logits([ids])
    targets = torch.tensor([7, 11])
    batch = told_batch(ids)._replace(labels=torch.stack([torch.from_numpy(places), targets]), weight=2)
    with torch.no_grad():
        loss, _ = run_task(trained, "pretrain")(batch)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item())


# ------------------------------------------------------------------------------------- the last checkpoint, any ZeRO


def check_last_is_best(run: Path, target: Path) -> None:
    """The consolidated checkpoint and the weights that `keep` wrote at the same step are the same bits."""
    assert main([str(run), str(target / "best")]) == 0
    assert main([str(run), str(target / "last"), "--weights", "last"]) == 0
    best, last = (load_file(target / name / "model.safetensors") for name in ("best", "last"))
    assert best.keys() == last.keys()
    assert all(best[name].dtype == last[name].dtype and torch.equal(best[name], last[name]) for name in best)
    one, other = (load_model(target / name).config for name in ("best", "last"))
    assert (one.step, other.step, one.weights, other.weights) == (4, 4, "best", "last")


@pytest.mark.parametrize(
    ("zero", "precision"),
    [("zero0", "fp32"), ("zero0", "bf16"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "fp32")],
)
def test_the_last_checkpoint_of_one_rank(
    zero: str, precision: str, small_corpus: Path, tmp_path: Path, ranks: Ranks
) -> None:
    changes: dict[str, Any] = {"deepspeed": f"ds_configs/{zero}.json", "precision": precision, **FIRST_IS_BEST}
    changes |= {"encoder__attention": KINDS["favor"], "stages__finetune__num_frozen_layers": 1}
    told = train_here(tiny_run(small_corpus, tmp_path, **changes), ranks)
    check_last_is_best(told.settings.folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "precision", "kind"),
    [
        ("zero1", "bf16", "sdpa"),
        ("zero2", "fp32", "lsh"),
        ("zero2_offload", "fp32", "favor"),
        ("zero3", "fp32", "favor"),
        ("zero3", "bf16", "lsh"),
        ("zero3_offload", "fp32", "sdpa"),
    ],
)
def test_the_last_checkpoint_of_two_ranks(
    zero: str, precision: str, kind: str, small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    forker: Forker,
) -> None:  # fmt: skip
    """17 wide: no parameter's size is even, so every share is padded."""
    changes: dict[str, Any] = {"deepspeed": f"ds_configs/{zero}.json", "precision": precision, **FIRST_IS_BEST}
    changes |= {"encoder__attention": KINDS[kind], "encoder__hidden_size": 17, "encoder__intermediate_size": 33}
    done = run_ranks(forker, 2, write_run(small_corpus, tmp_path, "two", **changes), "--quiet")
    assert done.returncode == 0, done.stderr
    check_last_is_best(tmp_path / "two", tmp_path)
    for file in (tmp_path / "two").glob("stages/finetune/checkpoints/step-*/engine/*zero_pp_rank_1_*optim_states.pt"):
        file.unlink()
    said = refused(capsys, tmp_path / "two", tmp_path / "three", "--weights", "last")
    assert "optim_states.pt is missing" in said and said.endswith("or export best")


class Evil:
    """What somebody could put into a checkpoint that they send."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_that_holds_code_is_not_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = run.glob("stages/finetune/checkpoints/step-*/engine/*model_states.pt")
    torch.save({"module": {}, "surprise": Evil(tmp_path / "ran")}, file)
    manifest = json.loads((file.parents[1] / "manifest.json").read_text())
    manifest["files"][f"engine/{file.name}"] = {"bytes": file.stat().st_size, "crc32": checksum(file)}
    (file.parents[1] / "manifest.json").write_text(json.dumps(manifest))
    said = refused(capsys, run, tmp_path / "model", "--weights", "last")
    assert said.startswith(f"{file}: cannot be read as a checkpoint (it names posix.mkdir, which was not run)")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize("how", ["cut", "emptied", "foreign", "gone"])
def test_a_damaged_checkpoint_is_one_sentence(
    how: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = run.glob("stages/finetune/checkpoints/step-*/engine")
    (file,) = folder.glob("*model_states.pt")
    if how == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    elif how == "emptied":
        file.write_bytes(b"")
    elif how == "foreign":
        torch.save({"weights": torch.zeros(3)}, file)
    else:
        file.unlink()
    said = refused(capsys, run, tmp_path / "model", "--weights", "last")
    assert "export best" in said and str(folder.parent.parent) in said and file.name in said


def test_a_share_of_another_model_is_told(run: Path) -> None:
    (folder,) = run.glob("stages/finetune/checkpoints/step-*/engine")
    (file,) = folder.glob("*optim_states.pt")
    share = {"single_partition_of_fp32_groups": [torch.zeros(5)] * 2, "param_slice_mappings": [{}, {}]}
    torch.save({"optimizer_state_dict": share}, file)
    with pytest.raises(UserError, match="is no checkpoint of a dstrain run"):
        consolidate(folder, [])


# ------------------------------------------------------------------------------------------------- what is refused


def test_what_is_no_run_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "no"):
        assert f"{folder}: is no run folder (it has no settings.yaml)" in refused(capsys, folder, tmp_path / "model")
    (tmp_path / "search.yaml").touch()
    assert refused(capsys, tmp_path, tmp_path / "model").endswith(f"one of its trials, {tmp_path}/trials/ID")


def test_an_unfinished_run_offers_what_there_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "outcome.json").unlink()
    (run / "stages/finetune/done.json").unlink()
    assert main([str(run), str(tmp_path / "model")]) == 0, "the best weights so far"
    assert "**The stage had not finished" in (tmp_path / "model/README.md").read_text()
    (run / "stages/finetune/best.safetensors").unlink()
    assert refused(capsys, run, tmp_path / "two") == (
        f"{run}: its stage finetune holds no best weights; export what there is with --stage pretrain or "
        "--stage pretrain --weights last or --stage finetune --weights last"
    )
    assert main([str(run), str(tmp_path / "two"), "--weights", "last"]) == 0
    shutil.rmtree(run / "stages")
    assert refused(capsys, run, tmp_path / "three", "--weights", "last").endswith("no checkpoint; train it first")
    assert "did you mean finetune" in refused(capsys, run, tmp_path / "three", "--stage", "finetun")


def test_the_best_step_is_the_one_that_the_run_kept(run: Path, trained: Told) -> None:
    for stage in ("pretrain", "finetune"):
        source = find(run, stage, "best")
        _, progress = source.weights(run_task(trained, stage))
        assert progress.step == source.done[stage].best_step > 0


def test_a_target_that_holds_something_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "deep/empty"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    empty.mkdir(parents=True)
    for target in (full, file):
        assert "is there already and not an empty folder" in refused(capsys, run, target)
    assert "cannot be written (Not a directory)" in refused(capsys, run, file / "model")
    assert main([str(run), str(empty)]) == 0
    assert {path.name for path in empty.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
    }
    assert (full / "mine").read_text() == file.read_text() == "mine"


def test_nothing_stays_of_an_export_that_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    full = OSError(28, "No space left on device")

    def card(evidence: object) -> str:
        raise full

    monkeypatch.setattr(export, "card", card)
    said = refused(capsys, run, tmp_path / "model")
    assert said == f"{tmp_path}/model: cannot be written (No space left on device); give another folder"
    monkeypatch.setattr(export, "largest_difference", lambda one, other: float("nan"))
    assert "its logits differ by nan" in refused(capsys, run, tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_damaged_runs_are_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, weights = tmp_path / "model", run / "stages/finetune/best.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert f"{weights}: cannot be read as weights" in refused(capsys, run, target)
    weights.write_bytes((run / "stages/pretrain/best.safetensors").read_bytes())
    assert "does not fit the model that its settings describe (Missing key(s)" in refused(capsys, run, target)
    weights.write_bytes(whole)
    (run / "stages/pretrain/done.json").write_text('{"a": 1}')
    assert "done.json: is damaged" in refused(capsys, run, target)
    (run / "stages/pretrain/done.json").unlink()
    texts = run / "data.json"
    whole_texts = texts.read_text()
    for spoilt, due in (("[", "is damaged"), (whole_texts.replace('"title"', '"titel"', 1), "pretrain.titel: no such")):
        texts.write_text(spoilt)
        assert main([str(run), str(target)]) == 2
        assert f"{texts}: {due}" in capsys.readouterr().err
    texts.unlink()
    (run / "vocabulary/tokenizer.json").unlink()
    assert "vocabulary/tokenizer.json: there is no such file" in refused(capsys, run, target)
    assert not target.exists()


def test_a_run_is_exported_without_its_text_only_if_it_wrote_down_what_that_was(
    small_corpus: Path, tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shutil.copytree(small_corpus, tmp_path / "text")
    told = train_here(tiny_run(text, tmp_path), ranks)
    run = told.settings.folder
    for name in ("told", "asked"):
        assert main([str(run), str(tmp_path / name)]) == 0
        (run / "data.json").unlink(missing_ok=True)  # as of an older run
    cards = [(tmp_path / name / "README.md").read_text() for name in ("told", "asked")]
    assert cards[0] == cards[1]
    shutil.rmtree(text)
    assert "there is no such" in refused(capsys, run, tmp_path / "model")
    assert main([str(run), str(tmp_path / "model"), "--stage", "pretrain"]) == 0
    assert "its text was not at hand" in (tmp_path / "model/README.md").read_text()


# ------------------------------------------------------------------------------------------------ loading what is sent


def spoil(folder: Path, change: str) -> str:
    """Damages an export in one way; the sentence that is due."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    tree = json.loads(config.read_text())
    if change == "byte":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
        return "model.safetensors: is damaged (its checksum is not the one in config.json)"
    if change == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        return "has no tokenizer.json"
    if change == "torn config":
        config.write_text(config.read_text()[:100])
        return "config.json: is not JSON"
    if change == "no config":
        config.unlink()
        return "config.json: cannot be read (No such file or directory); give a folder that"
    if change == "other tool":
        config.write_text('{"model_type": "bert"}')
        return "config.json: is not of dstrain"
    if change == "weights of another":
        save_file({"encoder.word_embedding.weight": torch.zeros(2, 2)}, weights)
        tree["sha256"]["model.safetensors"] = export._checksum(weights)
        due = "does not fit the model that its settings describe (Missing key(s) in state_dict"
    elif change == "no safetensors":
        weights.write_bytes(b"x" * 100)
        tree["sha256"]["model.safetensors"] = export._checksum(weights)
        due = "model.safetensors: cannot be read as weights"
    elif change == "newer":
        tree |= {"format": 2, "dstrain": "9.1"}
        due = f"is in format 2, written by dstrain 9.1; this is dstrain {__version__}, which reads format 1"
    elif change == "unchecked":
        del tree["sha256"]["model.safetensors"]
        due = "model.safetensors: is damaged (its checksum is not"
    elif change == "overlap":
        tree |= {"long_documents": "window", "window_overlap": 62}
        due = "window_overlap 62 leaves a window of 62 nothing new"
    elif change == "no labels":
        tree["label_names"] = []
        due = "classify does not go with 0 label_names"
    elif change == "places":
        tree["encoder"]["positions"] = {"kind": "learned", "max_length": 8}
        due = "encoder.positions.max_length: is 8, but documents have up to 64 tokens"
    elif change == "giant":
        tree["encoder"]["hidden_size"] = 2**40
        due = "no such model can be built"
    elif change == "unknown key":
        tree["encoder"]["num_layer"] = 2
        due = "encoder.num_layer: no such setting; did you mean num_layers?"
    else:
        tree["max_length"] = "long"
        due = "max_length: must be a whole number, but is 'long'"
    config.write_text(json.dumps(tree))
    return due


@pytest.mark.parametrize(
    "change",
    [
        "byte", "no tokenizer", "torn config", "no config", "other tool", "weights of another", "no safetensors", "newer",
        "unchecked", "overlap", "no labels", "places", "giant", "unknown key", "wrong value",
    ],
)  # fmt: skip
def test_a_spoiled_export_is_refused_in_one_sentence(change: str, exported: Path) -> None:
    due = spoil(exported, change)
    with pytest.raises(UserError) as caught:
        load_model(exported)
    assert due in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_is_no_export_and_says_how_to_make_one(run: Path) -> None:
    with pytest.raises(UserError, match=r"is the folder of a run; make a model of it: python -m dstrain\.export"):
        load_model(run)


# -------------------------------------------------------------------------------------------------------- the card


def test_the_card_tells_what_the_run_knows_and_nobodys_secrets(
    trained: Told, exported: Path, small_corpus: Path, tmp_path: Path
) -> None:
    text = (exported / "README.md").read_text()
    assert trained.outcome is not None
    for due in (
        "Tells 2 classes apart: net, text.", "| test | accuracy | ", "seed 0", "Always saying the most frequent class",
        "| pretrain | mlm |", "| finetune | classify |", "valid 30 documents", "torch ", "fingerprint `",
        "30 test documents", "differ by at most 0 ",
    ):  # fmt: skip
        assert due in text, due
    assert f"{trained.outcome.test['f1_macro']:.3f}" in text
    assert str(tmp_path) not in text and str(small_corpus.parent) not in text and "output_dir" not in text
    for split in ("train", "validation", "test"):
        for line in (small_corpus / f"{split}.csv").read_text().splitlines():
            assert len(line) < 40 or line[:40] not in text


def test_a_run_writes_down_what_its_text_was(trained: Told) -> None:
    told = json.loads((trained.settings.folder / "data.json").read_text())
    assert list(told) == ["pretrain", "finetune"]
    corpus, record = corpus_of(trained), told["finetune"]
    assert record["fingerprint"] == corpus.fingerprint and record["label_names"] == ["net", "text"]
    assert record["notes"] == corpus.notes and told["pretrain"]["label_names"] == []
    for name, split in corpus.splits.items():
        assert split.labels is not None
        count = split.num_documents
        assert record["splits"][name] == {
            "documents": count, "tokens": split.lengths.sum(), "classes": [count // 2, count // 2]
        }  # fmt: skip


def test_intervals_judge_the_test_documents_again(
    trained: Told, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained.settings.folder
    assert main([str(run), str(tmp_path / "model"), "--intervals"]) == 0
    text = (tmp_path / "model/README.md").read_text()
    assert trained.outcome is not None
    assert f"Read again with this export: accuracy {trained.outcome.test['accuracy']:.3f}" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| test | ")]
    assert [row[3].count(" to ") for row in rows] == [0, 1, 1, 1, 1, 1], "all but the loss"
    assert "--intervals: pretrain does not classify" in refused(
        capsys, run, tmp_path / "m", "--stage", "pretrain", "--intervals"
    )


def test_notes_lose_what_they_quote() -> None:
    assert bare("train: train.csv: left out 2 of 9 rows: line 3: label 'a text' is negative") == (
        "train: train.csv: left out 2 of 9 rows"
    )
    assert bare("no column 'label' among 'Some sentence', so there are no labels") == "no column ..."
    assert bare('train: class "it\'s" has 3 documents') == "train: class ... has 3 documents"


def test_wilsons_interval() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    assert wilson(1.0, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(0.0, 10)[0] == 0.0


def test_bootstrap_intervals_hold_the_value_and_repeat() -> None:
    random = np.random.default_rng(1)
    truth = random.integers(0, 3, 200)
    guess = np.where(random.random(200) < 0.7, truth, random.integers(0, 3, 200))
    judged = Judged(truth, guess, 3)
    found = bootstrap(judged, 300)
    assert found == bootstrap(judged, 300)
    value = scores(truth, guess, 3)
    assert found.keys() == value.keys()
    for name, (low, high) in found.items():
        assert low < value[name] < high and 0.08 < high - low < 0.2
    low, high = wilson(value["accuracy"], 200)
    assert found["accuracy"] == pytest.approx((low, high), abs=0.02)
