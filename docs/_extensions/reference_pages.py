"""The API reference: a page for each family of ops, and for what surrounds them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.mock import mock
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import rewardops
from rewardops.core.families import FAMILIES

# The families in their order, then what other modules of functions there are.
_modules = (m.name for m in pkgutil.iter_modules(rewardops.__path__) if not m.ispkg)
MODULES = dict.fromkeys([*FAMILIES, *(name for name in _modules if not name.startswith("_"))])
# Page: its title, and the modules or names that it documents.
PAGES = {name: (name, [f"rewardops.{name}"]) for name in MODULES} | {
    "backends": (
        "Backends and settings",
        ["rewardops.use_backend", "rewardops.BackendUnavailable", "rewardops.show_config", "rewardops.debug"],
    ),
    "testing": ("Testing kit", ["rewardops.testing", "rewardops.testing.strategies"]),
    "viz": ("Drawings of prefix trees", ["rewardops.viz"]),
    "adapters": ("Adapters", ["rewardops.integrations.adapters"]),
    "integrations": (
        "Integrations",
        ["rewardops.integrations.trl", "rewardops.integrations.verl", "rewardops.integrations.torchrl"],
    ),
}


def public(module: ModuleType) -> list[str]:
    """``__all__``, or else what a module defines: functions in their order, then classes."""
    own = (name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__)
    names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    functions = {name: inspect.unwrap(x) for name in names if inspect.isfunction(x := getattr(module, name))}
    in_order = sorted(
        functions, key=lambda n: (functions[n].__module__, functions[n].__code__.co_firstlineno)
    )
    return in_order + [name for name in names if name not in functions]


def directive(path: str) -> str:
    """The directive that documents an object under ``path``."""
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    if isinstance(thing, type):
        kind = "exception" if issubclass(thing, BaseException) else "class"
        ours = any(base.__module__.startswith("rewardops") for base in thing.__bases__)
        return f".. auto{kind}:: {path}\n   :members:\n" + "   :show-inheritance:\n" * ours
    return f".. auto{'function' if inspect.isroutine(thing) else 'data'}:: {path}\n"


class PublicNames(SphinxDirective):
    """The public names of a module, or a name of the package, with their docstrings.

    Each is under the path by which users import it: ``rewardops.gae``, not ``rewardops.td.gae``.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        with mock(self.config.autodoc_mock_imports):
            return self.parse_text_to_nodes("\n".join(self.lines(self.arguments[0])))

    def lines(self, path: str) -> Iterator[str]:
        if is_name(path):
            yield directive(path)
            return
        yield f".. automodule:: {path}\n   :no-members:\n"
        for name in public(importlib.import_module(path)):
            yield directive(f"rewardops.{name}" if name in rewardops.__all__ else f"{path}.{name}")


def is_name(path: str) -> bool:
    """True for a name of the package itself, False for a module."""
    package, _, name = path.rpartition(".")
    return package == "rewardops" and name in rewardops.__all__


def _titled(title: str, line: str, text: str) -> str:
    return f"{title}\n{line * len(title)}\n\n{text}"


def write_pages(app: Sphinx) -> None:
    """Write the pages to ``api/``, whose files git ignores."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    pages = {
        "index": _titled("Reference", "=", ".. toctree::\n\n" + "".join(f"   {name}\n" for name in PAGES))
    }
    for name, (title, paths) in PAGES.items():
        parts = {path: f".. public-names:: {path}\n\n" for path in paths}
        if len(parts) > 1:
            parts |= {path: _titled(path, "-", text) for path, text in parts.items() if not is_name(path)}
        pages[name] = _titled(title, "=", "".join(parts.values()))
    for path in folder.glob("*.rst"):
        if path.stem not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def resolve_short_name(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contents: nodes.TextElement
) -> nodes.reference | None:
    """Resolve a name that is documented on one page only, under the path by which it is imported."""
    if node.get("refdomain") != "py":
        return None
    last = node["reftarget"].rpartition(".")[2]
    found = [
        (name, entry)
        for name, entry in env.get_domain("py").objects.items()  # type: ignore[attr-defined]
        if name.rpartition(".")[2] == last and not entry.aliased
    ]
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contents, name)


class LinkCode(SphinxTransform):
    """Link code to what it names: ``docs/kl.md`` everywhere, names of the package in Markdown pages.

    These are ``token_kl``, ``ro.gae`` and ``rewardops.gae``; a plain ``gae`` may be another project's.
    """

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            target = self.target(literal.astext())
            if target and not isinstance(literal.parent, (nodes.reference, nodes.title)):
                xref = addnodes.pending_xref("", refdoc=self.env.docname, refwarn=True, **target)
                literal.replace_self(xref)
                xref += literal

    def target(self, text: str) -> dict[str, Any] | None:
        name = text.removeprefix("rewardops.").removeprefix("ro.")
        markdown = self.document["source"].endswith(".md")
        if markdown and name in rewardops.__all__ and re.search("[_.A-Z]", text):
            return {"refdomain": "py", "reftype": "obj", "reftarget": f"rewardops.{name}"}
        if page := re.fullmatch(r"docs/([\w/]+)\.md", text):
            return {"refdomain": "std", "reftype": "doc", "reftarget": f"/{page[1]}", "refexplicit": True}
        return None


def drop_generated_text(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Drop what ``collections.namedtuple`` writes for its fields."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def unlink_files(app: Sphinx, folder: Path, text: str) -> str:
    """Links of a Markdown text to files that are no part of the site, as plain text."""

    def kept(link: re.Match[str]) -> str:
        words, target = link.groups()
        path = target.partition("#")[0]
        outside = "://" not in target and path and not (folder / path).resolve().is_relative_to(app.srcdir)
        return words if outside else link[0]

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", kept, text)


def read_source(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = unlink_files(app, (Path(app.srcdir) / page).parent, source[0])


def read_include(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    source[0] = unlink_files(app, (Path(app.srcdir) / path).parent, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("public-names", PublicNames)
    app.add_transform(LinkCode)
    app.connect("builder-inited", write_pages)
    app.connect("source-read", read_source)
    app.connect("include-read", read_include)
    app.connect("autodoc-process-docstring", drop_generated_text)
    app.connect("missing-reference", resolve_short_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
