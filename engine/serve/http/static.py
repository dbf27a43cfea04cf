"""Files that the endpoint's pages are made of; all of them come with installed packages, so that they work offline."""

from __future__ import annotations

from importlib.resources import files

SWAGGER_JS, SWAGGER_CSS = "swagger-ui-bundle.js", "swagger-ui.css"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# A page of ours takes nothing from elsewhere, whatever a model may write into it; images come within an answer.
RULES = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
POLICY = {"Content-Security-Policy": RULES, "X-Content-Type-Options": "nosniff"}


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return name -> (content, media type) of the page at / and of Swagger's at /docs."""
    own = files("engine.serve.http").joinpath("page").iterdir()
    swagger = [files("fastapi_offline").joinpath("static", name) for name in (SWAGGER_JS, SWAGGER_CSS)]
    kinds = {file: TYPES.get(file.name.rpartition(".")[2]) for file in [*own, *swagger]}
    return {file.name: (file.read_bytes(), kind) for file, kind in kinds.items() if kind}
