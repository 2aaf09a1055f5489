"""Accuracy, throughput and latency of the ways of one task and seed, in turn in one process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from deployment_models import TaskModels
from deployment_systems import Answers, Loader, System, Way
from tqdm.auto import tqdm

# Single texts that one way classifies before the next one does.
TURN = 25
WARM_UP_TEXTS = 64


class Timing:
    """What was measured of one task and seed.

    Args:
        models (`TaskModels`): Whose.
        repeats (`int`): How often everything is run.
        single_texts (`int`): Texts that are classified one at a time.
        threads (`int`): Of every engine.
    """

    def __init__(self, models: TaskModels, repeats: int, single_texts: int, threads: int):
        data = models.data
        self.title = f"{data.name}, seed {models.seed}"
        self.loader = Loader(data, threads)
        self.repeats = repeats
        self.texts = list(data.test["text"])
        self.labels = np.array(data.test["label"])
        self.single_texts = self.texts[:single_texts]

    def measure(self, prepared: Mapping[str, dict[str, Any]], found: list[System]) -> dict[str, Any]:
        """Runs every system that is prepared, with all its settings.

        Args:
            prepared: What `prepare` of each returned, by name.
            found: All systems.

        Returns:
            `dict`: By point: its system's `series`, `label` and `kind`, what was set, and what was measured.
        """
        points = [(system, setting) for system in found if system.name in prepared for setting in system.settings]
        ways = {
            system.point(setting): system.load(self.loader, prepared[system.name], setting)
            for system, setting in tqdm(points, desc=f"{self.title}: loading", leave=False)
        }
        whole, alone = self._whole(ways), self._alone(ways)
        return {
            system.point(setting): {
                "series": system.series,
                "label": system.label or setting,
                "kind": system.kind,
                "setting": prepared[system.name].get(setting, {}),
                **self._measured(whole[system.point(setting)]),
                **_alone(alone[system.point(setting)]),
            }
            for system, setting in points
        }

    def _whole(self, ways: Mapping[str, Way]) -> dict[str, list[Answers]]:
        """All texts."""
        for way in tqdm(ways.values(), desc=f"{self.title}: warm-up", leave=False):
            way(self.texts[:WARM_UP_TEXTS])
        rounds = [name for _ in range(self.repeats) for name in ways]
        answers: dict[str, list[Answers]] = {name: [] for name in ways}
        for name in tqdm(rounds, desc=f"{self.title}: throughput"):
            answers[name].append(ways[name](self.texts))
        return answers

    def _alone(self, ways: Mapping[str, Way]) -> dict[str, list[Answers]]:
        """One text at a time."""
        answers: dict[str, list[Answers]] = {name: [] for name in ways}
        for start in tqdm(range(0, len(self.single_texts), TURN), desc=f"{self.title}: latency"):
            for name, way in ways.items():
                way(self.single_texts[:1], is_alone=True)
                answers[name] += [way([text], is_alone=True) for text in self.single_texts[start : start + TURN]]
        return answers

    def _measured(self, answers: list[Answers]) -> dict[str, Any]:
        return {
            "accuracy": float((answers[0].classes == self.labels).mean()),
            "texts": len(self.texts),
            "seconds": [each.seconds for each in answers],
            "tokenised_seconds": [each.tokenised_seconds for each in answers],
            "cost": answers[0].cost,
        }


def _alone(answers: list[Answers]) -> dict[str, list[float]]:
    return {
        "single_seconds": [each.seconds for each in answers],
        "single_tokenised_seconds": [each.tokenised_seconds for each in answers],
    }


def has_vnni() -> bool:
    """Whether this machine's processor multiplies 8-bit numbers in one instruction."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.exists() else set()
    return bool(words & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
