"""How well a subject does the tasks, behind its first token (BOS) and without it: a table of trainers/tasks/README.md.

    python -m tests.benchmarks.tasks smollm2-135m [--prompts 120]

In float32. Of induction a quarter of the prompts, R of 20, 50 and 100 tokens.
"""

import argparse
import time
from functools import partial
from typing import Any

from saescale.storage.errors import SaescaleError
from saescale.trainers.subjects.subject import get_subject
from saescale.trainers.tasks import induction
from saescale.trainers.tasks.task import METRIC, TASKS, find_task, measure_task, steerable

LENGTHS = (20, 50, 100)
AT_A_TIME = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject")
    parser.add_argument("--prompts", type=int, default=120)
    given = parser.parse_args()
    subject: Any = get_subject(given.subject, dtype="float32")
    first = subject.bos_token_id
    asked: list[tuple[str, str, Any, int]] = []
    for name in TASKS.names():
        if name == "induction":
            few = max(2, given.prompts // 4)
            asked += [(name, f"R of {each}", partial(induction.prompts, tokens=each), few) for each in LENGTHS]
        else:
            asked.append((name, "", find_task(name).prompts, given.prompts))
    print("| task | | behind | prompts | " + METRIC + " | of which | on corrupted prompts |")
    print("|---|---|---|---|---|---|---|")
    for name, what, prompts, number in asked:
        for behind in dict.fromkeys((first, None)):
            subject.bos_token_id = behind
            began = time.monotonic()
            try:
                drawn = prompts(subject, number, 0)
            except SaescaleError as error:
                print(f"{name}: {error}")
                continue
            clean, corrupt = (mean_scores(subject, name, drawn, which) for which in ("ids", "corrupt"))
            parts = ", ".join(f"{part} {value:.2f}" for part, value in clean.items() if part != METRIC)
            token = "BOS" if behind is not None else "nothing"
            print(
                f"| {name} | {what} | {token} | {number} | {clean[METRIC]:.2f} | {parts} | {corrupt[METRIC]:.2f} |"
                f" <!-- {time.monotonic() - began:.0f} s -->",
                flush=True,
            )


def mean_scores(subject: Any, name: str, prompts: Any, which: str) -> dict[str, float]:
    """Over all prompts, some at a time."""
    totals: dict[str, float] = {}
    for start in range(0, len(prompts.ids), AT_A_TIME):
        some = prompts.part(slice(start, start + AT_A_TIME))
        for part, values in measure_task(steerable(subject), find_task(name), some, getattr(some, which)).items():
            totals[part] = totals.get(part, 0.0) + float(values.double().sum())
    return {part: total / len(prompts.ids) for part, total in totals.items()}


if __name__ == "__main__":
    main()
