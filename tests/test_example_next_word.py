"""The example of a recurrent model in examples/next_word."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # examples are run from the checkout and are in no wheel
pytest.importorskip("flax.linen")
pytest.importorskip("tqdm")

from examples.next_word import model, text  # noqa: E402

BATCH = 8


@pytest.fixture(scope="module")
def data() -> text.Text:
    return text.load(paragraphs=100)


def words_of(data: text.Text, sequences: list[np.ndarray]) -> list[list[str]]:
    """The paragraphs that sequences were cut from."""
    paragraphs, current = [], []
    for ids in sequences:
        current += [data.vocabulary[word] for word in ids[1:]]
        if ids[-1] == text.END:
            paragraphs.append(current[:-1])
            current = []
    assert not current
    return paragraphs


def test_sequences_are_the_paragraphs_and_each_is_in_one_part(data):
    chosen = text._paragraphs()[:100]
    train, test = words_of(data, data.train), words_of(data, data.test)
    assert (len(train), len(test)) == (90, 10)
    known = set(data.vocabulary)
    as_known = [[word if word in known else "<rare>" for word in words] for words in chosen]
    assert test == as_known[text.TEST_FROM :: text.TEST_EVERY]
    assert train == [words for i, words in enumerate(as_known) if i % text.TEST_EVERY != text.TEST_FROM]
    assert len({tuple(words) for words in chosen}) == 100
    for ids in (*data.train, *data.test):
        assert ids.dtype == np.int32
        assert 2 <= len(ids) <= text.LENGTH + 1
    assert any(len(ids) == text.LENGTH + 1 for ids in data.train)


def test_vocabulary_is_of_the_training_part(data):
    train = [words for i, words in enumerate(text._paragraphs()[:100]) if i % text.TEST_EVERY != text.TEST_FROM]
    counts = {}
    for word in (word for words in train for word in words):
        counts[word] = counts.get(word, 0) + 1
    assert set(data.vocabulary[2:]) == {word for word, count in counts.items() if count >= text.FEWEST_OCCURRENCES}
    in_order = [counts[word] for word in data.vocabulary[2:]]
    assert in_order == sorted(in_order, reverse=True)


def test_models_that_count_are_distributions(data):
    bigram, unigram = text.bigram(data), text.unigram(data)
    assert bigram.min() > 0
    assert unigram.min() > 0
    np.testing.assert_allclose(bigram.sum(axis=1), 1)
    np.testing.assert_allclose(unigram.sum(), 1)


def test_bigram_is_interpolated_kneser_ney():
    """By hand: after 2 come 3, 3 and 4; after 3 comes 2; after 4 nothing."""
    tiny = text.Text(("<end>", "<rare>", "a", "b", "c"), [np.array(ids) for ids in ([2, 3, 2, 3], [2, 4])], [])
    before = {2: 1, 3: 1, 4: 1}  # different words that each word comes after
    continuation = [(before.get(word, 0) + 0.5) / (3 + 5 * 0.5) for word in range(5)]
    after_2 = [0.75 * 2 / 3 * share for share in continuation]
    after_2[3] += (2 - 0.75) / 3
    after_2[4] += (1 - 0.75) / 3
    np.testing.assert_allclose(text.bigram(tiny)[2], after_2)
    np.testing.assert_allclose(text.bigram(tiny)[4], continuation)


def test_model_reads_no_later_word_and_padding_does_not_count(data, standard_promotion):
    next_word = model.new_model(data, BATCH)
    short, long = np.array([0, 5, 6, 7, 0], np.int32), data.train[0].copy()
    changed = long.copy()
    changed[10:] = 3 + changed[10:] % 5
    packed, following = model.pack(next_word, [long, changed, short], BATCH)
    params = next_word.init(jax.random.key(0), packed)["params"]
    scores = np.asarray(jax.jit(next_word.apply)({"params": params}, packed), np.float64)
    assert scores.shape == (BATCH, text.LENGTH, len(data.vocabulary))
    np.testing.assert_array_equal(scores[0, :10], scores[1, :10])
    assert not np.array_equal(scores[0, 10], scores[1, 10])

    np.testing.assert_array_equal(following[2], [5, 6, 7, 0, *[-1] * (text.LENGTH - 4)])
    assert (following[3:] == -1).all()
    likelihoods = []
    for row, ids in enumerate([long, changed, short]):
        odds = np.exp(scores[row] - scores[row].max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        likelihoods += [np.log(odds[place, word]) for place, word in enumerate(ids[1:])]
    perplexity = model.perplexity(next_word, params, [long, changed, short], BATCH)
    np.testing.assert_allclose(perplexity, np.exp(-np.mean(likelihoods)), rtol=1e-5)


def test_training_repeats_bit_for_bit(data, standard_promotion):
    next_word = model.new_model(data, BATCH)
    short = data._replace(train=data.train[: 4 * BATCH])
    (params, losses), (again, same) = (model.train(next_word, short, BATCH, 1, seed=0) for _ in range(2))
    assert losses == same
    assert len(set(losses)) == 4
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_it_beats_models_that_count():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "examples.next_word", "--epochs=3"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    perplexity = {
        name: float(re.search(rf"^{name} +([\d.]+)$", done.stdout, re.MULTILINE)[1])
        for name in ("embax, recurrent", "bigrams, Kneser-Ney", "unigrams")
    }
    assert perplexity["embax, recurrent"] < 0.9 * perplexity["bigrams, Kneser-Ney"] < 0.9 * perplexity["unigrams"]
    assert len(re.findall(r"^.+ \.\.\. .+%, .+%, .+%$", done.stdout, re.MULTILINE)) == 3
    assert "loss" in done.stderr
