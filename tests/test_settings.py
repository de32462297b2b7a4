"""What a file says, what the machine and the command line change, and everything that can be wrong with it."""
# ruff: noqa: E501  (messages stand verbatim)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_run

from dstrain import settings as module
from dstrain.schema import Settings, UserError, dump_yaml, flatten, parse_yaml, set_path, validate
from dstrain.settings import (
    ROOT,
    ResourceSettings,
    RunSettings,
    SearchSettings,
    differences,
    load_run,
    load_search,
    plain,
    read_document,
    run_settings,
    shipped,
)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file of settings: tiny_run with changes, and other parts beside its base."""

    def write(parts: dict[str, Any] | None = None, **changes: Any) -> Path:
        file = tmp_path / "f.yaml"
        tree = {"base": tiny_run(Path("/corpus"), tmp_path / "runs", **changes), **(parts or {})}
        file.write_text(dump_yaml(tree), encoding="utf-8")
        return file

    return write


def refused(attempt: Callable[[], object], file: Path) -> list[str]:
    """The sentences of a refusal, without the file's path in front of them."""
    with pytest.raises(UserError) as error:
        attempt()
    return [line.removeprefix(f"{file}: ") for line in str(error.value).splitlines()]


# --------------------------------------------------------------------------------------------- impossible runs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder__num_head": 2}, "encoder.num_head: no such setting; did you mean num_heads?"),
        ({"stages__finetune__optim__warmpu": 1}, "stages.finetune.optim.warmpu: no such setting; did you mean warmup?"),
        ({"encoder__attention": {"kind": "lsh", "num_hash": 2}}, "encoder.attention.num_hash: no such setting; did you mean num_hashes?"),
        ({"stages__pretrain__objective__pooling": "mean"}, "stages.pretrain.objective.pooling: no such setting; there are kind, mask_rate, mask_share, random_share"),
        ({"encoder__attention": {"kind": "spda"}}, "encoder.attention.kind: 'spda' is not a kind there is; did you mean sdpa?"),
        ({"encoder__attention": "lsh"}, "encoder.attention: is 'lsh'; it takes a mapping that says its kind, such as {kind: lsh}"),
        ({"encoder__preset": "bert_smal"}, "encoder.preset: 'bert_smal' is not one of 'bert_tiny', 'bert_mini', 'bert_small', 'bert_base', 'autotinybert_1', 'autotinybert_2', 'autotinybert_3' or 'autotinybert_4'; did you mean bert_small?"),
        ({"encoder__num_heads": 3}, "encoder: qkv_size = 32 cannot be shared among num_heads = 3 heads; take num_heads from 1, 2, 4, 8, or qkv_size = 33"),
        ({"seed": -1}, "seed: must be greater than or equal to 0, but is -1"),
        ({"stages__finetune__optim__lr": 0}, "stages.finetune.optim.lr: must be greater than 0, but is 0"),
        ({"stages__finetune__optim__min_lr_ratio": 1.5}, "stages.finetune.optim.min_lr_ratio: must be less than or equal to 1, but is 1.5"),
        ({"stages__finetune__objective__classifier_dropout": 1.0}, "stages.finetune.objective.classifier_dropout: must be less than 1, but is 1.0"),
        ({"stages__pretrain__objective__mask_share": 0.95}, "stages.pretrain.objective: mask_share 0.95 and random_share 0.1 are more than 1 together; lower one"),
        ({"stages__finetune__max_length": 4096}, "stages.finetune: max_length 4096 is more than tokens_per_batch 512: one document would not fit in a micro-batch; lower the one or raise the other"),
        ({"stages__finetune__num_frozen_layers": 5}, "stages.finetune.num_frozen_layers: is 5, but the encoder has 2 layers; freeze fewer, or raise encoder.num_layers"),
        ({"stages__finetune__metric": "f1_marco"}, "stages.finetune.metric: classify has no 'f1_marco'; did you mean f1_macro?"),
        ({"stages__pretrain__metric": "f1_macro"}, "stages.pretrain.metric: mlm has no 'f1_macro'; there are accuracy, loss, perplexity"),
        ({"stages": {}}, "stages: is empty; name at least one stage"),
        ({"stages": [1]}, "stages: must be a mapping, but is [1]"),
        ({"stages__finetune": "imdb"}, "stages.finetune: is 'imdb'; it takes a mapping of settings"),
        ({"stages__finetun__epochs": 3}, "stages: finetun has neither objective nor corpus; did you mean finetune?"),
        ({"name": "a/b"}, "name: 'a/b' names a folder; use letters, digits and . _ - only"),
        ({"name": ".."}, "name: '..' names a folder; use letters, digits and . _ - only"),
        ({"name": ""}, "name: must have at least 1 character, but is ''"),
        ({"precision": "fp61"}, "precision: 'fp61' is not one of 'auto', 'fp32', 'bf16' or 'fp16'; did you mean fp16?"),
        ({"stages__finetune__corpus__name": "imdb"}, "stages.finetune.corpus: name (imdb) and path (/corpus) both say where the corpus is; give one of them"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused_in_one_sentence(write: Write, changes: dict[str, Any], said: str) -> None:
    file = write(**changes)
    assert refused(lambda: load_run(file), file) == [said]


def test_learned_positions_must_reach_every_stage(write: Write) -> None:
    file = write(encoder__positions={"kind": "learned", "max_length": 63}, stages__pretrain__max_length=63)
    assert refused(lambda: load_run(file), file) == [
        "encoder.positions.max_length: is 63, but documents have up to 64 tokens; raise it to 64, lower the documents' "
        "length, or use positions of kind rope (stages.finetune.max_length)"
    ]
    load_run(write(encoder__positions={"kind": "learned", "max_length": 64}))


def test_a_stage_name_must_fit_in_a_metric_key(write: Write) -> None:
    base = tiny_run(Path("/corpus"), Path("runs"))
    base["stages"]["fine-tune"] = base["stages"].pop("finetune")
    file = write({"base": base})
    said = "stages.fine-tune: a stage's name becomes part of metric keys; use letters, digits and _ only"
    assert refused(lambda: load_run(file), file) == [said]


def test_several_mistakes_are_one_message(write: Write) -> None:
    file = write(seed=-1, encoder__num_head=3, stages__finetune__optim__lr=-1, name="a/b")
    assert refused(lambda: load_run(file), file) == [
        "name: 'a/b' names a folder; use letters, digits and . _ - only",
        "seed: must be greater than or equal to 0, but is -1",
        "encoder.num_head: no such setting; did you mean num_heads?",
        "stages.finetune.optim.lr: must be greater than 0, but is -1",
    ]
    file = write(stages__finetune__num_frozen_layers=5, stages__finetune__metric="f", stages__pretrain__metric="f")
    assert [line.partition(":")[0] for line in refused(lambda: load_run(file), file)] == [
        "stages.pretrain.metric", "stages.finetune.num_frozen_layers", "stages.finetune.metric",
    ]  # fmt: skip


def _bounds() -> list[tuple[str, str, float]]:
    """(address, bound, a value just outside) of every bounded setting of a run and a search."""
    from dstrain.schema import explain

    found = []
    for row in [*explain(RunSettings), *explain(SearchSettings, "search.")]:
        parts = row.bounds.split()
        for sign, number in (
            zip(parts[::2], parts[1::2], strict=True) if parts and parts[0] in (">", ">=", "<", "<=") else ()
        ):
            limit = float(number) if "." in number or "e" in number else int(number)
            outside = {">": limit, "<": limit, ">=": limit - 1, "<=": limit + 1}[sign]
            found.append((row.address, f"{sign} {number}", outside))
    return found


def test_there_are_bounds_of_each_class() -> None:
    assert {bound.split()[0] for _, bound, _ in _bounds()} == {">", ">=", "<", "<="}


@pytest.mark.parametrize(("address", "bound", "outside"), _bounds(), ids=lambda value: str(value))
def test_every_bound_is_held_and_told(write: Write, address: str, bound: str, outside: float) -> None:
    tree: dict[str, Any] = {
        "base": tiny_run(Path("/corpus"), Path("runs")),
        "search": {"metric": "finetune/valid/loss"},
    }
    owner, _, leaf = address.removeprefix("search.").rpartition(".")
    words = owner.split(".") if owner else []
    place = []
    for word in words:
        if word == "<name>":
            word = "finetune"
        plain_word, _, kind = word.partition("<")
        place.append(plain_word)
        if kind:
            here = tree["search" if address.startswith("search.") else "base"]
            for step in place[:-1]:
                here = here.setdefault(step, {})
            if here.get(plain_word, {}).get("kind") != kind.rstrip(">"):
                here[plain_word] = {"kind": kind.rstrip(">")}
    inner = ".".join([*place, leaf])
    part = "search" if address.startswith("search.") else "base"
    set_path(tree[part], inner, outside)
    file = write(tree)
    shown = f"search.{inner}" if part == "search" else inner
    lines = refused(lambda: load_search(read_document(file)), file)
    assert len(lines) == 1
    assert lines[0].startswith(f"{shown}: must be ") and lines[0].endswith(f", but is {outside}")


# ---------------------------------------------------------------------------------------------- broken files

WAY_OUT = "a file of settings is `base: {name: ..., encoder: ..., stages: ...}`"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("foo: 1\n", [f"base: is missing; {WAY_OUT}"]),
        ("bsae: {}\n", [f"base: is missing; {WAY_OUT}", "bsae: no such part of a file; did you mean base?"]),
        ("space: {}\n", [f"base: is missing; {WAY_OUT}"]),
        ("base:\n", [f"base: is missing; {WAY_OUT}"]),
        ("base: [1]\n", ["base: is [1]; it takes a mapping"]),
        ("base: {a: 1}\nspace: [1]\nsearch: 3\n", ["space: is [1]; it takes a mapping", "search: is 3; it takes a mapping"]),
        ("base: {a: 1}\nsearc: {}\n", ["searc: no such part of a file; did you mean search?"]),
        ("base: {a: 1}\nzzz: {}\n", ["zzz: no such part of a file; there are base, search, space, when"]),
        ("base: {a: 1}\nwhen: {no_gpus: {a: 2}, gpu: [1]}\n", ["when.no_gpus: no such condition; did you mean no_gpu?", "when.gpu: is [1]; it maps dotted addresses to values"]),
        ("- base\n", ["holds a list; a file of settings is a mapping, such as `base: ...`"]),
        ("base: {name: x}\n", ["encoder: is missing and has no default; give it a value", "stages: is missing and has no default; give it a value"]),
    ],
)  # fmt: skip
def test_a_file_of_another_shape_is_refused(tmp_path: Path, text: str, said: list[str]) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text)
    assert refused(lambda: load_run(file), file) == said


# ------------------------------------------------------------------------------------- precedence and overrides


def test_default_file_when_command_line_is_the_order(write: Write) -> None:
    when = {"no_gpu": {"seed": 2, "stages.finetune.optim.lr": 1e-4}, "gpu": {"seed": 3}}
    file = write({"when": when}, seed=1)
    assert load_run(file, full_size=True).seed == 1
    assert load_run(file).seed == 2
    assert load_run(file, gpu=True).seed == 3
    assert load_run(file, ["seed=4"]).seed == 4
    assert load_run(file).stages["finetune"].optim.lr == 1e-4
    assert load_run(write()).seed == 0, "the default"
    assert read_document(write({"when": when}), ["seed=4"]).precedence == [
        "seed = 2 (when.no_gpu)", "stages.finetune.optim.lr = 0.0001 (when.no_gpu)", "seed = 4 (command line)",
    ]  # fmt: skip


def test_an_override_reaches_every_part_of_a_file(write: Write) -> None:
    file = write({"space": {"seed": [1, 2]}, "search": {"metric": "finetune/valid/loss"}})
    document = read_document(file, ["base.seed=5", "space.encoder.num_layers=[1, 2]", "search.mode=min", "name=other"])
    assert document.base["seed"] == 5 and document.base["name"] == "other"
    assert document.space == {"seed": [1, 2], "encoder.num_layers": [1, 2]}
    assert load_search(document).mode == "min"


def test_a_search_may_come_from_the_command_line_alone(write: Write) -> None:
    assert load_search(read_document(write(), ["search.metric=finetune/valid/loss"])).metric == "finetune/valid/loss"


def test_a_stage_is_left_out_by_null(write: Write) -> None:
    assert list(load_run(write(), ["stages.pretrain=null"]).stages) == ["finetune"]
    file = write()
    overrides = ["stages.pretrain=null", "stages.finetune="]
    assert refused(lambda: load_run(file, overrides), file) == ["stages: is empty; name at least one stage"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nme=x", "command line: nme: no such setting; did you mean name?"),
        ("base.nme=x", "command line: nme: no such setting; did you mean name?"),
        ("stages.finetune.optim.lrr=3", "command line: stages.finetune.optim.lrr: no such setting; did you mean lr?"),
        ("encoder.attention={kind: lsh, num_hash: 2}", "command line: encoder.attention.num_hash: no such setting; did you mean num_hashes?"),
        ("stages.finetune.num_frozen_layers=9", "command line: stages.finetune.num_frozen_layers: is 9, but the encoder has 2 layers; freeze fewer, or raise encoder.num_layers"),
        ("stages.finetun.optim.lr=3e-4", "command line: stages: finetun has neither objective nor corpus; did you mean finetune?"),
        ("name.x=1", "command line: name: is 'tiny', which has no settings inside; set name itself, or name another"),
        ("seed=[1", "seed: line 1, column 3 not readable as YAML: expected ',' or ']', but got '<stream end>'"),
        ("seed", "'seed': an override is written key=value, such as stages.finetune.optim.lr=3e-4"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused(write: Write, override: str, said: str) -> None:
    file = write()
    assert refused(lambda: load_run(file, [override]), file) == [said]


def test_wrong_overrides_of_file_and_command_line_come_together(write: Write) -> None:
    file = write({"when": {"no_gpu": {"name.x": 1, "encoder.num_hed": 2}}})
    assert refused(lambda: load_run(file, ["seed", "seed.y=1", "precision.z=1"]), file) == [
        "when.no_gpu: name: is 'tiny', which has no settings inside; set name itself, or name another",
        "'seed': an override is written key=value, such as stages.finetune.optim.lr=3e-4",
    ]
    file = write({"when": {"no_gpu": {"encoder.num_hed": 2}}})
    said = "encoder.num_hed: no such setting; did you mean num_heads?"
    assert refused(lambda: load_run(file), file) == [f"when.no_gpu: {said}"]
    assert refused(lambda: load_run(file, ["encoder.num_hed=3"]), file) == [f"command line: {said}"], "who spoke last"


def test_a_wrong_override_of_the_search_is_looked_for_where_it_stands(write: Write) -> None:
    file = write({"search": {"metric": "finetune/valid/loss", "trials": 0}})
    assert refused(lambda: load_search(read_document(file, ["search.max_failures=-1"])), file) == [
        "search.trials: must be greater than or equal to 1, but is 0",
        "command line: search.max_failures: must be greater than or equal to 0, but is -1",
    ]
    metric = ["search.trials=3", "search.metric=finetun/valid/loss"]
    assert refused(lambda: load_search(read_document(file, metric)), file) == [
        "command line: search.metric: there is no stage 'finetun'; did you mean finetune?"
    ]
    tpe = ["search.sampler=tpe", "search.trials=null"]
    assert refused(lambda: load_search(read_document(file, tpe)), file) == [
        "command line: search.sampler: tpe draws samples; say how many with trials"
    ]


# ------------------------------------------------------------------------------------------- kept settings


def test_settings_differ_by_address_and_a_younger_one_has_had_its_default(write: Write) -> None:
    settings = load_run(write())
    kept = parse_yaml(dump_yaml(plain(settings)), "kept")
    assert differences(kept, settings) == []
    del kept["stages"]["finetune"]["healing"], kept["precision"]
    assert differences(kept, settings) == [], "those are the defaults"
    other = load_run(write(seed=3), ["stages.finetune.optim.lr=0.5", "precision=bf16"])
    assert differences(kept, other) == [
        "seed: 0 -> 3", f"stages.finetune.optim.lr: {kept['stages']['finetune']['optim']['lr']} -> 0.5",
        'precision: "auto" -> "bf16"',
    ]  # fmt: skip
    assert differences({**kept, "removed": 1}, settings) != [] and differences(3, settings) != []


# ----------------------------------------------------------------------------------------------- searches


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (None, ["has no search; add `search: {metric: finetune/valid/f1_macro}`, or train it with train.py"]),
        ({}, ["search.metric: is missing and has no default; give it a value"]),
        ({"metric": "f1"}, ["search.metric: 'f1' is not stage/split/name, such as finetune/valid/f1_macro"]),
        ({"metric": "finetun/valid/loss"}, ["search.metric: there is no stage 'finetun'; did you mean finetune?"]),
        ({"metric": "finetune/test/loss"}, ["search.metric: 'test' cannot choose; a search is decided on the split valid"]),
        ({"metric": "finetune/valid/f1_marco"}, ["search.metric: finetune reports no 'f1_marco'; did you mean f1_macro?"]),
        ({"metric": "pretrain/valid/f1_macro"}, ["search.metric: pretrain reports no 'f1_macro'; there are accuracy, loss, perplexity"]),
        ({"metric": "x", "moed": "max", "trials": 0}, [
            "search.metric: 'x' is not stage/split/name, such as finetune/valid/f1_macro",
            "search.trials: must be greater than or equal to 1, but is 0",
            "search.moed: no such setting; did you mean mode?",
        ]),
        ({"metric": "a/valid/b", "scheduler": {"kind": "ash"}}, ["search.scheduler.kind: 'ash' is not a kind there is; did you mean asha?"]),
        ({"metric": "a/valid/b", "resources": {"gpus": "some", "cpus": -1}}, [
            "search.resources.cpus: -1 is neither a number of 0 or more nor auto",
            "search.resources.gpus: 'some' is neither a number of 0 or more nor auto",
        ]),
        ({"metric": "a/valid/b", "scheduler": {"kind": "asha", "grace": True}}, ["search.scheduler.grace: 'true' is neither a whole number of optimizer steps (1 or more) nor a share of the stage (a number with a point, above 0.0 and below 1.0)"]),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused(write: Write, search: Any, said: list[str]) -> None:
    file = write({} if search is None else {"search": search})
    assert refused(lambda: load_search(read_document(file)), file) == said


def test_resources_are_numbers_or_auto(write: Write) -> None:
    file = write({"search": {"metric": "finetune/valid/loss", "resources": {"cpus": 0.5}}})
    resources = load_search(read_document(file)).resources
    assert (resources.cpus, resources.gpus) == (0.5, "auto")
    assert parse_yaml(dump_yaml(plain(resources)), "f") == {"ranks": "auto", "cpus": 0.5, "gpus": "auto", "nodes": "any"}


@pytest.mark.parametrize(("said", "ranks"), [({}, 1), ({"gpus": 2}, 2), ({"ranks": 3, "gpus": 0}, 3), ({"gpus": 0.5}, 1)])
def test_a_trial_has_a_rank_per_gpu_unless_told(said: dict[str, Any], ranks: int) -> None:
    assert validate(ResourceSettings, said, "f.yaml").num_ranks == ranks


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"ranks": 2, "gpus": 4}, "ranks is 2 and gpus 4: a rank uses one GPU; leave ranks out, or give them alike"),
        ({"gpus": 1.5}, "gpus is 1.5; give whole GPUs, or a part of one such as 0.5"),
        ({"ranks": 0}, "0 is neither a whole number of 1 or more nor auto"),
        ({"nodes": "two"}, "'two' is not one of 'any' or 'one'"),
    ],
)
def test_resources_that_cannot_be_are_sentences(said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        validate(ResourceSettings, said, "f.yaml", prefix="search.resources.")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ({"sampler": "tpe"}, "sampler: tpe draws samples; say how many with trials"),
        ({"sampler": "tpe", "trials": 4, "seeds": [0, 1]}, "give the best more seeds with finalists"),
        ({"sampler": "tpe", "trials": 4, "scheduler": {"kind": "pbt"}}, "pbt needs all trials at its start"),
        ({"silence_minutes": 0}, "search.silence_minutes: must be greater than 0"),
        ({"scheduler": {"kind": "pbt"}, "finalists": {"top": 1}}, "none are left to run again; leave it out"),
    ],
)
def test_parts_of_a_search_that_do_not_go_together(write: Write, search: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_search(read_document(write({"search": {"metric": "finetune/valid/loss", **search}})))
    assert sentence in str(error.value)


# --------------------------------------------------------------------------------------------- paths, plain


def test_shipped_files_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = Path("ds_configs/zero2.json")
    assert shipped(plan) == ROOT / plan
    plan.parent.mkdir()
    plan.touch()
    assert shipped(plan) == plan, "one's own file comes first"
    assert shipped(Path("none.yaml")) == Path("none.yaml")
    assert shipped(tmp_path / "none.json") == tmp_path / "none.json"
    assert load_run(Path("search_spaces/smoke.yaml")).deepspeed_path == ROOT / "ds_configs/zero1.json"


def test_the_run_folder(write: Write, tmp_path: Path) -> None:
    assert load_run(write()).folder == tmp_path / "runs" / "tiny"


def test_settings_written_and_read_again_are_the_same(write: Write, tmp_path: Path) -> None:
    made = load_run(write(stages__finetune__optim__lr=1e-05, encoder__attention={"kind": "lsh"}, name="1e3"))
    again = tmp_path / "settings.yaml"
    again.write_text(dump_yaml({"base": plain(made)}))
    assert load_run(again) == made
    assert flatten(plain(made))["stages.finetune.optim.lr"] == 1e-05


def test_no_setting_of_a_run_takes_a_truth_for_a_number(write: Write) -> None:
    assert issubclass(RunSettings, Settings)
    file = write(encoder__num_layers=True)
    assert refused(lambda: load_run(file), file) == ["encoder.num_layers: must be a whole number, but is 'true'"]


def test_the_module_root_is_the_checkout() -> None:
    assert (module.ROOT / "search_spaces").is_dir()
    assert run_settings(read_document(Path("search_spaces/smoke.yaml"))).name == "smoke"
    assert validate(SearchSettings, {"metric": "a/valid/b"}, "f").mode == "max"
