"""A report's page: one file that needs nothing else."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #22223b; max-width: 1040px; margin: 2.5em auto;
       padding: 0 1.5em; }}
h1 {{ font-size: 1.5em; margin: 0; }} h2 {{ font-size: 1.1em; margin: 2.2em 0 .6em; }} p {{ margin: .3em 0; }}
table {{ border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .22em .9em; border-bottom: 1px solid #e4e4e8; }}
th {{ font-weight: 600; color: #6a6a78; vertical-align: bottom; }}
th:first-child, td:first-child {{ padding-left: 0; }} .words {{ text-align: left; }}
tr.all td {{ font-weight: 600; }}
svg {{ width: 100%; height: auto; }} .films {{ display: flex; flex-wrap: wrap; gap: 1em; }}
pre {{ font-size: .8em; }} .quiet {{ color: #6a6a78; }}
</style></head><body>
{body}
</body></html>
"""


def write_page(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Puts the page there whole; gives its path.  sections: markup."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *sections])
    partial = path.with_suffix(".partial")
    partial.write_text(PAGE.format(title=html.escape(title), body=body), encoding="utf-8")
    os.replace(partial, path)
    return path


def table(head: Sequence[str], body: Sequence[Sequence[str]], *, words: Sequence[str] = (), sums: bool = False) -> str:
    """words: the columns that are text.  sums: the last line is of all the others."""
    kinds = [' class="words"' if name in words else "" for name in head]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    lines = [f"<tr>{line('td', cells)}</tr>" for cells in body]
    if sums:
        lines[-1] = lines[-1].replace("<tr>", '<tr class="all">')
    return f"<table><tr>{line('th', head)}</tr>{''.join(lines)}</table>"


def embedded(film: Path) -> str:
    """An animation as an image in the page."""
    data = base64.b64encode(film.read_bytes()).decode()
    return f'<img alt="{html.escape(film.stem)}" src="data:image/webp;base64,{data}">'


def hours(seconds: float) -> str:
    """A time in hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"
