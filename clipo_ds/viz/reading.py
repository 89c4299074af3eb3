"""The rollouts themselves, as HTML to read: false equations marked, nearest neighbours, siblings, tables.

What a model wrote is never trusted: every text goes through `html.escape`, and the page gets no script from here.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from clipo_ds.steps import FalseEquation, check_steps
from clipo_ds.viz.frames import CELLS, PART, RIGHT_BUT_WRONG, Rollouts, cells
from clipo_ds.viz.theme import GREEN, GREY, PALE, PURPLE, SKY, VERMILLION

CELL_COLOURS = dict(zip(CELLS, (GREEN, VERMILLION, PURPLE, SKY, GREY, PALE), strict=True))
SHORT = 160  # characters of a text in a table


def mark_false_equations(text: str) -> str:
    """The text as HTML, every false equation marked, with what would be true as the mark's tooltip.

    >>> mark_false_equations("2 + 2 = 5 <b>")
    '<mark title="stated 5, is 4">2 + 2 = 5</mark> &lt;b&gt;'
    """
    pieces, position = [], 0
    for wrong in check_steps(text).wrong:
        if wrong.start < position:
            continue  # the middle of a running equality, marked already
        pieces.append(html.escape(text[position : wrong.start]))
        pieces.append(f'<mark title="{html.escape(_correction(wrong))}">{html.escape(wrong.text)}</mark>')
        position = wrong.end
    return "".join(pieces) + html.escape(text[position:])


def rollout_html(table: Rollouts, row: int) -> str:
    """One rollout in full: what it is worth, its prompt, its reasoning with false equations marked, its answer."""
    entry, texts = table.frame.loc[row], table.texts([row]).iloc[0]
    check = check_steps(texts["response"])
    said = "no equation that could be checked"
    if check.num_equations:
        said = f"{check.num_wrong} of {check.num_equations} checked equations false"
    if not check.wrong and pd.notna(entry["process_consistent"]) and not entry["process_consistent"]:
        said += "; the task's own verifier rejects the steps, which are not those of this problem"
    corrections = "".join(
        f"<li><code>{html.escape(wrong.text)}</code>: {html.escape(_correction(wrong))}</li>" for wrong in check.wrong
    )
    extracted = texts["extracted"]
    answer = "none found" if pd.isna(extracted) else f"<code>{html.escape(extracted)}</code>"
    return (
        f"{heading(table, row)}"
        f'<div class="quiet">{_worth(entry)}</div>'
        f"<h4>Prompt</h4><pre>{html.escape(texts['prompt'])}</pre>"
        f'<h4>Reasoning <span class="{"why" if check.wrong else "quiet"}">{said}</span></h4>'
        f"<pre>{mark_false_equations(texts['response'])}</pre>"
        + (f"<ul>{corrections}</ul>" if corrections else "")
        + f"<div>Answer: {answer} · truth: <code>{html.escape(texts['ground_truth'])}</code></div>"
    )


def heading(table: Rollouts, row: int) -> str:
    """Which rollout this is, as a line with its cell's badge."""
    entry = table.frame.loc[row]
    return (
        f"<h4>Rollout {row} {badge(entry['cell'])} "
        f'<span class="quiet">step {entry["step"]}, prompt #{entry["prompt"]}, {entry["num_tokens"]} tokens'
        f"{', cut at the length cap' if entry['truncated'] else ''}</span></h4>"
    )


def badge(cell: str) -> str:
    """A cell's name on its colour."""
    ink = "#2B2F36" if CELL_COLOURS[cell] in (PALE, SKY, PURPLE) else "white"
    return f'<span class="badge" style="background:{CELL_COLOURS[cell]};color:{ink}">{cell}</span>'


def neighbours(vectors: np.ndarray, rows: np.ndarray, row: int, count: int = 5) -> list[tuple[int, float]]:
    """The rollouts nearest to one in the original space, with their cosine similarity, nearest first.

    Args:
        vectors: Float[M, D], the embeddings of `rows`.
        rows: Int[M].
        row: One of them; it is not its own neighbour.
        count: How many at most.
    """
    wide = vectors.astype(np.float32)
    lengths = np.maximum(np.linalg.norm(wide, axis=1), 1e-9)
    own = int(np.flatnonzero(rows == row)[0])
    similarity = (wide @ wide[own]) / (lengths * lengths[own])
    order = np.argsort(-similarity, kind="stable")
    return [(int(rows[i]), float(similarity[i])) for i in order[: count + 1] if i != own][:count]


def siblings(table: Rollouts, row: int) -> np.ndarray:
    """Rows of the rollout's group, itself left out."""
    entry = table.frame.loc[row]
    rows = table.rows_of(entry["step"], entry["group"])
    return rows[rows != row]


def suspects(table: Rollouts, limit: int = 20) -> pd.DataFrame:
    """Rollouts whose answer is right and whose process is wrong, worst first.

    The worst are those that training reinforces most: by advantage, then by the number of their false equations.
    Columns as in `table.frame`, TEXTS and `num_wrong`; the index is the row.
    """
    chosen = table.frame[table.frame["cell"] == RIGHT_BUT_WRONG]
    chosen = chosen.sort_values(["advantage", "step"], ascending=[False, True], kind="stable").head(limit)
    found = chosen.join(table.texts(chosen.index.to_numpy()).drop(columns="prompt"))
    found["num_wrong"] = [check_steps(text).num_wrong for text in found["response"]]
    return found.sort_values(["advantage", "num_wrong"], ascending=False, kind="stable")


def suspects_html(table: Rollouts, limit: int = 20) -> str:
    """The list behind `suspects_view`, to be opened one by one."""
    found = suspects(table, limit)
    total = int((table.frame["cell"] == RIGHT_BUT_WRONG).sum())
    if total == 0:
        if table.frame["process_consistent"].isna().all():
            return '<div class="note">No reasoning of this run states an equation that could be checked.</div>'
        return "<div>No right answer of this run has a false step.</div>"
    right = int(table.frame["correct"].sum())
    shown = f", the {len(found)} with the highest advantage" if total > len(found) else ""
    items = [f"<h4>{total:,} of {right:,} right answers have a false step{shown}</h4>"]
    for row, entry in found.iterrows():
        items.append(
            f"<details><summary>advantage {entry['advantage']:+.2f} · {entry['num_wrong']} false · "
            f"{mark_false_equations(short(entry['response'], 110))}</summary>{rollout_html(table, row)}</details>"
        )
    return "".join(items)


def rollouts_table(table: Rollouts, rows: Sequence[int] | np.ndarray, similarity: Sequence[float] | None = None) -> str:
    """Some rollouts as an HTML table, short."""
    rows = np.asarray(rows, dtype=np.int64)
    texts = table.texts(rows)
    lines = []
    for place, row in enumerate(rows.tolist()):
        entry, text = table.frame.loc[row], texts.loc[row]
        cells = [("", str(row)), ("", str(entry["step"]))]
        if similarity is not None:
            cells.append(("", f"{similarity[place]:.3f}"))
        cells += [
            ("text", badge(entry["cell"])),
            ("", f"{entry['advantage']:+.2f}"),
            ("", _number(entry["contrastive_reward"], "+.2f")),
            ("text", html.escape(short(text["prompt"], 60, end=True))),
            ("text", mark_false_equations(short(text["response"]))),
        ]
        lines.append("".join(f'<td class="{kind}">{value}</td>' for kind, value in cells))
    names = ["rollout", "step", *(["cosine"] if similarity is not None else []), "answer and process", "advantage"]
    names += ["contrastive reward", "prompt", "response"]
    return html_table(names, lines, text=("answer and process", "prompt", "response"))


def responses_table(responses: pd.DataFrame) -> str:
    """Responses with `correct`, `process_consistent` and `num_tokens` as an HTML table, in full."""
    words = cells(responses["correct"], responses["process_consistent"].astype("boolean"))
    lines = [
        f'<td class="text">{badge(word)}</td><td>{tokens}</td><td class="text">{mark_false_equations(text)}</td>'
        for word, tokens, text in zip(words, responses["num_tokens"], responses["response"], strict=True)
    ]
    return html_table(["answer and process", "tokens", "response"], lines, text=("answer and process", "response"))


def html_table(names: Sequence[str], lines: Sequence[str], text: Sequence[str] = ()) -> str:
    """A table of ready-made rows; `text` names the columns that hold words."""
    head = "".join(f'<th class="{"text" if name in text else ""}">{html.escape(name)}</th>' for name in names)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def separation_table(scores: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Figures beside their shuffled-label baselines; what exceeds its baseline is bold."""
    lines = []
    for name, score in scores.items():
        if score.value is None:
            cells = [f'<td class="quiet" colspan="2">{html.escape(score.why)}</td>']
        else:
            above = score.high is not None and score.value > score.high
            value = f"{score.value:.3f}"
            interval = "" if score.low is None else f"{score.baseline:.3f} [{score.low:.3f}, {score.high:.3f}]"
            cells = [f"<td>{f'<b>{value}</b>' if above else value}</td>", f'<td class="quiet">{interval}</td>']
        lines.append(f'<td style="text-align:left">{html.escape(words[name])}</td>{"".join(cells)}')
    return html_table(["figure", "value", "labels shuffled within groups"], lines, text=("figure",))


def short(text: str, length: int = SHORT, *, end: bool = False) -> str:
    """The beginning of a text, or its end, on one line."""
    line = " ".join(text.split())
    if len(line) <= length:
        return line
    return "… " + line[-length:] if end else line[:length] + " …"


def _correction(wrong: FalseEquation) -> str:
    if wrong.actual is wrong.stated is None:
        return "is never true"
    if wrong.actual is None or wrong.stated is None:
        return "has no value"
    return f"stated {_fraction(wrong.stated)}, is {_fraction(wrong.actual)}"


def _fraction(value: Fraction) -> str:
    """Whole numbers as they are, others with six digits."""
    if value.denominator == 1:
        return str(value.numerator) if abs(value.numerator) < 10**30 else "a number of more than 30 digits"
    return f"{float(value):.6g}" if abs(value.numerator).bit_length() < 1000 else "a very large number"


def _worth(entry: pd.Series) -> str:
    parts = [f"reward {entry['reward']:.3f} = outcome {entry['outcome_reward']:.3f}"]
    parts[0] += f" + contrastive {_number(entry['contrastive_reward'], '.3f')}"
    for name in entry.index[entry.index.str.startswith(PART)]:
        parts[0] += f" + {html.escape(name.removeprefix(PART))} {_number(entry[name], '.3f')}"
    if entry["other_reward"]:
        parts[0] += f" + other {entry['other_reward']:.3f}"
    parts.append(f"advantage {entry['advantage']:+.3f}")
    if not pd.isna(entry["contrastive_loss"]):
        parts.append(f"contrastive loss {entry['contrastive_loss']:.3f}")
    return " · ".join(parts)


def _number(value: float, form: str) -> str:
    return "-" if pd.isna(value) else f"{value:{form}}"
