"""Operations: requests to the service, each a table entry. FACTS is the table of the values that describe rows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model

from reparam.service.artifact.outputs import OUTPUTS
from reparam.service.runtime.graphs import Work
from reparam.service.runtime.repository import Repository


@dataclass(frozen=True)
class Fact:
    """A value in a response that describes the rows, such as the seed.

    name: member of the JSON response.
    type: int, float, str or bool.
    meaning: one sentence, for OpenAPI.
    header: name of the response header with the value; None for no header.
    per_model: the same for all responses of a model version.
    """

    name: str
    type: type
    meaning: str
    header: str | None = None
    per_model: bool = False


FACTS = {
    fact.name: fact
    for fact in (
        Fact("model", str, "The model that answered.", "Model-Name", per_model=True),
        Fact("version", int, "Its version.", "Model-Version", per_model=True),
        Fact("seed", int, "The seed, given or fresh.", "Sample-Seed"),
        Fact("start", int, "The first row.", "Sample-Start"),
        Fact("n", int, "Number of rows."),
        Fact("temperature", float, "Scale of the noise or of the relaxation."),
        Fact("hard", bool, "Whether codes are one-hot at any temperature."),
        Fact("prior", str, "The distribution that rows without parameters are drawn from."),
        Fact("noise_version", int, "Version of the noise contract.", "Noise-Version", per_model=True),
    )
}

Resolve = Callable[[Any, Repository, int], Work]


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation of the service, at `POST path`.

    path: path of the URL, beginning with a slash.
    summary, description: for OpenAPI.
    request: model of the JSON body, for validation and OpenAPI.
    response: model of the JSON response, for OpenAPI.
    resolve: maps a request, the repository, and the limit on a request's rows to the rows to compute. Raises: Problem.
    facts: names of the facts in `Work.facts`, in the order of the JSON response.
    """

    path: str
    summary: str
    description: str
    request: type[BaseModel]
    response: type[BaseModel]
    resolve: Resolve
    facts: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """The path without the slash."""
        return self.path.removeprefix("/")

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """The validator of request bodies."""
        return TypeAdapter(self.request)


def response_model(name: str, facts: tuple[str, ...], outputs: tuple[str, ...], doc: str) -> type[BaseModel]:
    """Make the model of a JSON response from the tables of facts and of outputs.

    name: name of the model, and so of the schema in OpenAPI.
    facts, outputs: names of entries of FACTS and OUTPUTS.
    doc: description of the response.
    """
    fields: dict[str, Any] = {fact: (FACTS[fact].type, ...) for fact in facts}
    for output in (OUTPUTS[name] for name in outputs):
        fields[output.name] = (output.json_type | None, Field(None, description=output.meaning))
    return create_model(name, __config__=ConfigDict(), __doc__=doc, **fields)
