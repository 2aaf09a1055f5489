"""Measured time, of several things beside each other."""

import time
from collections.abc import Callable, Mapping

from transformers.utils import logging


def seconds_in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, show_progress: bool = True
) -> dict[str, list[float]]:
    """Times every run once a round, after one that does not count, so that a machine that slows down slows all.

    Args:
        runs (`Mapping[str, Callable]`): What to time, by name.
        rounds (`int`): How often.
        show_progress (`bool`): Whether to show a bar.

    Returns:
        `dict[str, list[float]]`: Seconds by name, a number a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with logging.tqdm(total=rounds * len(runs), desc="Measuring time", disable=not show_progress) as bar:
        for run in runs.values():
            run()
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds
