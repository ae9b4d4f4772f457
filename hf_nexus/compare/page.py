"""The report as one HTML file that needs no other file and no network."""

import base64
import re
from pathlib import Path
from urllib.parse import unquote

__all__ = ["PAGE_NAME", "write_page"]

PAGE_NAME = "report.html"


def write_page(markdown: str, folder: Path, title: str) -> Path:
    """
    Write a report in Markdown as `report.html`, with its PNG images inside and tables that a click sorts. The paths of
    the images are relative to `folder`.
    """
    import jinja2
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    body = re.sub(r'(?<=<img src=")[^"]+', lambda link: _inline(folder / unquote(link[0])), body)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    path = folder / PAGE_NAME
    page = jinja2.Environment(autoescape=True).from_string(template)
    path.write_text(page.render(title=title, body=body) + "\n", encoding="utf-8")
    return path


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
