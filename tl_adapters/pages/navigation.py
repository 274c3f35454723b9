"""The navigation in the head of every page: links among the pages that exist in a run folder.

A page is written when its stage is done, so its navigation lacks the pages of later stages. The report is written after
every stage, and then the navigation of the other pages is written again (`refresh_navigation`); nothing else in them
changes. Of feature pages this holds for the index only, since there may be thousands of the others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tl_adapters.errors import UserError
from tl_adapters.utils.files import write_text
from tl_adapters.utils.html import render
from tl_adapters.utils.reading import read_text
from tl_adapters.utils.results import RESULTS_FILE, is_own_output, output_file, read_results, write_output

log = logging.getLogger(__name__)

REPORT_PAGE_FILE = "report.html"
HESITATION_PAGE_FILE = "hesitation.html"
SWEEP_PAGE_FILE = "sweep.html"
GRAPHS_FOLDER = "graphs"
"""Folder of the attribution graphs within a run."""
FEATURE_PAGES_FOLDER = "features/pages"
"""Folder of the feature pages within a run."""
FEATURE_INDEX_PAGE = "index.html"
MAX_GRAPH_LINKS = 8
"""Graphs that a navigation links; the report lists those of the run."""
_NAVIGATION = re.compile(r'<nav class="pages".*?</nav>', re.DOTALL)
"""The navigation of a written page; no other text of a page can hold this tag, because templates escape."""


@dataclass(frozen=True)
class PageLink:
    """A page as the navigation of another page, or of itself, names it."""

    name: str
    """Displayed name."""
    address: str
    """Address from the folder that is ``up`` folders above the page."""
    up: int = 0
    """Number of folders between the page and that folder."""
    current: bool = False
    """Whether it is the page itself."""


def page_links(page: str | Path) -> list[PageLink]:
    """Return the navigation of a page: the pages that exist in its run folder, in their usual order, and itself.

    The report is always among those of features and of the circuit, whose commands write it at their end.

    Args:
        page: path of the page, which need not exist yet. Empty is returned for a page that is in no run folder.
    """
    page = Path(page).absolute()
    run = _run_of(page)
    if run is None:
        return []
    here = page.relative_to(run)
    up = len(here.parts) - 1
    # What may not exist yet: the page itself, and the index of the feature pages that are being written.
    coming = {here.as_posix(), *((folder / FEATURE_INDEX_PAGE).as_posix() for folder in here.parents)}
    if here.parts[0] != GRAPHS_FOLDER:
        coming.add(output_file(run, REPORT_PAGE_FILE).name)
    links = [
        PageLink(name, address, up, address == here.as_posix())
        for name, address in _named_pages(run)
        if address in coming or (run / address).is_file()
    ]
    if (run.parent / SWEEP_PAGE_FILE).is_file() and (run.parent / "sweep.json").is_file():
        links.insert(0, PageLink("Sweep", SWEEP_PAGE_FILE, up + 1))
    return links


def refresh_navigation(run: str | Path) -> None:
    """Write the navigation of the pages of a run again where pages were added or removed; the rest of them stays.

    A page without a navigation of ours, or a report or a circuit's page that the user changed, is left as it is.

    Raises WriteError.
    """
    run = Path(run)
    outputs = {output_file(run, name): name for name in (REPORT_PAGE_FILE, HESITATION_PAGE_FILE)}
    for _, address in _named_pages(run):
        page = run / address
        try:
            text = read_text(page)
        except UserError:  # no page yet, or a file of the user's that is no text
            continue
        navigation = str(render("shared/navigation.html.j2", pages=page_links(page))).strip()
        before, found, after = _parted(text)
        if not found or found == navigation:
            continue
        if page not in outputs:
            write_text(page, before + navigation + after)
        elif is_own_output(run, outputs[page]):
            write_output(run, outputs[page], before + navigation + after)


def _parted(page: str) -> tuple[str, str, str]:
    """The text of a page before its navigation, the navigation, and the text after it; "" where it has none."""
    match = _NAVIGATION.search(page)
    return (page, "", "") if match is None else (page[: match.start()], match[0], page[match.end() :])


def _named_pages(run: Path) -> Iterator[tuple[str, str]]:
    """The pages that a run may have, as (name, address from the run folder)."""
    yield "Report", output_file(run, REPORT_PAGE_FILE).name
    yield "Features", f"{FEATURE_PAGES_FOLDER}/{FEATURE_INDEX_PAGE}"
    yield "Neurons", f"features/neuron_pages/{FEATURE_INDEX_PAGE}"
    graphs = sorted((run / GRAPHS_FOLDER).glob("*.html"), key=lambda path: (len(path.name), path.name))
    for path in [path for path in graphs if not path.name.startswith(".")][:MAX_GRAPH_LINKS]:
        yield path.stem.replace("moment-", "Graph "), f"{GRAPHS_FOLDER}/{path.name}"
    yield "Circuit", output_file(run, HESITATION_PAGE_FILE).name


def _run_of(page: Path) -> Path | None:
    """The run folder that a page is in, at most three folders above it; None where there is none."""
    for folder in list(page.parents)[:4]:
        if (folder / RESULTS_FILE).is_file():
            try:
                read_results(folder)
            except UserError:  # a file of another program, or damaged: a page is written without it
                log.debug("%s is not of a run.", folder / RESULTS_FILE)
                return None
            return folder
    return None
