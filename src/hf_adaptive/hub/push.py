"""Cards on the Hub: put there where there is none, and never over one that somebody wrote."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, ModelCard, create_commit, create_repo, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from ..files import write_whole
from .authorship import is_empty_form, is_nobodys
from .model_card import CARD_FILE, PLOT_FILE, model_card, write_model_card

logger = logging.get_logger(__name__)


def card_on_hub(repo_id: str, token: str | bool | None = None, revision: str | None = None) -> str | None:
    """The text of a repository's card, None if it has none.

    Args:
        repo_id (`str`): Name on the Hub.
        token (`str` or `bool`, *optional*): As everywhere in `huggingface_hub`.
        revision (`str`, *optional*): Branch, tag or commit; a branch that does not exist yet will start as `main`, so
            the card of `main` is what it will have.

    Raises:
        RepositoryNotFoundError: No such repository, or no right to read it.
        LocalEntryNotFoundError: The Hub cannot be reached. Whether there is a card is then not known.
    """
    try:
        path = hf_hub_download(repo_id, CARD_FILE, token=token, revision=revision)
    except RevisionNotFoundError:
        return None if revision is None else card_on_hub(repo_id, token=token)
    except RemoteEntryNotFoundError:
        return None
    return Path(path).read_bytes().decode("utf-8", errors="replace")


def push_model_card(
    card: ModelCard,
    repo_id: str,
    *,
    plot: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo | None:
    """Puts a card into a repository, unless there is one that somebody wrote or edited.

    Args:
        card (`ModelCard`): Made by `model_card`.
        repo_id (`str`): Name on the Hub; made if it does not exist.
        plot (`str` or `os.PathLike`, *optional*): The picture that the card shows; put beside it as `exits.png`.
        overwrite (`bool`): Whether to replace a card that somebody wrote or edited, too.
        token, revision, create_pr (*optional*): As in `huggingface_hub.create_commit`.

    Returns:
        `CommitInfo` or None: None if the card that is there was left alone.

    Raises:
        ValueError: The card's metadata is not valid.
        HfHubHTTPError: The Hub refuses.
    """
    repo_id = create_repo(repo_id, token=token, exist_ok=True).repo_id
    existing = card_on_hub(repo_id, token=token, revision=revision)
    if existing is not None and not overwrite and not is_nobodys(existing):
        logger.warning(
            f"The card of {repo_id} is left as it is: somebody wrote or edited it. To replace it, pass overwrite=True "
            f"to push_model_card."
        )
        return None
    files = {CARD_FILE: str(card).encode()}
    if plot is not None:
        files[PLOT_FILE] = Path(plot).read_bytes()
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return create_commit(
        repo_id,
        operations,
        commit_message="Upload model card",
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def choose_card_to_upload(
    model: Any,
    folder: str | os.PathLike[str],
    repo_id: str,
    token: str | bool | None = None,
    revision: str | None = None,
) -> None:
    """Replaces the card that `PreTrainedModel.push_to_hub` has put into the folder that it is about to upload.

    That card is an empty form, or the repository's own card of `main` written anew, whatever the revision. Instead,
    where the repository has no card, the folder gets ours; where it has one, nothing is uploaded, except for tags that
    were asked for.

    Args:
        model: A classifier with exits.
        folder (`str` or `os.PathLike`): About to be uploaded; has a `README.md`.
        repo_id, token, revision: Where it will be uploaded to.
    """
    path = Path(folder) / CARD_FILE
    tags = _tags(ModelCard(path.read_text(encoding="utf-8")))
    existing = card_on_hub(repo_id, token=token, revision=revision)
    if existing is None or is_empty_form(existing):
        write_model_card(model_card(model, repo_id=repo_id, tags=tags), folder, overwrite=True)
        return
    card = ModelCard(existing, ignore_metadata_errors=True)
    new = [tag for tag in tags if tag not in _tags(card)]
    if new:
        card.data["tags"] = [*_tags(card), *new]
        write_model_card(card, folder, overwrite=True)
    else:
        path.unlink()


def keep_card_of_hub(
    repo_id: str,
    folder: str | os.PathLike[str],
    token: str | bool | None = None,
    revision: str | None = None,
) -> bool:
    """Brings a card that somebody wrote on the Hub into the folder whose upload would replace it.

    For `Trainer`, which uploads its output folder whole. A card that somebody wrote into the folder stays.

    Args:
        repo_id (`str`): Name on the Hub.
        folder (`str` or `os.PathLike`): About to be uploaded; made if it does not exist.
        token, revision: Where it will be uploaded to.

    Returns:
        `bool`: Whether the folder now has the Hub's card.
    """
    existing = card_on_hub(repo_id, token=token, revision=revision)
    if existing is None or is_nobodys(existing):
        return False
    path = Path(folder) / CARD_FILE
    if path.exists():
        own = path.read_text(encoding="utf-8", errors="replace")
        if not is_nobodys(own):
            if own.strip() != existing.strip():
                logger.warning(f"{path} was written or edited by hand: it will replace the other card of {repo_id}.")
            return False
    write_whole(path, lambda draft: Path(draft).write_bytes(existing.encode()))
    return True


def _tags(card: ModelCard) -> list[str]:
    return card.data.get("tags") or []
