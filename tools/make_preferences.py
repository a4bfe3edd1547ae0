"""Write the human preferences that come with loopos.

    python tools/make_preferences.py

Makes ``loopos/assets/preferences_train.jsonl`` and ``preferences_validation.jsonl`` from the rated
sentences that ``tools/make_assets.py`` fetches (VADER, MIT licence): two sentences of film reviews
that begin with the same words are a prompt with two responses, the one that people rated higher is
the chosen one, and the margin is the difference of the two mean ratings. The same seed gives the
same bytes. Their sha256 goes into the data card beside them; so this comes after ``make_assets``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from make_assets import (
    ASSETS,
    ROOT,
    VADER_SHA256,
    Rated,
    fetch,
    read_archive,
    read_rated,
    without_neighbours,
)

SEED = 0
SMALLEST_MARGIN = 1.5  # of ratings from -4 to 4
WORDS = (6, 24)
#: By how many characters the two responses may differ, as a share of the longer one.
LENGTH_DIFFERENCE = 0.3
#: Share of the sentences whose first word only the validation file has; and how many sentences
#: begin with a word that is too common for that.
HELD_SHARE, COMMON = 0.2, 300
#: Words that a prompt has, tried in this order.
OPENINGS = (4, 3, 2, 1)
TRAIN_PAIRS, VALIDATION_PAIRS = 1600, 400
MARK = "<!-- preferences -->"


@dataclass(frozen=True)
class Pair:
    """A prompt and two responses, which continue it."""

    prompt: str
    chosen: str
    rejected: str
    margin: float

    @property
    def row(self) -> str:
        """The line of the file."""
        fields = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected,
                  "margin": self.margin}  # fmt: skip
        return json.dumps(fields, ensure_ascii=False) + "\n"


def opening(text: str, words: int) -> str:
    """Return the first words of a text."""
    return " ".join(text.split()[:words])


def held_words(rated: Sequence[Rated], rng: np.random.Generator) -> set[str]:
    """Draw the first words that only the validation file has."""
    counts = Counter(opening(r.text, 1) for r in rated)
    known = sorted(word for word, count in counts.items() if count < COMMON)
    held: set[str] = set()
    for i in rng.permutation(len(known)):
        if sum(counts[word] for word in held) >= HELD_SHARE * len(rated):
            break
        held.add(known[i])
    return held


def pairs_of(rated: Sequence[Rated], rng: np.random.Generator) -> list[Pair]:
    """Pair sentences that begin alike, each used once, those with the longest openings first."""
    found: list[Pair] = []
    left = list(rated)
    for words in OPENINGS:
        groups: dict[str, list[Rated]] = defaultdict(list)
        for one in left:
            groups[opening(one.text, words)].append(one)
        used: set[str] = set()
        fresh = []
        for prompt in sorted(groups):
            for better, worse in matched(groups[prompt], len(prompt), rng):
                used |= {better.text, worse.text}
                margin = round(better.rating - worse.rating, 3)
                sides = (one.text[len(prompt) :] for one in (better, worse))
                fresh.append(Pair(prompt, *sides, margin))
        found += [fresh[i] for i in rng.permutation(len(fresh))]
        left = [one for one in left if one.text not in used]
    return found


def matched(
    group: Sequence[Rated], begin: int, rng: np.random.Generator
) -> list[tuple[Rated, Rated]]:
    """Return pairs of a group: each better one with the worse one that is nearest in length."""
    order = [group[i] for i in rng.permutation(len(group))]
    order.sort(key=lambda one: -one.rating)
    taken: set[str] = set()
    found = []
    for better in order:
        size = len(better.text) - begin
        near = [
            (abs(len(worse.text) - begin - size), i)
            for i, worse in enumerate(order)
            if worse.text not in taken
            and better.rating - worse.rating >= SMALLEST_MARGIN
            and abs(len(worse.text) - begin - size)
            <= LENGTH_DIFFERENCE * max(size, len(worse.text) - begin)
        ]
        if better.text in taken or not near:
            continue
        worse = order[min(near)[1]]
        taken |= {better.text, worse.text}
        found.append((better, worse))
    return found


def make(rated: Sequence[Rated]) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs of both files."""
    rng = np.random.default_rng(SEED)
    alone = without_neighbours([r.text for r in rated])
    films = [
        (r, free)
        for r, free in zip(rated, alone, strict=True)
        if r.source == "movie" and WORDS[0] <= len(r.text.split()) <= WORDS[1]
    ]
    held = held_words([r for r, _ in films], rng)
    apart = [(r, free, opening(r.text, 1) in held) for r, free in films]
    # Validation sentences have no neighbour in all of the text, so none in the training file.
    validation = [r for r, free, own in apart if own and free]
    train = [r for r, _, own in apart if not own]
    return (
        shuffled(pairs_of(train, rng)[:TRAIN_PAIRS], rng),
        shuffled(pairs_of(validation, rng)[:VALIDATION_PAIRS], rng),
    )


def shuffled(pairs: list[Pair], rng: np.random.Generator) -> list[Pair]:
    """Return them in random order."""
    return [pairs[i] for i in rng.permutation(len(pairs))]


def longer_share(pairs: Sequence[Pair]) -> float:
    """Return in what share of the pairs the chosen response has more characters."""
    lead = np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs])
    return float(((lead > 0) + 0.5 * (lead == 0)).mean())


def section(train: Sequence[Pair], validation: Sequence[Pair]) -> str:
    """Return what the card says of the files."""
    median = float(np.median([pair.margin for pair in train]))
    prompts = [len({pair.prompt for pair in pairs}) for pairs in (train, validation)]
    return f"""{MARK}
`preferences_train.jsonl` ({len(train):,} pairs, {prompts[0]} prompts) and
`preferences_validation.jsonl` ({len(validation):,} pairs, {prompts[1]} prompts): human preferences,
with the fields `prompt`, `chosen`, `rejected` and `margin`.

- **Made by** `python tools/make_preferences.py`, seed {SEED}; the same seed gives the same bytes.
- **Source**: the rated sentences of film reviews above (sha256 `{VADER_SHA256[:16]}...`), MIT
  licence, in `LICENSE-vader.txt`.
- **Preference**: two sentences that begin with the same words, which are the prompt (up to
  {OPENINGS[0]}); their rests are the responses, and the one is chosen whose mean rating is
  higher, by {SMALLEST_MARGIN:g} or more (`margin`, median {median:.1f}). So the "better" one is
  the one that sounded more positive to people: nothing else of what makes a good answer.
- **Length tells nothing**: responses of a pair differ by {LENGTH_DIFFERENCE:.0%} of their
  characters at the most; the longer one is chosen in {longer_share(train):.1%} of the training
  pairs and {longer_share(validation):.1%} of the others.
- **Split**: each sentence is in one pair. No sentence of the training file begins with the first
  word of a validation prompt, and no validation sentence has a neighbour in all of the text (see
  above). But unlike the sentences of `sentiment_validation.csv`, most of them are in the base
  model's pretraining text, without ratings; and some are in `sentiment_train.csv`.
{MARK}
"""


def updated(card: str, texts: dict[str, str], words: str) -> str:
    """Return the card with the files' section and hashes, in place of older ones."""
    card = re.sub(rf"{MARK}\n.*?{MARK}\n\n", "", card, flags=re.DOTALL)
    card = re.sub(r"^\| `preferences_.*\n", "", card, flags=re.MULTILINE)
    place = card.index("`base_model/` holds")
    card = card[:place] + words + "\n" + card[place:]
    for name, text in texts.items():
        card += f"| `{name}` | `{hashlib.sha256(text.encode()).hexdigest()}` |\n"
    return card


def main() -> None:
    """Write both files, and the card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    packages = ROOT / "build" / "packages"
    parser.add_argument("--packages", type=Path, default=packages, help="where the archive lies")
    archive, _ = read_archive(fetch(parser.parse_args().packages))
    train, validation = make(read_rated(archive))
    texts = {
        "preferences_train.jsonl": "".join(pair.row for pair in train),
        "preferences_validation.jsonl": "".join(pair.row for pair in validation),
    }
    for name, text in texts.items():
        (ASSETS / name).write_bytes(text.encode("utf-8"))
        print(f"{name}: {len(text.splitlines())} pairs, {len(text.encode()):,} bytes")
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    card = updated(card, texts, section(train, validation))
    (ASSETS / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
