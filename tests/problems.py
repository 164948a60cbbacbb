"""Problem documents in responses."""

from typing import Any

import httpx

from reparam.service.errors import PROBLEMS


def problem(response: httpx.Response, slug: str) -> dict[str, Any]:
    """Check that the response is a proper problem document of this type. Returns the document."""
    document: dict[str, Any] = response.json()
    assert response.headers["Content-Type"] == "application/problem+json"
    assert document["type"] == f"/problems/{slug}", document
    assert document["status"] == response.status_code == PROBLEMS[slug].status
    assert document["instance"] == f"urn:request:{response.headers['X-Request-ID']}"
    assert document["title"]
    return document
