"""Sequence labelling as text: written, read back from whatever a model says, and scored by spans."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hyperscale.config.data import DataSettings
from hyperscale.data.examples import Example, renderer
from hyperscale.data.metrics import compute, majority_score, score
from hyperscale.data.rows import Row
from hyperscale.data.tagging import WRITINGS, TagFormat, Tagged, read_tags, read_words
from hyperscale.data.tasks import Task
from hyperscale.data.tokenization import TaskTokenizer
from hyperscale.errors import DataError
from tests.rows import encode_split

FLIGHT = Tagged(
    ("to", "new", "york", "on", "may", "2"), ("O", "B-city", "I-city", "O", "B-date.month_name", "B-date.day_number")
)
TYPES = ("city", "date.month_name", "RATINGS_AVERAGE", "timeRange")


def task(format: TagFormat | None = None, **fields: object) -> Task:
    return Task.model_validate({"name": "t", "source": "rows.jsonl", "tagging": {"format": format}} | fields)


def sentences(count: int, seed: int = 0) -> list[Tagged]:
    """Return sentences of 1 to 12 words, some of them repeated, with valid BIO tags."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        tags: list[str] = []
        for _ in range(draw.randint(1, 12)):
            kind = draw.choice(TYPES)
            inside = [f"I-{tags[-1][2:]}"] * 2 if tags and tags[-1] != "O" else []
            tags.append(draw.choice(["O", f"B-{kind}", *inside]))
        rows.append(
            Tagged(tuple(draw.choice(("to", "2", "York", "don't", "a/b", "<3", "naïve")) for _ in tags), tuple(tags))
        )
    return rows


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (type, start, end) of every B- tag and the I- tags of its type right after it: BIO by its definition."""
    chunks = set()
    for start, tag in enumerate(tags):
        if tag.startswith("B-"):
            end = start + 1
            while end < len(tags) and tags[end] == f"I-{tag[2:]}":
                end += 1
            chunks.add((tag[2:], start, end))
    return chunks


def micro_f1(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    pairs = [(spans(right), spans(predicted_spans)) for right, predicted_spans in zip(expected, predicted, strict=True)]
    hits = sum(len(right & predicted_spans) for right, predicted_spans in pairs)
    total = sum(len(right) + len(predicted_spans) for right, predicted_spans in pairs)
    return 200 * hits / total if total else 0.0


def test_the_formats_are_as_documented():
    sentinels, lines = WRITINGS["sentinels"], WRITINGS["lines"]
    three = Tagged(FLIGHT.words[:3], FLIGHT.tags[:3])
    assert sentinels.prompt(three.words) == "<extra_id_0> to <extra_id_1> new <extra_id_2> york <extra_id_3>"
    assert sentinels.answer(three) == "<extra_id_0> O <extra_id_1> city <extra_id_2> I <extra_id_3>"
    assert lines.prompt(three.words) == "to new york\nTags:"
    assert lines.answer(three) == "to O\nnew city\nyork I"


@pytest.mark.parametrize("format", WRITINGS)
def test_what_is_written_is_read_back(format: TagFormat):
    writing = WRITINGS[format]
    for sentence in (FLIGHT, *sentences(300)):
        answer = writing.answer(sentence)
        assert writing.tags(answer, sentence.words) == sentence.tags
        assert writing.reference(answer).tags == sentence.tags
        assert len(writing.reference(answer).words) == len(sentence.words)


def test_answers_that_went_wrong_lose_no_other_word():
    words = FLIGHT.words
    answers = {
        "sentinels": {
            "": ("O",) * 6,
            "nothing of the kind": ("O",) * 6,
            "<extra_id_1> city <extra_id_2> I <extra_id_5> date": ("O", "B-city", "I-city", "O", "O", "B-date"),
            "<extra_id_1> city <extra_id_1> O <extra_id_2> I": ("O", "B-city", "I-city", "O", "O", "O"),
            "<extra_id_0> I <extra_id_1> ci ty <extra_id_9> date": ("O", "B-city", "O", "O", "O", "O"),
        },
        "lines": {
            "": ("O",) * 6,
            "nothing of the kind": ("O",) * 6,
            "new city\nyork I\n2 date": ("O", "B-city", "I-city", "O", "O", "B-date"),
            "to O\nto O\nnew city\nyork I\n\non O\nmay month\nmay month": (
                *("O", "B-city", "I-city", "O", "B-month", "O"),
            ),
            "to O\nknew city\nyork I\non O\nmay month\n2": ("O", "O", "O", "O", "B-month", "O"),
        },
    }
    for name, cases in answers.items():
        for answer, expected in cases.items():
            assert WRITINGS[name].tags(answer, words) == expected, answer


@pytest.mark.parametrize("format", WRITINGS)
def test_span_f1_equals_a_second_count(format: TagFormat):
    writing, draw = WRITINGS[format], random.Random(1)
    right = sentences(200, seed=2)
    assert score(task(format), [writing.answer(one) for one in right], [writing.answer(one) for one in right]) == {
        "span_f1": 100
    }
    scores = set()
    for share in (0.0, 0.1, 0.5, 1.0):
        answers = []
        for one in right:
            noisy = Tagged(
                one.words,
                tuple(draw.choice(["O", "B-city", "I-city"]) if draw.random() < share else tag for tag in one.tags),
            )
            text = writing.answer(noisy)
            answers.append(text[: draw.randrange(len(text) + 1)] if draw.random() < 0.2 else text)
        predicted = [writing.tags(text, one.words) for text, one in zip(answers, right, strict=True)]
        measured = score(task(format), answers, [writing.answer(one) for one in right])["span_f1"]
        assert measured == pytest.approx(micro_f1([one.tags for one in right], predicted), abs=1e-9)
        scores.add(round(measured))
    assert len(scores) == 4


def test_span_f1_is_strict_where_an_answer_is_any_tags():
    """An I- that begins is no span, in tags that a task of free text writes itself too."""
    expected = [["B-a", "I-a", "O", "B-b"], ["O", "O", "B-a"]]
    predicted = [["I-a", "I-a", "O", "B-b"], ["O", "I-b", "B-a"]]
    texts = [[" ".join(tags) for tags in side] for side in (predicted, expected)]
    assert compute(["span_f1"], *texts)["span_f1"] == pytest.approx(micro_f1(expected, predicted)) == pytest.approx(80)


def test_the_majority_is_outside():
    train = [Example("x", WRITINGS["lines"].answer(one), ()) for one in sentences(5)]
    assert majority_score(task("lines"), train, train) == {"span_f1": 0}


def test_words_and_tags_of_a_row():
    assert read_words(["to", "New York ", 2]) == ("to", "New_York", "2")
    assert read_words("to new  york") == read_words(["to", "new", "york"])
    assert read_tags("O B-city I-city", ("to", "new", "york")).tags == ("O", "B-city", "I-city")
    strict = read_tags(["I-a", "B-a", "I-b", "I-b", "B-c", "I-c"], ["a", "b", "c", "d", "e", "f"])
    assert strict.tags == ("O", "B-a", "O", "O", "B-c", "I-c")
    shown = renderer(task("lines")).example(Row({"tokens": ["to", "york"], "tags": ["O", "B-city"]}, "a:1"))
    assert (shown.source, shown.target, shown.candidates) == ("to york\nTags:", "to O\nyork city", ())
    framed = renderer(task("lines", input="Domain {d}: {tokens}", tagging={"format": "lines"}))
    assert framed.prompt(Row({"tokens": ["to"], "d": 3}, "a:1")) == "Domain 3: to\nTags:"
    assert framed.read_answer(Row({"tokens": ["to", "york"]}, "a:1"), "york city") == "O B-city"
    cases: list[tuple[dict[str, object], str]] = [
        (
            {"tokens": ["to", " "], "tags": ["O", "O"]},
            "a:1: column 'tokens', used by the input of task 't', word 2 is emp",
        ),
        ({"tokens": [], "tags": []}, "has no words"),
        ({"tokens": ["a", "<extra_id_3>"], "tags": ["O", "O"]}, "word 2, '<extra_id_3>', contains a sentinel"),
        ({"tokens": [["a"]], "tags": ["O"]}, "is neither a list of words nor text"),
        (
            {"tokens": ["a", "b"], "tags": ["O"]},
            "column 'tags', used by the target of task 't', has 1 tags for 2 words",
        ),
        ({"tokens": ["a"], "tags": ["U-city"]}, "tag 1, 'U-city', is not BIO"),
        ({"tokens": ["a"], "tags": [3]}, "tag 1, '3', is not BIO"),
        ({"tokens": ["a"], "tags": ["B-I"]}, "a type cannot be named O or I"),
        ({"tokens": ["a"]}, "the target of task 't' needs column 'tags'"),
    ]
    for values, message in cases:
        with pytest.raises(DataError, match=message):
            renderer(task("lines")).example(Row(values, "a:1"))


@pytest.fixture(scope="module")
def t5(tiny_t5_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_t5_folder)
    return tokenizer


def example_of(words: int, format: TagFormat = "sentinels") -> Example:
    return renderer(task(format)).example(Row({"tokens": ["a"] * words, "tags": ["O"] * words}, "a:1"))


def test_every_word_has_its_sentinel_or_the_sentence_is_left_out(
    t5: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
):
    tokenizer = TaskTokenizer(t5, task("sentinels"), is_encoder_decoder=True)
    limits = {"tasks": ["t"], "max_source_tokens": 2000, "max_target_tokens": 2000}
    fits, too_long = example_of(99), example_of(100)
    split = encode_split(tokenizer, [fits, too_long], DataSettings.model_validate(limits))
    assert (split.examples, split.dropped) == ((fits,), 1)
    assert "1 of 2 rows left out, beyond" in caplog.text
    assert "without a sentinel for every word" in caplog.text
    ids = split.encoded[0].source_ids
    sentinels = t5.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)])
    assert [token for token in ids if token in sentinels] == sentinels  # one id each, none cut
    with pytest.raises(DataError, match=r"more words than the vocabulary has sentinels for.*divide it"):
        encode_split(tokenizer, [too_long], DataSettings.model_validate(limits | {"too_long": "error"}))
    # and no word is taken out of the middle of a sentence
    short = DataSettings.model_validate(limits | {"too_long": "truncate_source", "max_source_tokens": 20})
    assert encode_split(tokenizer, [fits, example_of(4)], short).dropped == 1


def test_generated_ids_keep_their_sentinels(t5: PreTrainedTokenizerBase, tiny_llama_folder: Path):
    tokenizers = {"sentinels": t5, "lines": AutoTokenizer.from_pretrained(tiny_llama_folder)}
    for name, tokenizer in tokenizers.items():
        writing = WRITINGS[name]
        task_tokenizer = TaskTokenizer(tokenizer, task(name), is_encoder_decoder=name == "sentinels")
        (ids,) = task_tokenizer.encode_answers([writing.answer(FLIGHT)])
        assert (
            writing.tags(task_tokenizer.decode([*ids, *ids]), FLIGHT.words) == FLIGHT.tags
        )  # what comes after eos does not count
