"""Render the Jinja templates of HTML pages."""

from importlib import resources

import jinja2
from markupsafe import Markup

__all__ = ["read_template", "render_page"]

_PAGES = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render_page(package: str, template: str, **values: object) -> str:
    """Return an HTML page; strings in it are escaped unless they are `markupsafe.Markup`.

    The variable `base_style` is the style sheet that all pages share, `page.css`: colours for light and dark paper, tables whose first
    column stays in view, plots.

    Args:
        package: the package that holds the template.
        template: the name of its file.
        values: the variables of the template. Each variable that the template uses must be given.

    Raises:
        jinja2.UndefinedError: the template uses a variable that is not given.
    """
    style = Markup(read_template("contralto.common", "page.css"))  # our own file
    return _PAGES.from_string(read_template(package, template)).render(base_style=style, **values)


def read_template(package: str, template: str) -> str:
    """Return the source of a template.

    Args:
        package: the package that holds the template.
        template: the name of its file.
    """
    return resources.files(package).joinpath(template).read_text(encoding="utf-8")
