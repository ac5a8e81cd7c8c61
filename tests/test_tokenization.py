"""Prompts and answers as ids: one boundary everywhere, the tokenizer's own special tokens, no answer cut."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hyperscale.config.data import DataSettings
from hyperscale.data.examples import Example
from hyperscale.data.shortening import shorten
from hyperscale.data.tasks import Task
from hyperscale.data.tokenization import TaskTokenizer
from hyperscale.errors import BackboneError, DataError
from tests.rows import encode_split

TEXTS = [
    "Review: a fine film\nSentiment: positive",
    "Review: a dull film\nSentiment: negative",
    "user system assistant",
]
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'refuse' %}{{ raise_exception('no system') }}"
    "{% endif %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_level(prefix: str = "<s> ", suffix: str = "") -> PreTrainedTokenizerFast:
    """A vocabulary of words with their leading space, as GPT and LLaMA 3 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{prefix}$A{suffix}", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def sentencepiece_like(single: str) -> PreTrainedTokenizerFast:
    """A vocabulary that puts the leading space itself, as T5 and LLaMA 2 have."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def task(**fields: object) -> Task:
    return Task.model_validate({"name": "t", "source": "x", "input": "{x}", "target": "{y}"} | fields)


def settings(**fields: object) -> DataSettings:
    return DataSettings.model_validate({"tasks": ["t"]} | fields)


def example(source: str, target: str, *candidates: str) -> Example:
    return Example(source, target, candidates)


REVIEW = example("Review: a fine film\nSentiment:", "positive", "negative", "positive")


@pytest.fixture(scope="module")
def gpt() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="module")
def t5() -> PreTrainedTokenizerFast:
    return sentencepiece_like("$A </s>")


def test_decoder_only_joins_prompt_and_answer_at_the_space(gpt: PreTrainedTokenizerFast):
    tokenizer = TaskTokenizer(gpt, task(), is_encoder_decoder=False)
    split = encode_split(tokenizer, [REVIEW], settings())
    (encoded,) = split.encoded
    assert (split.examples, split.dropped) == ((REVIEW,), 0)
    whole = gpt("Review: a fine film\nSentiment: positive")["input_ids"]
    assert [*encoded.source_ids, *encoded.target_ids] == [*whole, gpt.eos_token_id]
    assert encoded.source_ids[0] == gpt.bos_token_id
    assert gpt.decode(encoded.target_ids) == " positive</s>"
    assert encoded.num_tokens == len(whole) + 1
    # the very ids that scoring and generation see
    assert tokenizer.encode_prompts([REVIEW.source]) == [tuple(encoded.source_ids)]
    assert encoded.candidate_ids == tokenizer.encode_candidates(["negative", "positive"])
    assert encoded.candidate_ids[1] == tuple(encoded.target_ids[:-1])
    assert tokenizer.decode([*encoded.target_ids, 17, 18]) == "positive"
    # trailing spaces of a template make no second boundary; an answer may bring its own
    assert tokenizer.encode_prompts([REVIEW.source + "  "]) == [tuple(encoded.source_ids)]
    assert tokenizer.encode_answers([" positive", "\npositive"]) == [
        tuple(encoded.target_ids),
        (*gpt("\npositive", add_special_tokens=False)["input_ids"], gpt.eos_token_id),
    ]


def test_a_prompt_is_never_closed_and_bos_is_the_tokenizers_own_choice():
    closing = byte_level(prefix="", suffix=" </s>")
    (ids,) = TaskTokenizer(closing, task(), is_encoder_decoder=False).encode_prompts(["a fine film"])
    assert closing.decode(ids) == "a fine film"


def test_a_tokenizer_that_puts_the_space_itself_gets_none(t5: PreTrainedTokenizerFast):
    llama2 = sentencepiece_like("$A")
    tokenizer = TaskTokenizer(llama2, task(), is_encoder_decoder=False)
    (encoded,) = encode_split(tokenizer, [REVIEW], settings()).encoded
    whole = llama2("Review: a fine film\nSentiment: positive")["input_ids"]
    assert [*encoded.source_ids, *encoded.target_ids[:-1]] == whole
    assert tokenizer.decode(encoded.target_ids) == "positive"


def test_encoder_decoder_closes_both_sides(t5: PreTrainedTokenizerFast):
    tokenizer = TaskTokenizer(t5, task(), is_encoder_decoder=True)
    (encoded,) = encode_split(tokenizer, [REVIEW], settings()).encoded
    assert list(encoded.source_ids) == t5(REVIEW.source)["input_ids"]
    assert list(encoded.target_ids) == t5("positive")["input_ids"]
    assert encoded.source_ids[-1] == encoded.target_ids[-1] == t5.eos_token_id
    assert encoded.candidate_ids[1] == tuple(encoded.target_ids[:-1])
    assert tokenizer.decode(encoded.target_ids) == "positive"
    plain = sentencepiece_like("$A")  # one that does not close texts by itself
    (ids,) = TaskTokenizer(plain, task(), is_encoder_decoder=True).encode_prompts(["a film"])
    assert ids[-1] == plain.eos_token_id


def test_candidates_are_closed_only_where_one_begins_another(gpt: PreTrainedTokenizerFast):
    tokenizer = TaskTokenizer(gpt, task(), is_encoder_decoder=False)
    nested = tokenizer.encode_candidates(["a film", "a film negative"])
    assert all(ids[-1] == gpt.eos_token_id for ids in nested)
    assert all(ids[-1] != gpt.eos_token_id for ids in tokenizer.encode_candidates(["positive", "negative"]))
    assert tokenizer.encode_candidates([]) == ()
    with pytest.raises(DataError, match="two labels have the same tokens"):
        tokenizer.encode_candidates(["film", " film"])


def test_chat_uses_the_tokenizers_template(gpt: PreTrainedTokenizerFast):
    with pytest.raises(DataError, match="tokenizer has no chat template; set chat: false"):
        TaskTokenizer(gpt, task(chat=True), is_encoder_decoder=False).encode_prompts(["a"])
    chatty = byte_level()
    chatty.chat_template = CHAT
    tokenizer = TaskTokenizer(chatty, task(chat=True, system="Be brief."), is_encoder_decoder=False)
    (encoded,) = encode_split(tokenizer, [REVIEW], settings()).encoded
    text = f"<s>system\nBe brief.</s>\n<s>user\n{REVIEW.source}</s>\n<s>assistant\n"
    assert chatty.decode(encoded.source_ids) == text  # one bos a turn: the template's, and none of the tokenizer's
    assert chatty.decode(encoded.target_ids) == "positive</s>"
    with pytest.raises(DataError, match="chat template refuses the prompt: no system"):
        TaskTokenizer(chatty, task(chat=True, system="refuse"), is_encoder_decoder=False).encode_prompts(["a"])


def test_limits_drop_reject_or_shorten_rows_but_never_cut_an_answer(
    gpt: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
):
    tokenizer = TaskTokenizer(gpt, task(), is_encoder_decoder=False)
    long_source = example("Review: " + "a fine film " * 20 + "\nSentiment:", "positive")
    long_target = example("Review:", "positive " * 20)
    examples = [long_source, REVIEW, long_target]
    limits = {"max_source_tokens": 16, "max_target_tokens": 4}

    dropping = encode_split(tokenizer, examples, settings(**limits))
    assert (dropping.examples, dropping.dropped) == ((REVIEW,), 2)
    assert "2 of 3 rows left out" in caplog.text

    shortened = encode_split(tokenizer, examples, settings(too_long="truncate_source", **limits))
    assert (shortened.examples, shortened.dropped) == ((long_source, REVIEW), 1)
    ids = shortened.encoded[0].source_ids
    assert len(ids) == 16
    text = gpt.decode(ids)
    assert text.startswith("<s>Review: a fine")
    assert text.endswith("film \nSentiment:")

    with pytest.raises(DataError, match=r"task 't': a row has \d+ source and 2 target tokens.*raise the limits"):
        encode_split(tokenizer, examples, settings(too_long="error", **limits))
    with pytest.raises(DataError, match="all 1 rows of a split are empty or beyond 16 source"):
        encode_split(tokenizer, [long_target], settings(**limits))


def test_answers_that_are_too_long_to_generate_are_reported(
    gpt: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
):
    tokenizer = TaskTokenizer(gpt, task(max_new_tokens=3), is_encoder_decoder=False)
    answers = [example("Review:", "positive " * count) for count in (1, 6)]
    encode_split(tokenizer, [answers[0], REVIEW], settings())
    assert caplog.text == ""
    encode_split(tokenizer, answers, settings())
    assert "task t: 1 of 2 answers have more than max_new_tokens 3, up to" in caplog.text


def test_shorten_keeps_both_ends():
    assert shorten((1, 2, 3, 4, 5), 5) == (1, 2, 3, 4, 5)
    assert shorten((1, 2, 3, 4, 5), 3) == (1, 4, 5)
    assert shorten((1, 2, 3, 4, 5), 1) == (5,)


def test_an_empty_prompt_cannot_be_continued():
    bare = byte_level(prefix="")
    split = encode_split(TaskTokenizer(bare, task(), is_encoder_decoder=False), [example("", "a"), REVIEW], settings())
    assert (split.examples, split.dropped) == ((REVIEW,), 1)
    bare.eos_token = None
    with pytest.raises(BackboneError, match="no end-of-sequence token"):
        TaskTokenizer(bare, task(), is_encoder_decoder=False).encode_prompts(["a"])
