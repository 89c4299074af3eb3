"""Write clipo_ds/recipes/easy_sums.jsonl and easy_sums_test.jsonl: one-step word problems for the recipe smollm2_cpu.

A model of 135M parameters solves them sometimes: three solved examples stand before each problem, because without them
it hardly ever writes an answer in a box (none right in 240 samples), and with them about one answer in five is right.
Everything comes from the templates below and a fixed seed, so the files can be made again byte by byte; no problem of
the test file is in the training file.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Ben", "Carla", "Dev", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemi", "Lin")
THINGS = ("apples", "marbles", "stickers", "books", "shells", "pencils", "cards", "coins", "buttons", "stamps")

EXAMPLES = (
    ("Mia has 4 pears and gets 3 more. How many pears does Mia have now?", "4 + 3 = 7", 7),
    ("Tom has 9 kites and gives 5 away. How many kites are left?", "9 - 5 = 4", 4),
    ("Zoe fills 2 bags with 6 nuts each. How many nuts are in the bags?", "2 * 6 = 12", 12),
)
TEMPLATES = (
    ("{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", "+"),
    ("There are {a} {thing} on one table and {b} on another. How many {thing} are there in all?", "+"),
    ("{name} finds {a} {thing} on Monday and {b} on Tuesday. How many {thing} is that together?", "+"),
    ("{name} has {a} {thing} and gives {b} away. How many {thing} are left?", "-"),
    ("A box holds {a} {thing}. {name} takes out {b}. How many {thing} stay in the box?", "-"),
    ("{name} fills {a} bags with {b} {thing} each. How many {thing} are in the bags?", "*"),
)


def make_problem(rng: random.Random) -> tuple[str, int]:
    """One problem's text and its answer; numbers are 2 to 9, and what is taken away leaves something."""
    text, operation = rng.choice(TEMPLATES)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if operation == "-":
        a, b = max(a, b) + 1, min(a, b)
    answer = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return text.format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=a, b=b), answer


def make_row(text: str, answer: int, index: int, split: str) -> dict[str, Any]:
    """A problem in the layout of RLVR data, with the solved examples as earlier turns of the chat."""
    messages = []
    for example, equation, result in EXAMPLES:
        messages.append({"role": "user", "content": example})
        messages.append({"role": "assistant", "content": f"{equation}. The answer is \\boxed{{{result}}}."})
    return {
        "data_source": "easy_sums",
        "prompt": [*messages, {"role": "user", "content": text}],
        "ability": "math",
        "reward_model": {"ground_truth": str(answer), "style": "rule"},
        "extra_info": {"index": index, "split": split},
    }


def make_rows(num_train: int, num_test: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of both files by split; all problems differ."""
    rng = random.Random(seed)
    answers: dict[str, int] = {}
    while len(answers) < num_train + num_test:
        text, answer = make_problem(rng)
        answers[text] = answer
    problems = list(answers.items())
    splits = {"train": problems[:num_train], "test": problems[num_train:]}
    return {
        split: [make_row(text, answer, index, split) for index, (text, answer) in enumerate(chosen)]
        for split, chosen in splits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the two easy_sums files of the shipped recipes.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "clipo_ds" / "recipes")
    out = parser.parse_args().out
    for split, rows in make_rows(num_train=200, num_test=40, seed=0).items():
        name = "easy_sums.jsonl" if split == "train" else f"easy_sums_{split}.jsonl"
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
