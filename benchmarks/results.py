"""The page of measured results, of which each benchmark writes its own section."""

import pathlib
import re

RESULTS = pathlib.Path(__file__).with_name("RESULTS.md")


def _find(title: str, page: str) -> re.Match[str] | None:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, flags=re.DOTALL | re.MULTILINE)


def _page() -> str:
    return RESULTS.read_text() if RESULTS.exists() else "# Results\n"


def read_section(title: str) -> str:
    """The text of a section, empty if there is none."""
    found = _find(title, _page())
    return "" if found is None else found[1].strip()


def write_section(title: str, text: str) -> None:
    """Replaces the section `title` of the page, or adds it at the end."""
    page = _page()
    section = f"## {title}\n\n{text.strip()}\n"
    found = _find(title, page)
    if found is None:
        page = page.rstrip() + "\n\n" + section
    else:
        rest = page[found.end() :]
        page = page[: found.start()] + section + ("\n" + rest if rest else "")
    RESULTS.write_text(page)
    print(f"wrote {title!r} to {RESULTS}")


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]
