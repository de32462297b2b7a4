"""The accuracy benchmark on tiny inputs: rows that can be known otherwise, its files, and what it says to bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy
from benchmarks.accuracy import Case, Row, build, cases, main, make_tokens, measure
from benchmarks.attention import main as attention
from dstrain.packed import Sequences

TINY = ["--length", "40", "--heads", "2", "--head-dim", "8", "--seeds", "1"]
L, H, D = 40, 2, 8


def case(tokens="structureless", std=1.0, estimator=None, **softmax):
    return Case("study", "line", "1", tokens, std, softmax, estimator or {})


def relative(x, truth):
    return float((x - truth).norm() / truth.norm())


@pytest.mark.slow
def test_table_rows_and_picture_of_a_tiny_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "FEATURES", (8, 16))
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    assert attention(["--accuracy", *TINY, *files]) == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    rows, asked = [Row(**row) for row in written["rows"]], list(cases())
    assert [(row.study, row.line, row.x) for row in rows] == [(each.study, each.line, each.x) for each in asked]
    assert len({(row.study, row.line, row.x) for row in rows}) == len(rows), "no two rows share a place"
    for row in rows:
        assert row.settings.items() >= build(asked[rows.index(row)], (L, H, D), 0).settings.model_dump(
            include=set(row.settings)
        ).items()
        assert row.error >= 0 and row.uniform_error > 0 and 0 < row.captured_share <= 1 + 1e-6
        assert row.settings["kind"] == "lsh" or row.captured_share == pytest.approx(1)
    assert written["environment"]["commit"] and written["environment"]["torch"] == torch.__version__
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "nb_features" in said and "center_queries" in said and "num_hashes" in said and "1 seed\n" in said


def test_a_row_is_the_error_against_the_softmax_of_the_settings() -> None:
    asked = [
        case(std=0.5, kind="favor", normalize_qk=False, estimator={"nb_features": 16}),
        case(kind="favor", normalize_qk=True, temperature=3.0, estimator={"nb_features": 16}),
        case(tokens="clustered", kind="lsh", estimator={"chunk_size": 8, "num_hashes": 1}),
    ]
    rows = measure(asked, L, H, D, seeds=1)
    for each, row in zip(asked, rows, strict=True):
        q, k, v = make_tokens(each.tokens, each.std, (L, H, D), 0)
        if each.softmax["kind"] == "lsh":
            logits = torch.einsum("lhd,mhd->hlm", q, q / q.norm(dim=-1, keepdim=True))
            logits.diagonal(dim1=1, dim2=2).fill_(-math.inf)
        elif each.softmax["normalize_qk"]:
            logits = 3 * torch.cosine_similarity(q.transpose(0, 1)[:, :, None], k.transpose(0, 1)[:, None], dim=-1)
        else:
            logits = torch.einsum("lhd,mhd->hlm", q, k) / D**0.5
        exact = torch.einsum("hlm,mhd->lhd", logits.softmax(-1), v)
        with torch.no_grad():
            out = build(each, (L, H, D), 0)(q, q if each.softmax["kind"] == "lsh" else k, v, Sequences.of([L]))
        assert row.error == pytest.approx(relative(out, exact), rel=1e-3)
        assert row.uniform_error == pytest.approx(relative(v.mean(0, keepdim=True).expand_as(v), exact), rel=1e-3)
        shown = logits[logits.isfinite()].view(H, L, -1)
        assert row.logit_std == pytest.approx(float(shown.var(-1, correction=0).mean().sqrt()), rel=1e-3)


def test_seeds_draw_tokens_and_projections_anew_and_are_averaged() -> None:
    asked = [case(kind="favor", normalize_qk=True, temperature=1.0, estimator={"nb_features": 8})]
    one, two = (measure(asked, L, H, D, seeds)[0] for seeds in (1, 2))
    assert one.error_std == 0 and two.error_std > 0 and two.seeds == 2
    assert two.error == pytest.approx(one.error, abs=2.1 * two.error_std) and two.error != one.error
    assert measure(asked, L, H, D, 2) == [two]


def test_what_is_fitted_is_fitted_to_another_document() -> None:
    shape = (200, H, D)
    fitted = case(tokens="clustered", kind="favor", temperature=2.0, estimator={"projections": "fitted"})
    spread = build(fitted, shape, 0).spread_HDD
    for document in (0, 1):
        other = build(fitted, shape, 0)
        q, k, _ = make_tokens("clustered", 1.0, shape, 0, document)
        other.adapt(q, k, Sequences.of([200]))
        assert torch.equal(other.spread_HDD, spread) == (document == 1)
        assert torch.allclose(other.spread_HDD, spread, atol=0.2), "of the same head"


def test_tokens_are_what_they_are_called() -> None:
    shape = (640, 3, 16)
    drawn = {tokens: make_tokens(tokens, 0.5, shape, 0) for tokens in ("structureless", "clustered", "biased")}
    for tokens, (q, k, _) in drawn.items():
        assert abs(float(torch.cat([q, k]).std()) - 0.5) < (0.05 if tokens == "structureless" else 0.2)
    for x in drawn["structureless"]:
        assert x.mean(0).abs().max() < 0.2
    q, k, _ = drawn["biased"]
    assert q.mean(0).norm(dim=-1).min() > 0.5 and relative(q.mean(0), k.mean(0)) > 0.5, "each a mean of its own"
    q, k, v = (x / x.norm(dim=-1, keepdim=True) for x in drawn["clustered"])
    near = torch.einsum("lhd,mhd->hlm", q, k) > 0.5
    assert 0.05 < float(near.float().mean()) < 0.3, "ten clusters"
    alike = torch.einsum("lhd,mhd->hlm", v, v)
    assert float(alike[near].mean()) > 0.5 > 0.2 > abs(float(alike[~near].mean())), "values share the clusters"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--json", "nowhere/rows.json"], "nowhere/rows.json: there is no folder nowhere; make it first"),
        (["--plot", "rows.pdf"], "--plot rows.pdf: the picture is a PNG; end the name with .png"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == sentence + "\n"


@pytest.mark.parametrize("word", ["0", "-1", "many"])
def test_counts_are_whole_numbers_from_1(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--length", word])
    assert ended.value.code == 2 and "is not a whole number from 1" in capsys.readouterr().err
