"""The help of the commands `serve`, `train`, `publish` and their like."""

import re
from argparse import Action, RawDescriptionHelpFormatter
from inspect import cleandoc

# What pydantic-settings adds for a default that the text of the option explains.
_UNTOLD = re.compile(r" \(default(: None| factory: \w+)\)$")


class HelpFormatter(RawDescriptionHelpFormatter):
    """Formats the docstring of a command as it is written, without its indentation."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(cleandoc(text), width, indent)

    def _get_help_string(self, action: Action) -> str | None:
        return _UNTOLD.sub("", action.help) if action.help else None
