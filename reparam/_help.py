"""The help of commands whose options are pydantic settings, such as `serve` and `train`."""

import re
from argparse import Action, RawDescriptionHelpFormatter
from inspect import cleandoc

# Text appended by pydantic-settings for defaults; the description of the option explains the default better.
_DEFAULT_NOTE = re.compile(r" \(default(: None| factory: \w+)\)$")


class HelpFormatter(RawDescriptionHelpFormatter):
    """Formats the docstring of a command with line breaks kept and indentation removed."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(cleandoc(text), width, indent)

    def _get_help_string(self, action: Action) -> str | None:
        return _DEFAULT_NOTE.sub("", action.help) if action.help else None
