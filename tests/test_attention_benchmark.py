"""The attention benchmark on tiny inputs: rows, ratios, crossovers, and what it says to bad input. Nothing is timed here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.attention import Row, main
from benchmarks.candidates import AttentionStep, Candidate, Workload, read_candidate, with_peers
from benchmarks.measure import Sample, crossover, footprint, median_ratio, race, saved_storages
from benchmarks.peers import PEERS, check_peers
from dstrain.packed import Sequences
from dstrain.schema import UserError

CPU = torch.device("cpu")
TINY = Workload(length=24, documents=2, num_heads=2, head_dim=8, dtype="fp32", device="cpu")
ARGUMENTS = ["--lengths", "32", "16", "--heads", "2", "--head-dim", "8", "--threads", "1", "--repeats", "2"]


# ------------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_rows_picture_and_table_of_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["--kinds", "favor:nb_features=4", "lsh:num_hashes=1,chunk_size=8"]
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    assert main([*ARGUMENTS, *kinds, *files]) == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    rows = [Row(**row) for row in written["rows"]]
    names = ["sdpa", "favor:nb_features=4", "lsh:num_hashes=1,chunk_size=8"]
    assert [(row.length, row.name) for row in rows] == [(length, name) for length in (16, 32) for name in names]
    for row in rows:
        assert row.seconds > 0 and row.cpu_seconds > 0 and row.saved_bytes > 0 and row.kernel
        assert (row.dtype, row.device, row.threads, row.rounds, row.peer) == ("fp32", "cpu", 1, 2, False)
        if row.kind == "sdpa":
            ratios = (row.time_vs_sdpa, row.time_vs_sdpa_cpu, row.memory_vs_sdpa, row.saved_vs_sdpa)
            assert ratios == (1, 1, 1, 1)
    assert rows[1].settings["nb_features"] == 4 and rows[2].settings["chunk_size"] == 8
    assert set(written["crossover"]) == set(names[1:])
    facts = written["environment"]
    assert facts["torch"] == torch.__version__ and facts["threads"] == 1 and facts["commit"] and facts["date"]
    assert facts["allocator"]["MALLOC_MMAP_THRESHOLD_"]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(name in said for name in names) and "MALLOC_TRIM_THRESHOLD_" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kinds", "favour"], "--kinds favour: attention.kind: 'favour' is not a kind there is; did you mean favor?"),
        (["--kinds", "favor:features=3"], "--kinds favor:features=3: attention.features: no such setting"),
        (["--kinds", "lsh:num_hashes=0"], "--kinds lsh:num_hashes=0: attention.num_hashes: must be greater than"),
        (["--kinds", "lsh:num_hashes"], "--kinds lsh:num_hashes: 'num_hashes' is no setting=value"),
        (["--json", "no/such/folder/rows.json"], "there is no folder no/such/folder"),
        (["--plot", "rows.xyz"], "--plot rows.xyz: no picture is written as that"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, *arguments]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and len(said.err.splitlines()) == 1 and not said.out


@pytest.mark.parametrize("length", ["0", "-5", "many", "1.5"])
def test_a_length_is_a_whole_number_from_1(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--lengths", length])
    assert stopped.value.code == 2 and "is not a whole number from 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_device_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_accuracy_is_a_command_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    accuracy = types.ModuleType("benchmarks.accuracy")
    accuracy.main = lambda arguments: told.append(arguments) or 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.accuracy", accuracy)
    assert main(["--accuracy", "--json", "rows.json"]) == 7
    assert told == [["--json", "rows.json"]]


def test_help_is_complete_and_imports_no_torch() -> None:
    code = "import sys; from benchmarks.attention import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    options = "lengths kinds peers documents heads head-dim device dtype threads repeats budget json plot accuracy"
    assert all(f"--{option}" in done.stdout for option in options.split()) and "exit status" in done.stdout


# -------------------------------------------------------------------------------------------------- candidates


def test_a_kind_is_read_with_its_settings_and_named_the_same_way() -> None:
    for text in ("sdpa", "favor", "favor:nb_features=64", "lsh:num_hashes=4,chunk_size=32"):
        assert read_candidate(text).name == text
    assert read_candidate("lsh:num_hashes=2").name == "lsh"  # the default
    peers = [candidate.name for candidate in with_peers([read_candidate("sdpa"), read_candidate("lsh:num_hashes=4")])]
    assert peers[2:] == ["reformer-pytorch:num_hashes=4", "transformers:num_hashes=4"]


@pytest.mark.parametrize("kind", ["sdpa", "favor:nb_features=4", "lsh:chunk_size=8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_returns_a_gradient_for_each_part_of_the_packed_input(kind: str, dtype: str) -> None:
    candidate = read_candidate(kind)
    step = AttentionStep(candidate, dataclasses.replace(TINY, dtype=dtype))
    parts = 2 if candidate.settings.tied_qk else 3
    assert step.packed.shape == (48, parts * 16)
    first, second = step(), step()
    assert len(first) == parts and all(x.abs().sum() > 0 for x in first)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_attends_packed_documents(peer: type) -> None:
    pytest.importorskip(peer.module)
    kind = "favor:nb_features=16" if peer.name == "performer-pytorch" else "lsh:chunk_size=4,num_hashes=3"
    candidate = Candidate(read_candidate(kind).settings, peer)
    check_peers(candidate.settings, [24])
    step = AttentionStep(candidate, TINY)
    step()
    assert peer.name in step.kernel
    q, v = torch.randn(48, 2, 8), torch.randn(2, 2, 8).repeat_interleave(24, 0)  # one value per document and head
    out = step.module(q, q, v, Sequences.of([24, 24]))
    torch.testing.assert_close(out, v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("missing", [peer.module.split(".")[0] for peer in PEERS])
def test_a_missing_peer_says_how_to_install_it(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer.module, None if peer.module.startswith(missing) else sys)
    with pytest.raises(UserError, match=r"cannot be imported.*pip install -e '\.\[peers\]'"):
        check_peers(read_candidate("favor" if missing.startswith("perf") else "lsh").settings, [128])


def test_a_length_that_a_peer_cannot_take_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer.module, sys)
    with pytest.raises(UserError, match="--lengths 192: reformer-pytorch takes only multiples of 128 tokens"):
        check_peers(read_candidate("lsh").settings, [128, 192])


@pytest.mark.slow
def test_with_peers_our_rows_have_a_ratio_to_each(tmp_path: Path) -> None:
    if not all(importlib.util.find_spec(peer.module.split(".")[0]) for peer in PEERS[:2]):
        pytest.skip("the extra `peers` is not installed")
    file = tmp_path / "rows.json"
    assert main([*ARGUMENTS, "--kinds", "favor:nb_features=4", "--peers", "--json", str(file)]) == 0
    rows = [Row(**row) for row in json.loads(file.read_text())["rows"]]
    assert [row.peer for row in rows] == [False, False, True] * 2
    assert [set(row.time_vs_peer) for row in rows] == [set(), {"performer-pytorch"}, set()] * 2


# --------------------------------------------------------------------------------------------------- measuring


def test_crossover_is_interpolated_on_log_axes() -> None:
    assert crossover([256, 1024], [2.0, 0.5]) == pytest.approx(512)
    assert crossover([256, 512, 1024, 4096], [8.0, 3.0, 3.0, 1 / 3]) == pytest.approx(2048)
    assert crossover([256, 1024], [2.0, 1.0]) == pytest.approx(1024)
    assert crossover([256, 512, 1024, 4096], [0.9, 1.5, 2.0, 0.5]) == pytest.approx(2048)  # the last crossing counts
    assert crossover([256, 512], [0.9, 0.5]) == 256
    assert crossover([256, 512], [3.0, 1.01]) is None
    assert crossover([256, 512], [0.5, 1.01]) is None


def test_a_race_rotates_the_order_and_drops_the_round_that_warms_up() -> None:
    ran: list[int] = []
    rounds = race([lambda i=i: ran.append(i) for i in range(3)], 4, 1e9, CPU)
    assert ran == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert len(rounds) == 3 and all(len(samples) == 3 and isinstance(samples[0], Sample) for samples in rounds)
    ran.clear()
    assert len(race([lambda: ran.append(0)], 9, 0.0, CPU)) == 2 == len(ran)  # no budget: two rounds, both kept
    assert len(race([lambda: ran.append(0)], 1, 1e9, CPU)) == 1


def test_ratios_are_taken_within_rounds() -> None:
    assert median_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 1.0]) == 0.5
    assert median_ratio([5.0, 7.0], [5.0, 7.0]) == 1


def test_a_storage_that_is_saved_twice_counts_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    with saved_storages() as storages:
        y = x * x + x.T @ x  # x four times, each as another view
        z = y.exp()  # saves its output
    assert sum(storages.values()) == 2 * 400
    z.sum().backward()
    expected = torch.autograd.functional.jacobian(lambda x: (x * x + x.T @ x).exp().sum(), x.detach())
    torch.testing.assert_close(x.grad, expected)


def test_the_footprint_counts_inputs_and_what_the_step_allocates() -> None:
    def make(megabytes: int):
        held = torch.ones(megabytes << 18)
        return lambda: (held * 2).sum()

    small, large = (footprint(lambda: make(1), lambda size=size: make(size), CPU).peak_bytes for size in (40, 80))
    assert 60 << 20 < small < 100 << 20 < 140 << 20 < large < 180 << 20
