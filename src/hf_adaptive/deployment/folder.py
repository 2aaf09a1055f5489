"""What an exported classifier consists of on disk. Without torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE, STAGES_FILE, TOKENIZER_FILE = "config.json", "stages.json", "tokenizer.json"
FORMAT = 2
# Inputs and outputs of graphs that are no columns of examples.
STATE, NEXT_STATE, IS_ASKED = "state", "next_state", "is_asked"
QUANTIZATIONS = ("int8",)


@dataclass(frozen=True)
class Stage:
    """One graph.

    Args:
        file (`str`): Its name in the folder.
        inputs (`list[str]`): What it is given: tokens and masks, or `state`, what the stage before it handed on; and
            `is_asked` where the exit has layers of its own, which are not run if it is false.
        outputs (`list[str]`): `logits` (before temperatures), `certainty` where it is learned, and `next_state` where
            a later stage goes on from it.
    """

    file: str
    inputs: list[str]
    outputs: list[str]


@dataclass(frozen=True)
class Stages:
    """The content of `stages.json`: what the graphs are, and what the configuration has no field for.

    Args:
        stages (`list[Stage]`): In the order in which they are run.
        costs (`list[float]`): Cost of each exit, as `exit_costs` of the model.
        branch_costs (`list[float]`): The part of each exit's cost that is its own layers, as `exit_branch_costs`.
        limits (`dict[str, int]`): How many values there are for each input that is looked up in a table.
        certainty_ranges (`list[list[float]]`, *optional*): Least and largest certainty of each exit's learned unit.
        quantize (`str`, *optional*): How the weights were quantised.
        opset (`int`): Of the graphs.
        format (`int`): Version of this layout.
    """

    stages: list[Stage]
    costs: list[float]
    branch_costs: list[float]
    limits: dict[str, int]
    certainty_ranges: list[list[float]] | None
    quantize: str | None
    opset: int
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Writes `stages.json`."""
        (folder / STAGES_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Stages":
        """Reads `stages.json` and checks that the graphs are there.

        Raises:
            OSError: A folder that does not exist, that holds something else, or a part of an exported classifier only.
        """
        if not folder.is_dir():
            raise OSError(
                f"{folder} is no folder. Give the folder that export_onnx wrote; one on the Hub is downloaded first, "
                "with huggingface_hub.snapshot_download(...)."
            )
        values = read_json(folder, STAGES_FILE)
        if values.get("format") != FORMAT:
            raise OSError(
                f"{folder / STAGES_FILE} has format {values.get('format')!r}; this version reads {FORMAT}. Export the "
                "model again."
            )
        values["stages"] = [Stage(**stage) for stage in values["stages"]]
        found = cls(**values)
        missing = [stage.file for stage in found.stages if not (folder / stage.file).is_file()]
        if missing:
            raise OSError(f"{folder} holds a part of an exported classifier: {missing} are missing. Copy it again.")
        return found


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The content of a file of an exported classifier.

    Raises:
        OSError: It is missing or damaged.
    """
    path = folder / name
    if not path.is_file():
        held = sorted(file.name for file in folder.iterdir())
        raise OSError(
            f"{folder} holds no classifier exported by hf_adaptive.export_onnx: {name} is missing among {held[:8]}. "
            "Export one, or give its folder."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise OSError(f"{path} is damaged: {error}. Copy or export it again.") from error


def is_graph(name: str) -> bool:
    """Whether a file is a graph (or its weights) of an exported classifier, by its name."""
    return name.startswith("stage-") and (name.endswith(".onnx") or name.endswith(".onnx.data"))


def graph_file(index: int) -> str:
    """Name of a stage's graph, counted from 0."""
    return f"stage-{index + 1}.onnx"
