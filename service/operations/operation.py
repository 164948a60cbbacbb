"""An operation: what a client can ask for, from a request to rows. The table of facts is what responses say of them."""

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
    """A value that a response says of its rows: a member of JSON, and a header if `header` names one.

    type: int, float, str or bool.
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

    path: begins with a slash.
    summary, description: for OpenAPI.
    request: model of the JSON body; its schema and its validation.
    response: model of the JSON response; for OpenAPI.
    resolve: maps a request, the repository, and the most rows of a request to the rows asked for. Raises Problem.
    facts: names of the facts that `Work.facts` has, in the order of JSON.
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
        """The path without its slash."""
        return self.path.removeprefix("/")

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """The validator of request bodies."""
        return TypeAdapter(self.request)


def response_model(name: str, facts: tuple[str, ...], outputs: tuple[str, ...], doc: str) -> type[BaseModel]:
    """Make the model of a JSON response from the tables of facts and of outputs. `doc` describes the response."""
    fields: dict[str, Any] = {fact: (FACTS[fact].type, ...) for fact in facts}
    for output in (OUTPUTS[name] for name in outputs):
        fields[output.name] = (output.json_type | None, Field(None, description=output.meaning))
    return create_model(name, __config__=ConfigDict(), __doc__=doc, **fields)
