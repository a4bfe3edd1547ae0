"""Build the labelled set of the demo, and the text its base model is pretrained on, from a package.

    python tools/make_assets.py

Fetches VADER's rated texts (MIT licence) with ``pip download`` into ``build/packages``, unless they
are there already or ``--packages`` says where they are, checks their sha256, and writes

* ``loopos/assets/sentiment_train.csv`` and ``sentiment_validation.csv``: sentences of film reviews
  with the sentiment that human raters saw in them;
* ``loopos/assets/LICENSE-vader.txt`` and ``loopos/assets/README.md``, the data card;
* ``build/demo/pretraining.jsonl``: unlabelled text for ``tools/make_base_model.py``, which holds
  none of the validation sentences, nor anything close to one.

The same seed gives the same bytes; the script prints the sha256 of all it wrote. The card is
written anew: ``tools/make_problems.py`` adds its files to it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "loopos" / "assets"
PRETRAINING = ROOT / "build" / "demo" / "pretraining.jsonl"

SEED = 0
SMALLEST_RATING = 1.0  # of -4 .. 4; below it raters disagree about the sign
SHORTEST_WORDS = 4
TRAIN_PER_CLASS = 1500
VALIDATION_PER_CLASS = 400
LABELS = ("negative", "positive")

# Two texts are too close when this share of the shorter one's word triples is in the other.
NEAR_SHARE = 0.4

VADER = "vaderSentiment-3.3.2.tar.gz"
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
VADER_SOURCES = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "tweet": "tweets",
    "news": "nytEditorialSnippets",
}


@dataclass(frozen=True)
class Rated:
    """One text with the mean of its human ratings, from -4 to 4."""

    source: str
    text: str
    rating: float


def fetch(directory: Path) -> Path:
    """Return the path of the archive, fetched into `directory` when it is not there."""
    path = directory / VADER
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "vaderSentiment==3.3.2", "-d", str(directory)], check=True)
    found = sha256(path.read_bytes())
    if found != VADER_SHA256:
        raise SystemExit(f"{path} has the sha256 {found}, expected {VADER_SHA256}")
    return path


def sha256(data: bytes) -> str:
    """Return the hexadecimal sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def member(archive: tarfile.TarFile, ending: str) -> bytes:
    """Return the bytes of the one member whose name ends so."""
    names = [name for name in archive.getnames() if name.endswith(ending)]
    if len(names) != 1:
        raise SystemExit(f"expected one member '*{ending}' in the archive, found {len(names)}")
    file = archive.extractfile(names[0])
    if file is None:
        raise SystemExit(f"{names[0]} in the archive is not a file")
    return file.read()


def clean(text: str) -> str:
    """Undo HTML entities and collapse runs of white space; nothing else is changed."""
    return " ".join(html.unescape(text).split())


def read_archive(path: Path) -> tuple[IO[bytes], str]:
    """Return the archive of rated texts inside the sdist, and the licence."""
    with tarfile.open(path) as outer:
        licence = member(outer, "/LICENSE.txt").decode("utf-8")
        inner = io.BytesIO(member(outer, "/hutto_ICWSM_2014.tar.gz"))
    return inner, licence.replace("\r\n", "\n")


def read_rated(archive_file: IO[bytes]) -> list[Rated]:
    """Return the rated texts of all four sources, each text once."""
    rated: dict[str, Rated] = {}
    with tarfile.open(fileobj=archive_file) as archive:
        for source, name in VADER_SOURCES.items():
            lines = member(archive, f"/{name}_GroundTruth.txt").decode("utf-8").splitlines()
            for line in lines:
                _, rating, text = line.split("\t")
                text = clean(text)
                rated.setdefault(key_of(text), Rated(source, text, float(rating)))
    return list(rated.values())


def words_of(text: str) -> list[str]:
    """Return the lower-cased words, punctuation apart."""
    return re.findall(r"\w+", text.lower())


def key_of(text: str) -> str:
    """Return what two texts share when they differ in case, spaces and punctuation only."""
    return " ".join(words_of(text))


def triples_of(text: str) -> set[tuple[str, ...]]:
    """Return the word triples of a text (the whole text when it is shorter)."""
    words = words_of(text)
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def without_neighbours(texts: list[str]) -> list[bool]:
    """Return for each text whether no other of them is close to it (see ``NEAR_SHARE``)."""
    triples = [triples_of(text) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, own in enumerate(triples):
        for triple in own:
            holders[triple].append(i)
    alone = []
    for i, own in enumerate(triples):
        shared = Counter(j for triple in own for j in holders[triple] if j != i)
        sizes = {j: min(len(own), len(triples[j])) for j in shared}
        alone.append(all(count < NEAR_SHARE * sizes[j] for j, count in shared.items()))
    return alone


def choose(rated: list[Rated]) -> tuple[list[Rated], list[Rated]]:
    """Return the labelled (train, validation) sets, seeded, classes equal in number.

    Validation sentences are drawn from those that have no neighbour in all of the text, so that
    neither fine-tuning nor pretraining can have seen one of them in other words.
    """
    alone = without_neighbours([r.text for r in rated])
    rng = np.random.default_rng(SEED)
    train: list[Rated] = []
    validation: list[Rated] = []
    for sign in (-1, 1):
        pool = [
            (r, free)
            for r, free in zip(rated, alone, strict=True)
            if r.source == "movie"
            and sign * r.rating >= SMALLEST_RATING
            and len(words_of(r.text)) >= SHORTEST_WORDS
        ]
        order = [pool[i] for i in rng.permutation(len(pool))]
        held = [r for r, free in order if free][:VALIDATION_PER_CLASS]
        kept = {r.text for r in held}
        validation += held
        train += [r for r, _ in order if r.text not in kept][:TRAIN_PER_CLASS]
    return (
        [train[i] for i in rng.permutation(len(train))],
        [validation[i] for i in rng.permutation(len(validation))],
    )


def csv_bytes(rows: list[Rated]) -> bytes:
    """Return the rows as CSV with the columns text, label."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["text", "label"])
    writer.writerows([r.text, LABELS[r.rating > 0]] for r in rows)
    return out.getvalue().encode("utf-8")


def pretraining_bytes(rated: list[Rated], held: list[Rated]) -> bytes:
    """Return the unlabelled text as JSONL (text, source), without the validation sentences."""
    hidden = {r.text for r in held}
    rows = [{"text": r.text, "source": r.source} for r in rated if r.text not in hidden]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def card(hashes: dict[str, str]) -> str:
    """Return the data card."""
    rows = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in hashes.items())
    return f"""# The embedded data

`sentiment_train.csv` ({2 * TRAIN_PER_CLASS:,} rows) and `sentiment_validation.csv`
({2 * VALIDATION_PER_CLASS:,} rows): English sentences from film reviews with the columns `text` and
`label` ("negative" or "positive", half and half in both files).

- **Made by** `python tools/make_assets.py`, seed {SEED}; the same seed gives the same bytes.
- **Source**: `vaderSentiment` 3.3.2 (sdist, sha256
  `{VADER_SHA256}`),
  `movieReviewSnippets_GroundTruth.txt`: 10,605 sentences from rotten.tomatoes.com by way of Pang
  and Lee, each rated by at least 15 people from -4 to 4. C. J. Hutto and E. Gilbert (2014),
  *VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text*, ICWSM-14.
  MIT licence, in `LICENSE-vader.txt`.
- **Label**: the sign of the mean rating, for sentences whose mean is {SMALLEST_RATING:g} or more
  away from 0 and that have at least {SHORTEST_WORDS} words: clearer than film reviews at large.
- **Cleaned**: HTML entities undone, runs of white space made one space; each text once.
- **Split**: seeded, classes equal in number. No validation sentence shares {NEAR_SHARE:.0%} or more
  of its word triples (or of the other's, if that is shorter) with any other text, neither in the
  training file nor in the base model's pretraining text.
- **Do not** judge a model that saw this text on SST-2, MR or other sets cut from the same reviews:
  their sentences are the same ones.

`reasoning_train.jsonl` (1,000 rows) and `reasoning_validation.jsonl` (100 rows): arithmetic word
problems with their steps and answers, made by `python tools/make_problems.py` from
`loopos.data.problems`, seed 0; no calculation of the second file is one of the first.

`base_model/` holds the small language model that `loopos demo` starts from, with a card of its own.

| file | sha256 |
|---|---|
{rows}
"""


def write(path: Path, data: bytes) -> str:
    """Write a file, print its size and sha256, and return the sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    print(f"{sha256(data)}  {len(data):>9,} bytes  {path.relative_to(ROOT)}")
    return sha256(data)


def main() -> None:
    """Build everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    packages = ROOT / "build" / "packages"
    parser.add_argument("--packages", type=Path, default=packages, help="where the archive lies")
    archive, licence = read_archive(fetch(parser.parse_args().packages))
    rated = read_rated(archive)
    train, validation = choose(rated)
    hashes = {
        name: write(ASSETS / name, data)
        for name, data in {
            "sentiment_train.csv": csv_bytes(train),
            "sentiment_validation.csv": csv_bytes(validation),
            "LICENSE-vader.txt": licence.encode("utf-8"),
        }.items()
    }
    write(ASSETS / "README.md", card(hashes).encode("utf-8"))
    write(PRETRAINING, pretraining_bytes(rated, validation))


if __name__ == "__main__":
    main()
