"""The reference of the Python language (``pydoc_data.topics`` of the standard library) as sequences of words.

Every version of Python has its own edition of it, so figures are those of one version.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

LENGTH = 32  # words that a sequence has at most
FEWEST_WORDS = 8  # of a paragraph; what is shorter is a heading or a line of grammar
FEWEST_OCCURRENCES = 2  # of a word in the vocabulary
TEST_EVERY, TEST_FROM = 10, 4
DISCOUNT = 0.75

END, RARE = (
    0,
    1,
)  # ids of the end of a paragraph, which is also what comes before it, and of words outside the vocabulary
WORD = re.compile(r"[a-z]+|[.,:;()]")


class Text(NamedTuple):
    """Sequences of words.

    Attributes:
      vocabulary: the word of each id, the most frequent first, after END and RARE.
      train: int32[2 to LENGTH + 1] arrays of ids, each word to be predicted from those before it.
      test: likewise, of every tenth paragraph; none of them is in ``train``.
    """

    vocabulary: tuple[str, ...]
    train: list[np.ndarray]
    test: list[np.ndarray]

    def ids(self, words: Sequence[str]) -> np.ndarray:
        """int32[1 + number of words], the ids of the words of the beginning of a paragraph."""
        known = {word: position for position, word in enumerate(self.vocabulary)}
        return np.array([END, *(known.get(word, RARE) for word in words)], np.int32)


def load(paragraphs: int | None = None) -> Text:
    """The text, or its first paragraphs."""
    chosen = _paragraphs()[:paragraphs]
    train = [words for position, words in enumerate(chosen) if position % TEST_EVERY != TEST_FROM]
    counts = Counter(word for words in train for word in words)
    frequent = [word for word, count in counts.most_common() if count >= FEWEST_OCCURRENCES]
    text = Text(("<end>", "<rare>", *frequent), [], [])
    for position, words in enumerate(chosen):
        ids = np.append(text.ids(words), np.int32(END))
        part = text.test if position % TEST_EVERY == TEST_FROM else text.train
        # A word is the last one of a sequence and the first one of the next.
        part.extend(ids[start : start + LENGTH + 1] for start in range(0, len(ids) - 1, LENGTH))
    return text


def _paragraphs() -> list[list[str]]:
    """The words of each paragraph, in order; topics share paragraphs, and each is there once."""
    found = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name].lower()):
            words = WORD.findall(paragraph)
            if len(words) >= FEWEST_WORDS:
                found[tuple(words)] = words
    return list(found.values())


def pairs(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Each word that is to be predicted, int32[n], and the one before it: (before, words)."""
    return np.concatenate([ids[:-1] for ids in sequences]), np.concatenate([ids[1:] for ids in sequences])


def unigram(text: Text) -> np.ndarray:
    """The probability of each word by its frequency, float64[vocabulary]; one more occurrence of each is assumed."""
    counts = np.bincount(pairs(text.train)[1], minlength=len(text.vocabulary)) + 1.0
    return counts / counts.sum()


def bigram(text: Text) -> np.ndarray:
    """The probability of each word after each other, float64[vocabulary before, vocabulary].

    Interpolated Kneser-Ney smoothing with an absolute discount: Ney, Essen and Kneser, On Structuring Probabilistic
    Dependences in Stochastic Language Modelling, 1994.
    """
    counts = np.zeros((len(text.vocabulary),) * 2)
    np.add.at(counts, pairs(text.train), 1.0)
    seen, kinds = counts.sum(axis=1, keepdims=True), (counts > 0).sum(axis=1, keepdims=True)
    continuation = (counts > 0).sum(axis=0) + 0.5
    continuation /= continuation.sum()
    smoothed = np.maximum(counts - DISCOUNT, 0) + DISCOUNT * kinds * continuation
    return np.where(seen > 0, smoothed / np.maximum(seen, 1), continuation)
