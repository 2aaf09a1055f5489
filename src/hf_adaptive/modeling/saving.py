"""Checkpoints written whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any


class SavesWhole:
    """Makes `save_pretrained` write to a folder beside the target first, and move the files when all are there."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves configuration, weights (safetensors) and the code that a machine without this package needs.

        An interrupted or failed save (full disk, no permission) leaves the folder as it was.

        Args:
            save_directory (`str` or `os.PathLike`): Folder; made if it does not exist.
            is_main_process (`bool`): Whether this process writes; the others of a distributed run do not.
            state_dict (`dict`, *optional*): Weights to save instead of the model's own.
            push_to_hub (`bool`): Whether to push as well; `repo_id` defaults to the folder's name.
            **kwargs: As in `PreTrainedModel.save_pretrained`.

        Raises:
            OSError: The folder cannot be written.
        """
        if push_to_hub:
            kwargs["repo_id"] = kwargs.get("repo_id") or Path(save_directory).name
        self._announce_backbone()
        target = Path(save_directory)
        if not is_main_process:
            super().save_pretrained(target, is_main_process=False, state_dict=state_dict, **kwargs)
            return
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".incomplete-") as draft:
            super().save_pretrained(draft, state_dict=state_dict, push_to_hub=push_to_hub, **kwargs)
            _move_files(Path(draft), target)

    def _announce_backbone(self) -> None:
        """Names the class that `AutoModel` loads elsewhere from this checkpoint."""
        if self.is_remote_code():
            module = type(self).__module__.rpartition(".")[2]
            names = {"AutoModel": f"{module}.{self.architecture.backbone_name}"}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **names}


def _move_files(source: Path, target: Path) -> None:
    """Moves every file; the configuration last, because a folder without one cannot be loaded by mistake."""
    names = sorted((path.name for path in source.iterdir()), key=lambda name: name == "config.json")
    _remove_stale_shards(target, names)
    for name in names:
        os.replace(source / name, target / name)


def _remove_stale_shards(target: Path, names: list[str]) -> None:
    """Removes weights of an earlier save that this one does not overwrite: loading would prefer or mix them."""
    for stale in target.glob("model*.safetensors*"):
        if stale.name not in names:
            stale.unlink()
