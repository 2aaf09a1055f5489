"""Files of a study: each is whole or not there, and a folder holds results of one setting only."""

import json
from pathlib import Path
from typing import Any

from hf_adaptive.files import write_whole


def write_json(path: Path, content: Any) -> None:
    """Writes the file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda draft: Path(draft).write_text(text, encoding="utf-8"))


def keep_settings(folder: Path, settings: dict[str, Any], growing: str | None = None) -> None:
    """Writes `settings.json` of a folder whose results must not be mixed with those of other settings.

    Args:
        folder (`Path`): Where the results are.
        settings (`dict[str, Any]`): What changes them.
        growing (`str`, *optional*): One of the settings, by name: a dict to which entries may be added later.

    Raises:
        ValueError: The folder holds results of other settings.
    """
    path = folder / "settings.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    changed = [f"{name}={stored.get(name)!r}" for name in _changed(settings, stored) if name != growing]
    if growing is not None:
        changed += [
            f"{growing}[{name!r}]={stored[growing][name]!r}"
            for name in _changed(settings[growing], {**settings[growing], **stored[growing]})
        ]
        settings = {**settings, growing: {**stored[growing], **settings[growing]}}
    if changed:
        raise ValueError(
            f"{folder} holds results of other settings: {', '.join(changed)}. Use these, or another output_dir."
        )
    write_json(path, settings)


def _changed(settings: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    return [name for name in settings if settings[name] != stored.get(name)]
