"""Checkpoints written whole or not at all."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from .bases import ConfigBase, ModelBase
from .checks import check_path
from .switch import replaced_files, settle


class SavesWhole(ModelBase):
    """Makes `save_pretrained` write all files before it replaces the first."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves configuration, weights (safetensors) and the code that a machine without this package needs.

        A save that fails (full disk, no permission) or is interrupted leaves the folder as it was; after a kill the
        next load, or the next save, makes it so.

        Args:
            save_directory (`str` or `os.PathLike`): Folder; made if it does not exist.
            is_main_process (`bool`): Whether this process writes; the others of a distributed run do not.
            state_dict (`dict`, *optional*): Weights to save instead of the model's own.
            push_to_hub (`bool`): Whether to push as well; `repo_id` defaults to the folder's name.
            **kwargs: As in `PreTrainedModel.save_pretrained`.

        Raises:
            OSError: The folder cannot be written; it names the folder.
        """
        check_path("save_directory", save_directory)
        self._announce_backbone()
        target = Path(save_directory)
        if not is_main_process:
            super().save_pretrained(target, is_main_process=False, state_dict=state_dict, **kwargs)
            return
        # The configuration decides: it tells at any time which weights the folder will have when all is settled.
        is_stale = _weights_of(kwargs.get("variant"))
        with _failure_named(target), replaced_files(target, CONFIG_NAME, is_stale) as new:
            super().save_pretrained(new, state_dict=_copied(state_dict), **kwargs)
        if push_to_hub:
            # After the move: what cannot be pushed is at least saved.
            kwargs["repo_id"] = kwargs.get("repo_id") or target.name
            with tempfile.TemporaryDirectory() as draft:
                super().save_pretrained(draft, state_dict=_copied(state_dict), push_to_hub=True, **kwargs)

    # Set where the package is imported: chooses the card that a push carries (here it knows nothing of cards).
    before_upload: ClassVar[Callable[..., None] | None] = None

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if self.before_upload is not None:
            self.before_upload(working_dir, repo_id, token=kwargs.get("token"), revision=kwargs.get("revision"))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _announce_backbone(self) -> None:
        """Names the class that `AutoModel` loads elsewhere from this checkpoint."""
        if self.is_remote_code():
            module = type(self).__module__.rpartition(".")[2]
            names = {"AutoModel": f"{module}.{self.architecture.backbone_name}"}
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **names}


class ReadsWhole(ConfigBase):
    """Makes reading a configuration settle a save that was interrupted in its folder."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        settle_checkpoint(pretrained_model_name_or_path, kwargs.get("subfolder"))
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)


def settle_checkpoint(path: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Undoes a save that was interrupted in this folder, or ends it; nothing for a name on the Hub."""
    settle(Path(path, subfolder or ""))


def _copied(state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """`save_pretrained` empties the one that it is given."""
    return None if state_dict is None else dict(state_dict)


@contextlib.contextmanager
def _failure_named(target: Path) -> Iterator[None]:
    """Says what could not be saved where; safetensors and a full disk do not."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"could not save to {target}, which is as it was: {error}") from error
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; could not save, left as it was", str(target)) from error


def _weights_of(variant: str | None) -> Callable[[str], bool]:
    """Tells a save's files of weights by their names: loading would prefer or mix those of an earlier one."""
    infix = "" if variant is None else re.escape(f".{variant}")
    ours = re.compile(rf"model{infix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{infix}\.json")
    return lambda name: ours.fullmatch(name) is not None
