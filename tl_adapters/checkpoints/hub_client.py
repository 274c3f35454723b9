"""Calls of the Hugging Face hub, of which every failure becomes one error: what happened, the hub's words, what to do.

The hub's client, the HTTP library below it and the libraries around it (datasets, xet) raise some thirty classes, which
differ between their versions; some are no OSError. `hub_errors` is the only place that knows them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from tl_adapters.errors import UserError
from tl_adapters.utils.files import DiskFullError
from tl_adapters.utils.printing import printable_line

RepositoryKind = Literal["model", "dataset"]
MAX_EXPLANATION = 300
"""Most characters of an explanation of the hub that a message repeats."""
TABLE_FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""Formats of a dataset's files that are read, as the datasets library calls them."""
_NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "socket", "ssl")
_OFFLINE = "HF_HUB_OFFLINE is set, so only downloaded repositories are found: unset it, or check the spelling."


_TOKEN: ContextVar[str | None] = ContextVar("hub token", default=None)


@contextmanager
def hub_token(token: str | None) -> Iterator[None]:
    """Within this context, downloads that are given no token of their own use this one; None changes nothing."""
    before = _TOKEN.set(token or _TOKEN.get())
    try:
        yield
    finally:
        _TOKEN.reset(before)


def given_token() -> str | None:
    """The token of the innermost `hub_token`; None leaves the choice to the hub's client (HF_TOKEN, the login)."""
    return _TOKEN.get()


class HubError(UserError, RuntimeError):
    """The hub refused an upload or a download; the message says why and what to do."""


@contextmanager
def hub_errors(
    failed: str,
    repo: str,
    *,
    error: type[UserError] = HubError,
    kind: RepositoryKind = "model",
    upload: bool = False,
    otherwise: str = "That is no answer of a hub: check the name, and HF_ENDPOINT where it is set.",
    instead: str = "",
) -> Iterator[None]:
    """Within this context, whatever a call of the hub raises becomes one error; an error of ours passes unchanged.

    Args:
        failed: the beginning of the message: what was not possible.
        repo: name of the repository.
        error: class of the error.
        kind: "model" or "dataset", which have other addresses.
        upload: whether the call writes to the repository.
        otherwise: what to do about errors that are neither of the network nor an answer of the hub.
        instead: the end of the message: another way, which needs no hub.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as raised:
        causes = _causes(raised)
        if any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
            raise DiskFullError(
                f"The disk is too full to download {repo} into {constants.HF_HUB_CACHE}. Free some space, or set "
                "HF_HOME to a folder on another disk, and call again: what has arrived is not downloaded again."
            ) from raised
        advice = _advice(causes, repo, kind, upload, otherwise)
        raise error(f"{failed} ({_explanation(causes)}). {advice} {instead}".rstrip()) from raised


def dataset_builder(
    name: str,
    subset: str | None = None,
    *,
    revision: str | None = None,
    data_files: str | None = None,
    error: type[UserError] = HubError,
) -> Any:
    """Return the datasets library's builder of a table; to be called within `hub_errors`.

    Nothing but tables of text is read. No code of a data set runs, since releases of the library from 4.0 on, which are
    required, read data files only; and no file is unpickled, which some of the library's other formats do.

    Args:
        name: a dataset of the hub, a folder on this machine, or, with ``data_files``, the format of that file.
        subset: None is the dataset's own.
        revision: branch, tag or commit of the hub's.
        data_files: a file on this machine.
        error: class of the error.

    Raises ``error`` for other files, and for the name of a format, which the library would look for in the current
    folder.
    """
    import datasets  # takes a second to import, and only tables need it

    datasets.disable_progress_bars()
    if os.path.isfile(os.path.join(name, datasets.config.DATASET_STATE_JSON_FILENAME)):
        raise error(f"{name} was written by save_to_disk of the datasets library; write a .jsonl file with to_json.")
    try:
        builder = datasets.load_dataset_builder(name, subset, revision=revision, data_files=data_files)
    except datasets.exceptions.DatasetNotFoundError:
        # The library drops the hub's answer, which says whether a login or a license is missing, so it is asked again.
        HfApi().dataset_info(name, revision=revision)
        raise
    if data_files is None and builder.repo_id is None and not os.path.isdir(name):
        raise error(f"{name} is a format of files and no dataset; give a .jsonl file, a folder, or USER/NAME.")
    file_format = type(builder).__module__.rpartition(".")[2]
    if file_format not in TABLE_FORMATS:
        raise error(
            f"{name} holds files of the format {file_format}, which is not read: conversations are read from "
            f"{', '.join(TABLE_FORMATS)}. Give another dataset, or write it as a .jsonl file."
        )
    return builder


def load_table(builder: Any, split: str, streaming: bool = False) -> Any:
    """Return a split of what `dataset_builder` gave, as a dataset; to be called within `hub_errors`."""
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def require_repository_name(name: str) -> None:
    """Raises HubError for what cannot be the name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HubError(f"{name!r} is not the name of a repository ({error}); give user/name.") from error


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from, the first of them last."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return chain


def _response(causes: list[BaseException]) -> Any:
    """The hub's answer that led to an error; None where there was none."""
    answers = (getattr(cause, "response", None) for cause in causes)
    return next((answer for answer in answers if hasattr(answer, "status_code")), None)


def _explanation(causes: list[BaseException]) -> str:
    """The status and the hub's own words, or the error of the network, on one line."""
    named = [cause for cause in causes if isinstance(cause, HfHubHTTPError)] or causes
    first = named[0]
    response = _response(causes)
    words = getattr(first, "server_message", None) or (response is not None and response.headers.get("X-Error-Message"))
    if response is not None:
        text = f"{response.status_code}: {words or response.reason_phrase}"
    else:
        # LocalEntryNotFoundError and its like hide the error of the network among their causes.
        last = causes[-1] if isinstance(causes[0], EntryNotFoundError) else first
        text = f"{type(last).__name__}: {last}"
    line = printable_line(" ".join(text.split()))
    return line if len(line) <= MAX_EXPLANATION else f"{line[: MAX_EXPLANATION - 3]}..."


def _is_of_network(cause: BaseException) -> bool:
    """Whether an error is of the connection, and not of an answer or a file."""
    library = type(cause).__module__.partition(".")[0]
    cut = "Consistency check failed" in str(cause)  # of the hub's client, for a file that ended early
    return cut or isinstance(cause, (ConnectionError, TimeoutError)) or library in _NETWORK_LIBRARIES


def _advice(causes: list[BaseException], repo: str, kind: RepositoryKind, upload: bool, otherwise: str) -> str:
    """What a user can do about an error."""
    response = _response(causes)
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return (
            "Names of repositories are NAME or USER/NAME; for a folder on this machine, check the spelling of its path."
        )
    if response is None and constants.HF_HUB_OFFLINE:
        return _OFFLINE
    if response is None and not any(map(_is_of_network, causes)):
        return otherwise
    if response is None:
        arrived = "what has arrived is not sent twice" if upload else "what has arrived is not downloaded again"
        return f"Check the network, and HF_ENDPOINT and HTTPS_PROXY where they are set, and call again: {arrived}."
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{repo} has no such revision; give a branch, a tag or a commit that its page lists."
    return _advice_by_status(response, repo, kind, upload)


def _advice_by_status(response: Any, repo: str, kind: RepositoryKind, upload: bool) -> str:
    """What a user can do about an answer of the hub."""
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    status = int(response.status_code)
    if status == 400 and upload:
        return "Change what these words name, and push again: https://huggingface.co/docs/hub lists what is allowed."
    if status in (401, 403) and upload:
        return (
            f"Set HF_TOKEN to a token that may write to {repo} (or run `hf auth login`), and push again: what has "
            "arrived is not sent twice."
        )
    if status in (401, 403):
        unknown = " The hub answers the same for a name that does not exist: check its spelling." * (status == 401)
        return (
            f"Open {page} in a browser, accept the license if it asks for that, and set HF_TOKEN to a token of that "
            f"account (or run `hf auth login`).{unknown}"
        )
    if status == 404:
        return (
            f"Check the spelling of {repo} and the revision. A private repository is found only with a token of an "
            "account that may read it: set HF_TOKEN or run `hf auth login`."
        )
    if status == 429:
        wait = response.headers.get("Retry-After", "")
        seconds = f"{wait} seconds" if wait.isdecimal() and len(wait) < 6 else "some minutes"
        return (
            f"The hub limits the number of requests: wait {seconds} and call again. With HF_TOKEN set it allows more."
        )
    if status >= 500:
        return "The fault is the hub's: call again later. https://status.huggingface.co says whether it is known."
    return f"{page} may say more."
