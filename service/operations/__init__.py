"""The operations of the service, a module each. To add an operation, add a module and an entry of OPERATIONS."""

from reparam.service.operations.operation import Operation
from reparam.service.operations.sample import SAMPLE

OPERATIONS: tuple[Operation, ...] = (SAMPLE,)
