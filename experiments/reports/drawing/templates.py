"""HTML pages from the Jinja templates in pages/.

Autoescape is on: all values from Python, including text of models, are escaped. Only templates, and JSON from
`script_json`, are markup.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

PAGES = Path(__file__).parents[1] / "pages"


def render(template: str, **values: Any) -> Markup:
    """Render the template of this name in pages/. A missing value is an error."""
    return Markup(_environment().get_template(template).render(values))


def script_json(value: Any) -> Markup:
    """JSON that is safe inside a script element, for any strings."""
    return htmlsafe_json_dumps(value, allow_nan=False)


@functools.cache
def _environment() -> Environment:
    # `trim_blocks` and `lstrip_blocks` remove the line of a template tag, so that pages have no blank lines for them.
    return Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
