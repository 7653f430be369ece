"""The page of measured results, of which each benchmark writes its own section."""

import pathlib
import re

RESULTS = pathlib.Path(__file__).with_name("RESULTS.md")


def write_section(title: str, text: str) -> None:
    """Replaces the section `title` of the page, or adds it at the end."""
    page = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    section = f"## {title}\n\n{text.strip()}\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", page, flags=re.DOTALL | re.MULTILINE)
    if found is None:
        page = page.rstrip() + "\n\n" + section
    else:
        rest = page[found.end() :]
        page = page[: found.start()] + section + ("\n" + rest if rest else "")
    RESULTS.write_text(page)
    print(f"wrote {title!r} to {RESULTS}")
