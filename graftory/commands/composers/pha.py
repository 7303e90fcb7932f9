"""`hub compose pha`."""

from __future__ import annotations

from graftory.commands.composers.hyperformer import generator_command
from graftory.config import PhaConfig

command = generator_command(
    PhaConfig,
    """Train one generator of adapters with prototypes of its tasks (PHA).

    A hyperformer whose embedding of a task is a prototype: a retriever sees of which task a row is, and rows and
    prototypes of one task are pulled together. One more task starts from the prototype that is nearest to its rows,
    and learns its own and a head. Each task is measured on its test rows.

    \b
    Example:
      hub compose pha wheel:trec wheel:sms wheel:disaster --base wheel:minilm --name many
      hub compose pha wheel:rotten-tomatoes --from many@1 --name many --rows 50
      hub eval many --task wheel:trec
    """,
)
