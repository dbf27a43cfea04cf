"""Files of the endpoint's pages; all come with installed packages, so that the pages work offline."""

from __future__ import annotations

from importlib.resources import files

SWAGGER_JS, SWAGGER_CSS = "swagger-ui-bundle.js", "swagger-ui.css"
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Our page loads nothing from other origins, whatever a model generates; images come as data URLs within a response.
CONTENT_SECURITY_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
SECURITY_HEADERS = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return name -> (content, media type) of the page at / and of Swagger's at /docs."""
    page = files("engine.serve.http").joinpath("page").iterdir()
    swagger = [files("fastapi_offline").joinpath("static", name) for name in (SWAGGER_JS, SWAGGER_CSS)]
    media_types = {file: MEDIA_TYPES.get(file.name.rpartition(".")[2]) for file in [*page, *swagger]}
    return {file.name: (file.read_bytes(), media_type) for file, media_type in media_types.items() if media_type}
