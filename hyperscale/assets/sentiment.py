"""Texts of four kinds from the source distribution of vaderSentiment, each rated by about twenty people.

Source: Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014. Each line of its ground-truth files is `id<TAB>mean rating in [-4, 4]<TAB>text`; product and newspaper
ids are `document_sentence`.
"""

import html
import re
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from hyperscale.assets.packages import PinnedPackage, fetch

PACKAGE = PinnedPackage(
    name="vaderSentiment",
    version="3.3.2",
    kind="sdist",
    filename="vaderSentiment-3.3.2.tar.gz",
    num_bytes=2_466_783,
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    licence="MIT",
)

_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"

_FILES = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
}

SUBSETS = tuple(_FILES)

_CLEAR = 0.5
"""A text whose mean rating is closer to zero than this is neither positive nor negative, and is dropped."""


@dataclass(frozen=True)
class RatedText:
    """One text with the mean of its ratings, in [-4, 4]."""

    id: str
    text: str
    rating: float


def read_ratings(subset: str) -> list[RatedText]:
    """Return all texts of a subset in file order, with HTML entities resolved and white space collapsed."""
    member = f"hutto_ICWSM_2014/{_FILES[subset]}_GroundTruth.txt"
    with tarfile.open(fetch(PACKAGE)) as outer, tarfile.open(fileobj=outer.extractfile(_ARCHIVE)) as inner:
        stream = inner.extractfile(member)
        assert stream is not None  # The archive's digest was checked, so the member exists.
        lines = stream.read().decode("utf-8").split("\r\n")
    rated = []
    for line in lines:
        if line:
            identifier, rating, text = line.split("\t")
            # Unescape twice: eight editorial sentences were escaped twice.
            text = html.unescape(html.unescape(text))
            rated.append(RatedText(identifier, " ".join(text.split()), float(rating)))
    return rated


def normalised(text: str) -> str:
    """Return the words of a text without differences of case, punctuation, spacing and Unicode form."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def rows(subset: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (split key, {id, text, label}) for every clearly rated text; each normalised text occurs once.

    Texts that occur with both labels are dropped. Rows with equal split keys must stay in one split. The key is the
    document if the ids name one, else the normalised text.
    """
    labels: dict[str, set[str]] = {}
    first: dict[str, RatedText] = {}
    for rated in read_ratings(subset):
        words = normalised(rated.text)
        if words and abs(rated.rating) >= _CLEAR:
            labels.setdefault(words, set()).add(_label(rated))
            first.setdefault(words, rated)
    for words, rated in first.items():
        if len(labels[words]) == 1:
            document, has_document, _ = rated.id.partition("_")
            key = f"{subset} {document}" if has_document else words
            yield key, {"id": rated.id, "text": rated.text, "label": _label(rated)}


def _label(rated: RatedText) -> str:
    return "positive" if rated.rating > 0 else "negative"
