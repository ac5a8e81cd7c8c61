"""Word tasks: inflection from lemminflect's table, British and American spelling from breame.

The tables are read from the packages' files; neither package is installed or imported.
"""

import ast
import gzip
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator

from hyperscale.assets import sentiment
from hyperscale.assets.packages import PinnedPackage, fetch

LEMMINFLECT = PinnedPackage(
    name="lemminflect",
    version="0.2.3",
    kind="wheel",
    filename="lemminflect-0.2.3-py3-none-any.whl",
    num_bytes=769_698,
    sha256="1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c",
    licence="MIT",
)

BREAME = PinnedPackage(
    name="breame",
    version="0.1.2",
    kind="sdist",
    filename="breame-0.1.2.tar.gz",
    num_bytes=141_701,
    sha256="b6a2cbb390743ab0d7551a4a2ad1bcb7f3126b2d0f5bfa14ae0b4ddb990d8fa6",
    licence="Apache-2.0",
)

_COLUMNS = {"past_tense": ("verb", 0), "ing_form": ("verb", 2), "plural": ("noun", 0)}
"""Part of speech and column of the table. Its lines are `lemma,verb,past,participle,-ing,third person` and
`lemma,noun,plural`. A cell holds one or more spellings separated by `/`, the preferred one first."""

INFLECTIONS = tuple(_COLUMNS)


def inflections(subset: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (split key, {word, form}) for common words. The key is the lemma and is the same in all subsets.

    A word is common if the rated texts of the sentiment tasks contain both its lemma and an inflected form. Nouns whose
    plural equals the singular are left out, because the table cannot tell "sheep" from "abandonment". So are words for
    which the table prefers another form than those texts do ("quitted", "fitted").
    """
    part_of_speech, column = _COLUMNS[subset]
    counts = _word_counts()
    for lemma, cells in _inflection_table(part_of_speech):
        # The third person is no evidence: "windows" would turn every noun into a verb.
        inflected = {form for cell in cells[:3] for form in cell if form != lemma}
        forms = [form for form in cells[column] if part_of_speech == "verb" or form != lemma]
        common = counts[lemma] and any(counts[form] for form in inflected)
        if common and forms and counts[forms[0]] == max(counts[form] for form in forms):
            yield lemma, {"word": lemma, "form": forms[0]}


def spellings(subset: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (split key, {word, form}), British to American. Words with the same beginning (one family) share a key."""
    assert subset == "american"
    with tarfile.open(fetch(BREAME)) as archive:
        stream = archive.extractfile("breame-0.1.2/breame/data/spelling_constants.py")
        assert stream is not None  # The archive's digest was checked, so the member exists.
        module = ast.parse(stream.read())
    for statement in module.body:
        # Read as a literal, never executed.
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "BRITISH_ENGLISH_SPELLINGS":
            for british, american in ast.literal_eval(statement.value).items():
                yield british[:5], {"word": british, "form": american}


def _word_counts() -> Counter[str]:
    counts: Counter[str] = Counter()
    for subset in sentiment.SUBSETS:
        for rated in sentiment.read_ratings(subset):
            counts.update(re.findall(r"[a-z]+", rated.text.lower()))
    return counts


def _inflection_table(part_of_speech: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield (lemma, cells); each cell lists its spellings. Words and forms with other characters are left out."""
    with zipfile.ZipFile(fetch(LEMMINFLECT)) as wheel:
        table = gzip.decompress(wheel.read("lemminflect/resources/infl_lu.csv.gz")).decode("utf-8")
    for line in table.splitlines():
        lemma, kind, *cells = line.split(",")
        if kind == part_of_speech and re.fullmatch(r"[a-z]{2,}", lemma):
            yield lemma, [[form for form in cell.split("/") if re.fullmatch(r"[a-z]+", form)] for cell in cells]
