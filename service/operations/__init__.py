"""The operations of the service, a module each. A further one is a module, and a line here."""

from reparam.service.operations.operation import Operation
from reparam.service.operations.sample import SAMPLE

OPERATIONS: tuple[Operation, ...] = (SAMPLE,)
