"""Build the site: `make docs`. A warning, a broken link or a public name without documentation fails the build."""

import json
import os
import re
import shutil
from pathlib import Path
from textwrap import indent
from typing import Any

import typer.main
from sphinx.application import Sphinx

import hf_nexus
from hf_nexus.cli.app import app as cli

HERE, PACKAGE = Path(__file__).parent, Path(hf_nexus.__file__).parent

project, author, copyright = "hf_nexus", "the hf_nexus authors", "the hf_nexus authors, Apache-2.0"
version = release = hf_nexus.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
smartquotes = False  # they change the dashes of flags
html_theme = "furo"
html_title = "hf_nexus"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
exclude_patterns = ["images/*.py"]
suppress_warnings = ["misc.highlighting_failure"]  # pseudocode

# The notebooks run for the site, each in a temporary folder.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
default_role = "code"  # docstrings have single backticks, as those of transformers
autodoc_typehints = "none"  # the docstrings have the types
autodoc_member_order = "bysource"
napoleon_use_rtype = False


def markdown_to_rst(*args: Any) -> None:
    """Convert what doc-builder renders in docstrings: links to classes, and fenced code."""
    lines: list[str] = args[-1]
    text = re.sub(r"\[(`{1,2})~?([\w.]+)\1\]", r"``\2``", "\n".join(lines))
    fences = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    text = fences.sub(lambda code: ".. code-block:: python\n\n" + indent(code[1], "    "), text)
    lines[:] = text.split("\n")


def write_commands(_: Sphinx) -> None:
    """Write `generated/commands.md`, and a page for each command from its help."""
    folder = HERE / "generated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    group = typer.main.get_command(cli)
    commands = dict(sorted(group.commands.items()))  # type: ignore[attr-defined]
    for name, command in commands.items():
        (folder / f"{name}.md").write_text(_command_page(name, command))
    rows = [f"| [`hf-nexus {name}`]({name}.md) | {_summary(command)} |" for name, command in commands.items()]
    table = "\n".join(["| command | |", "|---|---|", *rows])
    pages = "\n".join(["```{toctree}", ":hidden:", "", *commands, "```"])
    (folder / "commands.md").write_text(f"# Commands\n\n{group.help}\n\n{table}\n\n{pages}\n")


def _summary(command: Any) -> str:
    """The first line of its help, without the example."""
    return command.help.partition("\n")[0].partition(":")[0]


def _command_page(name: str, command: Any) -> str:
    words = [f"{{{param.name}}}" for param in command.params if param.param_type_name == "argument"]
    text = f"# hf-nexus {name}\n\n```bash\nhf-nexus {' '.join([name, *words])}\n```\n\n{command.help}\n\n"
    rows = []
    for param in command.params:
        names = ", ".join(f"`{option}`" for option in [*param.opts, *param.secondary_opts])
        rows.append(f"| {names} | {' '.join((getattr(param, 'help', None) or '').split())} |")
    text += "\n".join(["| | |", "|---|---|", *rows])
    return f"{text}\n\n{command.epilog or ''}\n".replace(str(PACKAGE), "hf_nexus")


def add_colab_badge(_: Sphinx, page: str, source: list[str]) -> None:
    """Link a notebook to Colab where the site is built for a repository, as in its workflow."""
    repository = os.environ.get("GITHUB_REPOSITORY")
    if repository is None or not (HERE / f"{page}.ipynb").is_file():
        return
    notebook = json.loads(source[0])
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    address = f"https://colab.research.google.com/github/{repository}/blob/main/docs/{page}.ipynb"
    install = f"There, first run `%pip install 'hf_nexus[plots] @ git+https://github.com/{repository}'`."
    badge = f"[![Open in Colab]({image})]({address})\n\n{install}"
    notebook["cells"].insert(1, {"cell_type": "markdown", "id": "colab", "metadata": {}, "source": badge})
    source[0] = json.dumps(notebook)


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_colab_badge)
    app.connect("builder-inited", write_commands)
    app.connect("autodoc-process-docstring", markdown_to_rst)
