"""The corpora that are known by name and fetched from a Hugging Face hub when they do not lie in a folder here."""

from __future__ import annotations

import threading
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dstrain.data.files import ArrowTexts, Rows
from dstrain.data.labels import Value
from dstrain.schema import UserError

Say = Callable[[str], None]
_PATIENCE_S = 4.0  # to find out whether the hub answers at all; downloads themselves have no limit


class HubSource(NamedTuple):
    """Where a named corpus lives on the hub and what its splits are called there."""

    repository: str
    config: str | None
    splits: Mapping[str, str]
    """dstrain's split -> the hub's; splits that are missing are carved out of "train"."""
    labelled: bool
    replacements: tuple[tuple[str, str], ...] = ()
    """Left-overs of HTML and escaping in the texts, and what they stand for."""


HUB: dict[str, HubSource] = {
    "wikipedia": HubSource("wikimedia/wikipedia", "20231101.en", {"train": "train"}, labelled=False),
    "imdb": HubSource(
        "stanfordnlp/imdb",
        None,
        {"train": "train", "test": "test", "unlabeled": "unsupervised"},
        True,
        (("<br />", "\n"),),
    ),
    "ag_news": HubSource("fancyzhx/ag_news", None, {"train": "train", "test": "test"}, True, (("\\", " "),)),
    "hyperpartisan": HubSource(
        "SemEvalWorkshop/hyperpartisan_news_detection",
        "bypublisher",
        {"train": "training", "valid": "validation"},
        True,
    ),
    "arxiv": HubSource(
        "ccdv/arxiv-classification", "default", {"train": "train", "valid": "validation", "test": "test"}, True
    ),
    "yelp_polarity": HubSource(
        "fancyzhx/yelp_polarity", None, {"train": "train", "test": "test"}, True, (("\\n", "\n"),)
    ),
}


def read_hub(name: str, wanted: tuple[str, ...], labelled: bool, say: Say) -> dict[str, Rows]:
    """The wanted splits ("train", "valid", "test", "unlabeled") that the hub has of a corpus in `HUB`.

    What was downloaded before is used without a network. Raises UserError that names the folder layout which serves
    instead when the hub cannot be reached or has not got the corpus.
    """
    source = HUB[name]
    _go_offline_if_cut_off(say)
    splits = {split: hub for split, hub in source.splits.items() if split in wanted}
    say(f"corpus {name}: reading {source.repository} ({', '.join(splits.values())}) from the hub or its local cache")
    try:
        if name == "hyperpartisan":
            return {split: _read_hyperpartisan(source, hub) for split, hub in splits.items()}
        return {split: _read_split(source, hub, labelled and split != "unlabeled") for split, hub in splits.items()}
    except UserError:
        raise
    except Exception as error:
        # Dozens of classes from four libraries can come out of a failed download; none means anything to the reader.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"corpus {name}: {source.repository} could not be had from the hub ({reason[:200]}); {layout_advice(name)}"
        ) from None


def layout_advice(name: str) -> str:
    """The clause that says which folder serves in place of the hub."""
    return (
        f"without it, set DSTRAIN_DATA to a folder that holds {name}/train.parquet (and validation.parquet, "
        "test.parquet, "
        "unlabeled.parquet) with columns text and label, or set path to such a folder"
    )


def _go_offline_if_cut_off(say: Say) -> None:
    """Tells the hub's libraries that there is no network, because they would find out by minutes of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        return
    say("the hub does not answer; only what was downloaded before can be used")
    constants.HF_HUB_OFFLINE = True
    import datasets

    datasets.config.HF_HUB_OFFLINE = True


def _answers(endpoint: str) -> bool:
    """Whether any HTTP answer comes back within a few seconds (through a proxy, where one is set)."""
    import urllib.error
    import urllib.request

    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_PATIENCE_S):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass

    # In a thread of its own: a name server that is gone can block for longer than any time-out of the request.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    return answered.is_set()


def _read_split(source: HubSource, split: str, labelled: bool) -> Rows:
    import pyarrow as pa
    import pyarrow.compute as pc

    data = _load(source, split)
    column = data.data.column("text").cast(pa.large_string())
    for old, new in source.replacements:
        column = pc.replace_substring(column, pattern=old, replacement=new)
    if not (labelled and source.labelled):
        return Rows(ArrowTexts(column), None)
    labels: list[Value] = data.data.column("label").to_pylist()
    named = getattr(data.features["label"], "names", None) or []
    return Rows(ArrowTexts(column), labels, dict(enumerate(named)))


def _load(source: HubSource, split: str) -> Any:
    """One split as a `datasets.Dataset`, memory-mapped from the hub's local cache."""
    import datasets

    try:
        return datasets.load_dataset(source.repository, source.config, split=split)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        # A repository that still holds a loading script is served by the hub's own conversion to parquet.
        files = (
            f"hf://datasets/{source.repository}@refs%2Fconvert%2Fparquet/{source.config or 'default'}/{split}/*.parquet"
        )
        return datasets.load_dataset("parquet", data_files={split: files}, split=split)


def _read_hyperpartisan(source: HubSource, split: str) -> Rows:
    """One half of the by-publisher part, from the XML archives in the repository (it has never been converted)."""
    from huggingface_hub import hf_hub_download

    stem = f"{split}-{source.config}-20181122"
    archives = [
        hf_hub_download(source.repository, f"data/{kind}-{stem}.zip", repo_type="dataset")
        for kind in ("articles", "ground-truth")
    ]
    truth = {article.get("id", ""): article.get("hyperpartisan") == "true" for article in _articles(archives[1])}
    texts: list[str] = []
    labels: list[Value] = []
    for article in _articles(archives[0]):
        body = " ".join(" ".join(article.itertext()).split())
        texts.append(f"{article.get('title', '')}\n{body}".strip())
        labels.append(int(truth[article.get("id", "")]))
    return Rows(texts, labels, {0: "not_hyperpartisan", 1: "hyperpartisan"})


def _articles(archive: str) -> Iterator[ElementTree.Element]:
    """Every <article> of the one XML file in a zip archive, one at a time."""
    with zipfile.ZipFile(archive) as folder:
        (name,) = [name for name in folder.namelist() if name.endswith(".xml")]
        with folder.open(name) as stream:
            for _, element in ElementTree.iterparse(stream):
                if element.tag == "article":
                    yield element
                    element.clear()
