"""Pages link to files outside of docs/ as GitHub finds them; this hook says where the site has these files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ON_SITE = {"../benchmarks/results/": "records/", "../notebooks/": "notebooks/", "docs/": ""}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite a page: links to pictures and notebooks, and a page that is a link to a Markdown file into that file."""
    whole = re.fullmatch(r"\[.+\]\(\.\./(.+\.md)\)\s*", markdown)
    markdown = (ROOT / whole[1]).read_text(encoding="utf-8") if whole else markdown
    for there, here in ON_SITE.items():
        markdown = markdown.replace(f"]({there}", f"]({here}")
    return markdown
